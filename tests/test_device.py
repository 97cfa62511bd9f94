"""Tensors side by side in large pages."""

import mmap

import pytest
import torch

from gpt.device import ALIGNMENT, empty_together, lie_together
from gpt.kernels.native_model import move_together


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
def test_a_system_without_such_pages_gets_none(monkeypatch, missing):
    monkeypatch.delattr(mmap, missing)
    assert empty_together([(3, 5), (7,)], torch.float32) is None


def test_a_system_that_refuses_them_gets_none(monkeypatch):
    def refuse(*_, **__):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert empty_together([(3, 5), (7,)], torch.int8) is None


def test_without_them_the_native_model_leaves_weights_where_they_are(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    tensors = [torch.ones(3, 5), torch.ones(7)]
    places = [tensor.data_ptr() for tensor in tensors]
    move_together(tensors)
    assert [tensor.data_ptr() for tensor in tensors] == places


def test_moved_tensors_keep_their_values_and_are_not_moved_twice():
    tensors = [torch.randn(300, 5), torch.randn(7)]
    before = [tensor.clone() for tensor in tensors]
    move_together(tensors)
    assert lie_together(tensors)
    assert all(map(torch.equal, tensors, before))
    places = [tensor.data_ptr() for tensor in tensors]
    move_together(tensors)
    assert [tensor.data_ptr() for tensor in tensors] == places
