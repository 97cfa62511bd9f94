"""Arguments of the C++ functions: ctypes structures of numbers and pointers, in the order in which the C++ declares
them."""

import ctypes

import torch

Number, Pointer = ctypes.c_int64, ctypes.c_void_p


def numbers(names: str) -> list[tuple[str, type]]:
    """Returns fields of a ctypes.Structure: numbers("rows width") for `int64_t rows, width`."""
    return [(name, Number) for name in names.split()]


def pointers(names: str) -> list[tuple[str, type]]:
    """Returns fields of a ctypes.Structure: pointers("keys values") for `void *keys, *values`."""
    return [(name, Pointer) for name in names.split()]


def address(tensor: torch.Tensor | None) -> int | None:
    """Returns the address of a tensor's first element; None stays None, which is NULL in C++."""
    return None if tensor is None else tensor.data_ptr()
