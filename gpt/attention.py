"""Causal attention over whole sequences, in training and prefill.

Shapes: B batch rows, H heads, T positions, D width of a head."""

import math

import torch
import torch.nn.functional as F

IN_CACHE = 1 << 20  # scores in float32 at a time
LONGEST_KEPT = 512  # positions; beyond them the weights take more memory than their speed is worth


def causal_attention(q, k, v, dropout=0.0):
    """Attention of each position to itself and those before it: q, k, v (B, H, T, D) -> (B, H, T, D). On CUDA torch
    knows the fastest fused kernel that is safe: cuDNN's on Hopper and its successor from cuDNN 9.15.1 on (earlier ones
    read beyond sequences), FlashAttention elsewhere and where results must repeat to the bit."""
    if keeps_weights(q.shape[-2], q.dtype, q.device, dropout) and q.requires_grad:
        return KeptWeights.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


def keeps_weights(length, dtype, device, dropout):
    """Whether training keeps attention's weights (B, H, T, T): in bf16 on a CPU, forward and backward pass together
    then take half the time of torch's fused kernel, which makes them anew."""
    return device.type == "cpu" and dtype == torch.bfloat16 and not dropout and length <= LONGEST_KEPT


class KeptWeights(torch.autograd.Function):
    """Attention as plain products. As in the fused kernels scores are in float32: rounded to bf16, large ones would
    make the gradient's error three times as large."""

    @staticmethod
    def forward(ctx, q, k, v):
        hidden = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)  # what comes later
        weights = q.new_empty(*q.shape[:-1], q.shape[-2])
        rows = max(1, IN_CACHE // weights[0].numel())
        with torch.autocast(q.device.type, enabled=False):
            for some, keys, found in zip(q.split(rows), k.split(rows), weights.split(rows), strict=True):
                scores = (some.float() * q.shape[-1] ** -0.5) @ keys.float().mT
                found.copy_(scores.masked_fill_(hidden, -math.inf).softmax(-1))
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    def backward(ctx, upstream):
        q, k, v, weights = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        to_scores = torch.ops.aten._softmax_backward_data(upstream @ v.mT, weights, -1, weights.dtype)
        return (to_scores @ k) * scale, to_scores.mT @ (q * scale), weights.mT @ upstream
