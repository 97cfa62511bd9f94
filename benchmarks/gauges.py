"""Clock and memory of a program that is measured, on a CPU or on CUDA."""

import contextlib
import ctypes
import re
import sys
import time
from pathlib import Path


class Clock:
    """Seconds since it was made: on CUDA those of the device, between two events."""

    def __init__(self, device):
        self.started = self.event() if device == "cuda" else None
        self.start = time.perf_counter()

    def event(self):
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self):
        if self.started is None:
            return time.perf_counter() - self.start
        ended = self.event()
        ended.synchronize()
        return self.started.elapsed_time(ended) / 1000


def release(device):
    """Give memory that is not in use back, for the other programs."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak(device):
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Most bytes in use since `reset_peak`: torch's own on CUDA, else the resident ones of this process; 0 where the
    system does not tell."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return 1024 * int(found[1]) if found else 0
    return 0
