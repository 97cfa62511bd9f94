"""The C++ GELU of a training step against its formula in float64, and against the plain torch that it replaces."""

import math

import pytest
import torch

from gpt.kernels import build
from gpt.kernels.native_gelu import NativeGelu
from gpt.model import gelu

SIZES = [1, 7, 8, 1000, 4095, 4097, 100_001]


@pytest.fixture
def ours(kernels):
    return NativeGelu(build.load_library(build.TRAINING))


def formula(x):
    """GELU in its tanh form: Hendrycks and Gimpel 2016, arXiv:1606.08415."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def passes(function, x, upstream):
    """(values, gradient of x)"""
    x = x.clone().requires_grad_()
    out = function(x)
    assert ("GeluFunction" in str(out.grad_fn)) == isinstance(function, NativeGelu)
    return out.detach(), torch.autograd.grad(out, x, upstream)[0]


@pytest.mark.parametrize("size", SIZES)
def test_gelu_and_its_gradient_are_those_of_float64(size, ours):
    x = torch.linspace(-12, 12, size)
    upstream = torch.randn(size, generator=torch.Generator().manual_seed(size))
    wanted = passes(formula, x.double(), upstream.double())
    for found, right in zip(passes(ours, x, upstream), wanted, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=1e-6)


def test_far_from_zero_gelu_is_x_or_0_and_its_slope_1_or_0(ours):
    x = torch.tensor([20.0, 1e4, 1e10, -20.0, -1e4, -1e10])
    values, _ = passes(ours, x, torch.ones(6))
    assert torch.equal(values[:3], x[:3])
    torch.testing.assert_close(values[3:], torch.zeros(3), rtol=0, atol=1e-20)
    x = torch.tensor([20.0, 1e4, 1e10, 1e13, 1e20])
    for sign, right in ((1, torch.ones(5)), (-1, torch.zeros(5))):
        torch.testing.assert_close(passes(ours, sign * x, torch.ones(5))[1], right, rtol=0, atol=1e-6)


def test_gelu_is_the_same_bits_whatever_the_threads(ours, one_thread):
    x, upstream = torch.randn(2, 70_001, generator=torch.Generator().manual_seed(0))
    one = passes(ours, x, upstream)
    torch.set_num_threads(2)
    assert all(map(torch.equal, one, passes(ours, x, upstream)))


def test_what_gelu_reads_need_not_be_contiguous(ours):
    x, upstream = torch.randn(2, 30, 40).transpose(1, 2)
    assert all(map(torch.equal, passes(ours, x, upstream), passes(ours, x.contiguous(), upstream.contiguous())))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gelu_hides_no_damage_and_spreads_none(value, ours):
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    sound = passes(ours, x, torch.ones(50))
    x[20] = value
    for found, before in zip(passes(ours, x, torch.ones(50)), sound, strict=True):
        assert not found[20].isfinite()
        assert torch.equal(found[:20], before[:20]) and torch.equal(found[21:], before[21:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gelu_leaves_other_types_to_torch(dtype, ours):
    x = torch.linspace(-3, 3, 50, dtype=dtype)
    assert torch.equal(ours(x), gelu(x))
