"""Measures time and peak memory of the program that runs in this process, on a CPU or on CUDA."""

import contextlib
import ctypes
import re
import sys
import time
from pathlib import Path


class Clock:
    """Measures seconds from its creation: on CUDA between two events on the device, else by the host's clock."""

    def __init__(self, device: str):
        self.first_event = self.record_event() if device == "cuda" else None
        self.start = time.perf_counter()

    def record_event(self):
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Returns the seconds since the creation. On CUDA it waits until the device has done all work so far."""
        if self.first_event is None:
            return time.perf_counter() - self.start
        last_event = self.record_event()
        last_event.synchronize()
        return self.first_event.elapsed_time(last_event) / 1000


def release(device: str) -> None:
    """Gives unused memory back to the device or the system, for the other programs."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak(device: str) -> None:
    """Makes `peak_memory` count from now on."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """Returns the most bytes in use since `reset_peak`: torch's allocations on CUDA, else the resident memory of this
    process; 0 on systems without /proc."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return 1024 * int(match[1]) if match else 0
    return 0
