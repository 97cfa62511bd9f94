"""The end of a step by the native library (choose.cpp): what Backend.choose does, for logits on a CPU."""

import ctypes
import weakref

import torch

NUMBERS = ("rows", "vocabulary", "stride", "banned_count", "draws_ahead", "eot", "threads")
POINTERS = (
    *("logits", "temperature", "min_p", "penalty", "top_k", "top_p", "banned", "draws", "seen"),
    *("ids", "turns", "next", "ignores_eot"),
)


class Choice(ctypes.Structure):  # as choose.cpp declares it
    _fields_ = [*((name, ctypes.c_int64) for name in NUMBERS), *((name, ctypes.c_void_p) for name in POINTERS)]


class NativeSampler:
    """Computes what sampling.choose and Backend.choose compute; `library` is a ctypes.CDLL with choose.cpp in it."""

    def __init__(self, library):
        self.run = library.gpt_choose
        self.run.argtypes, self.run.restype = [ctypes.c_void_p], None
        self.prepared = weakref.WeakKeyDictionary()  # Step -> (what a call was made for, the call)

    def choose_ids(self, logits, filters, draws, seen=None, banned=None, narrow=False):  # `narrow`: it always decides
        """As sampling.choose."""
        assert len(draws) == len(filters.temperature) == len(logits)
        if logits.stride(1) != 1 or logits.dtype != torch.float32:
            logits = logits.float().contiguous()
        return self.call(logits, filters, draws[:, None], seen, banned)()

    def choose(self, logits: torch.Tensor, step) -> torch.Tensor:
        """As Backend.choose. The library's description of a Step's tensors is made once."""
        made_for = logits.data_ptr(), step.seen is None, step.filters.penalizes
        before, call = self.prepared.get(step, (None, None))
        if before != made_for:
            end = {"turns": step.turns, "next": step.next, "ignores_eot": step.ignores_eot}
            call = self.call(logits, step.filters, step.draws, step.seen, step.banned, step.eot, **end)
            self.prepared[step] = made_for, call
        return call()

    def call(self, logits, filters, draws, seen, banned, eot=0, **end):
        """Returns a function that chooses ids (R,) from what the tensors hold when it is called. draws (R, N)."""
        ids = torch.empty(len(logits), dtype=torch.int64)
        seen = seen.contiguous() if filters.penalizes else None
        tensors = {"logits": logits, "draws": draws.contiguous(), "seen": seen, "banned": banned, "ids": ids, **end}
        tensors |= {name: getattr(filters, name) for name in ("temperature", "min_p", "penalty", "top_k", "top_p")}
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}
        counts = *logits.shape, logits.stride(0), 0 if banned is None else len(banned), draws.shape[1], eot
        choice = Choice(*counts, torch.get_num_threads(), **pointers)
        choice.kept = tensors  # which the library reads
        described = ctypes.byref(choice)

        def run():
            self.run(described)
            return ids.clone()

        return run
