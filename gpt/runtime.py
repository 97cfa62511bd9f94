"""The machine: device, precision, threads, memory, determinism, seeds, signals, which process of a run this is. Nothing
else knows what hardware is used."""

import contextlib
import ctypes
import os
import platform
import re
import shutil
import signal
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from gpt.data import mix
from gpt.errors import InputError, ResourceError, note, tell
from gpt.fp8 import CAPABILITY
from gpt.kernels import build
from gpt.ranks import ALONE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Dense bf16/fp16 tensor-core peaks in FLOP/s, by words of the device's name. Source: NVIDIA's data sheets.
GPU_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
EAGER_SHARE = 0.25  # of that peak, what an uncompiled step reaches
COMPILING_SECONDS, COMPILING_SAVES = 60, 0.3  # how long it takes; the least share of a step that it saves
KERNELS_PAY = 1e12  # FLOPs of a run, ten seconds or so of a CPU, from which it pays to wait until kernels are built
# Of one layer's passes over a micro-batch, uncompiled: about 15 forward and 30 backward; what the host takes for each.
LAUNCHES, LAUNCH_SECONDS = 45, 5e-6
LAUNCHES_MATTER = 0.25  # of the time of the products, from which a step is captured: it gains, or it loses nothing
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class MachineConfig:
    device: str = "auto"
    """auto (CUDA, else Apple's MPS, else CPU), cpu, cuda, cuda:1, mps"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """precision of the products; auto is bf16 where it is native, fp16 on older GPUs, else fp32. Saved weights are
    fp32"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto is on for CUDA runs long enough to pay for it, off elsewhere"""
    kernels: Literal["auto", "on", "off"] = "auto"
    """own C++ for attention, GELU and loss on a CPU, compiled once by the system's compiler; auto is on where that is
    done, or the run long enough to wait a second or two for it, and the run is not torch.compile's. It rounds otherwise
    than torch: a run that is continued goes on as it began"""
    deterministic: bool = False
    """bit-exact repetition on CUDA too, slower there (on CPU it always holds, with the same kernels)"""
    fp8_head: bool = False
    """logits of training from 8-bit numbers, on GPUs from compute capability 8.9 (Ada, Hopper)"""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch"""

    def problems(self):
        """What is wrong with these values, in words; empty if nothing."""
        found = [f"threads {self.threads} must be 0 or more"] if self.threads < 0 else []
        if self.kernels == self.compile == "on":
            found.append("kernels on and compile on exclude each other: the compiler makes its own")
        return found


def launched():
    """(rank, number of ranks, rank and number of ranks on this machine) that torchrun gave this process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not all(name in os.environ for name in names):
        return 0, 1, 0, 1
    return tuple(int(os.environ[name]) for name in names)


class Runtime:
    """Device, precision and determinism of one training process, set up once; and the `ranks` that it is one of."""

    def __init__(self, config, ranks=ALONE):
        self.ranks = ranks
        self.device = own_device(pick_device(config.device), ranks)
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # for kernels and streams that are not told a device
        self.dtype = pick_dtype(config.dtype, self.device)
        self.fp8_head = config.fp8_head
        if self.fp8_head:
            check_fp8(self.device, self.dtype)
        if config.kernels == "on" and (self.device.type != "cpu" or build.compiler() is None):
            raise InputError("kernels on: they need a CPU and a C++ compiler; use auto")
        self.deterministic = config.deterministic or self.device.type == "cpu"
        if self.device.type == "cpu":
            keep_freed_memory()
        set_threads(config.threads)
        set_precision(self.dtype)
        if self.deterministic:
            be_deterministic()

    def autocast(self, enabled=True):
        """Context in which matrix products run in this precision while weights stay fp32. What it cast is kept until
        the outermost one ends; one within it, not `enabled`, is for the backward pass."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def ready(self, array):
        """An int64 array as a tensor on the device; a copy to a GPU waits its turn there, and nobody waits for it."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def fetch(self, tensor):
        """A function that gives `tensor` as lists. On a GPU it waits for it alone, not for what is launched later."""
        if self.device.type != "cuda":
            return tensor.tolist
        host, done = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True), torch.cuda.Event()
        host.copy_(tensor, non_blocking=True)
        done.record()

        def wait():
            done.synchronize()
            return host.tolist()

        return wait

    def compiles(self, setting, flops, before=None):
        """Whether to compile a run of so many FLOPs on this device. Left to choose, one that is continued goes on as it
        was: `before` is its record of the machine."""
        if setting != "auto":
            return setting == "on"
        if before is not None and before["device"] == device_name(self.device):
            return before["compile"]
        return self.device.type == "cuda" and has_compiler() and compiling_pays(flops, self.device)

    def kernels(self, setting, compiled, flops, before=None):
        """The library of C++ kernels if a run of so many FLOPs is to use them on this device, else None; all ranks do,
        or none. `before` as in `compiles`. Raises ResourceError where the setting is "on" and they cannot be had."""
        wanted = self.device.type == "cpu" and not compiled and setting != "off"
        again = before is not None and before["device"] == device_name(self.device)
        if setting == "auto" and again:
            wanted = wanted and before.get("kernels", False)
        if wanted and self.ranks.local_rank == 0:
            build_kernels(wait=setting == "on" or again or flops >= KERNELS_PAY)
        self.ranks.least(0)  # here all wait until they are built
        library = build.load_library(build.TRAINING) if wanted else None
        usable = library is not None and (library.gpt_has_threads() or torch.get_num_threads() == 1)
        if self.ranks.least(int(usable)):
            return library
        if setting == "on":
            path = build.library_path(build.TRAINING)
            raise ResourceError(f"kernels on: {path} is not there or without OpenMP, or the run is compiled; use auto")
        return None

    def captures(self, flops, layers):
        """Whether to capture steps as a CUDA graph whose micro-batch takes so many FLOPs in so many layers, and that
        is not compiled. (It changes no bit, and needs no record.)"""
        return self.device.type == "cuda" and self.ranks.size == 1 and launches_matter(flops, layers, self.device)

    def record(self, compiled, kernels, micro_batch_size):
        """What must agree for a run to repeat to the bit."""
        return {
            "torch": torch.__version__,
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "precision": str(self.dtype).removeprefix("torch."),
            "fp8_head": self.fp8_head,
            "compile": compiled,
            "kernels": kernels,
            "micro_batch_size": micro_batch_size,
            "deterministic": self.deterministic,
            "world_size": self.ranks.size,
        }

    def sharers(self):
        """How many processes of the run share the device's memory."""
        return self.ranks.local_size if self.device.type == "cpu" else 1


def build_kernels(wait):
    """Builds the C++ of training if it is missing: now, or in the background for later runs."""
    if wait:
        build.build_now(build.TRAINING)
    elif build.load_library(build.TRAINING) is None and build.start_background_build(build.TRAINING):
        note("info", "C++ kernels are being built in the background, for later runs; this one uses torch")


def pick_device(name):
    """The torch.device of a name. Raises InputError for one that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        warn_about_cpu_torch()
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r}: not a device name; use auto, cpu, cuda, cuda:1 or mps") from None
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise InputError(f"device {name}: this torch ({torch.__version__}) finds none; use --device auto")
    return device


def own_device(device, ranks):
    """The device of this process: of GPUs, each process on a machine has its own. Raises InputError if it has none."""
    if ranks.size == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise InputError(f"device {device}: {ranks.size} processes cannot share it; use --device cuda or cpu")
    if ranks.local_size > torch.cuda.device_count():
        raise InputError(
            f"device cuda: {ranks.local_size} processes on this machine, {torch.cuda.device_count()} GPUs; "
            "start one for each"
        )
    return torch.device("cuda", ranks.local_rank)


def warn_about_cpu_torch():
    if torch.version.cuda is None and os.path.exists("/proc/driver/nvidia/version"):
        note("warning", f"an NVIDIA driver is here, but torch {torch.__version__} is a CPU build; see README, Install")


def pick_dtype(name, device):
    """The torch.dtype of a precision name on `device`."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if capability >= (8, 0) else torch.float16 if capability >= (7, 0) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


def check_fp8(device, dtype):
    """Raise InputError for a device without products of 8-bit floating point, or another precision than bf16."""
    if device.type == "mps" or (device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY):
        raise InputError(f"fp8_head: {device_name(device)} has no 8-bit floating point; leave it off")
    if dtype != torch.bfloat16:
        raise InputError(f"fp8_head: needs bf16, the precision is {str(dtype).removeprefix('torch.')}; leave it off")


def cpu_has_bf16():
    """Whether the CPU multiplies bf16 natively (AMX or AVX512-BF16)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities:
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def set_threads(threads):
    if threads:
        torch.set_num_threads(threads)


def keep_freed_memory():
    """Have glibc reuse the memory of large tensors that are gone. It would give it back to the system, which hands out
    new pages one by one, zeroed: up to a fifth of a training step on a CPU."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def set_precision(dtype):
    """fp32 means fp32: TF32 is only for runs whose products are in a shorter type anyway."""
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")


def be_deterministic():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when CUDA starts
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms would import the compiler: a second
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would write NaN over every new tensor first


def compiling_pays(flops, device):
    """Whether a run of so many FLOPs on a GPU saves more time than compiling takes. One that is held up by launches of
    small kernels gains more than is counted here. (On a CPU a step of GPT-2 124M gains nothing.)"""
    return COMPILING_SAVES * flops / eager_speed(device) > COMPILING_SECONDS


def launches_matter(flops, layers, device):
    """Whether the host takes a good part of the time to launch a micro-batch's kernels in which the GPU computes its
    FLOPs: then the GPU waits for it."""
    return layers * LAUNCHES * LAUNCH_SECONDS > LAUNCHES_MATTER * flops / eager_speed(device)


def eager_speed(device):
    """FLOP/s of an uncompiled step on a GPU; an A100's where its peak is not known."""
    return EAGER_SHARE * (gpu_peak(torch.cuda.get_device_name(device)) or GPU_PEAKS["A100"])


def has_compiler():
    """Returns whether torch.compile and Triton find the C compiler that both need, by Triton's rules."""
    if platform.system() == "Windows":
        return False
    return bool(os.environ.get("CC")) or any(map(shutil.which, ("gcc", "clang")))


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


def seed_step(seed, step, rank=0):
    """Set all of torch's generators from (seed, step, rank), so that no generator state need ever be saved."""
    torch.manual_seed(int(mix(seed, step, rank)[0] >> np.uint64(1)))


def peak_flops(device, dtype):
    """FLOP/s that the device can reach in this precision: a table for GPUs, measured for others; 0.0 if unknown."""
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device)) if dtype != torch.float32 else 0.0
    return measured_flops(device, dtype) if device.type == "cpu" else 0.0


def gpu_peak(name):
    """FLOP/s of the GPU that torch calls `name`; 0.0 if unknown. Other chips bear some of these names with an addition:
    "RTX 4090 Laptop GPU"."""
    found = (peak for part, peak in GPU_PEAKS.items() if re.search(rf"\b{part}\b(?! (?:Ti|D|Laptop)\b)", name))
    return next(found, 0.0)


def measured_flops(device, dtype, too_long=0.05):
    """Best of a few square matrix products; takes a tenth of a second or so. They grow, and end with one that takes
    `too_long` seconds: a type that the CPU only emulates is a hundred times slower than another."""
    best = 0.0
    for size in (128, 256, 512, 1024, 1024, 1024, 1024):
        a = torch.ones(size, size, dtype=dtype, device=device)
        start = time.perf_counter()
        a @ a
        seconds = time.perf_counter() - start
        best = max(best, 2 * size**3 / seconds)
        if seconds > too_long:
            break
    return best


class StopFlag:
    """Set by the first SIGTERM or Ctrl-C; the loop reads it between steps. A second Ctrl-C interrupts at once."""

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self.previous = {s: signal.signal(s, self.handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, _frame):
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __bool__(self):
        return self.signal is not None


def profiler(trace_path):
    """A context whose `step()` counts training steps: a torch profiler of steps 4 to 6 that writes a Chrome trace and
    prints where the time went; without a path, one that does nothing."""
    if trace_path is None:
        return NoProfile()

    def report(profile):
        profile.export_chrome_trace(str(trace_path))
        tell(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))

    schedule = torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=report)


class NoProfile(contextlib.nullcontext):
    def __enter__(self):
        return self

    def step(self):
        """Nothing is profiled."""
