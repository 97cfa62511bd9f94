"""A training step's work besides matrix products, by the native library: causal attention, GELU, losses of logits. Each
means what its twin in plain torch does, and leaves to it what it does not take."""

import ctypes

import torch

from gpt.attention import causal_attention
from gpt.loss import losses_of
from gpt.model import gelu

KINDS = (torch.float32, torch.bfloat16)


# ---- as causal.cpp and training.cpp declare them


def structure(name, numbers, pointers):
    fields = [*((field, ctypes.c_int64) for field in numbers), *((field, ctypes.c_void_p) for field in pointers)]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


Attention = structure(
    "Attention",
    ("rows", "positions", "heads", "width", "threads"),
    ("qkv", "out", "logsums", "to_out", "to_qkv"),
)
Gelu = structure("Gelu", ("count", "is_half", "threads"), ("x", "upstream", "out"))
Losses = structure(
    "Losses",
    ("rows", "vocabulary", "padded", "is_half", "gradient", "threads"),
    ("logits", "targets", "losses"),
)


# ---- in the place of plain torch


class TrainingKernels:
    """`library` is a ctypes.CDLL with causal.cpp and training.cpp in it."""

    def __init__(self, library):
        self.library = library
        library.gpt_causal_attention.restype = ctypes.c_int64

    def install(self, model):
        """Let a GPT on the CPU use them."""
        model.token.losses_of = self.losses_of
        for block in model.blocks:
            block.attn.attend, block.mlp.gelu = self.causal_attention, self.gelu

    def causal_attention(self, qkv, heads, dropout=0.0):
        """As attention.causal_attention: by the library in bf16 without dropout, for heads of an even width."""
        width = qkv.shape[-1] // (3 * heads)
        if qkv.dtype != torch.bfloat16 or dropout or width % 2:
            return causal_attention(qkv, heads, dropout)
        return NativeAttention.apply(qkv.contiguous(), heads, self.run_attention)

    def gelu(self, x):
        """As model.gelu."""
        return NativeGelu.apply(x.contiguous(), self.run_gelu) if x.dtype in KINDS else gelu(x)

    def losses_of(self, logits, targets, vocab_size, gradient):
        """As loss.losses_of. Raises IndexError for a target that does not exist."""
        if logits.dtype not in KINDS or not logits.is_contiguous():
            return losses_of(logits, targets, vocab_size, gradient)
        assert targets.dtype == torch.int64 and len(targets) == len(logits)
        least, most = targets.aminmax()
        if least < 0 or most >= vocab_size:
            raise IndexError(f"targets from {least} to {most}, vocabulary {vocab_size}")
        losses, targets, is_half = torch.empty(len(logits)), targets.contiguous(), logits.dtype == torch.bfloat16
        pointers = pointers_of(logits, targets, losses)
        described = Losses(len(logits), vocab_size, logits.shape[1], is_half, gradient, threads(), *pointers)
        self.library.gpt_losses(ctypes.byref(described))
        return losses

    def run_attention(self, qkv, heads, out, logsums, to_out=None, to_qkv=None):
        rows, positions, width = out.shape
        pointers = pointers_of(qkv, out, logsums, to_out, to_qkv)
        described = Attention(rows, positions, heads, width // heads, threads(), *pointers)
        if self.library.gpt_causal_attention(ctypes.byref(described)) < 0:
            raise MemoryError(f"attention of {positions} positions")

    def run_gelu(self, x, upstream=None):
        out = torch.empty_like(x)
        described = Gelu(x.numel(), x.dtype == torch.bfloat16, threads(), *pointers_of(x, upstream, out))
        self.library.gpt_gelu(ctypes.byref(described))
        return out


class NativeAttention(torch.autograd.Function):
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


class NativeGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, run):
        ctx.save_for_backward(x)
        ctx.run = run
        return run(x)

    @staticmethod
    def backward(ctx, upstream):
        return ctx.run(*ctx.saved_tensors, upstream.contiguous()), None


def pointers_of(*tensors):
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def threads():
    return torch.get_num_threads()
