"""Undoes one technique of the training step with each function, to measure what the technique gains.

`train_speed.py --impl ours:bf16:no-loss` measures a program in which `loss()` was called. A function replaces a name of
the product before the model is built; it fails if the product no longer has that name."""

import torch
import torch.nn.functional as F

import train
from gpt import model
from gpt.loss import IGNORED
from gpt.model import REFERENCE
from gpt.train import runtime, setup


def loss() -> None:
    """Computes the loss with torch's cross_entropy from logits in fp32."""

    def cross_entropy(x, weight, targets, vocab_size, *_):
        logits = F.linear(x, weight)[:, :vocab_size].float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")

    replace(model, "cross_entropy", cross_entropy)


def kernels() -> None:
    """Uses torch's attention and GELU in place of the C++."""
    replace(runtime.Runtime, "ops", lambda *_: REFERENCE)


def pages() -> None:
    """Gives the memory of freed tensors back to the system."""
    replace(runtime, "keep_freed_memory", lambda: None)


def casts() -> None:
    """Casts the weights anew for every micro-batch."""

    def accumulate(state, batch, machine):
        total = torch.zeros((), device=machine.device)
        parts = batch.split(state.progress.micro_batch_size)
        for part in parts:
            with machine.autocast():
                share = state.model(part[:, :-1].contiguous(), part[:, 1:].contiguous()).mean() / len(parts)
            share.backward()
            total += share.detach()
        return total

    replace(train, "accumulate", accumulate)


class LoopAdamW(torch.optim.AdamW):
    """AdamW without the fused kernel, in a training step that passes it `found_inf`."""

    def step(self, _found_inf):
        super().step()


def fused() -> None:
    """Updates parameter by parameter, with several kernels each: torch's default on a CPU."""

    def make_optimizer(trained, config, *_):
        parameters = list(trained.parameters())
        groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay}]
        groups += [{"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
        return LoopAdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), foreach=False)

    replace(setup, "make_optimizer", make_optimizer)


def drop() -> None:
    """Fills gradients with zeros instead of dropping them."""
    original = setup.make_optimizer

    def make_optimizer(trained, *arguments):
        optimizer = original(trained, *arguments)
        optimizer.zero_grad = lambda: torch._foreach_zero_([p.grad for p in trained.parameters() if p.grad is not None])
        return optimizer

    replace(setup, "make_optimizer", make_optimizer)


def graph() -> None:
    """Launches every kernel of a step from the host, however small the model is."""
    replace(runtime, "launches_matter", lambda *_: False)


def padding() -> None:
    """Leaves the vocabulary without padding."""
    replace(model, "VOCAB_MULTIPLE", 1)


def determinism() -> None:
    """Allows operations that do not repeat to the bit."""
    replace(runtime, "be_deterministic", lambda: None)


def replace(owner, name, value):
    assert hasattr(owner, name), f"{owner.__name__} has no {name}: nothing would be undone"
    setattr(owner, name, value)
