"""Causal attention of a training step in bf16 on a CPU, by the native library (attention.cpp).

Shapes: B batch rows, T positions, H heads, C = H times the width of a head."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from gpt.attention import causal_attention
from gpt.kernels.structures import Number, address, numbers, pointers


class Attention(ctypes.Structure):
    _fields_ = numbers("rows positions heads width threads") + pointers("qkv out log_sums d_out d_qkv")


class NativeAttention:
    """Computes in C++ what attention.causal_attention computes. Calls causal_attention for other types than bf16, for
    dropout and for heads of an odd width."""

    def __init__(self, library: ctypes.CDLL):
        self.library, self.function = library, library.gpt_causal_attention
        self.function.restype = Number

    def __call__(self, qkv: torch.Tensor, heads: int, dropout: float = 0.0) -> torch.Tensor:
        """Returns the attention (B, T, C) of qkv (B, T, 3 C): see attention.causal_attention."""
        width = qkv.shape[-1] // (3 * heads)
        if qkv.dtype != torch.bfloat16 or dropout or width % 2:
            return causal_attention(qkv, heads, dropout)
        return AttentionFunction.apply(qkv.contiguous(), heads, self.run)

    def run(
        self,
        qkv: torch.Tensor,
        heads: int,
        out: torch.Tensor,
        log_sums: torch.Tensor,
        d_out: torch.Tensor | None = None,
        d_qkv: torch.Tensor | None = None,
    ) -> None:
        """Computes `out` (B, T, C) and `log_sums` (B, H, T), the log-sum-exp of each query's scores, in place. If
        `d_out` (B, T, C), the gradient of `out`, is given, computes instead the gradient `d_qkv` (B, T, 3 C) from all
        of these. Raises MemoryError if memory does not suffice."""
        rows, positions, width = out.shape
        sizes = rows, positions, heads, width // heads, torch.get_num_threads()
        call = Attention(*sizes, *map(address, (qkv, out, log_sums, d_out, d_qkv)))
        if self.function(ctypes.byref(call)) < 0:
            raise MemoryError(f"attention of {positions} positions")


class AttentionFunction(torch.autograd.Function):
    """The autograd function of NativeAttention. Keeps the inputs, the outputs and the log-sum-exp of each query's
    scores for the backward pass."""

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, heads: int, run: Callable) -> torch.Tensor:
        out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
        log_sums = torch.empty(len(qkv), heads, qkv.shape[1])
        run(qkv, heads, out, log_sums)
        ctx.save_for_backward(qkv, out, log_sums)
        ctx.heads, ctx.run = heads, run
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        qkv, out, log_sums = ctx.saved_tensors
        d_qkv = torch.empty_like(qkv)
        ctx.run(qkv, ctx.heads, out, log_sums, d_out.contiguous(), d_qkv)
        return d_qkv, None, None
