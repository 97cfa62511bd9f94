"""Weights in 8 bits: every matrix of the model, the head included, as int8 with one scale per output. Where the CPU has
the instructions, the product in C++ rounds its inputs to 8 bits too: see gpt/kernels/products.h.

Shapes: N outputs, K inputs, C n_embd, V vocabulary (padded)."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt.loss import IGNORED, losses_of_logits

LARGEST = 127  # without -128 a row and its negative become the same numbers, apart from the sign
CHUNK = 4096  # rows quantized at once, to keep the fp32 copies small


class Int8Linear(nn.Module):
    """A linear layer whose weight (N, K) is `weight`, int8, times `scale` (N,)."""

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
    """The embedding and head (V, C), one scale per token."""

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
    """Returns x (..., K) times weight (N, K), int8, times scale (N,): (..., N) in x's dtype."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        rows = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), weight, scale.to(x.dtype))
        return rows.view(*x.shape[:-1], -1)
    # The power of two keeps sums within float16 and changes no digit.
    return F.linear(x, weight.to(x.dtype) / 128) * (scale * 128).to(x.dtype)


@torch.no_grad()
def int8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns weight (N, K) as int8 (N, K) and float32 scales (N,): int8 * scale is off by at most half a scale."""
    scale = torch.cat([part.abs().amax(1).float() for part in weight.split(CHUNK)]) / LARGEST
    divisor = scale.where(scale > 0, 1.0)[:, None]
    parts = zip(weight.split(CHUNK), divisor.split(CHUNK), strict=True)
    return torch.cat([(part.float() / divisors).round().to(torch.int8) for part, divisors in parts]), scale


@torch.no_grad()
def to_int8(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Replaces the matrices of a GPT, in place, by their int8 form, and returns it. Layer norms, biases and positions,
    and what is computed, become `dtype`, if given."""
    dtype = dtype or model.dtype
    for block in model.blocks:
        block.attn.qkv, block.attn.proj = Int8Linear(block.attn.qkv), Int8Linear(block.attn.proj)
        block.mlp.fc, block.mlp.proj = Int8Linear(block.mlp.fc), Int8Linear(block.mlp.proj)
    model.token = Int8Embedding(model.token.weight, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
