"""Weight updates: AdamW and its groups, clipping, the gate, the fp16 loss scale, learning-rate shapes."""

import copy
import math

import pytest
import torch
from training_helpers import random_gradients, tiny_model

from gpt.errors import NonFiniteError
from gpt.train.optim import LossScaler, OptimConfig, clip_gradients, gated_step, learning_rate, make_optimizer

YES, NO = torch.tensor(True), torch.tensor(False)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def moments(optimizer):
    return [{k: v.clone() for k, v in optimizer.state[p].items()} for g in optimizer.param_groups for p in g["params"]]


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b)


# ---- groups


def test_every_parameter_is_in_exactly_one_group():
    model = tiny_model()
    grouped = [id(p) for group in make_optimizer(model, OptimConfig()).param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_the_padding_of_the_vocabulary_stays_zero_and_gathers_no_moments():
    model = tiny_model(vocab_size=257)
    assert model.token.weight.shape[0] == 320
    optimizer = make_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    for step in range(4):
        ids = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(step))
        model(ids[:, :-1], ids[:, 1:]).mean().backward()
        assert not model.token.weight.grad[257:].any()
        clip_gradients(model.parameters(), 1.0)
        gated_step(optimizer, YES)
        optimizer.zero_grad()
    assert not model.token.weight[257:].any()
    state = optimizer.state[model.token.weight]
    assert not state["exp_avg"][257:].any()
    assert not state["exp_avg_sq"][257:].any()
    assert state["exp_avg"][:257].any()


# ---- clipping and the gate


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e9])
def test_clipping_scales_all_gradients_to_one_norm_and_reports_the_norm_before(limit):
    model = tiny_model()
    random_gradients(model, 1)
    flat = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    norm = clip_gradients(model.parameters(), limit)
    assert norm.item() == pytest.approx(flat.norm().item(), rel=1e-5)
    after = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    share = min(1.0, limit / flat.norm().item()) if limit else 1.0
    torch.testing.assert_close(after, flat * share, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.0])
def test_fault_028_a_closed_gate_leaves_weights_and_moments_as_they_were(bad):
    model = tiny_model()
    optimizer = make_optimizer(model, OptimConfig())
    random_gradients(model, 1)
    gated_step(optimizer, YES)
    before, moments_before = weights(model), moments(optimizer)
    random_gradients(model, 2)
    model.token.weight.grad[3, 3] = bad
    gated_step(optimizer, NO)
    assert same(weights(model), before)
    assert same(moments(optimizer), moments_before)


def test_a_skipped_step_leaves_no_trace_in_later_ones():
    model = tiny_model()
    twin = copy.deepcopy(model)
    one, two = make_optimizer(model, OptimConfig()), make_optimizer(twin, OptimConfig())
    for step in range(3):
        random_gradients(model, step)
        random_gradients(twin, step)
        gated_step(one, YES)
        gated_step(two, YES)
        random_gradients(model, 99, scale=math.inf)
        gated_step(one, NO)
    assert same(weights(model), weights(twin))
    assert same(moments(one), moments(two))


def test_a_closed_gate_before_the_first_step_makes_no_moments():
    model = tiny_model()
    optimizer = make_optimizer(model, OptimConfig())
    before = weights(model)
    random_gradients(model, 1, scale=math.nan)
    gated_step(optimizer, NO)
    assert same(weights(model), before)
    assert not any(value.any() for state in moments(optimizer) for value in state.values())


# ---- the loss scale


def test_the_scale_halves_at_an_overflow_and_doubles_after_enough_finite_steps(monkeypatch):
    monkeypatch.setattr("gpt.train.optim.SCALE_GROWTH_STEPS", 3)
    scaler = LossScaler("cpu", enabled=True)
    scales = []
    for finite in [YES, NO, YES, YES, YES, YES, YES, NO, YES, YES, YES]:
        scaler.update(finite)
        scales.append(scaler.scale.item() / 65536)
    assert scales == [1, 0.5, 0.5, 0.5, 1, 1, 1, 0.5, 0.5, 0.5, 1]


def test_unscaling_divides_the_gradients_by_the_scale():
    model = tiny_model()
    random_gradients(model, 1)
    before = [p.grad.clone() for p in model.parameters()]
    scaler = LossScaler("cpu", enabled=True)
    for parameter in model.parameters():
        parameter.grad *= scaler.scale
    scaler.unscale(model.parameters())
    assert same([p.grad for p in model.parameters()], before)


def test_without_fp16_the_scale_is_one_and_stays_so():
    scaler = LossScaler("cpu", enabled=False)
    for finite in [YES, NO] * 3:
        scaler.update(finite)
    assert scaler.scale.item() == 1.0


def test_fault_029_an_fp16_overflow_is_skipped_until_the_twentieth_in_a_row():
    scaler = LossScaler("cpu", enabled=True)
    for step in range(19):
        scaler.check(step, False, 3.0, "")
    scaler.check(19, True, 3.0, "")
    for step in range(20, 39):
        scaler.check(step, False, 3.0, "")
    with pytest.raises(NonFiniteError, match=r"step 39.*train_000000.bin offset 8"):
        scaler.check(39, False, 3.0, "train_000000.bin offset 8")


def test_fault_029_without_fp16_the_first_infinite_gradient_ends_the_run():
    with pytest.raises(NonFiniteError, match="non-finite loss or gradient at step 7"):
        LossScaler("cpu", enabled=False).check(7, False, 3.0, "x")


def test_the_state_of_a_scaler_continues_in_another():
    scaler, other = LossScaler("cpu", enabled=True), LossScaler("cpu", enabled=True)
    for finite in [NO, YES, YES]:
        scaler.update(finite)
        scaler.check(1, bool(finite), 1.0, "")
    scaler.check(1, False, 1.0, "")
    other.load(scaler.state())
    assert other.state() == scaler.state() == {"scale": 32768.0, "finite_steps": 2.0, "overflows": 1}


# ---- learning rates: (settings, total steps, {step: rate})

SHAPES = [
    ({"schedule": "constant"}, 10, {0: 1.0, 5: 1.0, 9: 1.0}),
    ({"schedule": "constant", "warmup_steps": 3.0}, 10, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 9: 1.0}),
    ({"schedule": "linear"}, 10, {0: 1.0, 1: 0.9, 5: 0.5, 9: 0.1}),
    ({"schedule": "linear", "min_lr": 0.2}, 10, {0: 1.0, 5: 0.6, 9: 0.28}),
    ({"schedule": "linear", "warmup_steps": 4.0}, 12, {0: 0.2, 3: 0.8, 4: 1.0, 8: 0.5, 11: 0.125}),
    ({"schedule": "linear", "decay_steps": 4.0}, 12, {0: 1.0, 7: 1.0, 8: 1.0, 9: 0.75, 11: 0.25}),
    ({"schedule": "cosine"}, 8, {0: 1.0, 2: (1 + math.sqrt(0.5)) / 2, 4: 0.5, 6: (1 - math.sqrt(0.5)) / 2}),
    ({"schedule": "cosine", "min_lr": 0.1, "warmup_steps": 10.0}, 110, {0: 1 / 11, 9: 10 / 11, 10: 1.0, 60: 0.55}),
    ({"schedule": "cosine", "decay_steps": 2.0}, 10, {0: 1.0, 8: 1.0, 9: 0.5}),
    ({"schedule": "wsd"}, 20, {0: 1.0, 15: 1.0, 16: 1.0, 17: 0.75, 18: 0.5, 19: 0.25}),
    ({"schedule": "wsd", "decay_steps": 0.5}, 20, {9: 1.0, 10: 1.0, 15: 0.5, 19: 0.1}),
    ({"schedule": "wsd", "warmup_steps": 0.1, "min_lr": 0.5}, 20, {0: 1 / 3, 1: 2 / 3, 2: 1.0, 16: 1.0, 18: 0.75}),
    ({"schedule": "linear", "warmup_steps": 0.5, "decay_steps": 1.0}, 8, {0: 0.2, 3: 0.8, 4: 1.0, 7: 1.0}),
    ({"schedule": "linear", "warmup_steps": 1.0}, 3, {0: 0.5, 1: 1.0, 2: 0.5}),
]


@pytest.mark.parametrize(("values", "total", "rates"), SHAPES)
def test_learning_rates_are_those_computed_by_hand(values, total, rates):
    config = OptimConfig(**{"lr": 1.0, "min_lr": 0.0, **values})
    assert {step: learning_rate(config, step, total) for step in rates} == pytest.approx(rates)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 3, 50])
def test_a_rate_is_never_above_lr_nor_below_min_lr_after_warmup(schedule, total):
    for warmup in (0.0, 1.0, 0.3):
        config = OptimConfig(lr=1e-2, min_lr=1e-3, schedule=schedule, warmup_steps=warmup)
        rates = [learning_rate(config, step, total) for step in range(total)]
        assert all(0 < rate <= 1e-2 * (1 + 1e-12) for rate in rates)
        assert all(rate >= 1e-3 * (1 - 1e-12) for rate in rates[math.ceil(warmup * (total if warmup < 1 else 1)) :])


def test_fault_097_every_bad_value_is_one_problem():
    bad = {"lr": -1.0, "warmup_steps": -1.0, "decay_steps": 2.5, "beta1": 1.0, "beta2": -0.1, "eps": 0.0}
    found = OptimConfig(**bad, min_lr=1.0, weight_decay=-1.0, grad_clip=-1.0).problems()
    assert len(found) == 9
    assert OptimConfig().problems() == []
