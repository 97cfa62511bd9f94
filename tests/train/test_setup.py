"""What is made ready before the first step: the micro-batch size, the profile, what is said about memory."""

import json
from types import SimpleNamespace

import pytest
import torch
from training_helpers import EIGHT_STEPS, train_here

from gpt.model import GPT
from gpt.train import memory, setup
from gpt.train.budget import Progress
from gpt.train.optim import OptimConfig
from gpt.train.ranks import Ranks
from gpt.train.setup import micro_batch_size


def test_the_memory_line_names_its_four_parts(made, tmp_path):
    said = train_here("tiny", "--data", made / "data", "--out", tmp_path / "out", *EIGHT_STEPS).stderr
    line = next(line for line in said.splitlines() if line.startswith("info: memory: "))
    assert all(f"{part} " in line for part in ("weights", "gradients", "optimizer", "activations"))


def test_profile_writes_a_chrome_trace_and_a_table(made, tmp_path):
    out = tmp_path / "out"
    run = train_here("tiny", "--data", made / "data", "--out", out, *EIGHT_STEPS, "--profile")
    trace = json.loads((out / "trace.json").read_text())
    assert any("addmm" in event.get("name", "") for event in trace["traceEvents"])
    assert "Self CPU" in run.stderr


@pytest.mark.parametrize(
    ("given", "of_checkpoint", "size"),
    [
        (4, 8, 4),
        (0, 8, 8),  # a run that continues keeps its sums in the same order
        (0, 5, 6),  # but not by a size that does not divide the batch any more
        (0, 0, 6),
    ],
)
def test_the_micro_batch_is_the_given_one_the_checkpoints_or_what_fits(monkeypatch, given, of_checkpoint, size):
    monkeypatch.setattr(memory, "choose_micro_batch", lambda *_: 6)
    batch = SimpleNamespace(global_batch_size=24, micro_batch_size=given)
    config = SimpleNamespace(batch=batch, model=None, optim=OptimConfig())
    machine = SimpleNamespace(ranks=Ranks(), dtype=torch.float32, device=torch.device("cpu"), sharers=lambda: 1)
    progress = Progress(micro_batch_size=of_checkpoint)
    assert micro_batch_size(config, progress, SimpleNamespace(vocab_size=257), machine) == size


def test_fault_132_a_compiler_that_fails_is_one_line_and_exit_2(made, tmp_path, monkeypatch):
    from torch._inductor.exc import CppCompileError, InductorError

    def fail(*_):
        raise InductorError(CppCompileError(["g++", "x.cpp"], "Python.h: No such file or directory"), None)

    monkeypatch.setattr(setup, "warm_up", fail)
    monkeypatch.setattr(GPT, "compile", lambda self: None)
    done = train_here("tiny", "--data", made / "data", "--out", tmp_path / "out", *EIGHT_STEPS, "--compile", "on")
    assert (done.code, done.last) == (
        2,
        "error: compile on: the compiler failed (C++ compile error); use --compile off",
    )
