"""Training on examples: what is learned, that padding and batches change nothing, resume, ranks, what is refused."""

import tomllib

import numpy as np
import pytest
import torch
from training_helpers import (
    Recording,
    fingerprint,
    make_examples,
    metrics,
    random_examples,
    save_step,
    state_of,
    tiny_model,
    train_here,
)

import gpt
import train
from gpt.checkpoint.read import load_pretrained
from gpt.errors import printable
from gpt.kernels.select import NATIVE_OPS, native_kernels
from gpt.loss import IGNORED, inputs_and_targets
from gpt.model import REFERENCE, Ops
from gpt.text.example_stream import ExampleStream
from gpt.text.reader import TokenReader, read_masks
from gpt.text.shards import open_dataset
from gpt.train.budget import Progress
from gpt.train.optim import LossScaler
from gpt.train.state import State

FLAGS = ("--dropout", "0.1", "--threads", "1", "--warmup_steps", "0", "--log_every", "1", "--eval_every", "4")


def stream_of(folder, examples, block_size=100):
    shards = open_dataset(make_examples(folder, examples)).splits["train"]
    return ExampleStream("train", TokenReader(shards, 257), read_masks(shards), block_size, seed=1)


def step(model, batch, cpu, ops=REFERENCE):
    """The gradients and the loss of a step on a batch."""
    state = State(model, Recording(model), LossScaler("cpu", False), Progress(micro_batch_size=1), ops)
    numbers = train.train_step(state, batch, 1e-3, 0.0, cpu)
    return state.optimizer.gradients, float(numbers[0])


def tensors(micro_batches):
    return [torch.from_numpy(part) for part in micro_batches]


# ---- what is learned


def test_the_loss_is_that_of_transformers_with_the_labels_of_prompts_left_out(tmp_path, cpu):
    """-100 is its mark for a token that is not learned, and padding is never attended to."""
    transformers = pytest.importorskip("transformers")
    model, examples = tiny_model(block_size=100).train(), random_examples(9, longest=99)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(save_step(tmp_path / "model", 1, model)).eval()
    nats, targets = 0.0, 0
    for ids, learned in examples:
        row = torch.tensor([ids])
        labels = torch.tensor([[-100] * (len(ids) - learned) + ids[len(ids) - learned :]])
        nats += theirs(row, labels=labels).loss.item() * learned
        targets += learned
    for micro_batch_size in (1, 4, 9):
        batch = tensors(stream_of(tmp_path / "d", examples).share(0, 9, 0, 1, micro_batch_size))
        assert step(model, batch, cpu)[1] == pytest.approx(nats / targets, abs=1e-5)


def test_tokens_of_a_prompt_are_read_and_no_targets_and_windows_are_all_targets():
    tokens = torch.tensor([[~7, ~8, 9, 10, ~0, ~0]])
    ids, targets = inputs_and_targets(tokens)
    assert ids.tolist() == [[7, 8, 9, 10, 0]]
    assert targets.tolist() == [[IGNORED, 9, 10, IGNORED, IGNORED]]
    windows = torch.randint(257, (3, 9))
    ids, targets = inputs_and_targets(windows)
    assert torch.equal(ids, windows[:, :-1]) and torch.equal(targets, windows[:, 1:])


# ---- padding and batches


def one_by_one(model, stream, count, cpu):
    """The gradients and the loss of examples 0 to `count`, each run alone and without padding."""
    total, nats, targets = {}, 0.0, 0
    for part in stream.share(0, count, 0, 1, 1):
        row = torch.from_numpy(part[:, : np.flatnonzero(part[0] >= 0)[-1] + 1])
        learned = int((row[:, 1:] >= 0).sum())
        gradients, loss = step(model, row, cpu)
        for name, gradient in gradients.items():
            total[name] = total.get(name, 0) + gradient * learned
        nats, targets = nats + loss * learned, targets + learned
    return {name: gradient / targets for name, gradient in total.items()}, nats / targets


@pytest.mark.parametrize("micro_batch_size", [1, 3, 12])
@pytest.mark.parametrize("engine", ["eager", "kernels"])
def test_examples_in_padded_batches_give_the_gradients_of_each_alone(
    kernels_cache, monkeypatch, tmp_path, cpu, engine, micro_batch_size
):
    monkeypatch.setenv("XDG_CACHE_HOME", kernels_cache)
    ops = Ops(**native_kernels(list(NATIVE_OPS), wait=True)) if engine == "kernels" else REFERENCE
    model, stream = tiny_model(block_size=100).train(), stream_of(tmp_path, random_examples(12, longest=130))
    expected, loss = one_by_one(model, stream, 12, cpu)
    batch = tensors(stream.share(0, 12, 0, 1, micro_batch_size))
    gradients, found = step(model, batch, cpu, ops)
    assert found == pytest.approx(loss, abs=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
def test_compiled_examples_in_padded_batches_give_the_gradients_of_each_alone(tmp_path, cpu):
    stream = stream_of(tmp_path, random_examples(12, longest=130))
    expected, loss = one_by_one(tiny_model(block_size=100).train(), stream, 12, cpu)
    model = tiny_model(block_size=100).train()
    model.compile()
    for micro_batch_size in (1, 3):
        gradients, found = step(model, tensors(stream.share(0, 12, 0, 1, micro_batch_size)), cpu)
        assert found == pytest.approx(loss, abs=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=0, msg=name)


# ---- runs


def test_a_killed_run_on_examples_goes_on_to_the_bit(processes, tmp_path):
    data = make_examples(tmp_path / "data", random_examples(30, longest=70), random_examples(7, seed=1))
    settings = ("tiny", "--data", data, "--max_steps", "12", "--save_every", "5", *FLAGS, "--micro_batch_size", "2")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert processes.run("train.py", *settings, "--out", killed, kill_step=8).code == -9
    last = processes.run("train.py", *settings, "--out", killed)
    assert (last.code, processes.run("train.py", *settings, "--out", whole).code) == (0, 0), last.stderr
    assert f"continuing {killed}/step-000000005 at step 5" in last.stderr
    assert fingerprint(killed, 12) == fingerprint(whole, 12)


def test_the_log_counts_tokens_without_padding_and_an_epoch_ends_the_run(tmp_path):
    examples = random_examples(24)
    data = make_examples(tmp_path / "data", examples, random_examples(5, seed=1))
    flags = ("--max_epochs", "2", "--max_steps", "0", "--block_size", "128", *FLAGS)
    run = train_here("tiny", "--data", data, "--out", tmp_path / "out", *flags)
    assert run.code == 0, run.stderr
    last = metrics(tmp_path / "out")[-1]
    assert last["step"] == 6  # 8 examples a step
    assert last["tokens"] == 2 * sum(len(ids) - 1 for ids, _ in examples)


def test_the_validation_loss_is_the_mean_over_the_targets_of_all_examples(tmp_path, cpu):
    examples = random_examples(11, seed=1)
    data = make_examples(tmp_path / "data", random_examples(8), examples)
    run = train_here("tiny", "--data", data, "--out", tmp_path / "out", "--max_steps", "1", *FLAGS)
    assert run.code == 0, run.stderr
    model = load_pretrained(tmp_path / "out/latest")[0]
    stream = stream_of(tmp_path / "again", examples, model.config.block_size)
    expected = one_by_one(model, stream, stream.per_epoch, cpu)[1]
    assert metrics(tmp_path / "out")[-1]["val_loss"] == pytest.approx(expected, abs=1e-5)


def test_a_batch_of_more_examples_than_there_are_becomes_smaller_in_one_line(tmp_path):
    data = make_examples(tmp_path / "data", random_examples(5, longest=30))
    run = train_here("tiny", "--data", data, "--out", tmp_path / "out", "--max_steps", "1", *FLAGS)
    assert run.code == 0, run.stderr
    assert "global_batch_size 8 -> 5" in run.stderr
    config = tomllib.loads((tmp_path / "out/config.toml").read_text())
    assert config["global_batch_size"] == 5
    run = train_here("tiny", "--data", data, "--out", tmp_path / "new", "--global_batch_size", "8", *FLAGS)
    assert (run.code, run.last) == (
        2,
        f"error: {data}: the training split has 5 examples, global_batch_size is 8; lower it or give more text",
    )


def test_masks_that_changed_since_the_checkpoint_are_refused(tmp_path):
    data = make_examples(tmp_path / "data", random_examples(8, longest=30))
    flags = ("tiny", "--data", data, "--out", tmp_path / "out", *FLAGS)
    assert train_here(*flags, "--max_steps", "1").code == 0
    make_examples(data, [(ids, 1) for ids, _ in random_examples(8, longest=30)])
    run = train_here(*flags, "--max_steps", "2")
    assert run.code == 3 and "dataset changed since checkpoint: train_000000.mask" in run.last


@pytest.mark.parametrize("val", [[([65, 66, 67, 68], 1)], []])
def test_a_line_of_text_while_training_answers_the_prompt_of_an_example(val, tmp_path):
    """One of the validation set if there is one."""
    data, out = make_examples(tmp_path / "data", [([97, 98, 99], 1)] * 8, val), tmp_path / "out"
    run = train_here("tiny", "--data", data, "--out", out, *FLAGS, "--max_steps", "1", "--sample_every", "1")
    assert run.code == 0, run.stderr
    tokens = {"max_new_tokens": train.SAMPLE_TOKENS, "seed": 1337}
    model = gpt.load(out, device="cpu", dtype="fp32", backend="eager")
    [[completion]] = model.generate("ABC" if val else "ab", **tokens)
    assert f"--- sample at step 1\n{printable(completion.text)}\n---" in run.stderr


def test_the_first_example_of_a_run_is_shown_once_before_its_first_step(tmp_path):
    data = make_examples(tmp_path / "data", [([*b"What? Yes.", 256], 5)] * 8)
    settings = ("tiny", "--data", data, "--out", tmp_path / "out", *FLAGS, "--max_steps")
    first = train_here(*settings, "1")
    assert '  given: "What? "\n  learned: "Yes." <|endoftext|>\n' in first.stderr
    assert first.stderr.index("  given: ") < first.stderr.index("step 1/")
    again = train_here(*settings, "2")
    assert again.code == 0 and "  given: " not in again.stderr


def test_a_run_chooses_small_micro_batches_of_examples_which_need_little_padding(tmp_path):
    data = make_examples(tmp_path / "data", random_examples(16, longest=300))
    flags = ("--max_steps", "1", "--block_size", "512", "--global_batch_size", "16", "--warmup_steps", "0")
    run = train_here("tiny", "--data", data, "--out", tmp_path / "out", *flags)
    assert run.code == 0, run.stderr
    assert state_of(tmp_path / "out", 1)["progress"]["micro_batch_size"] == 2  # 1,024 tokens
