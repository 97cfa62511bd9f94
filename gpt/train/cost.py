"""Estimates from FLOPs whether it saves time to compile a run, to capture its steps, or to wait for C++ kernels.

constant            what it decides                              where it comes from
EAGER_SHARE         speed of an uncompiled step on a GPU         nanoGPT's published eager speed; not measured here
COMPILING_SECONDS   the time that torch.compile takes            6 to 48 s on two CPU cores; for a GPU an estimate
COMPILING_SAVES     the least share of a step that it saves      nanoGPT's published speeds, compiled and not
KERNELS_PAY         whether a run waits until kernels are built  1.3 s of building, 10 s of training on a CPU
LAUNCHES            kernels of one layer of an uncompiled step   counted in a profile: 15 forward, 30 backward
LAUNCH_SECONDS      the host's time to launch one kernel         an estimate for PyTorch without compilation
LAUNCHES_MATTER     from which share of the time to capture      an estimate: then a capture gains, or loses nothing
"""

import re
import time

import torch

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
EAGER_SHARE = 0.25  # share of the peak
COMPILING_SECONDS = 60
COMPILING_SAVES = 0.3
KERNELS_PAY = 1e12  # FLOPs of a run
LAUNCHES = 45
LAUNCH_SECONDS = 5e-6
LAUNCHES_MATTER = 0.25  # of the time of the matrix products


def compiling_pays(flops: float, device: torch.device) -> bool:
    """Returns whether compiling a run of `flops` FLOPs on a GPU saves more time than it takes. (On a CPU, compiling
    gains nothing for a step of GPT-2 124M.)"""
    return COMPILING_SAVES * flops / eager_speed(device) > COMPILING_SECONDS


def launches_matter(flops: float, layers: int, device: torch.device) -> bool:
    """Returns whether the GPU waits for the host to launch the kernels of a micro-batch of `flops` FLOPs in `layers`
    layers."""
    return layers * LAUNCHES * LAUNCH_SECONDS > LAUNCHES_MATTER * flops / eager_speed(device)


def eager_speed(device: torch.device) -> float:
    """Returns the FLOP/s of an uncompiled step on a GPU, EAGER_SHARE of its peak. A GPU of unknown peak counts as an
    A100."""
    return EAGER_SHARE * (gpu_peak(torch.cuda.get_device_name(device)) or GPU_PEAKS["A100"])


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the highest FLOP/s of the device in this precision: from GPU_PEAKS for GPUs, measured for CPUs; 0.0 if
    unknown."""
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device)) if dtype != torch.float32 else 0.0
    return measured_flops(device, dtype) if device.type == "cpu" else 0.0


def gpu_peak(name: str) -> float:
    """Returns the dense bf16/fp16 peak, in FLOP/s, of the GPU that torch calls `name`; 0.0 if GPU_PEAKS lacks it. The
    Ti, D and Laptop variants of a GPU in the table count as unknown."""
    peaks = (peak for part, peak in GPU_PEAKS.items() if re.search(rf"\b{part}\b(?! (?:Ti|D|Laptop)\b)", name))
    return next(peaks, 0.0)


def measured_flops(device: torch.device, dtype: torch.dtype, too_long: float = 0.4) -> float:
    """Returns the FLOP/s of the fastest of a few square matrix products; takes about a tenth of a second. The matrices
    grow until the next product would take more than `too_long` seconds: a type that the CPU only emulates is a hundred
    times slower than another. The smallest product is repeated, because another program may hold it up."""
    best = 0.0
    for size, times in ((128, 3), (256, 1), (512, 1), (1024, 4)):
        flops = 2 * size**3
        if best and flops / best > too_long:
            break
        a = torch.ones(size, size, dtype=dtype, device=device)
        for _ in range(times):
            start = time.perf_counter()
            a @ a
            best = max(best, flops / (time.perf_counter() - start))
    return best
