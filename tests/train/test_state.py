"""An optimizer's state as the tensors of a checkpoint, and back."""

import pytest
import torch
from safetensors.torch import save_file
from training_helpers import random_gradients, tiny_model

from gpt.checkpoint.read import OPTIMIZER, Checkpoint
from gpt.errors import IntegrityError
from gpt.train.optim import OptimConfig, make_optimizer
from gpt.train.state import load_optimizer, optimizer_tensors


def saved(folder, tensors):
    (folder / OPTIMIZER).parent.mkdir()
    save_file(tensors, folder / OPTIMIZER)
    return Checkpoint(folder, 1, {}, {})


def stepped(model, kind):
    optimizer = make_optimizer(model, OptimConfig(optimizer=kind))
    random_gradients(model, 1)
    optimizer.step(torch.tensor(0.0))
    return optimizer


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_state_comes_back_equal_without_the_rows_that_pad_the_vocabulary(kind, tmp_path):
    model = tiny_model()
    optimizer, other = stepped(model, kind), make_optimizer(model, OptimConfig(optimizer=kind))
    tensors = optimizer_tensors(model, optimizer)
    assert model.token.weight.shape[0] > model.vocab_size == len(tensors["exp_avg.token.weight"])
    load_optimizer(other, model, saved(tmp_path, tensors))
    for parameter in model.parameters():
        state, expected = other.state[parameter], optimizer.state[parameter]
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)


def without(tensors):
    tensors.pop("exp_avg.ln_f.weight")


def misshaped(tensors):
    tensors["exp_avg.ln_f.weight"] = torch.zeros(3)


def unknown(tensors):
    tensors["exp_avg.ln_g.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without, "exp_avg.ln_f.weight is missing"),
        (misshaped, r"exp_avg.ln_f.weight is \(3,\), model wants \(16,\)"),
        (unknown, "exp_avg.ln_g.weight is unknown"),
    ],
)
def test_a_state_that_does_not_fit_the_model_is_refused_by_the_tensors_name(damage, reason, tmp_path):
    model = tiny_model()
    tensors = optimizer_tensors(model, stepped(model, "adamw"))
    damage(tensors)
    with pytest.raises(IntegrityError, match=reason):
        load_optimizer(make_optimizer(model, OptimConfig()), model, saved(tmp_path, tensors))
