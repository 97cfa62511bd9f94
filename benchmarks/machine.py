"""The machine that a benchmark runs on: its defaults, and what its figures depend on."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from project import ROOT
from report import tell


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

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def warn_of_load(machine: dict) -> None:
    """Prints a warning if other programs were running when `machine` was described."""
    if machine["load"] > 0.5:
        tell(f"warning: load average {machine['load']:.1f}, other work is running; times will be uneven")


def processor_name() -> str:
    """Returns the CPU's model name; on systems without /proc/cpuinfo, what Python's platform module reports."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str:
    """Returns the hash of the commit that is checked out; "" without git or outside a repository."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
