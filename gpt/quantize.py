"""Weights in 8 bits: every matrix of the model, the head included, as int8 with one scale per output. The native
product of gpt/kernels rounds its inputs to 8 bits too, where the CPU has the instructions: Int8 in products.h.

Shapes: N outputs, K inputs, C n_embd, V vocabulary (padded)."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt.loss import IGNORED, losses_of_logits

LARGEST = 127  # -128 is left out, so that a row and its negative are quantized alike
CHUNK = 4096  # rows quantized at once: the fp32 copies between stay small


class Int8Linear(nn.Module):
    """A linear layer whose weight (N, K) is `weight` int8 times `scale` (N,)."""

    def __init__(self, linear):
        super().__init__()
        weight, scale = int8_rows(linear.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):  # (..., K) -> (..., N)
        return int8_product(x, self.weight, self.scale) + self.bias


class Int8Embedding(nn.Module):
    """The embedding and head (V, C), one scale per token."""

    def __init__(self, embedding, dtype):
        super().__init__()
        weight, scale = int8_rows(embedding.weight)
        self.dtype = dtype
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids):  # (...) -> (..., C)
        return (self.weight[ids] * self.scale[ids][..., None]).to(self.dtype)

    def logits(self, x):  # (..., C) -> (..., V)
        return int8_product(x, self.weight, self.scale)

    def losses(self, x, targets, vocab_size):  # (N, C), (N,) -> (N,)
        counted = targets != IGNORED
        return losses_of_logits(self.logits(x), targets.where(counted, 0), vocab_size) * counted


def int8_product(x, weight, scale):
    """x (..., K) times weight (N, K) int8 times scale (N,) -> (..., N), in x's dtype."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        rows = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), weight, scale.to(x.dtype))
        return rows.view(*x.shape[:-1], -1)
    # The power of two keeps sums within float16 and changes no digit.
    return F.linear(x, weight.to(x.dtype) / 128) * (scale * 128).to(x.dtype)


@torch.no_grad()
def int8_rows(weight):
    """weight (N, K) -> int8 (N, K) and float32 scales (N,), weight ~ int8 * scale, off by at most half a scale."""
    scale = torch.cat([part.abs().amax(1).float() for part in weight.split(CHUNK)]) / LARGEST
    divisor = scale.where(scale > 0, 1.0)[:, None]
    parts = zip(weight.split(CHUNK), divisor.split(CHUNK), strict=True)
    return torch.cat([(part.float() / each).round().to(torch.int8) for part, each in parts]), scale


@torch.no_grad()
def to_int8(model, dtype=None):
    """Replace the matrices of `model`, in place, by their int8 form; layer norms, biases and positions, and what is
    computed, become `dtype`, if given."""
    dtype = dtype or model.dtype
    for block in model.blocks:
        block.attn.qkv, block.attn.proj = Int8Linear(block.attn.qkv), Int8Linear(block.attn.proj)
        block.mlp.fc, block.mlp.proj = Int8Linear(block.mlp.fc), Int8Linear(block.mlp.proj)
    model.token = Int8Embedding(model.token, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
