"""Cross-entropy over a large vocabulary: loss and gradient in one pass over the logits.

Autograd would keep the logits in float32, and then their gradient too. Here the logits exist once, in the precision of
the products, and the forward pass overwrites them with their gradient:

    logits = x @ weight.T                  (N, P)
    for a few rows at a time, in float32:
        loss = logsumexp(logits) - logits[target]
        logits = softmax(logits) - onehot(target)
    backward:  d x = upstream * (logits @ weight),  d weight = logits.T @ (upstream * x)

Where the weight is frozen, only d x is needed. The forward pass computes it, without the factor `upstream`, for some
rows of x at a time: the logits of all rows never exist at once.

Shapes: N positions, C width, V vocabulary, P its padded size (P >= V)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -1  # a target without loss
NOT_LEARNED = ~0  # a padding token, as inputs_and_targets takes it: id 0, without loss
CPU_ROWS, GPU_ROWS = 64, 512  # rows at a time in float32: on a CPU they stay in its cache
FROZEN_ROWS = {"cpu": 256, "cuda": 2048}  # rows of x at a time where the weight is frozen; on other devices as on CUDA
CPU_LOGITS = 2**19  # at least so many logits at a time on a CPU: each operation on fewer costs more than it computes


def inputs_and_targets(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the ids (B, T) that a model reads and the targets (B, T) of `tokens` (B, T + 1), in which a token that is
    not to be learned is ~id, which is negative: its target is IGNORED."""
    ids = tokens[:, :-1]
    return ids.where(ids >= 0, ~ids), tokens[:, 1:].clamp(min=IGNORED)


def losses_of_logits(logits: Tensor, targets: Tensor, vocab_size: int, gradient: bool = False) -> Tensor:
    """Returns the losses (N,) in nats, float32, of logits (N, P) at targets (N,); the softmax includes the first
    `vocab_size` columns. If `gradient`, overwrites the logits with the gradient of each row's loss."""
    if torch.compiler.is_compiling():
        return compiled_losses_of_logits(logits, targets, vocab_size, gradient)
    rows = max(CPU_ROWS, CPU_LOGITS // vocab_size) if logits.device.type == "cpu" else GPU_ROWS
    in_place = gradient and logits.dtype == torch.float32
    buffer = torch.empty(0 if in_place else min(rows, len(logits)), vocab_size, device=logits.device)
    losses = torch.empty(len(logits), device=logits.device)
    chunks = zip(logits.split(rows), targets[:, None].split(rows), losses.split(rows), strict=True)
    for logits_chunk, target, loss in chunks:
        values = logits_chunk[:, :vocab_size]
        if not in_place:
            values = buffer[: len(values)].copy_(values)
        largest, at_target = values.amax(-1, keepdim=True), values.gather(1, target)
        sums = values.sub_(largest).exp_().sum(-1, keepdim=True)
        loss.copy_((largest - at_target + sums.log())[:, 0])
        if gradient:
            values.div_(sums).scatter_add_(1, target, values.new_full(target.shape, -1.0))
            if not in_place:
                logits_chunk[:, :vocab_size] = values
            logits_chunk[:, vocab_size:] = 0
    return losses


def compiled_losses_of_logits(logits: Tensor, targets: Tensor, vocab_size: int, gradient: bool) -> Tensor:
    """Computes what `losses_of_logits` computes, in a form that the compiler turns into loops without float32 logits in
    memory."""
    values = logits[:, :vocab_size].float().log_softmax(-1)
    if gradient:
        is_target = torch.arange(vocab_size, device=targets.device) == targets[:, None]
        logits[:, :vocab_size] = values.exp() - is_target.to(values.dtype)
        logits[:, vocab_size:] = 0
    return -values.gather(1, targets[:, None])[:, 0]


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Returns the losses (N,) in nats, float32, of logits x (N, C) @ weight (P, C).T at targets (N,); 0 where a target
    is IGNORED. The softmax covers the first `vocab_size` rows of the weight. Autocast sets the precision of the
    products."""
    device, is_frozen = x.device.type, not weight.requires_grad
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    counted = targets != IGNORED
    targets = targets.where(counted, 0)
    if is_frozen:
        losses = FrozenWeight.apply(x, weight, targets, vocab_size, torch.is_grad_enabled())
    elif torch.is_grad_enabled():
        losses = OnePass.apply(x, weight, targets, vocab_size)
    else:
        losses = losses_of_logits(F.linear(x, weight), targets, vocab_size)
    return losses * counted


def frozen_rows(device: torch.device) -> int:
    """Returns how many rows of x have logits at the same time where the weight is frozen."""
    return FROZEN_ROWS.get(device.type, FROZEN_ROWS["cuda"])


class OnePass(torch.autograd.Function):
    """Computes the losses, and keeps the gradient of the logits for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        logits = F.linear(x, weight)
        losses = losses_of_logits(logits, targets, vocab_size, gradient=True)
        ctx.save_for_backward(x, weight, logits)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, gradient = ctx.saved_tensors
        upstream = upstream[:, None]  # float32: in bf16, all gradients would have the same rounding error
        to_x, scaled = (upstream * (gradient @ weight)).to(x.dtype), (upstream * x).to(x.dtype)
        return to_x, gradient.T @ scaled, None, None


class FrozenWeight(torch.autograd.Function):
    """Computes the losses where the weight is frozen. With `gradient`, keeps the gradient of x for the backward
    pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, gradient: bool) -> Tensor:
        rows, losses, to_x = min(frozen_rows(x.device), len(x)), [], torch.empty_like(x)
        buffer = x.new_empty(rows, len(weight))  # one for all: glibc's heap finds no second use for so large a piece
        for x_chunk, target, out in zip(x.split(rows), targets.split(rows), to_x.split(rows), strict=True):
            logits = torch.mm(x_chunk, weight.t(), out=buffer[: len(x_chunk)])
            losses.append(losses_of_logits(logits, target, vocab_size, gradient))
            if gradient:
                torch.mm(logits, weight, out=out)
        ctx.save_for_backward(to_x)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (to_x,) = ctx.saved_tensors
        return (upstream[:, None] * to_x).to(to_x.dtype), None, None, None, None
