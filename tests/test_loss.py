"""The loss in one pass against F.cross_entropy in float64, value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from gpt import loss
from gpt.loss import CPU_ROWS, IGNORED, cross_entropy


def problem(vocab_size, padded, rows, width=24, spread=1.0):
    generator = torch.Generator().manual_seed(vocab_size + rows)
    x = torch.randn(rows, width, generator=generator)
    weight = torch.randn(padded, width, generator=generator) * spread
    weight[vocab_size:] = 0
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    targets[::3] = IGNORED
    upstream = torch.randn(rows, generator=generator)
    return x, weight, targets, upstream


def reference(x, weight, targets, upstream, vocab_size):
    """Returns (losses, gradient of x, gradient of weight), by autograd in float64 over all logits."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    logits = F.linear(x, weight)[:, :vocab_size]
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    losses.backward(upstream.double())
    return losses.detach(), x.grad, weight.grad


def one_pass(x, weight, targets, upstream, vocab_size, function=cross_entropy, frozen=False):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
    losses = function(x, weight, targets, vocab_size)
    losses.backward(upstream)
    return losses.detach(), x.grad, weight.grad


SIZES = [(1, 64), (7, 64), (257, 320), (1001, 1024), (50257, 50304)]


@pytest.mark.parametrize(("vocab_size", "padded"), SIZES)
@pytest.mark.parametrize("rows", [1, 3, CPU_ROWS, 2 * CPU_ROWS + 5])
def test_losses_and_gradients_are_those_of_float64(vocab_size, padded, rows):
    given = problem(vocab_size, padded, rows)
    for found, expected in zip(one_pass(*given, vocab_size), reference(*given, vocab_size), strict=True):
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 64, 200])
def test_with_a_frozen_weight_losses_and_gradient_are_those_of_float64(rows, dtype, monkeypatch):
    monkeypatch.setitem(loss.FROZEN_ROWS, "cpu", 64)
    given = problem(1001, 1024, rows)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        losses, gradient, none = one_pass(*given, 1001, frozen=True)
        with torch.no_grad():
            assert torch.equal(cross_entropy(*given[:3], 1001), losses)
    assert none is None
    assert losses.dtype == torch.float32
    for found, exact in zip((losses, gradient), reference(*given, 1001)[:2], strict=True):
        assert (found.double() - exact).norm() <= (0.02 if dtype == torch.bfloat16 else 2e-6) * exact.norm()


@pytest.mark.parametrize("spread", [0.0, 40.0])
def test_equal_and_very_unequal_logits_stay_exact(spread):
    given = problem(1001, 1024, 100, spread=spread)
    for found, expected in zip(one_pass(*given, 1001), reference(*given, 1001), strict=True):
        assert (found.double() - expected).norm() <= 1e-4 * expected.norm() + 1e-6


def test_where_no_target_counts_losses_and_gradients_are_zero():
    x, weight, targets, upstream = problem(7, 64, 5)
    assert not any(part.any() for part in one_pass(x, weight, torch.full_like(targets, IGNORED), upstream, 7))


def test_padding_gets_no_gradient_and_takes_no_part():
    x, weight, targets, upstream = problem(257, 320, 50)
    before, _, gradient = one_pass(x, weight, targets, upstream, 257)
    assert not gradient[257:].any()
    weight[257:] = 100.0
    assert torch.equal(one_pass(x, weight, targets, upstream, 257)[0], before)


def test_without_gradients_the_losses_are_the_same():
    x, weight, targets, upstream = problem(257, 320, 150)
    expected = one_pass(x, weight, targets, upstream, 257)[0]
    with torch.no_grad():
        assert torch.equal(cross_entropy(x, weight, targets, 257), expected)


def test_under_autocast_it_is_as_near_to_float64_as_products_in_bf16_allow():
    given = problem(1001, 1024, 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, x_grad, weight_grad = one_pass(*given, 1001)
    expected = reference(*given, 1001)
    assert losses.dtype == torch.float32
    for found, exact in zip((losses, x_grad, weight_grad), expected, strict=True):
        assert (found.double() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("count", [768, 1536, 3072])
def test_in_bf16_the_gradient_of_a_mean_is_not_scaled(count):
    x, weight, targets, _ = problem(1001, 1024, 300)
    upstream = torch.full((300,), 1 / count)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = one_pass(x, weight, targets, upstream, 1001)[1:]
    for gradient, exact in zip(found, reference(x, weight, targets, upstream, 1001)[1:], strict=True):
        share = (gradient.double() * exact).sum() / exact.square().sum()
        assert abs(share - 1) < 1e-3


@pytest.mark.slow
def test_compiled_it_gives_the_same():
    given = problem(1001, 1024, 200)
    compiled = one_pass(*given, 1001, function=torch.compile(cross_entropy, fullgraph=True))
    for found, expected in zip(compiled, reference(*given, 1001), strict=True):
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_compilers_version_is_one_that_torch_itself_can_run(backend, frozen):
    """Inductor skips checks that torch makes: its own backends show an operation that torch does not have."""
    given = problem(257, 320, 7)
    compiled = torch.compile(cross_entropy, backend=backend, fullgraph=True)
    kept = 2 if frozen else 3
    found = one_pass(*given, 257, compiled, frozen)[:kept]
    for value, expected in zip(found, reference(*given, 257)[:kept], strict=True):
        torch.testing.assert_close(value.double(), expected, atol=2e-5, rtol=2e-5)
