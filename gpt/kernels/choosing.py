"""The C++ version of gpt.sampling.choose, and of the end of a step with it (Rows.take), for logits on a CPU."""

import ctypes
import weakref

import torch

NUMBERS = ("rows", "vocabulary", "stride", "banned_count", "draws_ahead", "eot", "threads")
POINTERS = (
    *("logits", "temperature", "min_p", "penalty", "top_k", "top_p", "banned", "draws", "seen"),
    *("ids", "turns", "next", "goes_on"),
)


class Choice(ctypes.Structure):  # as choose.cpp declares it
    _fields_ = [*((name, ctypes.c_int64) for name in NUMBERS), *((name, ctypes.c_void_p) for name in POINTERS)]


class NativeChoice:
    """gpt.sampling.choose and Rows.take; `library` is a ctypes.CDLL with choose.cpp in it."""

    def __init__(self, library):
        self.run = library.gpt_choose
        self.run.argtypes, self.run.restype = [ctypes.c_void_p], None
        self.prepared = weakref.WeakKeyDictionary()  # Rows -> what a call was made for, the call

    def choose(self, logits, filters, draws, seen=None, banned=None, narrow=False):  # `narrow`: it always decides
        assert len(draws) == len(filters.temperature) == len(logits)
        if logits.stride(1) != 1 or logits.dtype != torch.float32:
            logits = logits.float().contiguous()
        return self.call(logits, filters, draws[:, None], seen, banned)()

    def take(self, rows, logits):
        """As Rows.take; the tensors of `rows` are described once."""
        made_for = logits.data_ptr(), rows.seen is None, rows.filters.penalizes
        before, call = self.prepared.get(rows, (None, None))
        if before != made_for:
            end = {"turns": rows.turns, "next": rows.next, "goes_on": rows.goes_on}
            call = self.call(logits, rows.filters, rows.draws, rows.seen, rows.banned, rows.eot, **end)
            self.prepared[rows] = made_for, call
        return call()

    def call(self, logits, filters, draws, seen, banned, eot=0, **end):
        """A function that chooses from what the tensors then hold: ids (R,). draws (R, N)."""
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
