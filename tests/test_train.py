"""Training: gradients, losses and their independence of micro-batches and rhythm, limits, signals, faults, logging."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from paths import ROOT
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from training_helpers import (
    QUICK,
    Recording,
    fingerprint,
    make_data,
    metrics,
    sha256,
    step_names,
    text_of,
    tiny_model,
    train_here,
)

import gpt
import train
from gpt.config import make_config, read_toml
from gpt.errors import NonFiniteError, ResourceError, printable
from gpt.loss import IGNORED
from gpt.model import GPT
from gpt.text.reader import TokenReader
from gpt.text.shards import open_dataset
from gpt.text.tokenizer import load_tokenizer, train_bpe
from gpt.text.windows import Windows
from gpt.train import budget, saver, setup
from gpt.train.budget import Progress
from gpt.train.optim import LossScaler, OptimConfig, make_optimizer
from gpt.train.runtime import MachineConfig, Runtime
from gpt.train.state import State

LENGTH = 8  # steps of the runs below
FLAGS = ("--max_steps", LENGTH, "--warmup_steps", 2, "--log_every", 1, "--eval_every", 4, "--save_every", 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("training") / "data")


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """The run folder of LENGTH undisturbed steps, dropout 0.1."""
    out = tmp_path_factory.mktemp("plain") / "out"
    assert tiny(data, out).code == 0
    return out


def tiny(data, out, *flags):
    """Train the preset tiny with dropout on FLAGS, as changed by `flags`."""
    names = {name for name in flags if str(name).startswith("--")}
    base = [
        word for flag, value in zip(FLAGS[::2], FLAGS[1::2], strict=True) if flag not in names for word in (flag, value)
    ]
    dropout = () if "--dropout" in names else ("--dropout", "0.1")
    return train_here("tiny", "--data", data, "--out", out, *base, *dropout, *flags)


def losses(out, *names):
    """Step -> the named numbers of its training record."""
    return {r["step"]: [r[name] for name in names or ("loss", "grad_norm")] for r in metrics(out) if "loss" in r}


def weights(out, step):
    return sha256(out / f"step-{step:09d}/model.safetensors")


# ---- one step


def gradients(model, batch, micro_batch_size, run):
    state = State(model, Recording(model), LossScaler("cpu", False), Progress(micro_batch_size=micro_batch_size))
    numbers = train.train_step(state, batch, 1e-3, 0.0, run)
    return state.optimizer.gradients, numbers.tolist()


def batch_with_ignored(block_size):
    """8 windows, some of whose last targets do not count; with block_size 1 those count nothing at all."""
    batch = torch.randint(257, (8, block_size + 1), generator=torch.Generator().manual_seed(5))
    batch[[1, 4, 5], -1] = IGNORED
    return batch


@pytest.mark.parametrize("block_size", [1, 2, 32])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_fault_032_micro_batches_with_unequal_token_counts_give_the_gradients_of_one(cpu, block_size, micro_batch_size):
    model = tiny_model(block_size=32).train()
    batch = batch_with_ignored(block_size)
    whole, one = gradients(model, batch, 8, cpu)
    parts, many = gradients(model, batch, micro_batch_size, cpu)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=0, msg=name)
    assert many == pytest.approx(one, rel=1e-5)


def test_in_bf16_micro_batches_share_one_cast_of_a_weight_and_give_the_gradients_of_fp32(cpu):
    model = tiny_model(block_size=32).train()
    batch = batch_with_ignored(32)
    wanted, _ = gradients(model, batch, 8, cpu)
    casts = Casts(model.blocks[0].mlp.fc.weight)
    with casts:
        found, _ = gradients(model, batch, 2, Runtime(MachineConfig(device="cpu", dtype="bf16", threads=1)))
    assert casts.count == 1
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 0.03 * gradient.norm(), name


class Casts(TorchDispatchMode):
    """Counts how often a tensor is cast."""

    def __init__(self, tensor):
        super().__init__()
        self.tensor, self.count = tensor, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default and args[0].data_ptr() == self.tensor.data_ptr()
        return function(*args, **(kwargs or {}))


def test_fault_031_a_micro_batch_whose_targets_all_do_not_count_adds_nothing(cpu):
    model = tiny_model().train()
    batch = batch_with_ignored(1)
    counted = batch[batch[:, -1] != IGNORED]
    with_empty, one = gradients(model, batch, 1, cpu)
    without, other = gradients(model, counted, 5, cpu)
    for name, gradient in without.items():
        torch.testing.assert_close(with_empty[name], gradient, atol=1e-6, rtol=0, msg=name)
    assert one == pytest.approx(other, rel=1e-5)


def test_gradients_and_loss_are_those_of_the_mean_over_all_counted_targets(cpu):
    model = tiny_model().train()
    batch = batch_with_ignored(32)
    found, (loss, norm, finite) = gradients(model, batch, 2, cpu)
    x = model.hidden(batch[:, :-1])
    logits = F.linear(x, model.token.weight[:257]).flatten(0, 1)
    expected = F.cross_entropy(logits, batch[:, 1:].flatten(), ignore_index=IGNORED, reduction="mean")
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert norm == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in wanted)), rel=1e-4)
    assert finite == 1.0
    for (name, _), gradient in zip(model.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_fault_028_029_a_non_finite_loss_or_gradient_changes_neither_weights_nor_moments(cpu, where):
    model = tiny_model().train()
    optimizer = make_optimizer(model, OptimConfig())
    state = State(model, optimizer, LossScaler("cpu", False), Progress(micro_batch_size=2))
    batch = torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(5))
    train.train_step(state, batch, 1e-2, 1.0, cpu)
    before = [p.clone() for p in model.parameters()]
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    if where == "loss":
        model.register_forward_hook(lambda module, args, output: output * math.nan)
    else:
        model.ln_f.bias.register_hook(lambda gradient: gradient * math.inf)
    loss, norm, finite = train.train_step(state, batch, 1e-2, 1.0, cpu).tolist()
    assert finite == 0.0
    assert math.isfinite(loss) == (where == "gradient")
    assert not math.isfinite(norm)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    after = [value for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))


# ---- the numbers of a run


def initial_model(config, tokenizer):
    torch.manual_seed(config.seed)
    return GPT(config.model, tokenizer.vocab_size)


def test_the_first_logged_loss_is_the_mean_over_the_first_windows_by_hand(data, tmp_path):
    out = tmp_path / "out"
    assert tiny(data, out, "--dropout", 0, "--max_steps", 1, "--warmup_steps", 0).code == 0
    preset = read_toml(train.PRESETS / "tiny.toml", train.TrainConfig)
    config = make_config(train.TrainConfig, preset, {"data": str(data)})
    tokenizer = load_tokenizer("byte")
    reader = TokenReader(open_dataset(data).splits["train"], tokenizer.vocab_size)
    batch = torch.from_numpy(Windows(reader, config.model.block_size, config.seed).take(0, 8))
    model = initial_model(config, tokenizer)
    with torch.no_grad():
        by_hand = [
            F.cross_entropy(F.linear(model.hidden(row[None, :-1]), model.token.weight[:257])[0], row[1:])
            for row in batch
        ]
    assert losses(out)[1][0] == pytest.approx(torch.stack(by_hand).mean().item(), abs=2e-6)


def test_the_validation_loss_is_that_of_transformers_over_the_same_windows(data, plain):
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel.from_pretrained(plain / "latest").eval()
    shard = open_dataset(data).splits["val"][0]
    ids = torch.from_numpy(np.fromfile(shard.path, dtype="<u2", offset=1024).astype(np.int64))
    nats = 0.0
    with torch.no_grad():
        for first in range(0, len(ids) - 1, 32):
            window = ids[first : first + 33]
            logits = model(window[None, :-1]).logits[0]
            nats += F.cross_entropy(logits.double(), window[1:], reduction="sum").item()
    last = metrics(plain)[-1]
    assert last["step"] == LENGTH
    assert last["val_loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-5)
    size = len(text_of(600, seed=1).encode("utf-8"))  # the validation text that make_data writes
    assert last["val_bpb"] == pytest.approx(nats / math.log(2) / size, abs=1e-5)


def test_bits_per_byte_count_the_bytes_of_the_text_not_its_tokens(tmp_path):
    tokenizer = train_bpe([text_of(4000)], 280)
    folder = make_data(tmp_path / "data", tokenizer=tokenizer)
    out = tmp_path / "out"
    assert tiny(folder, out, "--max_steps", 2).code == 0
    last, text = metrics(out)[-1], text_of(600, seed=1)
    targets, size = len(tokenizer.encode(text)), len(text.encode("utf-8"))
    assert targets < 0.9 * size
    assert last["val_bpb"] == pytest.approx(last["val_loss"] * targets / math.log(2) / size, rel=1e-6)


def test_the_metrics_have_the_fields_of_the_design(plain):
    records = metrics(plain)
    assert [r["step"] for r in records] == list(range(1, LENGTH + 1))
    of_step = {"step", "tokens", "loss", "lr", "grad_norm", "tok_per_s", "mfu", "train_seconds"}
    of_evaluation = {"val_loss", "val_bpb"}
    for record in records:
        assert set(record) == (of_step | of_evaluation if record["step"] % 4 == 0 else of_step)
        assert record["tokens"] == record["step"] * 8 * 32
        assert all(isinstance(value, (int, float)) for value in record.values())
    seconds = [r["train_seconds"] for r in records]
    assert seconds == sorted(seconds)
    assert all(r["tok_per_s"] > 0 and r["mfu"] > 0 for r in records)


def test_tokens_per_second_are_tokens_over_training_time(data, tmp_path):
    out = tmp_path / "out"
    tiny(data, out, "--log_every", 3, "--eval_every", 0, "--max_steps", 9)
    records = [r for r in metrics(out) if "loss" in r]
    before = {"tokens": 0, "train_seconds": 0.0}
    for record in records:
        speed = (record["tokens"] - before["tokens"]) / (record["train_seconds"] - before["train_seconds"])
        assert record["tok_per_s"] == pytest.approx(speed, rel=0.05)  # the seconds are rounded to milliseconds
        before = record


# ---- what must not matter


@pytest.mark.parametrize(
    "rhythm",
    [
        ("--eval_every", 0),
        ("--eval_every", 3, "--eval_tokens", 64),
        ("--save_every", 3, "--keep_last", 5),
        ("--log_every", 3),
        ("--sample_every", 2),
        ("--micro_batch_size", 8, "--profile"),
    ],
)
def test_fault_033_evaluating_saving_logging_and_sampling_leave_the_losses_bit_identical(data, plain, tmp_path, rhythm):
    out = tmp_path / "out"
    assert tiny(data, out, *rhythm).code == 0
    expected, found = losses(plain), losses(out)
    assert len(found) >= 2
    assert found == {step: expected[step] for step in found}
    assert weights(out, LENGTH) == weights(plain, LENGTH)


def test_micro_batches_change_a_run_by_rounding_only(data, tmp_path):
    for size in (1, 8):
        assert tiny(data, tmp_path / str(size), "--dropout", 0, "--micro_batch_size", size).code == 0
    one, eight = losses(tmp_path / "1"), losses(tmp_path / "8")
    for step in eight:
        assert one[step] == pytest.approx(eight[step], rel=1e-4)


def test_the_same_command_gives_the_same_run_to_the_bit(data, plain, tmp_path):
    tiny(data, tmp_path / "out")
    assert fingerprint(tmp_path / "out", LENGTH) == fingerprint(plain, LENGTH)


def test_another_seed_gives_another_run(data, plain, tmp_path):
    tiny(data, tmp_path / "out", "--seed", 1)
    assert all(losses(tmp_path / "out")[step] != losses(plain)[step] for step in range(1, LENGTH + 1))


# ---- ends


def test_fault_038_the_last_step_is_saved_between_intervals(tmp_path):
    out = tmp_path / "out"
    folder = make_data(tmp_path / "data", val_size=0)  # so that no new best is saved at the end
    assert tiny(folder, out, "--max_steps", 7, "--save_every", 5).code == 0
    assert step_names(out) == ["step-000000005", "step-000000007"]


@pytest.mark.parametrize(
    ("limit", "steps"), [(("--max_tokens", 3 * 256 + 1), 4), (("--max_epochs", 0.2), 4), (("--max_steps", 3), 3)]
)
def test_fault_038_a_run_ends_at_the_first_limit_with_a_checkpoint(data, tmp_path, limit, steps):
    out = tmp_path / "out"
    windows = Windows(TokenReader(open_dataset(data).splits["train"], 257), 32, 0).per_epoch
    assert math.ceil(0.2 * windows / 8) == 4
    others = () if "--max_steps" in limit else ("--max_steps", 100)
    assert tiny(data, out, *limit, *others, "--eval_every", 0).code == 0
    assert step_names(out)[-1] == f"step-{steps:09d}"
    assert metrics(out)[-1]["step"] == steps


def test_max_minutes_ends_a_run_by_its_training_time_alone(data, tmp_path, monkeypatch):
    clock = iter(range(10**9))
    monkeypatch.setattr(train, "time", types.SimpleNamespace(perf_counter=lambda: 10.0 * next(clock)))
    out = tmp_path / "out"
    run = tiny(data, out, "--max_minutes", 1.0, "--max_steps", 0, "--warmup_steps", 0, "--eval_every", 1)
    assert run.code == 0
    assert [r["step"] for r in metrics(out)] == list(range(1, 7))  # every step takes ten seconds of this clock
    assert metrics(out)[-1]["train_seconds"] == 60.0


def test_patience_ends_a_run_that_no_longer_improves(data, tmp_path, monkeypatch):
    values = iter([5.0, 4.0, 4.5, 4.5, 3.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: (next(values), 1.0))
    out = tmp_path / "out"
    assert tiny(data, out, "--patience", 2, "--eval_every", 1).code == 0
    assert metrics(out)[-1]["step"] == 4
    assert (out / "best.txt").read_text().strip() == "step-000000002"


def test_a_finished_run_has_nothing_to_do(data, plain):
    before = sha256(plain / "metrics.jsonl")
    run = tiny(data, plain)
    assert (run.code, f"nothing to do: step {LENGTH} of {LENGTH}" in run.stdout) == (0, True)
    assert sha256(plain / "metrics.jsonl") == before


def at_step(monkeypatch, step, action):
    """Do `action` in the middle of training step number `step` (from 0)."""
    original = train.seed_step

    def seed_step(seed, number, rank):
        if number == step:
            action()
        original(seed, number, rank)

    monkeypatch.setattr(train, "seed_step", seed_step)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_fault_070_a_signal_ends_with_75_and_the_same_command_continues_to_the_same_result(
    data, plain, tmp_path, monkeypatch, number
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: signal.raise_signal(number))
        run = tiny(data, out)
    assert run.code == 75
    assert "step 6" in run.last
    assert step_names(out)[-1] == "step-000000006"
    assert tiny(data, out).code == 0
    assert fingerprint(out, LENGTH) == fingerprint(plain, LENGTH)


def stop_in_evaluation(number, data, out, monkeypatch, *flags):
    """A run that SIGTERM ends while it evaluates for the `number`-th time."""
    original, calls = train.evaluate, iter(range(1, number))

    def evaluate(*args):
        if next(calls, None) is None:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", evaluate)
        assert tiny(data, out, *flags).code == 75


@pytest.mark.parametrize("when", [1, 2], ids=["in_the_middle", "after_the_last_step"])
def test_fault_071_a_signal_during_an_evaluation_ends_it_and_it_is_made_up_for(
    when, data, plain, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    stop_in_evaluation(when, data, out, monkeypatch)
    assert tiny(data, out).code == 0
    assert fingerprint(out, LENGTH) == fingerprint(plain, LENGTH)


def test_only_a_fine_tune_is_evaluated_before_its_first_step_and_made_up_for_if_cut_short(
    data, plain, tmp_path, monkeypatch
):
    assert metrics(plain)[0]["step"] == 1
    out, flags = tmp_path / "out", ("--init", plain, "--max_steps", 2, "--warmup_steps", 0)
    stop_in_evaluation(1, data, out, monkeypatch, *flags)
    assert tiny(data, out, *flags).code == 0
    assert [record["step"] for record in metrics(out) if "val_loss" in record] == [0, 2]


def test_a_finished_run_whose_last_evaluation_was_made_up_for_has_nothing_to_do(data, plain, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop_in_evaluation(2, data, out, monkeypatch)
    assert tiny(data, out).code == 0
    assert (out / "best.txt").read_text() == (plain / "best.txt").read_text()
    before = metrics(out)
    done = tiny(data, out)
    assert (done.code, done.stdout) == (0, f"nothing to do: step {LENGTH} of {LENGTH}\n")
    assert metrics(out) == before
    assert not (out / "exit.json").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("buffering", [1, -1])
def test_fault_123_nothing_to_do_that_a_full_disk_loses_ends_in_exit_5(data, plain, monkeypatch, buffering):
    main = train.main

    def with_full_stdout():
        with open("/dev/full", "w", buffering=buffering) as full, contextlib.redirect_stdout(full):
            main()

    monkeypatch.setattr(train, "main", with_full_stdout)
    done = tiny(data, plain)
    assert (done.code, done.last.split(";")[0]) == (5, "error: stdout: No space left on device")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", ">/dev/full 2>/dev/full", "2>&1 | head -1", "2>&1 | cat"])
def test_fault_123_a_run_ends_as_always_whatever_the_streams_are(data, tmp_path, streams):
    narrow = os.environ | {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    flags = ("tiny", "--data", data, "--out", tmp_path / "é 雨", *FLAGS, *QUICK, "--sample_every", 4)
    words = [sys.executable, "train.py", *map(str, flags)]
    shell = ["bash", "-c", f'set -o pipefail; "$0" "$@" {streams}', *words]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=120, env=narrow)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr
    assert max(record["step"] for record in metrics(tmp_path / "é 雨")) == LENGTH


@pytest.mark.parametrize("where", ["warm_up", "train_step"])
def test_fault_035_out_of_gpu_memory_is_exit_5_with_the_setting_to_lower(where, data, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(setup if where == "warm_up" else train, where, full)
    monkeypatch.setattr(GPT, "compile", lambda self: None)
    flags, advice = {
        "warm_up": (("--compile", "on", "--checkpoint_activations"), ""),
        "train_step": (("--compile", "off"), ", or give --checkpoint_activations"),
    }[where]
    done = tiny(data, tmp_path / "out", *flags, "--micro_batch_size", 4)
    assert done.code == 5
    sizes = "micro_batch_size 4, block_size 32"
    assert done.last == f"error: out of GPU memory: {sizes}; lower --micro_batch_size{advice}"
    assert json.loads((tmp_path / "out" / "exit.json").read_text())["code"] == 5


def test_a_new_best_is_pointed_to_by_the_next_save_when_its_own_failed(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    original, broken = saver.save_checkpoint, iter([True])

    def save_checkpoint(*args):
        if next(broken, False):
            raise ResourceError("disk: full")
        return original(*args)

    monkeypatch.setattr(saver, "save_checkpoint", save_checkpoint)
    run = tiny(data, out, "--save_every", 4, "--max_steps", 4)
    assert run.code == 0
    assert "checkpoint at step 4 failed: disk: full" in run.stderr
    assert (out / "best.txt").read_text() == (out / "latest.txt").read_text() == "step-000000004\n"


def test_fault_070_a_second_ctrl_c_interrupts_at_once_with_130(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    at_step(monkeypatch, 5, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    run = tiny(data, out)
    assert run.code == 130
    assert "Traceback" not in run.stderr
    assert json.loads((out / "exit.json").read_text())["code"] == 130


def test_the_signal_handlers_are_put_back(data, tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    tiny(data, tmp_path / "out", "--max_steps", 2)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


# ---- faults


def poison(monkeypatch, step, factor=math.nan):
    """Multiply the loss of training step number `step` (from 1), one micro-batch, by `factor`."""
    original, calls = GPT.losses, iter(range(10**9))

    def losses(self, x, targets):
        found = original(self, x, targets)
        return found * factor if self.training and next(calls) == step - 1 else found

    monkeypatch.setattr(GPT, "losses", losses)


@pytest.mark.parametrize("save_every", [1, 2, 5])
def test_fault_028_a_nan_loss_is_exit_4_naming_the_step_and_the_data_and_nothing_of_it_is_saved(
    data, plain, tmp_path, monkeypatch, save_every
):
    out = tmp_path / "out"
    poison(monkeypatch, 6)
    run = tiny(data, out, "--save_every", save_every, "--keep_last", 9, "--eval_every", 0)
    assert run.code == 4
    assert "step 6" in run.last
    assert "loss nan" in run.last
    windows = Windows(TokenReader(open_dataset(data).splits["train"], 257), 32, 1337)
    assert windows.place(5 * 8) in run.last
    saved = step_names(out)
    assert saved[-1:] == [f"step-{5 // save_every * save_every:09d}"]
    for name in saved:
        assert all(torch.isfinite(value).all() for value in load_file(out / name / "model.safetensors").values())
    exit_record = json.loads((out / "exit.json").read_text())
    assert exit_record["code"] == 4
    assert "step 6" in exit_record["reason"]


def test_fault_028_the_weights_after_a_nan_loss_are_those_before_it(data, tmp_path, monkeypatch):
    out, kept = tmp_path / "out", []
    original = setup.first_model

    def first_model(*args):
        model, base = original(*args)
        kept.append(model)
        return model, base

    monkeypatch.setattr(setup, "first_model", first_model)
    poison(monkeypatch, LENGTH)  # the last step: no further one follows before it is noticed
    assert tiny(data, out, "--save_every", 1, "--eval_every", 0).code == 4
    saved = load_file(out / f"step-{LENGTH - 1:09d}/model.safetensors")
    assert torch.equal(saved["transformer.wte.weight"], kept[0].token.weight[:257])
    assert torch.equal(saved["transformer.ln_f.weight"], kept[0].ln_f.weight)
    assert step_names(out)[-1] == f"step-{LENGTH - 1:09d}"


def test_fault_029_a_resume_after_exit_4_goes_on_from_the_last_checkpoint(data, plain, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        poison(patch, 6)
        assert tiny(data, out).code == 4
    assert tiny(data, out).code == 0
    assert not (out / "exit.json").exists()
    assert fingerprint(out, LENGTH) == fingerprint(plain, LENGTH)


def test_fault_030_a_batch_of_garbage_is_one_warning_naming_step_loss_and_mean(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    poison(monkeypatch, 14, factor=10.0)
    run = tiny(data, out, "--max_steps", 16, "--eval_every", 0, "--lr", 1e-5)
    assert run.code == 0
    [warning] = [line for line in run.stderr.splitlines() if line.startswith("warning: ")]
    found = losses(out, "loss")
    mean = sum(found[step][0] for step in range(1, 14)) / 13
    assert warning == f"warning: loss spike at step 14: {found[14][0]:.1f}, mean {mean:.1f}"
    assert found[14][0] == pytest.approx(10 * mean, rel=0.05)


def test_a_validation_loss_that_is_not_finite_is_no_best_and_no_invalid_json(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *_: (math.nan, math.inf))
    out = tmp_path / "out"
    assert tiny(data, out, "--max_steps", 4).code == 0
    lines = (out / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert records[-1]["val_loss"] is None
    assert not (out / "best.txt").exists()


@pytest.mark.parametrize("what", ["folder", "lock", "metrics.jsonl"])
def test_fault_120_a_run_whose_folder_lock_or_metrics_go_warns_twice_and_ends_in_exit_5(
    what, data, tmp_path, monkeypatch
):
    out, flags = tmp_path / "out", ("--save_every", 1, "--eval_every", 0)
    gone = out if what == "folder" else out / what
    at_step(monkeypatch, 3, lambda: gone.rename(tmp_path / "away"))
    run = tiny(data, out, *flags)
    assert run.code == 5
    assert run.stderr.count("warning: checkpoint at step") == 2
    assert f"{gone}: was deleted, moved or replaced" in run.last
    assert not gone.exists()
    saved = tmp_path / "away" if what == "folder" else out
    assert step_names(saved) == ["step-000000002", "step-000000003"]


def test_fault_120_a_run_goes_on_by_the_same_command_after_its_lock_was_deleted(data, plain, tmp_path, monkeypatch):
    out, flags = tmp_path / "out", ("--save_every", 1)
    with monkeypatch.context() as patch:
        at_step(patch, 3, (out / "lock").unlink)
        assert tiny(data, out, *flags).code == 5
    assert tiny(data, out, *flags).code == 0
    assert fingerprint(out, LENGTH) == fingerprint(plain, LENGTH)


# ---- samples, profile, precision


def test_sample_every_prints_text_of_the_model(data, tmp_path):
    run = tiny(data, tmp_path / "out", "--sample_every", 4)
    assert [line for line in run.stderr.splitlines() if line.startswith("--- sample")] == [
        "--- sample at step 4",
        "--- sample at step 8",
    ]


SAMPLE = r"sample at step (\d+), (\d+) s: (.*)"


def test_where_sample_every_is_left_out_a_line_of_text_is_printed_before_the_first_step(data, tmp_path):
    run = tiny(data, tmp_path / "out")
    [(step, seconds, text)] = [found.groups() for found in re.finditer(SAMPLE, run.stderr)]
    assert (step, seconds) == ("0", "0")
    assert len(text) > 10
    assert all(len(line) <= 79 for line in run.stderr.splitlines() if line.startswith("sample at"))
    assert run.stderr.index("sample at") < run.stderr.index("step 1/")
    assert "sample at" not in tiny(data, tmp_path / "off", "--sample_every", 0).stderr


def test_lines_by_the_clock_show_the_text_of_the_model_at_that_step_and_go_on_with_evaluations(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(budget, "SAMPLE_SECONDS", (0,))
    out = tmp_path / "out"
    run = tiny(data, out, "--eval_every", 2, "--save_every", 2, "--keep_last", 9)
    found = {int(step): text for step, _, text in re.findall(SAMPLE, run.stderr)}
    assert list(found) == [0, 2, 4, 6, 8]
    for step in (2, 8):
        model = gpt.load(out / f"step-{step:09d}", device="cpu", dtype="fp32", backend="eager")
        [[completion]] = model.generate([""], max_new_tokens=train.LINE_TOKENS, seed=1337)
        shown = printable(" ".join(completion.text.split()), keep="")
        assert shown.startswith(found[step])
        assert len(found[step]) >= min(len(shown), 50)


def test_fault_033_lines_at_every_step_leave_the_losses_bit_identical(data, plain, tmp_path, monkeypatch):
    due = budget.SampleTimes.due
    monkeypatch.setattr(budget.SampleTimes, "due", lambda self, progress: due(self, progress) or True)
    out = tmp_path / "out"
    run = tiny(data, out)
    assert len(re.findall(SAMPLE, run.stderr)) == LENGTH + 1
    assert fingerprint(out, LENGTH) == fingerprint(plain, LENGTH)


@pytest.mark.parametrize("error", [ResourceError("memory is full; x"), NonFiniteError("non-finite logits at token 3")])
def test_a_line_of_text_that_fails_does_not_end_the_run(data, plain, tmp_path, monkeypatch, error):
    def fail(*_args, **_keywords):
        raise error

    monkeypatch.setattr(gpt.generate.generator.TextGenerator, "continue_ids", fail)
    run = tiny(data, tmp_path / "out")
    assert f"sample at step 0, 0 s: ({error})" in run.stderr
    assert fingerprint(tmp_path / "out", LENGTH) == fingerprint(plain, LENGTH)


# ---- the last lines


def test_the_last_lines_say_why_a_run_ended_the_best_loss_where_it_is_and_the_next_command(data, tmp_path):
    out = tmp_path / "my out"
    lines = tiny(data, out).stderr.splitlines()[-3:]
    best = min((r["val_loss"], r["step"]) for r in metrics(out) if "val_loss" in r)
    assert lines[0] == f"info: ended: max_steps {LENGTH} reached at step {LENGTH}"
    assert lines[1] == f"info: best: val_loss {best[0]:.4f} at step {best[1]}, in {out}/step-{best[1]:09d}"
    assert lines[2] == f"info: next: python sample.py '{out}'"
    assert (out / f"step-{best[1]:09d}/config.json").exists()


def test_the_next_command_of_an_installed_program_is_gpt_sample(data, tmp_path, monkeypatch):
    original = train.find_start

    def find_start(*args):
        sys.argv[0] = "gpt train"
        return original(*args)

    monkeypatch.setattr(train, "find_start", find_start)
    assert tiny(data, tmp_path / "out").last == f"info: next: gpt sample {tmp_path / 'out'}"


def test_a_run_without_validation_has_no_best_loss_in_its_last_lines(tmp_path):
    run = tiny(make_data(tmp_path / "data", val_size=0), tmp_path / "out")
    assert f"info: ended: max_steps {LENGTH} reached at step {LENGTH}" in run.stderr
    assert "best:" not in run.stderr


def test_a_run_that_is_stopped_says_its_best_loss_before_the_last_line(data, tmp_path, monkeypatch):
    at_step(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGTERM))
    run = tiny(data, tmp_path / "out")
    assert re.fullmatch(r"info: best: val_loss \S+ at step 4, in .*/step-000000004", run.stderr.splitlines()[-2])
    assert run.last.startswith("stopped: signal at step 6: checkpoint saved")
    assert "ended:" not in run.stderr


@pytest.mark.parametrize(("validation", "log_every", "steps"), [(0, 3, [3, 6, 8]), (0, 100, [8]), (600, 100, [4, 8])])
def test_the_last_step_is_logged_whatever_log_every_is(tmp_path, validation, log_every, steps):
    folder, out = make_data(tmp_path / "data", val_size=validation), tmp_path / "out"
    assert tiny(folder, out, "--log_every", log_every).code == 0
    assert [record["step"] for record in metrics(out) if "loss" in record] == steps


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_shorter_types_train_nearly_as_fp32_does_and_save_fp32(data, plain, tmp_path, dtype):
    out = tmp_path / "out"
    assert tiny(data, out, "--dtype", dtype).code == 0
    rough, fine = losses(out, "loss"), losses(plain, "loss")
    assert all(rough[step] == pytest.approx(fine[step], abs=0.05) for step in fine)
    assert rough != fine
    saved = load_file(out / f"step-{LENGTH:09d}/model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}


def test_fault_029_fp16_overflows_are_skipped_and_the_run_goes_on(data, tmp_path, monkeypatch):
    class Large(LossScaler):
        def __init__(self, *args, **keywords):
            super().__init__(*args, **keywords)
            self.scale.fill_(2.0**30)

    monkeypatch.setattr(setup, "LossScaler", Large)
    out = tmp_path / "out"
    assert tiny(data, out, "--dtype", "fp16", "--max_steps", 30, "--eval_every", 0).code == 0
    lines = (out / "metrics.jsonl").read_text().splitlines()
    norms = [json.loads(line, parse_constant=pytest.fail).get("grad_norm", 0.0) for line in lines]
    assert norms[1] is None  # skipped
    assert all(norm is not None for norm in norms[-3:])
    state = json.loads((out / "step-000000030/training/state.json").read_text())
    assert state["scaler"]["scale"] < 2.0**30


def test_a_tiny_model_learns_a_sentence_by_heart(tmp_path):
    sentence = "The gull cried once over the calm sea, and then there was silence. "
    folder = make_data(tmp_path / "data", val_size=0)
    ids = load_tokenizer("byte").encode(sentence * 40)
    shard = open_dataset(folder).splits["train"][0]
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(ids)
    shard.path.write_bytes(header.tobytes() + np.array(ids, dtype="<u2").tobytes())
    (folder / "dataset.json").unlink()
    out = tmp_path / "out"
    flags = ("--tokenizer", "byte", "--max_steps", 150, "--n_embd", 64, "--block_size", 64, "--dropout", 0)
    assert tiny(folder, out, *flags, "--lr", 5e-3, "--log_every", 50).code == 0
    assert metrics(out)[-1]["loss"] < 0.2
    model = gpt.load(out, device="cpu", dtype="fp32")
    [[completion]] = model.generate([sentence[:20]], max_new_tokens=40, temperature=0)
    assert completion.text == sentence[20:60]


def test_training_without_a_validation_split_works(tmp_path):
    folder = make_data(tmp_path / "data", val_size=0)
    out = tmp_path / "out"
    assert tiny(folder, out, "--max_steps", 3, "--eval_every", 1).code == 0
    assert [set(r) & {"val_loss"} for r in metrics(out)] == [set()] * 3


# ---- metrics on resume, wandb


class FakeRun:
    def __init__(self, run_id, fails):
        self.id, self.fails, self.logged, self.url = run_id or "fresh", fails, [], "https://wandb.test/run"

    def log(self, values, step):
        if self.fails:
            raise ConnectionError("500 Server Error")
        self.logged.append((step, values))

    def finish(self):
        if self.fails:
            raise ConnectionError("gone")


def fake_wandb(monkeypatch, fails_at=None):
    """Put a stub in place of wandb; returns the runs that it starts, with what they were started with."""
    started = []

    def init(id, **keywords):
        if fails_at == "init":
            raise RuntimeError("api_key not configured (no-tty)")
        started.append((FakeRun(id, fails_at == "log"), keywords))
        return started[-1][0]

    class Settings(types.SimpleNamespace):
        init_timeout = login_timeout = 90

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=Settings))
    return started


@pytest.mark.parametrize("fails_at", ["import", "init", "log"])
def test_fault_034_whatever_wandb_does_the_run_goes_on_with_one_warning(data, plain, tmp_path, monkeypatch, fails_at):
    out = tmp_path / "out"
    fake_wandb(monkeypatch, fails_at)
    if fails_at == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    run = tiny(data, out, "--wandb", "project")
    assert run.code == 0
    warnings = [line for line in run.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "wandb" in warnings[0]
    assert fingerprint(out, LENGTH)["log"] == fingerprint(plain, LENGTH)["log"]


def test_fault_034_wandb_gets_every_record_and_may_take_ten_seconds_to_start(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    started = fake_wandb(monkeypatch)
    assert "https://wandb.test/run" in tiny(data, out, "--wandb", "project").stderr
    [(run, keywords)] = started
    assert max(keywords["settings"].init_timeout, keywords["settings"].login_timeout) < 10
    assert keywords["project"] == "project"
    assert keywords["config"]["max_steps"] == LENGTH
    assert [{"step": step, **values} for step, values in run.logged] == metrics(out)


def test_fault_065_a_resumed_run_continues_its_wandb_run(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    started = fake_wandb(monkeypatch)
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
        assert tiny(data, out, "--wandb", "project").code == 75
    started[0][0].id = "ignored"
    assert tiny(data, out, "--wandb", "project").code == 0
    assert [run.id for run, _ in started] == ["ignored", "fresh"]
    assert started[1][1]["resume"] == "allow"
    steps = [step for run, _ in started for step, _ in run.logged]
    assert steps == sorted(set(steps)) == list(range(1, LENGTH + 1))


def test_fault_034_wandb_offline_really_works_and_a_resume_keeps_the_run_id(data, tmp_path, processes):
    pytest.importorskip("wandb")
    out = tmp_path / "out"
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_API_KEY": "0" * 40}
    words = ("tiny", "--data", data, "--out", out, "--wandb", "project", "--warmup_steps", 0)
    for steps in (2, 4):
        run = processes.run("train.py", *words, "--max_steps", steps, env=env)
        assert run.code == 0
        assert "warning: wandb" not in run.stderr
    ids = {path.name.rsplit("-", 1)[1] for path in (out / "wandb").glob("offline-run-*")}
    state = json.loads((out / "step-000000004/training/state.json").read_text())
    assert ids == {state["progress"]["wandb_id"]}
    assert len(list((out / "wandb").glob("offline-run-*/*.wandb"))) == 2


def test_fault_116_the_environment_does_not_reach_the_files_of_a_run(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret")
    out = tmp_path / "out"
    fake_wandb(monkeypatch)
    tiny(data, out, "--wandb", "project")
    for path in Path(out).rglob("*"):
        assert not path.is_file() or b"planted-secret" not in path.read_bytes()
