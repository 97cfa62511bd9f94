"""The hardware: devices, precisions, threads, compilers, memory."""

import contextlib
import functools
import math
import mmap
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from gpt.errors import InputError, note

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILERS = {"cpu": "C++", "cuda": "C"}  # kind of device -> language of the compiler that torch.compile calls for it
GIB = 1024**3
NO_MEMORY = "out of memory|can't allocate memory|not enough memory"  # torch's words, on GPUs and on CPUs
HUGE_PAGE = 2 << 20  # bytes
ALIGNMENT = 64  # bytes
OWN_GROUPS = Path("/proc/self/cgroup")  # Linux control groups limit the memory of a container or a batch job
GROUP_ROOT = Path("/sys/fs/cgroup")
# Controller in OWN_GROUPS -> folder below GROUP_ROOT, files with a group's limit and usage. "" is version 2 of groups.
GROUP_FILES = {
    "": ("", "memory.max", "memory.current"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def pick_device(name: str) -> torch.device:
    """Returns the torch.device called `name`; "auto" is CUDA, else Apple's MPS, else the CPU. Raises InputError if
    `name` is not the name of a device or this machine lacks the device."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        warn_about_cpu_torch()
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r}: not a device name; use auto, cpu, cuda, cuda:1 or mps") from None
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # it may count GPUs that cannot be used
    counts = {"cpu": 1, "cuda": gpus, "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= counts.get(device.type, 0):
        raise InputError(f"device {name}: this torch ({torch.__version__}) finds none; use --device auto")
    return device


def warn_about_cpu_torch() -> None:
    """Prints a warning if an NVIDIA driver is installed but this torch is built for CPUs only."""
    if torch.version.cuda is None and os.path.exists("/proc/driver/nvidia/version"):
        note("warning", f"an NVIDIA driver is here, but torch {torch.__version__} is a CPU build; see README, Install")


def device_name(device: torch.device) -> str:
    """Returns the GPU's name, or the kind of device and processor, such as "cpu x86_64"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


def has_compiler() -> bool:
    """Returns whether torch.compile and Triton find the C compiler that both need, by Triton's rules."""
    if platform.system() == "Windows":
        return False
    return bool(os.environ.get("CC")) or any(map(shutil.which, ("gcc", "clang")))


def can_compile(device: torch.device) -> bool:
    """Returns whether torch.compile finds, by its rules, the compiler that it needs for `device`: C++ for a CPU, C for
    Triton on a GPU."""
    if device.type == "cpu":
        usual = {"Windows": "cl", "Darwin": "clang++"}.get(platform.system(), "g++")
        return bool(shutil.which(os.environ.get("CXX", usual)))
    return device.type != "cuda" or has_compiler()


def set_precision(dtype: torch.dtype) -> None:
    """Allows TF32 in matrix products, unless `dtype` is float32: then they keep full float32 precision."""
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")


def set_threads(threads: int) -> None:
    """Sets the number of CPU threads that torch uses; 0 leaves it unchanged."""
    if threads:
        torch.set_num_threads(threads)


@functools.cache  # registers once
def use_one_thread_after_fork() -> None:
    """Makes every process that is forked from this one use one thread of torch: after a fork, the threads that computed
    here are missing there, and GNU's OpenMP would wait for them for ever."""
    if hasattr(os, "register_at_fork"):  # Windows has no fork
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


# ---- copies


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a host tensor on `device`. The copy to a GPU is asynchronous."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def upload(tensor: torch.Tensor, values: np.ndarray) -> None:
    """Copies `values` to `tensor`. The copy to a GPU is asynchronous; `values` may change meanwhile."""
    host = torch.from_numpy(values)
    tensor.copy_(host.pin_memory() if tensor.device.type == "cuda" else host, non_blocking=True)


def pinned_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy of a GPU tensor in pinned host memory. The copy is asynchronous: wait for the stream before
    reading it."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


# ---- memory


def free_memory(device: torch.device) -> int:
    """Returns the number of bytes that this process can still allocate on `device`."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min([available_memory(), *(limit - used for limit, used in group_limits())])


def available_memory() -> int:
    """Returns the number of bytes that Linux estimates to be available, droppable page cache included; 8 GiB on other
    systems."""
    try:
        kib = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:
        kib = None
    return int(kib[1]) * 1024 if kib else 8 * GIB


def total_memory(device: torch.device) -> float:
    """Returns the number of bytes that this process may use in all on `device`; infinity if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    totals: list[float] = [limit for limit, _ in group_limits()]
    with contextlib.suppress(AttributeError, ValueError):  # Windows has no sysconf
        totals.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(totals, default=math.inf)


def group_limits() -> list[tuple[int, int]]:
    """Returns (limit, usage) in bytes for each control group that contains this process and has a limit. The usage
    excludes page cache that can be dropped."""
    limits = []
    for folder, limit, used in control_groups():
        try:
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cache = int(stat.get("total_inactive_file", stat["inactive_file"]))
            limits.append((int((folder / limit).read_text()), int((folder / used).read_text()) - cache))
        except (OSError, KeyError, ValueError):  # unreadable, or without a limit: "max"
            continue
    return limits


def control_groups() -> Iterator[tuple[Path, str, str]]:
    """Yields (folder, name of the file with the limit, name of the file with the usage) for each memory group of this
    process, from its own group up to the root."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in GROUP_FILES:
            top, limit, used = GROUP_FILES[controllers]
            root = GROUP_ROOT / top
            own = root / path.lstrip("/")
            yield from ((folder, limit, used) for folder in (own, *own.parents) if folder.is_relative_to(root))


# ---- large pages


def empty_together(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor] | None:
    """Returns uninitialized CPU tensors of these shapes, in one block of memory with pages of 2 MiB: reading matrices
    from such pages takes a third less time. The block is freed with the last tensor. Returns None if the system has no
    such pages or too little memory."""
    shapes = list(shapes)
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    aligned_sizes = [math.ceil(size / ALIGNMENT) * ALIGNMENT for size in sizes]
    try:
        memory = mmap.mmap(-1, sum(aligned_sizes) + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except (OSError, AttributeError):  # no memory, or a kernel without such pages; a system without the flags
        return None
    block = torch.frombuffer(memory, dtype=torch.uint8)
    start, tensors = -block.data_ptr() % HUGE_PAGE, []
    for shape, size, aligned_size in zip(shapes, sizes, aligned_sizes, strict=True):
        tensors.append(block[start : start + size].view(dtype).view(shape))
        start += aligned_size
    return tensors


def lie_together(tensors: list[torch.Tensor]) -> bool:
    """Returns whether `tensors` share one block of memory, as the tensors of `empty_together` do."""
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that the memory of the device, or of the host, is used up."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(NO_MEMORY, str(error)) is not None
    )
