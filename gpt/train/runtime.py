"""The machine: device, precision, threads, memory, determinism, seeds, signals, which process of a run this is. Nothing
else knows what hardware is used."""

import contextlib
import ctypes
import os
import re
import signal
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from gpt.device import device_name, has_compiler, pick_device, set_precision, set_threads
from gpt.errors import InputError, ResourceError, tell
from gpt.kernels import build
from gpt.kernels.native_attention import NativeAttention
from gpt.kernels.select import attention_is_faster, pick_dtype, training_library
from gpt.model import Ops
from gpt.text.windows import mix
from gpt.train.ranks import ALONE

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
    """C++ for attention in bf16 on a CPU, built once by the system's compiler; auto uses it where a measurement finds
    it faster and it is built, or the run is long enough to wait a second or two for it. It rounds otherwise than torch,
    so a run that is continued goes on as it began"""
    deterministic: bool = False
    """bit-exact repetition on CUDA too, slower there (on CPU it always holds, with the same kernels)"""
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
        kernels_can_run = self.device.type == "cpu" and self.dtype == torch.bfloat16 and build.compiler() is not None
        if config.kernels == "on" and not kernels_can_run:
            raise InputError("kernels on: the C++ attention needs a CPU, bf16 and a C++ compiler; use auto")
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

    def native_attention(self, setting, config, compiled, flops, before=None):
        """Returns Ops with the C++ attention if a run of so many FLOPs is to use it, else None; all ranks agree.
        `config` is the ModelConfig, `before` as in `compiles`. Raises ResourceError where the setting is "on" and the
        library cannot be had."""
        width = config.n_embd // config.n_head
        takes = self.device.type == "cpu" and self.dtype == torch.bfloat16 and not config.dropout and width % 2 == 0
        again = before is not None and before["device"] == device_name(self.device)
        wanted = takes and not compiled and setting != "off"
        if setting == "auto" and again:
            wanted = wanted and before["kernels"]
        library = training_library(wait=setting == "on" or again or flops >= KERNELS_PAY) if wanted else None
        usable = library is not None and (library.gpt_has_threads() or torch.get_num_threads() == 1)
        if usable and setting == "auto" and not again:
            usable = attention_is_faster(library, config.n_head, width, config.block_size, self.dtype)
        if self.ranks.least(int(usable)):
            return Ops(attention=NativeAttention(library))
        if setting == "on":
            raise ResourceError("kernels on: the library could not be built, or the run is compiled; use auto")
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
            "compile": compiled,
            "kernels": kernels,
            "micro_batch_size": micro_batch_size,
            "deterministic": self.deterministic,
            "world_size": self.ranks.size,
        }

    def sharers(self):
        """How many processes of the run share the device's memory."""
        return self.ranks.local_size if self.device.type == "cpu" else 1


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


def keep_freed_memory():
    """Have glibc reuse the memory of large tensors that are gone. It would give it back to the system, which hands out
    new pages one by one, zeroed: up to a fifth of a training step on a CPU."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


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
