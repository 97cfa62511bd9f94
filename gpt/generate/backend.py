"""The back ends that run the model during generation: plain torch, torch.compile, CUDA graphs and C++. All compute the
same, up to rounding."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from gpt.attention import cached_attention
from gpt.device import has_compiler
from gpt.errors import InputError
from gpt.generate.sampling import choose
from gpt.kernels.select import gpu_ops, native_is_faster, native_is_ready, native_parts
from gpt.model import GPT, REFERENCE, KVCache, Ops, count_parameters

if TYPE_CHECKING:
    from gpt.generate.step import Step

BUILD_PAYS = 4e10  # steps times parameters from which waiting some seconds for the kernels to be built saves time
COMPILE_PAYS = 200_000  # steps from which compiling for a GPU, about a minute, takes less time than it saves
MOST_SHAPES = 64  # shapes for which a process compiles one function: numbers of rows, kinds of settings


class Backend:
    """The back end in plain torch, for any device, and the base class of the others."""

    captures = False  # whether steps are launched as CUDA graphs
    narrow = False  # whether `choose` may leave a row undecided: see sampling.choose

    def __init__(self, model: GPT, ops: Ops = REFERENCE):
        self.model, self.ops, self.choose_ids = model, ops, choose
        # Whether `decode` reads values beyond a row's length, which it multiplies by 0.
        self.reads_beyond = ops.cached_attention is cached_attention

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
        token. Needs no value on the host, so it can be compiled, or captured as a CUDA graph. The next call may
        overwrite the logits."""
        return self.model(ids[:, None], cache=cache, ops=self.ops)

    def choose(self, logits: torch.Tensor, step: Step) -> torch.Tensor:
        """Chooses each row's next id from logits (R, V), which it changes in place. Copies the ids to `step.next`,
        increments `step.turns` and returns the ids (R,), negative where sampling.choose finds none."""
        # Not -inf, which would look like damaged weights.
        logits[:, step.eot].masked_fill_(step.ignores_eot, torch.finfo(torch.float32).min)
        draws = step.draws.gather(1, step.turns[:, None] % step.draws.shape[1])[:, 0]
        ids = self.choose_ids(logits, step.filters, draws, step.seen, step.banned, step.narrow)
        step.turns += 1
        step.next.copy_(ids.clamp(min=0))
        return ids


class Captured(Backend):
    """Plain torch and Triton on a GPU. Steps are launched as CUDA graphs."""

    captures = narrow = True

    def __init__(self, model: GPT):
        super().__init__(model, gpu_ops(model.device))


class Compiled(Backend):
    """Plain torch, compiled by torch.compile; on a GPU, steps are launched as CUDA graphs too. On a CPU `choose` is not
    compiled, because it reads results to decide how much to sort."""

    def __init__(self, model: GPT):
        on_gpu = model.device.type == "cuda"
        super().__init__(model, gpu_ops(model.device) if on_gpu else REFERENCE)
        self.captures = self.narrow = on_gpu
        self.decode = compile_static(self.decode)  # type: ignore[method-assign]
        if on_gpu:
            self.choose_ids = compile_static(choose)


class Native(Backend):
    """C++ on a CPU, for the whole forward pass and for the choice of the next ids."""

    def __init__(self, model: GPT):
        super().__init__(model)
        self.reads_beyond = False
        native_model, sampler = native_parts(model)
        self.prefill, self.decode = native_model.prefill, native_model.decode  # type: ignore[method-assign]
        self.choose = sampler.choose  # type: ignore[method-assign]

    def slots(self, rows: int) -> int:
        return rows


BACKENDS = {"eager": Backend, "captured": Captured, "compiled": Compiled, "native": Native}


def pick_backend(name: str, model: GPT, steps: int, rows: int) -> str:
    """Returns the key in BACKENDS that `name` stands for. "auto" depends on the device, the number of decode `steps`
    and, on a CPU, a short measurement with `rows` rows. Raises InputError for a back end that cannot run here."""
    device = model.device.type
    if name == "auto" and device == "cpu":
        work = steps * count_parameters(model.config, model.vocab_size)
        ready = native_is_ready(model, wait=work >= BUILD_PAYS)
        return "native" if ready and native_is_faster(model, rows) else "eager"
    if name == "auto" and device == "cuda":
        return "compiled" if steps >= COMPILE_PAYS and has_compiler() else "captured"
    if name == "captured" and device != "cuda":
        raise InputError(f"backend captured: CUDA graphs need a CUDA device, the model is on {device}; use auto")
    if name == "native" and not native_is_ready(model, wait=True):
        raise InputError("backend native: needs a CPU, fp32, bf16 or int8 weights and a C++ compiler; use auto")
    return "eager" if name == "auto" else name


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
