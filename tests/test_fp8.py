"""The head in 8-bit floating point: its product, the loss and gradients by it, where it is refused, a run with it."""

import pytest
import torch
from test_loss import one_pass, problem, reference
from training_helpers import make_data, metrics, train_here

from gpt import runtime
from gpt.errors import InputError
from gpt.fp8 import CAPABILITY, fp8_linear, rounded
from gpt.loss import cross_entropy
from gpt.runtime import check_fp8


def relative(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 16, 16), (37, 64, 320), (65, 768, 1024)])
def test_a_product_errs_as_two_roundings_to_three_digits_do(rows, inputs, outputs):
    draw = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, inputs, generator=draw).bfloat16() for n in (rows, outputs))
    y = fp8_linear(x, weight)
    assert y.dtype == torch.bfloat16
    # Each factor's error is even within half of 1/8 to 1/16 of it: 2.6 % of the root mean square, twice, and room.
    assert relative(y, x.double() @ weight.double().T) < 0.05


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_one_scale_fits_the_largest_value_whatever_its_size(size):
    x = (size * torch.tensor([[1.0, -448.0, 0.25, 0.0]])).bfloat16()
    values, scale = rounded(x)
    assert values.float().abs().max() == 448
    torch.testing.assert_close(values.float() * scale, x.float(), rtol=2**-4, atol=0)


def test_zeros_stay_zeros_and_what_is_not_finite_does_not_vanish():
    weight = torch.randn(32, 16).bfloat16()
    assert not fp8_linear(torch.zeros(2, 16).bfloat16(), weight).any()
    for damage in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(2, 16).bfloat16()
        x[1, 3] = damage
        assert not fp8_linear(x, weight).isfinite().all()


def with_fp8(x, weight, targets, vocab_size):
    return cross_entropy(x, weight, targets, vocab_size, fp8=True)


def test_losses_and_gradients_are_near_those_of_float64():
    given = problem(1001, 1024, 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, x_grad, weight_grad = one_pass(*given, 1001, function=with_fp8)
    wanted, x_wanted, weight_wanted = reference(*given, 1001)
    assert losses.dtype == torch.float32
    assert relative(losses, wanted) < 0.02
    assert abs((losses - wanted).mean()) < 0.02
    assert relative(x_grad, x_wanted) < 0.1
    assert relative(weight_grad, weight_wanted) < 0.1
    assert not weight_grad[1001:].any()


def test_without_gradients_the_losses_are_those_of_bf16():
    x, weight, targets, _ = problem(257, 320, 50)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(with_fp8(x, weight, targets, 257), cross_entropy(x, weight, targets, 257))


def test_it_is_refused_where_it_cannot_run_or_does_not_fit(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    check_fp8(cpu, torch.bfloat16)
    with pytest.raises(InputError, match="fp8_head: needs bf16, the precision is float32"):
        check_fp8(cpu, torch.float32)
    monkeypatch.setattr(runtime, "device_name", lambda device: f"{device.type} of the test")
    with pytest.raises(InputError, match="fp8_head: mps of the test has no 8-bit floating point"):
        check_fp8(torch.device("mps"), torch.bfloat16)
    for capability in ((8, 0), (8, 6), CAPABILITY, (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        if capability >= CAPABILITY:
            check_fp8(cuda, torch.bfloat16)
        else:
            with pytest.raises(InputError, match="no 8-bit floating point"):
                check_fp8(cuda, torch.bfloat16)


def test_a_run_learns_with_it_as_without(tmp_path):
    data, losses = make_data(tmp_path / "data"), []
    words = ("tiny", "--data", data, "--dtype", "bf16", "--max_steps", "30")
    for out, more in (("plain", ()), ("fp8", ("--fp8_head",))):
        done = train_here(*words, "--out", tmp_path / out, *more)
        assert done.code == 0, done.stderr
        losses.append(metrics(tmp_path / out)[-1]["val_loss"])
    assert 0 < abs(losses[0] - losses[1]) < 0.05


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--dtype", "fp32"), "fp8_head: needs bf16"),
        (("--dtype", "bf16", "--n_embd", "40"), "n_embd 40 must be a multiple of 16 with fp8_head"),
    ],
)
def test_what_it_cannot_do_is_bad_input_and_nothing_is_created(words, reason, tmp_path):
    data = make_data(tmp_path / "data")
    done = train_here("tiny", "--data", data, "--out", tmp_path / "out", "--fp8_head", *words)
    assert done.code == 2
    assert reason in done.last
    assert not (tmp_path / "out").exists()
