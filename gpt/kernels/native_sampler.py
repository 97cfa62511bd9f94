"""The choice of the next ids on a CPU, by the native library (sampler.cpp).

Shapes: R rows, V vocabulary, N draws made ahead."""

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import torch

from gpt.kernels.structures import Pointer, address, numbers, pointers


class Choice(ctypes.Structure):
    _fields_ = [
        *numbers("rows vocabulary stride banned_count draws_ahead eot threads"),
        *pointers("logits temperature min_p penalty top_k top_p banned draws seen ids turns next ignores_eot"),
    ]


class NativeSampler:
    """Computes in C++ what sampling.choose and Backend.choose of gpt.generate compute in torch. gpt.kernels does not
    import gpt.generate, so its types are Any here: `filters` is a sampling.Filters, `step` a step.Step."""

    def __init__(self, library: ctypes.CDLL):
        self.function = library.gpt_choose
        self.function.argtypes, self.function.restype = [Pointer], None
        self.calls: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # Step -> key, call

    def choose_ids(
        self,
        logits: torch.Tensor,
        filters: Any,
        draws: torch.Tensor,
        seen: torch.Tensor | None = None,
        banned: torch.Tensor | None = None,
        narrow: bool = False,
    ) -> torch.Tensor:
        """Returns what sampling.choose returns; `narrow` has no effect, so no row is UNDECIDED."""
        assert len(draws) == len(filters.temperature) == len(logits)
        if logits.stride(1) != 1 or logits.dtype != torch.float32:
            logits = logits.float().contiguous()
        return self.call(logits, filters, draws[:, None], seen, banned)()

    def choose(self, logits: torch.Tensor, step: Any) -> torch.Tensor:
        """See Backend.choose. The tensors of a Step keep their addresses, so they are described to the library only
        once."""
        key = logits.data_ptr(), step.seen is None, step.filters.penalizes
        before, call = self.calls.get(step, (None, None))
        if before != key:
            changed = {"turns": step.turns, "next": step.next, "ignores_eot": step.ignores_eot}
            call = self.call(logits, step.filters, step.draws, step.seen, step.banned, step.eot, **changed)
            self.calls[step] = key, call
        return call()

    def call(
        self,
        logits: torch.Tensor,
        filters: Any,
        draws: torch.Tensor,
        seen: torch.Tensor | None,
        banned: torch.Tensor | None,
        eot: int = 0,
        **changed: torch.Tensor,
    ) -> Callable[[], torch.Tensor]:
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
