"""AdamW against its formula in float64 and against torch's own."""

import copy

import torch
from training_helpers import random_gradients, tiny_model

from gpt.train.optim import OptimConfig, gated_step, make_optimizer


def test_five_steps_equal_the_formula_of_adamw_with_decay_on_matrices_only():
    model = tiny_model()
    config = OptimConfig(lr=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.95, eps=1e-6)
    optimizer = make_optimizer(model, config)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    mean = {name: torch.zeros_like(p) for name, p in expected.items()}
    square = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(1, 6):
        random_gradients(model, step)
        for name, parameter in model.named_parameters():
            grad = parameter.grad.double()
            decayed = name.endswith("weight") and "ln_" not in name
            expected[name] *= 1 - 1e-2 * (0.3 if decayed else 0.0)
            mean[name] = 0.8 * mean[name] + 0.2 * grad
            square[name] = 0.95 * square[name] + 0.05 * grad**2
            root = (square[name] / (1 - 0.95**step)).sqrt() + 1e-6
            expected[name] -= 1e-2 * mean[name] / (1 - 0.8**step) / root
        gated_step(optimizer, torch.tensor(True))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], atol=2e-6, rtol=2e-5, msg=name)


def test_steps_equal_those_of_torchs_plain_adamw():
    model = tiny_model()
    twin = copy.deepcopy(model)
    config = OptimConfig(lr=1e-2, weight_decay=0.1)
    optimizer = make_optimizer(model, config)
    decayed = [p for n, p in twin.named_parameters() if n.endswith("weight") and "ln_" not in n]
    others = [p for n, p in twin.named_parameters() if n.endswith("bias") or "ln_" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False)
    for step in range(5):
        random_gradients(model, step)
        random_gradients(twin, step)
        gated_step(optimizer, torch.tensor(True))
        plain.step()
    for (name, one), two in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5, msg=name)
