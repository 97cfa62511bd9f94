"""Weights in 8 bits: every matrix of the model, the head included, as int8 with one scale per output. The product
in C++ rounds its inputs to 8 bits too: see gpt/kernels/weights.h.

Shapes: N outputs, K inputs, C n_embd, V vocabulary (padded)."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt.loss import IGNORED, losses_of_logits
from gpt.model import GPT

LARGEST = 127  # -128 is not used, so that a row and its negative get the same numbers with opposite signs
CHUNK = 4096  # rows quantized at once, to keep the fp32 copies small


class Int8Linear(nn.Module):
    """A linear layer whose weight is the int8 matrix `weight` (N, K) times `scale` (N,), one scale per output."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = int8_rows(linear.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., K) -> (..., N)
        return int8_product(x, self.weight, self.scale) + self.bias


class Int8Embedding(nn.Module):
    """The embedding, which is also the head: int8 (V, C), with one scale per token. `dtype` is the type of its
    embeddings."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, table: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        weight, scale = int8_rows(table)
        self.dtype = dtype
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # (...) -> (..., C)
        return (self.weight[ids] * self.scale[ids][..., None]).to(self.dtype)

    def logits(self, x: torch.Tensor) -> torch.Tensor:  # (..., C) -> (..., V)
        return int8_product(x, self.weight, self.scale)

    def losses(self, x: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:  # (N, C), (N,) -> (N,)
        counted = targets != IGNORED
        return losses_of_logits(self.logits(x), targets.where(counted, 0), vocab_size) * counted


def int8_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns the product (..., N) of x (..., K) and the weight: int8 `weight` (N, K) times `scale` (N,). The result
    has the dtype of x."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        rows = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), weight, scale.to(x.dtype))
        return rows.view(*x.shape[:-1], -1)
    # Dividing by 128 keeps sums in the range of float16, and rounds nothing: it is a power of two.
    return F.linear(x, weight.to(x.dtype) / 128) * (scale * 128).to(x.dtype)


@torch.no_grad()
def int8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns weight (N, K) as int8 (N, K) and float32 scales (N,). The int8 numbers times the scale differ from the
    weight by at most half a scale."""
    scale = torch.cat([part.abs().amax(1).float() for part in weight.split(CHUNK)]) / LARGEST
    divisor = scale.where(scale > 0, 1.0)[:, None]
    parts = zip(weight.split(CHUNK), divisor.split(CHUNK), strict=True)
    return torch.cat([(part.float() / divisors).round().to(torch.int8) for part, divisors in parts]), scale


@torch.no_grad()
def to_int8(model: GPT, dtype: torch.dtype | None = None) -> GPT:
    """Replaces the matrices of a GPT by int8 ones, in place, and returns the GPT. Layer norms, biases, positions and
    activations become `dtype` (None: stay as they are)."""
    dtype = dtype or model.dtype
    blocks: Any = model.blocks
    for block in blocks:
        block.attn.qkv, block.attn.proj = Int8Linear(block.attn.qkv), Int8Linear(block.attn.proj)
        block.mlp.fc, block.mlp.proj = Int8Linear(block.mlp.fc), Int8Linear(block.mlp.proj)
    model.token = Int8Embedding(model.token.weight, dtype)  # type: ignore[assignment]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
