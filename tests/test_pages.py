"""Tensors side by side in large pages."""

import mmap

import pytest
import torch

from gpt.pages import ALIGNMENT, empty_together, lie_together


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_tensors_lie_together_and_do_not_overlap(dtype):
    shapes = [(3, 5), (1,), (0, 4), (1000, 1001), (2, 2, 2)]
    tensors = empty_together(shapes, dtype)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % ALIGNMENT == 0 or not tensor.numel()
    assert [tuple(tensor.shape) for tensor in tensors] == shapes
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
    assert lie_together(tensors)
    assert not lie_together([tensors[0], torch.zeros(2)])


@pytest.mark.parametrize("missing", ["MADV_HUGEPAGE", "MAP_ANONYMOUS"])
def test_a_system_without_such_pages_gets_plain_tensors(monkeypatch, missing):
    monkeypatch.delattr(mmap, missing)
    first, second = empty_together([(3, 5), (7,)], torch.float32)
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all()
    assert not lie_together([first, second])


def test_a_system_that_refuses_them_gets_plain_tensors(monkeypatch):
    def refuse(*_, **__):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert [tensor.shape for tensor in empty_together([(3, 5), (7,)], torch.int8)] == [(3, 5), (7,)]
