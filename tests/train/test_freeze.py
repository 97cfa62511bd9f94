"""--freeze: which parameters a pattern names, and that these stay as they are."""

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import EIGHT_STEPS, fingerprint, tiny_model, train_here

from gpt.errors import InputError
from gpt.train.freeze import freeze


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        ("wte", {"token.weight"}),
        ("transformer.wte.weight", {"token.weight"}),
        ("wte, wpe", {"token.weight", "position.weight"}),
        ("h.1.ln_1", {"blocks.1.ln_1.weight", "blocks.1.ln_1.bias"}),
        ("blocks.0.mlp.fc.bias,h.1.mlp.c_fc.bias", {"blocks.0.mlp.fc.bias", "blocks.1.mlp.fc.bias"}),
        ("*.c_attn.weight", {"blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"}),
    ],
)
def test_a_pattern_names_parameters_by_either_name_or_their_module(patterns, frozen):
    model = tiny_model()
    freeze(model, patterns)
    left_out = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert left_out.keys() == frozen
    sizes = [257 * 16 if name == "token.weight" else value.numel() for name, value in left_out.items()]
    assert model.num_parameters() - model.num_parameters(trained=True) == sum(sizes)


@pytest.mark.parametrize(
    ("patterns", "reason"),
    [
        ("h.2.*", "freeze: h.2.* matches no parameter; names are like wte"),
        ("wte,w", "freeze: w matches no parameter"),
        (" , ", "freeze: ' , ' names no parameter"),
        ("*", "freeze: * matches every parameter, and leaves none to train"),
        ("h,wte,wpe,ln_f", "matches every parameter"),
    ],
)
def test_patterns_that_match_nothing_or_everything_are_refused(patterns, reason):
    with pytest.raises(InputError) as caught:
        freeze(tiny_model(), patterns)
    assert reason in str(caught.value)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_frozen_weights_stay_to_the_bit_have_no_state_and_a_run_continues_to_the_bit(kind, made, tmp_path):
    base = made / "run" / (made / "run/best.txt").read_text().strip()
    whole, half = tmp_path / "whole", tmp_path / "half"
    settings = ("--freeze", "wte,h.0.*", "--optimizer", kind, "--dropout", "0.1", "--weight_decay", "0.5")
    command = ("tiny", "--init", base, "--data", made / "data", *EIGHT_STEPS, *settings)
    done = train_here(*command, "--out", whole)
    assert done.code == 0, done.stderr
    assert "34,720 parameters, 13,792 of them trained, on " in done.stderr
    first, last = (load_file(folder / "model.safetensors") for folder in (base, whole / "step-000000008"))
    same = {name for name in first if torch.equal(first[name], last[name])}
    assert same == {name for name in first if name.startswith(("transformer.wte.", "transformer.h.0."))}
    state = load_file(whole / "step-000000008/training/optimizer.safetensors")
    assert state and not any(".token." in name or ".blocks.0." in name for name in state)
    assert train_here("--resume", whole / "step-000000004", "--out", half).code == 0
    ours, theirs = fingerprint(half, 8), fingerprint(whole, 8)
    assert (ours["weights"], ours["optimizer"]) == (theirs["weights"], theirs["optimizer"])
    done = train_here("--resume", whole, "--freeze", "wte", "--max_steps", 9)
    assert done.code == 2
    assert "other parameters to train (freeze 'wte,h.0.*' -> 'wte')" in done.last


def test_a_pattern_that_matches_nothing_creates_nothing(made, tmp_path):
    done = train_here("tiny", "--data", made / "data", "--out", tmp_path / "out", "--freeze", "head")
    assert (done.code, (tmp_path / "out").exists()) == (2, False)
    assert "freeze: head matches no parameter" in done.last
