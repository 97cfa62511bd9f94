"""The back ends that run the model during generation: plain torch, torch.compile, CUDA graphs and C++. All compute the
same, up to rounding."""

import contextlib
import ctypes
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from gpt.attention import cached_attention
from gpt.device import COMPILERS, can_compile
from gpt.errors import InputError
from gpt.generate.sampling import penalize
from gpt.kernels.measure_decode import native_is_faster, shape_of
from gpt.kernels.native_model import NativeModel, supports
from gpt.kernels.native_sampler import NativeSampler
from gpt.kernels.select import decode_library, gpu_decode, gpu_ops, triton_sampler
from gpt.model import GPT, REFERENCE, KVCache, Ops

MOST_SHAPES = 64  # shapes, such as numbers of rows, for which a process compiles one function


class Backend:
    """The back end in plain torch, for any device, and the base class of the others."""

    captures = False  # whether steps are launched as CUDA graphs
    choose_step: Callable[[torch.Tensor, Any], torch.Tensor] | None = None
    """(logits, Step) -> ids, in place of sampling.choose"""
    draws_ahead = True
    """whether steps read random numbers from Step.draws; otherwise `choose_step` is the Triton sampler, which converts
    the logits to float32 and makes the random numbers from Step.streams"""

    def __init__(self, model: GPT, ops: Ops = REFERENCE):
        self.model, self.ops = model, ops
        # Whether `decode` reads values beyond a row's length, which it multiplies by 0.
        self.reads_beyond = ops.cached_attention is cached_attention

    @property
    def narrow(self) -> bool:
        """Whether sampling.choose looks at few candidates and may leave a row undecided: where steps cannot wait for
        the result."""
        return self.captures and self.choose_step is None

    def slots(self, rows: int) -> int:
        """Returns the number of row slots for `rows` texts side by side. Above 4 it is a multiple of 4: a CPU's matrix
        products in fp32 round differently in the 5th to 7th row than in the others, so a text would depend on its
        slot."""
        return rows if rows <= 4 else math.ceil(rows / 4) * 4

    def prefill(self, ids: torch.Tensor, cache: KVCache) -> None:
        """Appends the keys and values of ids (1, T) to a cache of one row."""
        with no_cudnn_attention(self.model.device):
            self.model.hidden(ids, cache, self.ops)

    def decode(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Appends the keys and values of ids (R,), one id per row, to the cache; returns the logits (R, V) of the next
        token, in float32 or in the model's precision. Needs no value on the host, so it can be compiled, or
        captured as a CUDA graph. The next call may overwrite the logits."""
        # Not self.model(): training may have compiled that.
        return self.model.forward(ids[:, None], cache=cache, ops=self.ops)


class Captured(Backend):
    """Plain torch and Triton on a GPU. Steps are launched as CUDA graphs."""

    captures = True

    def __init__(self, model: GPT):
        super().__init__(model, gpu_ops(model.device))
        self.decode = gpu_decode(model) or self.decode  # type: ignore[method-assign, assignment]
        self.choose_step = fused_choice(model)
        self.draws_ahead = self.choose_step is None


class Compiled(Backend):
    """Plain torch, compiled by torch.compile; on a GPU, steps are launched as CUDA graphs too. sampling.choose is not
    compiled: on a CPU it reads results to decide how much to sort, and for a GPU torch before 2.13 cannot compile it
    for several rows and a large vocabulary."""

    def __init__(self, model: GPT):
        on_gpu = model.device.type == "cuda"
        super().__init__(model, gpu_ops(model.device) if on_gpu else REFERENCE)
        self.captures = on_gpu
        self.decode = compile_static(self.decode)  # type: ignore[method-assign]
        if on_gpu:
            self.choose_step = fused_choice(model)
            self.draws_ahead = self.choose_step is None


class Native(Backend):
    """C++ on a CPU, for the whole forward pass and for the choice of the next ids."""

    def __init__(self, model: GPT):
        super().__init__(model)
        self.reads_beyond = False
        library = native_library("native", model)
        assert library is not None
        native_model = NativeModel(model, library)
        self.prefill, self.decode = native_model.prefill, native_model.decode  # type: ignore[method-assign]
        self.choose_step = NativeSampler(library).choose

    def slots(self, rows: int) -> int:
        return rows


BACKENDS = {"eager": Backend, "captured": Captured, "compiled": Compiled, "native": Native}


def pick_backend(name: str, model: GPT, steps: int, rows: int) -> str:
    """Returns the key in BACKENDS that `name` stands for. "auto" depends on the device, the number of decode `steps`
    and, on a CPU, a short measurement with `rows` rows. Raises InputError for a back end that cannot run here."""
    device = model.device.type
    if name == "auto" and device == "cpu":
        library = native_library(name, model, steps)
        return "native" if library is not None and native_is_faster(shape_of(model), rows, library) else "eager"
    if name == "auto" and device == "cuda":
        return "captured"
    if name == "compiled" and not can_compile(model.device):
        raise InputError(f"backend compiled: no {COMPILERS[device]} compiler found; install one or use --backend auto")
    if name == "captured" and device != "cuda":
        raise InputError(f"backend captured: CUDA graphs need a CUDA device, the model is on {device}; use auto")
    if name == "native" and native_library(name, model) is None:
        raise InputError("backend native: needs a CPU, fp32, bf16, fp16 or int8 weights and a C++ compiler; use auto")
    return "eager" if name == "auto" else name


def native_library(backend: str, model: GPT, steps: int = 0) -> ctypes.CDLL | None:
    """Returns the C++ library, or None if it cannot run this model: see decode_library."""
    return decode_library(backend, steps, model.config, model.vocab_size) if supports(model) else None


def fused_choice(model: GPT) -> Callable[[torch.Tensor, Any], torch.Tensor] | None:
    """Returns a `choose_step` that launches the Triton sampler; None if it cannot be used."""
    choose_next = triton_sampler(model.device, model.dtype, model.vocab_size, len(model.token.weight))
    if choose_next is None:
        return None

    def choose_step(logits: torch.Tensor, step: Any) -> torch.Tensor:
        filters = step.filters
        if filters.penalizes:
            damaged = ~logits.isfinite()  # the penalty makes infinite logits finite
            logits = penalize(logits, step.seen, filters.penalty[:, None]).masked_fill(damaged, math.nan)
        rows = step.streams, step.turns, step.next, step.ignores_eot
        return choose_next(logits, filters, *rows, step.eot, step.ban_mask)

    return choose_step


def compile_static(function: Callable) -> Callable:
    """Returns `function`, compiled anew for each combination of argument shapes. A call raises an error if there would
    be more than MOST_SHAPES of them: otherwise torch would go on uncompiled, at a tenth of the speed, with a warning at
    most."""
    compiled = torch.compile(function, dynamic=False, fullgraph=True)

    def call(*arguments: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES, fail_on_recompile_limit_hit=True):
            return compiled(*arguments)

    return call


def no_cudnn_attention(device: torch.device) -> AbstractContextManager:
    """Returns a context in which torch does not use cuDNN's attention, which takes up to a second to plan each new
    length."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
