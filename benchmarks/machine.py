"""The machine that a benchmark runs on: its defaults, what its figures depend on, and a limit to its instructions."""

import os
import platform
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

from project import ROOT
from report import tell

CPUINFO = Path("/proc/cpuinfo")
INSTRUCTION_SETS = {  # those that matter for speed, by their names in /proc/cpuinfo
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512F",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX int8",
    "amx_bf16": "AMX bf16",
    "asimd": "NEON",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "SVE",
}
AVX2_LIMITS = {  # environment variables: torch, MKL, oneDNN, CTranslate2, OpenVINO
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "CT2_FORCE_CPU_ISA": "AVX2",
    "OV_CPU_MAX_ISA": "AVX2",
}


def default_threads() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def default_device() -> str:
    """Returns "cuda" if torch finds a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def describe_machine(device: str) -> dict:
    """Returns the hardware, the versions and the commit that measured figures depend on."""
    import torch

    device = default_device() if device == "auto" else device
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "processor": processor_name(),
        "instruction_sets": instruction_sets(),
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def open_record(settings: Namespace, device: str, **figures) -> dict:
    """Returns the record of a benchmark: the machine, the settings, and `figures`, still empty. Prints the machine, and
    a warning if other programs are running."""
    machine = describe_machine(device)
    print(headline(machine), flush=True)
    if machine["load"] > 0.5:
        tell(f"warning: load average {machine['load']:.1f}, other work is running; times will be uneven")
    return {"machine": machine, "settings": vars(settings), **figures}


def headline(machine: dict) -> str:
    """Returns the description of a machine in one line."""
    processor = f"{machine['processor']}, {machine['cores']} cores: {', '.join(machine['instruction_sets'])}"
    versions = f"torch {machine['torch']} ({machine['torch_uses']}), Python {machine['python']}"
    return "; ".join([*[machine["device"]] * (machine["device"] != "cpu"), processor, versions, machine["commit"][:10]])


def processor_name() -> str:
    """Returns the CPU's model name; without one in /proc/cpuinfo, what Python's platform module reports."""
    return cpu_line("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Returns which of INSTRUCTION_SETS the CPU has; [] on systems without /proc/cpuinfo."""
    flags = (cpu_line("flags") or cpu_line("Features")).split()
    return [name for flag, name in INSTRUCTION_SETS.items() if flag in flags]


def cpu_line(name: str) -> str:
    """Returns the value of the first line `name` in /proc/cpuinfo; "" if there is none."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def hold_to_avx2(work: Path) -> None:
    """Lets this program and those that it starts use AVX2 at most. Our kernels are compiled anew, in the folder
    `work`/avx2, which also keeps what is measured about their speed. llama.cpp has no such setting but its build."""
    compile_for("x86-64-v3", work / "avx2")
    os.environ.update(AVX2_LIMITS)


def compile_for(march: str, folder: Path) -> None:
    """Lets this program and those that it starts compile our kernels with `-march=<march>`, into `folder`."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    compiler = folder / "c++"  # a script, because torch.compile takes no words in CXX; the last -march counts
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -march={march} -mtune=native\n')
    compiler.chmod(0o755)
    os.environ.update(CXX=str(compiler), XDG_CACHE_HOME=str(folder))


def commit() -> str:
    """Returns the hash of the commit that is checked out; "" without git or outside a repository."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
