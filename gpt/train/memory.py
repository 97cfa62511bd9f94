"""What a training step needs in memory, estimated before it runs, and the micro-batch that fits."""

import contextlib
import math
from collections.abc import Iterator

import torch

from gpt.device import GIB, free_memory, total_memory
from gpt.errors import InputError, ResourceError
from gpt.model import ModelConfig, count_parameters, hidden_parameters, padded_vocabulary
from gpt.train.budget import Progress

MIB = 1024**2
MUON_BYTES = 18  # of working memory of Muon's step, per weight between embedding and head
USABLE = 0.6  # share of the free memory that a chosen micro-batch may fill
# Tokens of a chosen micro-batch, by kind of device: more gain nothing. On CUDA twice as many would have more than 2^31
# logits of GPT-2's vocabulary, which kernels then address with 64-bit integers.
MOST_TOKENS = {"cpu": 4096, "cuda": 32_768}


def estimate(
    model_config: ModelConfig,
    vocab_size: int,
    micro_batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    optimizer: str = "adamw",
) -> dict[str, int]:
    """Returns the number of bytes of weights (fp32), gradients, optimizer state and activations in training.
    Activations are those of one micro-batch in `dtype` at their peak in the backward pass, or Muon's working memory
    after it, if that is more."""
    parameters = count_parameters(model_config, vocab_size)
    tokens = micro_batch_size * model_config.block_size
    passing = extra_for_backward(model_config, device)
    kept = kept_for_backward(model_config, vocab_size, micro_batch_size, dtype, device)
    hidden = hidden_parameters(model_config) if optimizer == "muon" else 0
    return {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 8 * parameters - 4 * hidden,
        "activations": max(kept + tokens * passing, MUON_BYTES * hidden),
    }


def kept_for_backward(
    config: ModelConfig, vocab_size: int, micro_batch_size: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Returns the number of bytes that the forward pass over a micro-batch keeps for the backward pass."""
    padded = padded_vocabulary(vocab_size)
    c, width = config.n_embd, torch.finfo(dtype).bits // 8
    per_layer = 11 * width * c + 2 * 4 * c  # inputs of products and of GELU; inputs of layer norms, in fp32
    if keeps_scores(config, device):  # q, k, v in fp32, some twice; scores, the mask of dropout, and both multiplied
        per_layer += 4 * 4 * c + 3 * 4 * config.n_head * config.block_size
    else:
        per_layer += 3 * width * c
    if config.dropout:
        per_layer += 2 * c * (1 if device.type == "cuda" else width)  # masks
    per_token = config.n_layer * per_layer + (width + 4) * c + width * padded  # layers, last layer norm, logits
    copies = 0 if dtype == torch.float32 else width * count_parameters(config, vocab_size)  # of weights, by autocast
    return micro_batch_size * config.block_size * per_token + copies


def extra_for_backward(config: ModelConfig, device: torch.device) -> int:
    """Returns the number of bytes per token that the backward pass needs in addition: gradients of one layer's
    attention."""
    return 4 * config.n_head * config.block_size if keeps_scores(config, device) else 0


def keeps_scores(config: ModelConfig, device: torch.device) -> bool:
    """Returns whether attention keeps its T x T matrices: torch's fused kernels support dropout on CUDA only."""
    return config.dropout > 0 and device.type != "cuda"


def check_fits(model_config: ModelConfig, vocab_size: int, device: torch.device, optimizer: str = "adamw") -> None:
    """Raises InputError if weights, gradients and optimizer state alone do not fit on the device. Allocates nothing."""
    needs = sum(estimate(model_config, vocab_size, 0, torch.float32, device, optimizer).values())
    if needs > total_memory(device):
        raise InputError(
            f"a model of n_layer {model_config.n_layer}, n_embd {model_config.n_embd} needs {needs:,} bytes to train: "
            f"{device} has {total_memory(device):,}; choose a smaller model"
        )


def choose_micro_batch(
    model_config: ModelConfig,
    vocab_size: int,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    sharers: int = 1,
    optimizer: str = "adamw",
) -> int:
    """Returns the largest divisor of `batch_size` with which a step fits into USABLE of the free memory, which
    `sharers` processes share; 1 if none does. A micro-batch of several sequences has at most MOST_TOKENS tokens."""
    room = USABLE * free_memory(device) / sharers
    divisors = [n for n in range(batch_size, 0, -1) if batch_size % n == 0]
    for size in divisors:
        too_many = size * model_config.block_size > MOST_TOKENS.get(device.type, math.inf)
        if not too_many and sum(estimate(model_config, vocab_size, size, dtype, device, optimizer).values()) <= room:
            return size
    return 1


@contextlib.contextmanager
def out_of_memory_errors(progress: Progress, block_size: int) -> Iterator[None]:
    """Turns torch's error about GPU memory into a ResourceError that names the sizes."""
    try:
        yield
    except torch.OutOfMemoryError:
        sizes = f"micro_batch_size {progress.micro_batch_size}, block_size {block_size}"
        raise ResourceError(f"out of GPU memory: {sizes}; lower --micro_batch_size") from None


def memory_line(needs: dict[str, int]) -> str:
    """Returns the memory line: "memory: weights 0.5 + gradients 0.5 + optimizer 0.9 + activations 2.1 = 4.0 GiB
    (estimated)", in MiB below 1 GiB."""
    total = sum(needs.values())
    unit, name = (GIB, "GiB") if total >= GIB else (MIB, "MiB")
    parts = " + ".join(f"{part} {size / unit:.1f}" for part, size in needs.items())
    return f"memory: {parts} = {total / unit:.1f} {name} (estimated)"
