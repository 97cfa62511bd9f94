"""GELU of a training step in fp32 on a CPU, by the native library (gelu.cpp)."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from gpt.kernels.structures import address, numbers, pointers
from gpt.model import gelu


class Gelu(ctypes.Structure):
    _fields_ = numbers("count threads") + pointers("x d_out out")


class NativeGelu:
    """Computes in C++ what model.gelu computes. Calls model.gelu for other types than fp32."""

    def __init__(self, library: ctypes.CDLL):
        self.function = library.gpt_gelu
        self.function.restype = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Returns GELU of x in its tanh form."""
        return GeluFunction.apply(x.contiguous(), self.run) if x.dtype == torch.float32 else gelu(x)

    def run(self, x: torch.Tensor, d_out: torch.Tensor | None = None) -> torch.Tensor:
        """Returns GELU of x or, if `d_out` is given, the gradient of x from `d_out`, the gradient of its GELU."""
        out = torch.empty_like(x)
        call = Gelu(x.numel(), torch.get_num_threads(), *map(address, (x, d_out, out)))
        self.function(ctypes.byref(call))
        return out


class GeluFunction(torch.autograd.Function):
    """The autograd function of NativeGelu. Keeps the input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, run: Callable) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.run = run
        return run(x)

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.run(*ctx.saved_tensors, d_out.contiguous()), None
