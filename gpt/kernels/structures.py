"""Arguments of the C++ functions: ctypes structures of numbers and pointers, in the order in which the C++ declares
them."""

import ctypes

import torch

Number, Pointer = ctypes.c_int64, ctypes.c_void_p


def numbers(names: str) -> list[tuple[str, type]]:
    """numbers("rows width") -> the fields `int64_t rows, width` of a ctypes.Structure"""
    return [(name, Number) for name in names.split()]


def pointers(names: str) -> list[tuple[str, type]]:
    """pointers("keys values") -> the fields `void *keys, *values` of a ctypes.Structure"""
    return [(name, Pointer) for name in names.split()]


def address(tensor: torch.Tensor | None) -> int | None:
    """Returns the address of a tensor's first element, or None, which is NULL."""
    return None if tensor is None else tensor.data_ptr()
