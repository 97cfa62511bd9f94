"""Checkpointed activations: the same weights to the bit, and fewer tensors kept for the backward pass."""

from dataclasses import replace

import pytest
import torch
from training_helpers import make_data, make_examples, metrics, random_examples, sha256, tiny_model, train_here

import train
from gpt.kernels.select import native_kernels
from gpt.model import REFERENCE, Ops
from gpt.train.budget import Progress
from gpt.train.optim import LossScaler, OptimConfig, make_optimizer
from gpt.train.recompute import recomputed
from gpt.train.state import State


def trained(ops, batches, cpu, dropout):
    """Returns the weights of a small model after a step on each batch, and their losses and norms."""
    model = tiny_model()
    model.set_dropout(dropout)
    state = State(
        model.train(),
        make_optimizer(model, OptimConfig()),
        LossScaler(cpu.device, False),
        Progress(micro_batch_size=2),
        ops,
    )
    torch.manual_seed(7)
    numbers = [train.train_step(state, batch, 1e-2, 1.0, cpu) for batch in batches]
    return [*model.parameters(), *numbers]


def windows():
    return [torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(n)) for n in range(3)]


def padded_examples():
    short, long = torch.randint(257, (2, 2, 25), generator=torch.Generator().manual_seed(1))
    return [[~short[:, :9], long], [long, short[:, :17]]]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("batches", [windows, padded_examples])
@pytest.mark.parametrize("native", [False, True], ids=("eager", "native"))
def test_the_weights_after_some_steps_are_the_same_to_the_bit(native, batches, dropout, cpu, kernels):
    ops = Ops(**native_kernels(["attention", "gelu"], wait=True)) if native else REFERENCE
    assert (ops != REFERENCE) == native
    plain = trained(ops, batches(), cpu, dropout)
    less = trained(replace(ops, block=recomputed), batches(), cpu, dropout)
    assert all(torch.equal(a, b) for a, b in zip(plain, less, strict=True))


def test_a_run_with_it_is_the_same_to_the_bit_and_may_be_continued_without_it(tmp_path):
    settings = ("--max_steps", 6, "--save_every", 3, "--dropout", "0.1", "--micro_batch_size", 4, "--log_every", 1)
    windows, examples = make_data(tmp_path / "windows"), tmp_path / "examples"
    make_examples(examples, random_examples(20, 30), random_examples(5, 30))
    for data in (windows, examples):
        hashes = []
        for name, flags in {"plain": (), "less": ("--checkpoint_activations",)}.items():
            out = tmp_path / f"{data.name}-{name}"
            done = train_here("tiny", "--data", data, "--out", out, *settings, *flags)
            assert done.code == 0, done.stderr
            hashes.append((sha256(out / "step-000000006/model.safetensors"), [r["loss"] for r in metrics(out)]))
        assert hashes[0] == hashes[1]
    done = train_here("--resume", tmp_path / "windows-less", "--no_checkpoint_activations", "--max_steps", 7)
    assert done.code == 0, done.stderr
    assert "setting changed" not in done.stderr and "warning" not in done.stderr


def test_in_bf16_the_gradients_are_the_same_to_the_bit(cpu):
    cpu.dtype = torch.bfloat16
    plain, less = (trained(ops, windows(), cpu, 0.1) for ops in (REFERENCE, Ops(block=recomputed)))
    assert all(torch.equal(a, b) for a, b in zip(plain, less, strict=True))


def test_only_the_inputs_of_blocks_are_kept():
    model, kept = tiny_model(n_layer=4), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids, counts = torch.zeros(2, 32, dtype=torch.int64), []
    for ops in (REFERENCE, Ops(block=recomputed)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(ids, ids, ops=ops)
        counts.append(len(kept))
    assert counts[1] < counts[0] / 4
