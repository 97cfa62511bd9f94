"""Muon: its orthogonal steps against singular value decompositions, its momentum, its gate."""

import copy

import pytest
import torch
from training_helpers import tiny_model

from gpt.train.muon import ADAMW_RMS, orthogonalize
from gpt.train.optim import OptimConfig, gated_step, make_optimizer, state_names

CONFIG = OptimConfig(optimizer="muon", lr=0.02, weight_decay=0.3, momentum=0.9)
YES, NO = torch.tensor(True), torch.tensor(False)


def polar(x):
    """The nearest matrix with orthonormal rows or columns, in float64."""
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ v


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 16, 64), (1, 64, 64), (2, 7, 9), (2, 1, 5)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_it_keeps_the_singular_vectors_and_makes_the_values_about_one(dtype, shape, scale):
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.logspace(0, -2, shape[1])
    x = u @ (values[:, None] * v) * scale
    y = orthogonalize(x, dtype)
    assert y.dtype == torch.float32
    along = u.mT @ y @ v.mT  # what it made of the singular values, in their own axes
    made = along.diagonal(dim1=-2, dim2=-1)
    if scale > 1e-6:  # else the norm is lost in what keeps 0 / 0 away
        assert (made - 1).abs().max() < 0.2
    assert (along - torch.diag_embed(made)).abs().max() < (1e-3 if dtype == torch.float32 else 0.15)


def test_a_gradient_of_zeros_gives_a_step_of_zeros():
    assert not orthogonalize(torch.zeros(2, 3, 5), torch.float32).any()


def test_steps_follow_the_formula_with_an_exact_decomposition():
    model = tiny_model()
    optimizer = make_optimizer(model, CONFIG)
    weights = {n: p.detach().double().clone() for n, p in model.blocks.named_parameters() if p.dim() == 2}
    means = {name: torch.zeros_like(value) for name, value in weights.items()}
    for step in range(3):
        give_gradients(model, step)
        optimizer.param_groups[0]["lr"] = 0.02
        for name, parameter in model.blocks.named_parameters():
            if name in weights:
                grad = parameter.grad.double()
                means[name] = 0.9 * means[name] + 0.1 * grad
                direction = 0.1 * grad + 0.9 * means[name]
                width = direction.shape[1]
                squares = direction.split(width) if name.endswith("qkv.weight") else [direction]
                update = torch.cat([polar(part) * ADAMW_RMS * max(part.shape) ** 0.5 for part in squares])
                weights[name] = weights[name] * (1 - 0.02 * 0.3) - 0.02 * update
        gated_step(optimizer, YES)
    moved = dict(model.blocks.named_parameters())
    for name, expected in weights.items():
        first = dict(tiny_model().blocks.named_parameters())[name].detach().double()
        assert (moved[name] - expected).norm() < 0.2 * (expected - first).norm(), name


def test_all_other_parameters_move_as_with_adamw():
    ours, theirs = tiny_model(), tiny_model()
    optimizers = make_optimizer(ours, CONFIG), make_optimizer(theirs, OptimConfig(lr=0.02, weight_decay=0.3))
    for step in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(model, step)
            for group in optimizer.param_groups:
                group["lr"] = 0.02
            gated_step(optimizer, YES)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        hidden = name.startswith("blocks.") and one.dim() == 2
        assert torch.equal(one, other) != hidden, name


def test_every_parameter_is_in_exactly_one_group_and_has_its_own_state():
    model = tiny_model()
    optimizer = make_optimizer(model, CONFIG)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    give_gradients(model, 0)
    gated_step(optimizer, YES)
    for parameter in model.parameters():
        assert tuple(sorted(optimizer.state[parameter])) == tuple(sorted(state_names(optimizer, parameter)))


def test_a_closed_gate_before_the_first_step_leaves_a_state_that_can_be_saved_and_loaded():
    model = tiny_model()
    optimizer = make_optimizer(model, CONFIG)
    give_gradients(model, 0)
    gated_step(optimizer, NO)
    for parameter in model.parameters():
        assert set(optimizer.state[parameter]) == set(state_names(optimizer, parameter))
        assert not any(value.any() for value in optimizer.state[parameter].values())


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_nothing_changes_where_a_gradient_is_not_finite(damage):
    model = tiny_model()
    optimizer = make_optimizer(model, CONFIG)
    give_gradients(model, 0)
    gated_step(optimizer, YES)
    before = copy.deepcopy((model.state_dict(), [dict(optimizer.state[p]) for p in model.parameters()]))
    give_gradients(model, 1)
    model.blocks[0].mlp.fc.weight.grad[0, 0] = damage
    gated_step(optimizer, NO)
    after = (model.state_dict(), [dict(optimizer.state[p]) for p in model.parameters()])
    for one, other in zip(before[0].values(), after[0].values(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(before[1], after[1], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
