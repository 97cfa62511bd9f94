"""The choice of the next ids on a CPU, by the native library (sampler.cpp).

Shapes: R rows, V vocabulary, N draws made ahead."""

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import torch

from gpt.kernels.structures import Pointer, address, numbers, pointers

Choose = Callable[[], torch.Tensor]  # chooses ids (R,)


class Choice(ctypes.Structure):
    _fields_ = [
        *numbers("rows vocabulary stride banned_count draws_ahead eot threads"),
        *pointers("logits temperature min_p penalty top_k top_p banned draws seen ids turns next ignores_eot"),
    ]


class NativeSampler:
    """Computes in C++ what Step.choose of gpt.generate computes in torch; leaves no row undecided. gpt.kernels does not
    import gpt.generate, so its types are Any here: `filters` is a sampling.Filters, `step` a step.Step."""

    def __init__(self, library: ctypes.CDLL):
        self.function = library.gpt_choose
        self.function.argtypes, self.function.restype = [Pointer], None
        self.calls: weakref.WeakKeyDictionary[Any, tuple[tuple, Choose]] = weakref.WeakKeyDictionary()  # by Step

    def choose(self, logits: torch.Tensor, step: Any) -> torch.Tensor:
        """See Step.choose. The tensors of a Step keep their addresses, so they are described to the library only
        once."""
        key, described = (logits.data_ptr(), step.seen is None, step.filters.penalizes), self.calls.get(step)
        if described is None or described[0] != key:
            changed = {"turns": step.turns, "next": step.next, "ignores_eot": step.ignores_eot}
            call = self.call(logits, step.filters, step.draws, step.seen, step.banned, step.eot, **changed)
            described = self.calls[step] = key, call
        return described[1]()

    def call(
        self,
        logits: torch.Tensor,
        filters: Any,
        draws: torch.Tensor,
        seen: torch.Tensor | None,
        banned: torch.Tensor | None,
        eot: int = 0,
        **changed: torch.Tensor,
    ) -> Choose:
        """Returns a function that chooses ids (R,) by what the tensors hold when it is called. `draws` is (R, N)."""
        ids = torch.empty(len(logits), dtype=torch.int64)
        seen = seen.contiguous() if seen is not None and filters.penalizes else None
        tensors = {"logits": logits, "draws": draws.contiguous(), "seen": seen, "banned": banned, "ids": ids, **changed}
        tensors |= {name: getattr(filters, name) for name in ("temperature", "min_p", "penalty", "top_k", "top_p")}
        sizes = *logits.shape, logits.stride(0), 0 if banned is None else len(banned), draws.shape[1], eot
        addresses = {name: address(tensor) for name, tensor in tensors.items()}
        choice = Choice(*sizes, torch.get_num_threads(), **addresses)
        choice.tensors = tensors  # keeps the tensors: the library reads their memory

        def run() -> torch.Tensor:
            self.function(ctypes.byref(choice))
            return ids.clone()

        return run
