"""What a training step needs in memory, estimated before it runs, and the micro-batch that fits."""

import math
import os

import torch

from gpt.errors import InputError

GIB = 1024**3
MIB = 1024**2
USABLE = 0.6  # share of the free memory that a chosen micro-batch may fill
MOST_CPU_TOKENS = 16384  # per micro-batch on a CPU: more gains nothing


def estimate(model_config, vocab_size, micro_batch_size, dtype):
    """Bytes of {"weights", "gradients", "optimizer", "activations"} in training: fp32 weights and AdamW, activations of
    one micro-batch in `dtype`, dropout not counted."""
    c, tokens = model_config.n_embd, micro_batch_size * model_config.block_size
    parameters = vocab_size * c + model_config.block_size * c + model_config.n_layer * 12 * c * c
    width = torch.finfo(dtype).bits // 8
    per_layer = 14 * width * c + 2 * 4 * c  # products' inputs; the residual stream stays fp32
    head = vocab_size * (width + 3 * 4)  # logits, their fp32 copy, log-softmax and gradient
    return {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 8 * parameters,
        "activations": tokens * (model_config.n_layer * per_layer + head),
    }


def free_memory(device):
    """Bytes that can still be taken on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return available_memory() or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8 * GIB


def available_memory():
    """Linux's own estimate, page cache that can be dropped included; 0 elsewhere."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 0


def total_memory(device):
    """Bytes that `device` has, or infinity where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def check_fits(model_config, vocab_size, device):
    """Raise InputError if the device has not even room for weights, gradients and optimizer; before any of it is
    made."""
    needs = sum(estimate(model_config, vocab_size, 0, torch.float32).values())
    if needs > total_memory(device):
        raise InputError(
            f"a model of n_layer {model_config.n_layer}, n_embd {model_config.n_embd} needs {needs:,} bytes to train: "
            f"{device} has {total_memory(device):,}; choose a smaller model"
        )


def choose_micro_batch(model_config, vocab_size, global_batch_size, dtype, device):
    """The largest divisor of the global batch whose step fits into the free memory."""
    room = USABLE * free_memory(device)
    divisors = [n for n in range(global_batch_size, 0, -1) if global_batch_size % n == 0]
    for size in divisors:
        too_many = device.type == "cpu" and size * model_config.block_size > MOST_CPU_TOKENS
        if not too_many and sum(estimate(model_config, vocab_size, size, dtype).values()) <= room:
            return size
    return 1


def describe(needs):
    """The memory line: "memory: weights 0.5 + gradients 0.5 + optimizer 0.9 + activations 2.1 = 4.0 GiB (estimated)",
    in MiB below 1 GiB."""
    total = sum(needs.values())
    unit, name = (GIB, "GiB") if total >= GIB else (MIB, "MiB")
    parts = " + ".join(f"{part} {size / unit:.1f}" for part, size in needs.items())
    return f"memory: {parts} = {total / unit:.1f} {name} (estimated)"
