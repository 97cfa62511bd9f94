"""The C++ version of gpt.sampling.choose, for logits on a CPU."""

import ctypes

import torch

POINTER, WHOLE = ctypes.c_void_p, ctypes.c_int64
ARGUMENTS = [POINTER, WHOLE, WHOLE, WHOLE, *[POINTER] * 6, WHOLE, POINTER, WHOLE, POINTER, POINTER, ctypes.c_int]


def native_choose(library):
    """A function that does what gpt.sampling.choose does; `library` is a ctypes.CDLL with choose.cpp in it."""
    compiled = library.gpt_choose
    compiled.argtypes, compiled.restype = ARGUMENTS, None

    def choose(logits, filters, draws, seen=None, banned=None, narrow=False):  # `narrow` is void: it always decides
        rows, vocabulary = logits.shape
        assert len(draws) == len(filters.temperature) == rows
        if logits.stride(1) != 1 or logits.dtype != torch.float32:
            logits = logits.float().contiguous()
        seen = seen.contiguous() if filters.penalizes else None
        draws = draws.contiguous()
        ids = torch.empty(rows, dtype=torch.int64)
        settings = (filters.temperature, filters.top_k, filters.top_p, filters.min_p, filters.penalty)
        compiled(
            logits.data_ptr(),
            *(rows, vocabulary, logits.stride(0)),
            *(tensor.data_ptr() for tensor in settings),
            *((None, 0) if seen is None else (seen.data_ptr(), vocabulary)),
            *((None, 0) if banned is None else (banned.data_ptr(), len(banned))),
            *(draws.data_ptr(), ids.data_ptr(), torch.get_num_threads()),
        )
        return ids

    return choose
