"""What is made ready before the first step: the micro-batch size, the profile, the compiled model, and what is said."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from fake_gpu_helpers import GPU, FakeGpu
from training_helpers import EIGHT_STEPS, metrics, tiny_model, train_here

from gpt.model import GPT
from gpt.train import memory, setup
from gpt.train.budget import Progress
from gpt.train.lora import LoraConfig
from gpt.train.optim import OptimConfig
from gpt.train.ranks import Ranks
from gpt.train.runtime import MachineConfig
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
    config = SimpleNamespace(batch=batch, model=None, optim=OptimConfig(), lora=LoraConfig(), machine=MachineConfig())
    machine = SimpleNamespace(ranks=Ranks(), dtype=torch.float32, device=torch.device("cpu"), sharers=lambda: 1)
    corpus = SimpleNamespace(dataset=SimpleNamespace(has_examples=False))
    start = SimpleNamespace(config=config, progress=Progress(micro_batch_size=of_checkpoint), corpus=corpus)
    assert micro_batch_size(start, SimpleNamespace(vocab_size=257), machine) == size


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


def test_a_compiled_model_is_one_graph_in_training_and_one_in_evaluation(made, tmp_path, monkeypatch):
    graphs = []
    keep = functools.partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    monkeypatch.setattr(torch, "compile", functools.partial(keep, fullgraph=True))
    words = ("tiny", "--data", made / "data", *EIGHT_STEPS, "--dropout", "0.1", "--eval_tokens", "128")
    losses = []
    for compiled in ("off", "on"):
        out = tmp_path / compiled
        done = train_here(*words, "--out", out, "--compile", compiled)
        assert done.code == 0, done.stderr
        losses.append([record["val_loss"] for record in metrics(out) if "val_loss" in record])
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    assert len(graphs) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_a_compiled_model_is_one_graph(dtype):
    graphs, gpu, model = [], FakeGpu(), tiny_model(vocab_size=1000)
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    gpu.move(model)
    with gpu.without_checks(), torch.autocast("cuda", dtype):
        ids = torch.empty(3, 32, dtype=torch.int64, device=GPU)
        losses = compiled(ids, ids)
    assert (losses.shape, losses.dtype, losses.device) == ((3, 32), torch.float32, GPU)
    assert len(graphs) == 1
