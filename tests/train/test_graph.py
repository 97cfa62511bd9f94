"""Steps captured and replayed are to the bit those taken one by one: on a CPU, with a recorder for a CUDA graph."""

import copy

import pytest
import torch
from fake_gpu_helpers import GPU, FakeGpu, RunAtOnce
from graph_helpers import Recorded
from training_helpers import fingerprint, make_data, tiny_model, train_here

import train
from gpt.device import DTYPES
from gpt.model import ModelConfig, flops_per_token
from gpt.train import setup
from gpt.train.budget import LengthConfig, Progress
from gpt.train.graph import WARM_UPS, GraphedStep
from gpt.train.optim import LossScaler, OptimConfig, make_optimizer
from gpt.train.ranks import Ranks
from gpt.train.runtime import MachineConfig, Runtime, seed_step
from gpt.train.state import State

STEPS = WARM_UPS + 5
LENGTH = LengthConfig(max_steps=STEPS)


@pytest.fixture
def cpu():
    """A function from a precision to a Runtime on one thread; torch's settings are put back afterwards."""
    threads = torch.get_num_threads()
    yield lambda dtype: Runtime(MachineConfig(device="cpu", dtype=dtype, threads=1))
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def new_state(optimizer, scale, dropout):
    model = tiny_model().train()
    model.set_dropout(dropout)
    scaler = LossScaler("cpu", enabled=scale > 1)
    scaler.scale.fill_(scale)
    optimizer = make_optimizer(model, OptimConfig(optimizer=optimizer), torch.float32)
    return State(model, optimizer, scaler, Progress(micro_batch_size=2))


def changing(state):
    """The tensors that training changes."""
    moments = [value for kept in state.optimizer.state.values() for value in kept.values()]
    return [*state.model.parameters(), *moments, state.scaler.scale, state.scaler.finite_steps]


def take(step, number):
    """The numbers of step `number` of a run whose rate, a float32, is never the same."""
    seed_step(1, number)
    batch = torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(number))
    return step(batch, torch.tensor(1e-2 / (number + 1)).item())


def stepper_of(state, run):
    return lambda batch, lr: train.train_step(state, batch, lr, 0.5, run)


KINDS = [  # optimizer, precision, first scale of the loss, dropout
    ("adamw", "fp32", 1.0, 0.0),
    ("adamw", "fp32", 1.0, 0.1),
    ("muon", "fp32", 1.0, 0.0),
    ("adamw", "bf16", 1.0, 0.1),
    ("adamw", "fp32", 2.0**127, 0.0),
]


@pytest.mark.parametrize(("optimizer", "dtype", "scale", "dropout"), KINDS)
def test_captured_steps_are_those_taken_one_by_one(cpu, monkeypatch, optimizer, dtype, scale, dropout):
    monkeypatch.setattr("gpt.train.optim.SCALE_GROWTH_STEPS", 3)
    run = cpu(dtype)
    plain, state = new_state(optimizer, scale, dropout), new_state(optimizer, scale, dropout)
    monkeypatch.setattr("gpt.train.muon.host_asks", lambda device: False)  # as on a GPU
    step = GraphedStep(stepper_of(state, run), Recorded(), state.optimizer.zero_grad)
    wanted = torch.stack([take(stepper_of(plain, run), number) for number in range(STEPS)])
    found = torch.stack([take(step, number) for number in range(STEPS)])
    assert step.captured
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(a, b) for a, b in zip(changing(state), changing(plain), strict=True))
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert (not wanted[WARM_UPS:, 2].all()) == (scale > 1)  # the gate closes in replays too


@pytest.mark.parametrize(
    ("optimizer", "dtype"), [("adamw", "fp32"), ("adamw", "bf16"), ("adamw", "fp16"), ("muon", "fp16")]
)
def test_on_a_gpu_the_host_reads_nothing_in_a_step(cpu, optimizer, dtype):
    gpu, run, state = FakeGpu(), cpu("fp32"), new_state(optimizer, 2.0 if dtype == "fp16" else 1.0, dropout=0.1)
    run.dtype = DTYPES[dtype]
    step = GraphedStep(stepper_of(gpu.move(state), gpu.move(run)), RunAtOnce(), state.optimizer.zero_grad)
    with gpu:
        batch = torch.empty(4, 33, dtype=torch.int64, device=GPU)
        numbers = [step(batch, 1e-3) for _ in range(WARM_UPS + 1)]
    assert step.captured
    assert {(each.shape, each.dtype, each.device) for each in numbers} == {((3,), torch.float32, GPU)}
    assert gpu.product_types() == {run.dtype}
    assert {tensor.dtype for tensor in changing(state)} == {torch.float32}


def test_a_step_that_cannot_be_captured_goes_on_with_one_note(cpu, capsys):
    run = cpu("fp32")
    plain, state = new_state("adamw", 1.0, 0.1), new_state("adamw", 1.0, 0.1)

    def reading(batch, lr):
        state.model.ln_f.bias.register_hook(lambda gradient: gradient * gradient.isfinite().all().item())
        return stepper_of(state, run)(batch, lr)

    step = GraphedStep(reading, Recorded(), state.optimizer.zero_grad)
    wanted = [take(stepper_of(plain, run), number).tolist() for number in range(STEPS)]
    assert [take(step, number).tolist() for number in range(STEPS)] == wanted
    assert not step.captured
    assert all(torch.equal(a, b) for a, b in zip(changing(state), changing(plain), strict=True))
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "CUDA graph" in line] == [
        "warning: no CUDA graph, steps are launched one by one: the host waits"
    ]


def test_a_batch_of_another_shape_is_refused(cpu):
    state = new_state("adamw", 1.0, 0.0)
    step = GraphedStep(stepper_of(state, cpu("fp32")), Recorded(), state.optimizer.zero_grad)
    step(torch.zeros(4, 33, dtype=torch.int64), 1e-3)
    with pytest.raises(AssertionError, match="one shape"):
        step(torch.zeros(2, 33, dtype=torch.int64), 1e-3)


# ---- whole runs


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_captured_run_repeats_to_the_bit_killed_or_not_and_equals_a_plain_one(tmp_path, monkeypatch, optimizer):
    data = make_data(tmp_path / "data")
    words = ("tiny", "--data", data, "--optimizer", optimizer, "--dropout", "0.1", "--save_every", "6")
    words += ("--eval_every", "3", "--sample_every", "5", "--log_every", "1")
    assert train_here(*words, "--out", tmp_path / "plain", "--max_steps", "14").code == 0
    recorded = record_all_runs(monkeypatch, reads=optimizer == "muon")
    for out, *lengths in (("straight", 14), ("resumed", 6, 14)):
        for length in lengths:
            done = train_here(*words, "--out", tmp_path / out, "--max_steps", str(length))
            assert done.code == 0, done.stderr
            assert "no CUDA graph" not in done.stderr
    assert len(recorded) == 3 and all(graph.operations for graph in recorded)
    plain = fingerprint(tmp_path / "plain", 14)
    assert fingerprint(tmp_path / "straight", 14) == plain
    assert fingerprint(tmp_path / "resumed", 14) == plain


def record_all_runs(monkeypatch, reads):
    """Let train.py capture its steps on a CPU; the list that the recorders go to."""
    recorded, stepper = [], setup.stepper

    def recording(config, state, *rest):
        recorded.append(Recorded(reads))
        return stepper(config, state, *rest)

    monkeypatch.setattr(setup, "stepper", recording)
    monkeypatch.setattr(setup, "CudaGraph", lambda device: recorded[-1])
    monkeypatch.setattr(Runtime, "captures", lambda *_: True)
    return recorded


def test_neither_a_compiled_run_nor_a_profile_is_captured(cpu, monkeypatch):
    run, state = cpu("fp32"), new_state("adamw", 1.0, 0.0)
    monkeypatch.setattr(Runtime, "captures", lambda *_: True)
    monkeypatch.setattr(setup, "CudaGraph", lambda device: "a graph")
    plain, profiled = (train.TrainConfig(data="none", length=LENGTH, profile=on) for on in (False, True))
    assert setup.stepper(plain, state, run, False, True, train.train_step).graph == "a graph"
    assert not isinstance(setup.stepper(plain, state, run, True, True, train.train_step), GraphedStep)
    assert not isinstance(setup.stepper(plain, state, run, False, False, train.train_step), GraphedStep)  # examples
    assert not isinstance(setup.stepper(profiled, state, run, False, True, train.train_step), GraphedStep)


# ---- where


def test_small_models_are_captured_where_a_gpu_would_wait_for_its_host(cpu, monkeypatch):
    run = cpu("fp32")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    shapes = {  # layers, width, context, sequences of a micro-batch, vocabulary
        "shakespeare-cpu": (4, 128, 64, 24, 257),
        "demo": (4, 192, 128, 16, 2048),
        "shakespeare": (6, 384, 256, 64, 257),
        "gpt2, one sequence": (12, 768, 1024, 1, 50257),
        "gpt2": (12, 768, 1024, 12, 50257),
        "gpt2-medium": (24, 1024, 1024, 8, 50257),
    }
    found = {name: captures(run, *shape) for name, shape in shapes.items()}
    assert not any(found.values())  # on a CPU
    run.device = torch.device("cuda")
    found = [name for name, shape in shapes.items() if captures(run, *shape)]
    assert found == ["shakespeare-cpu", "demo", "shakespeare", "gpt2, one sequence"]
    run.ranks = copy.copy(Ranks())
    run.ranks.size = 2
    assert not captures(run, *shapes["demo"])


def captures(run, layers, width, context, sequences, vocabulary):
    config = ModelConfig(n_layer=layers, n_embd=width, block_size=context)
    return run.captures(flops_per_token(config, vocabulary) * context * sequences, layers)
