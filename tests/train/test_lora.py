"""LoRA: adapters alone are trained, checkpoints are merged and hold PEFT's adapter, and a run continues to the bit."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from adapter_helpers import adapted, save_adapter
from checkpoint_helpers import assert_same_outputs, flip_a_bit, load_theirs, save
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from training_helpers import (
    fingerprint,
    make_data,
    make_examples,
    metrics,
    random_examples,
    sha256,
    snapshot,
    start_train,
    tiny_model,
    train_here,
)

import gpt
import train
from gpt.checkpoint.read import Checkpoint, load_pretrained, verify_checkpoint
from gpt.config import flatten, make_config
from gpt.errors import InputError, IntegrityError, printable
from gpt.generate.generator import sample_line
from gpt.model import GPT, ModelConfig
from gpt.text.tokenizer import load_tokenizer
from gpt.train.budget import Progress
from gpt.train.lora import LoraConfig, adapted_layers, add_adapters, merged, restore_adapters
from gpt.train.optim import LossScaler, OptimConfig, make_optimizer
from gpt.train.start import check_settings
from gpt.train.state import State

DROPOUTS = ("--lora_dropout", "0.1", "--dropout", "0.1", "--micro_batch_size", "2")
LORA = ("--lora_rank", 3, "--lora_alpha", 9, *DROPOUTS)
ADAPTER = "adapter/adapter_model.safetensors"
FROZEN = "training/frozen.safetensors"


@pytest.fixture(scope="module")
def base(made, tmp_path_factory):
    """The model folder that the fine-tunes begin with."""
    best = made / "run" / (made / "run/best.txt").read_text().strip()
    return shutil.copytree(best, tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def tuned(made, base, tmp_path_factory):
    """A fine-tune of eight steps with adapters, checkpoints at 2, 4, 6 and 8, and what it printed."""
    out = tmp_path_factory.mktemp("lora") / "out"
    rhythm = ("--max_steps", 8, "--save_every", 2, "--eval_every", 0, "--keep_last", 9, "--sample_every", 8)
    done = train_here("tiny", "--init", base, "--data", made / "data", "--out", out, *LORA, *rhythm, "--log_every", 1)
    assert done.code == 0, done.stderr
    return out, done


def with_adapters(seed=0, **settings):
    """A small model with adapters, whose B is not 0 any more."""
    model = tiny_model(seed=seed)
    config = LoraConfig(lora_rank=3, **settings)
    add_adapters(model, config, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model, config


# ---- training


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("c_attn", ["attn.qkv"]),
        ("c_proj", ["attn.proj", "mlp.proj"]),
        ("attn.c_proj, mlp.c_fc", ["attn.proj", "mlp.fc"]),
        ("c_attn,c_proj,c_fc", ["attn.qkv", "attn.proj", "mlp.fc", "mlp.proj"]),
    ],
)
def test_adapters_alone_have_gradients_and_updates(targets, layers, cpu):
    model, _ = with_adapters(lora_targets=targets)
    expected = {f"blocks.{n}.{layer}.lora_{half}" for n in range(2) for layer in layers for half in "AB"}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_optimizer(model, OptimConfig())
    state = State(model, optimizer, LossScaler(cpu.device, False), Progress(micro_batch_size=2))
    batch = torch.randint(257, (4, 33))
    train.accumulate(state, batch, cpu)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected
    train.train_step(state, batch, 1e-2, 1.0, cpu)
    after = model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == expected
    assert len(optimizer.state) == len(expected)


def test_the_merged_model_gives_the_logits_of_the_adapted_one_which_stays_as_it_is():
    model, _ = with_adapters(lora_alpha=6.0)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(257, (3, 32))
    plain, expected = merged(model), model(ids)
    torch.testing.assert_close(plain(ids), expected, atol=1e-5, rtol=1e-5)
    assert (plain(ids) - tiny_model()(ids)).abs().max() > 0.1  # the adapters do something
    assert plain.token.weight.data_ptr() == model.token.weight.data_ptr()
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" not in name)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert merged(plain) is plain


def test_saving_merges_on_the_cpu_and_needs_no_memory_of_a_gpu():
    _, layer = next(adapted_layers(with_adapters()[0]))
    with FakeTensorMode():  # tensors of a GPU without a GPU, as long as none needs a gradient
        for name, value in list(layer.named_parameters()):
            setattr(layer, name, torch.nn.Parameter(torch.empty(value.shape, device="cuda"), False))
        devices = [layer.merged_weight(for_file).device.type for for_file in (True, False)]
    assert devices == ["cpu", "cuda"]


def test_a_begins_as_pefts_and_b_at_zero():
    model = tiny_model(n_embd=64, n_head=4)
    add_adapters(model, LoraConfig(lora_rank=8), seed=1)
    for name, value in model.named_parameters():
        if "lora_A" in name:
            bound = value.shape[1] ** -0.5
            assert value.abs().max() <= bound
            assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert "lora_B" not in name or not value.any()


# ---- checkpoints


def test_the_root_is_the_merged_model_and_the_adapter_is_one_for_its_base(tuned, base):
    step = tuned[0] / "step-000000008"
    theirs = adapted(base, load_file(step / ADAPTER), lambda module: 9 / 3)
    ours, _, _ = load_pretrained(step)
    assert_same_outputs(ours, theirs, 257)
    same, _, _ = load_pretrained(step / "adapter")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), same.parameters(), strict=True))
    settings = json.loads((step / "adapter/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (3, 9, 0.1)
    assert settings["fan_in_fan_out"] and settings["base_model_name_or_path"] == str(base)
    first, last = load_file(base / "model.safetensors"), load_file(step / "model.safetensors")
    changed = {name.split(".", 3)[3] for name in first if not torch.equal(first[name], last[name])}
    assert changed == {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}


def test_a_sample_in_training_is_written_by_the_merged_model(tuned):
    out, done = tuned
    [[completion]] = gpt.load(out / "step-000000008", device="cpu", dtype="fp32").generate(
        [""], max_new_tokens=train.SAMPLE_TOKENS, seed=1337
    )
    assert f"--- sample at step 8\n{printable(completion.text)}\n---" in done.stderr


def test_a_line_by_the_clock_needs_no_copy_of_the_matrices(made, base, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "merged", lambda _: pytest.fail("merged copies the matrices"))
    out, settings = tmp_path / "out", ("--max_steps", 1, "--warmup_steps", 0, "--eval_every", 0)
    done = train_here("tiny", "--init", base, "--data", made / "data", "--out", out, *LORA, *settings)
    assert done.code == 0, done.stderr
    assert "sample at step 0, 0 s: " in done.stderr
    model, _ = with_adapters()
    texts = {sample_line(m, load_tokenizer("byte"), [256], 20, 1, 79) for m in (model, merged(model), tiny_model())}
    assert len(texts) == 2


def test_older_checkpoints_keep_weights_and_adapter_alone(tuned):
    for step, has_state in ((2, False), (4, False), (6, True), (8, True)):
        folder = tuned[0] / f"step-{step:09d}"
        files = verify_checkpoint(folder, training=False).manifest["files"]
        assert {ADAPTER, "adapter/adapter_config.json"} < files.keys()
        assert (folder / FROZEN).exists() == (FROZEN in files) == has_state


def test_a_run_continues_to_the_bit_although_its_base_is_gone(tuned, base, tmp_path):
    whole, half = tuned[0], tmp_path / "half"
    gone = base.rename(base.with_name("gone"))
    try:
        done = train_here("--resume", whole / "step-000000006", "--out", half)
    finally:
        gone.rename(base)
    assert done.code == 0, done.stderr
    assert "warning" not in done.stderr
    ours, theirs = fingerprint(half, 8), fingerprint(whole, 8)
    assert (ours["weights"], ours["optimizer"], ours["log"]) == (
        theirs["weights"],
        theirs["optimizer"],
        theirs["log"][-2:],
    )
    for name in (ADAPTER, "adapter/adapter_config.json", FROZEN):
        assert sha256(half / "step-000000008" / name) == sha256(whole / "step-000000008" / name)
    optimizer = load_file(half / "step-000000008/training/optimizer.safetensors")
    assert all(".lora_" in name for name in optimizer)


def test_damaged_frozen_matrices_make_the_run_continue_from_the_checkpoint_before(tuned, tmp_path):
    run = shutil.copytree(tuned[0], tmp_path / "run", symlinks=True)
    flip_a_bit(run / "step-000000008" / FROZEN)
    done = train_here("--resume", run, "--max_steps", "9")
    assert done.code == 0, done.stderr
    assert f"{FROZEN}: sha256 mismatch" in done.stderr and "at step 6" in done.stderr


def test_tensors_that_do_not_fit_are_refused_by_name(tuned, tmp_path):
    step = shutil.copytree(tuned[0] / "step-000000008", tmp_path / "step")
    with pytest.raises(IntegrityError, match=r"lora_A.weight is \(3, 32\), model wants \(4, 32\)"):
        restore_adapters(load_pretrained(tuned[0])[0], LoraConfig(lora_rank=4), step)
    save_file(load_file(step / FROZEN) | {"more": torch.zeros(1)}, step / FROZEN)
    with pytest.raises(IntegrityError, match=r"frozen.safetensors: more is unknown"):
        restore_adapters(load_pretrained(tuned[0])[0], LoraConfig(lora_rank=3), step)


# ---- settings


def test_an_adapter_of_peft_starts_here_merged(made, base, tmp_path):
    tensors = save_adapter(tmp_path / "adapter", base)
    out, settings = tmp_path / "out", ("--max_steps", 1, "--lr", 1e-12, "--warmup_steps", 0)
    done = train_here("tiny", "--init", tmp_path / "adapter", "--data", made / "data", "--out", out, *LORA, *settings)
    assert done.code == 0, done.stderr
    assert_same_outputs(load_pretrained(out)[0], adapted(base, tensors, lambda module: 3.0), 257)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--lora_rank", 33), "lora_rank 33 is above n_embd 32"),
        (("--lora_rank", -1), "lora_rank -1 must be 0 or more"),
        (("--lora_rank", 2, "--lora_alpha", 0), "lora_alpha 0.0 must be above 0"),
        (("--lora_rank", 2, "--lora_dropout", 1), "lora_dropout 1.0 must be at least 0 and below 1"),
        (("--lora_rank", 2, "--lora_targets", "q_proj"), "lora_targets 'q_proj': give one or more of c_attn,c_proj"),
        (("--lora_rank", 2, "--lora_targets", ","), "lora_targets ',': give one or more of c_attn,c_proj"),
        (("--lora_rank", 2, "--optimizer", "muon"), "use adamw with lora_rank"),
        (("--lora_rank", 2, "--freeze", "wte"), "freeze has no effect with lora_rank"),
        (("--lora_rank", 2, "--init", ""), "lora_rank needs a model whose weights stay: give one with --init"),
        (("--lora_alpha", 16), "lora_alpha 16.0 has no effect without lora_rank"),
    ],
)
def test_settings_that_contradict_are_refused_before_anything_is_created(flags, what, made, base, tmp_path):
    init = () if "--init" in flags else ("--init", base)
    done = train_here("tiny", *init, "--data", made / "data", "--out", tmp_path / "out", *flags)
    assert done.code == 2
    assert what in done.last
    assert not (tmp_path / "out").exists()


def test_a_run_continues_with_the_adapters_that_it_began_with(tuned, made, base):
    before = snapshot(tuned[0])
    for flags, text in {
        ("--lora_rank", 4): "lora_rank 3 -> 4",
        ("--lora_targets", "c_attn"): "lora_targets 'c_attn,c_proj,c_fc' -> 'c_attn'",
    }.items():
        done = train_here("--resume", tuned[0], *flags)
        assert done.code == 2
        assert f"other parameters to train ({text}); use a new --out" in done.last
    done = train_here("tiny", "--init", base, "--data", made / "data", "--out", tuned[0], "--dropout", 0.1)
    assert (done.code, snapshot(tuned[0]) == before) == (2, True)
    assert done.last.endswith("(lora_rank 3 -> 0); use a new --out")


def test_a_checkpoint_of_a_version_without_these_settings_has_no_adapters():
    config = make_config(train.TrainConfig, {"data": "x", "init": "y", "max_steps": 1, "lora_rank": 2})
    old = {name: value for name, value in flatten(config).items() if "lora" not in name and name != "freeze"}
    with pytest.raises(InputError, match=r"other parameters to train \(lora_rank 0 -> 2\)"):
        check_settings(flatten(config), Checkpoint(Path("x"), 1, {}, {"config": old}), accept=True)


# ---- other programs


def test_peft_gives_the_logits_of_the_merged_model(tuned, base):
    peft = pytest.importorskip("peft")
    step = tuned[0] / "step-000000008"
    theirs = peft.PeftModel.from_pretrained(load_theirs(base), str(step / "adapter")).eval()
    ids = torch.randint(257, (2, 32))
    ours, _, _ = load_pretrained(step)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiled_adapters_are_trained_as_uncompiled_ones(made, base, tmp_path):
    command = ("tiny", "--init", base, "--data", made / "data", "--max_steps", 5, "--log_every", 1, "--lora_rank", 3)
    for compiled in ("on", "off"):
        out = tmp_path / compiled
        done = train_here(*command, "--out", out, "--compile", compiled, "--checkpoint_activations")
        assert done.code == 0, done.stderr
    losses = {name: [r["loss"] for r in metrics(tmp_path / name) if "loss" in r] for name in ("on", "off")}
    assert losses["on"] == pytest.approx(losses["off"], abs=1e-4)


@pytest.mark.slow
def test_adapters_on_examples_are_trained_padded_and_in_micro_batches(base, tmp_path):
    data = make_examples(tmp_path / "data", random_examples(24, 30), random_examples(5, 30, seed=1))
    command = ("tiny", "--init", base, "--data", data, *LORA, "--max_steps", 8, "--save_every", 4, "--log_every", 1)
    for name, flags in {"bf16": ("--dtype", "bf16"), "fp32": ()}.items():
        done = train_here(*command, "--out", tmp_path / name, *flags)
        assert done.code == 0, done.stderr
        done = train_here("--resume", tmp_path / name / "step-000000004", "--out", tmp_path / f"{name}-half", *flags)
        assert done.code == 0, done.stderr
        ours, theirs = fingerprint(tmp_path / f"{name}-half", 8), fingerprint(tmp_path / name, 8)
        assert (ours["weights"], ours["optimizer"]) == (theirs["weights"], theirs["optimizer"])


# ---- memory


def peak_memory(*args):
    """Runs train.py in a process of its own and returns the most memory that it had, in KiB."""
    process = start_train(*args)
    text = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, text
    return usage.ru_maxrss


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory in the units of Linux")
def test_adapters_need_at_most_055_of_the_memory_of_full_fine_tuning_of_124m(bpe_cache, tmp_path):
    gpt2 = load_tokenizer("gpt2")
    torch.manual_seed(0)
    model = save(GPT(ModelConfig(block_size=256), gpt2.vocab_size), gpt2, tmp_path)
    data = make_data(tmp_path / "data", 30_000, 3_000, tokenizer=gpt2)
    command = ("--init", model, "--data", data, "--max_steps", 2, "--max_epochs", 0, "--global_batch_size", 4)
    flags = {"full": (), "lora": ("--lora_rank", 16), "less": ("--lora_rank", 16, "--checkpoint_activations")}
    peaks = {name: peak_memory(*command, "--out", tmp_path / name, *flags[name]) for name in flags}
    assert peaks["lora"] <= 0.55 * peaks["full"], peaks
    assert peaks["less"] < 0.9 * peaks["lora"], peaks
