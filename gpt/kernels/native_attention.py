"""Causal attention of a training step in bf16 on a CPU, by the native library (causal.cpp)."""

import ctypes

import torch

from gpt.attention import causal_attention

NUMBERS = ("rows", "positions", "heads", "width", "threads")
POINTERS = ("qkv", "out", "logsums", "to_out", "to_qkv")


class Attention(ctypes.Structure):  # as causal.cpp declares it
    _fields_ = [*((name, ctypes.c_int64) for name in NUMBERS), *((name, ctypes.c_void_p) for name in POINTERS)]


class NativeAttention:
    """Computes what attention.causal_attention computes; `library` is a ctypes.CDLL with causal.cpp in it. Other types
    than bf16, dropout and heads of an odd width are left to torch."""

    def __init__(self, library):
        self.library = library
        library.gpt_causal_attention.restype = ctypes.c_int64

    def __call__(self, qkv: torch.Tensor, heads: int, dropout: float = 0.0) -> torch.Tensor:
        width = qkv.shape[-1] // (3 * heads)
        if qkv.dtype != torch.bfloat16 or dropout or width % 2:
            return causal_attention(qkv, heads, dropout)
        return AttentionFunction.apply(qkv.contiguous(), heads, self.run)

    def run(self, qkv, heads, out, logsums, to_out=None, to_qkv=None):
        """Fills `out` and `logsums`, or with the gradient `to_out` fills `to_qkv`. Raises MemoryError."""
        rows, positions, width = out.shape
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in (qkv, out, logsums, to_out, to_qkv)]
        described = Attention(rows, positions, heads, width // heads, torch.get_num_threads(), *pointers)
        if self.library.gpt_causal_attention(ctypes.byref(described)) < 0:
            raise MemoryError(f"attention of {positions} positions")


class AttentionFunction(torch.autograd.Function):
    """Keeps for the backward pass the inputs, the outputs and each query's log-sum-exp (B, H, T) of its scores."""

    @staticmethod
    def forward(ctx, qkv, heads, run):
        out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
        logsums = torch.empty(len(qkv), heads, qkv.shape[1])
        run(qkv, heads, out, logsums)
        ctx.save_for_backward(qkv, out, logsums)
        ctx.heads, ctx.run = heads, run
        return out

    @staticmethod
    def backward(ctx, to_out):
        qkv, out, logsums = ctx.saved_tensors
        to_qkv = torch.empty_like(qkv)
        ctx.run(qkv, ctx.heads, out, logsums, to_out.contiguous(), to_qkv)
        return to_qkv, None, None
