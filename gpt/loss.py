"""Cross-entropy over a large vocabulary: loss and gradient in one pass over the logits, which are there once, in the
precision of the products.

Shapes: N positions, C width, V vocabulary, P its padded size (P >= V)."""

import torch
import torch.nn.functional as F

from gpt.fp8 import fp8_linear

IGNORED = -1  # a target that counts for nothing
CPU_ROWS, GPU_ROWS = 64, 512  # positions at a time in float32: on a CPU they stay in its cache


def losses_of(logits, targets, vocab_size, gradient):
    """Losses (N,) of logits (N, P), which with `gradient` become that of each row's loss by them."""
    if torch.compiler.is_compiling():  # then all is one loop over logits, and nothing is there in float32
        return compiled_losses_of(logits, targets, vocab_size, gradient)
    rows = CPU_ROWS if logits.device.type == "cpu" else GPU_ROWS
    buffer = torch.empty(min(rows, len(logits)), vocab_size, device=logits.device)
    losses = torch.empty(len(logits), device=logits.device)
    for some, its, found in zip(logits.split(rows), targets[:, None].split(rows), losses.split(rows), strict=True):
        values = buffer[: len(some)].copy_(some[:, :vocab_size])
        largest, at_target = values.amax(-1, keepdim=True), values.gather(1, its)
        sums = values.sub_(largest).exp_().sum(-1, keepdim=True)
        found.copy_((largest - at_target + sums.log())[:, 0])
        if gradient:
            some[:, :vocab_size] = values.div_(sums).scatter_add_(1, its, values.new_full(its.shape, -1.0))
            some[:, vocab_size:] = 0
    return losses


def compiled_losses_of(logits, targets, vocab_size, gradient):
    """The same, for the compiler to make one loop of."""
    values = logits[:, :vocab_size].float().log_softmax(-1)
    if gradient:
        is_target = torch.arange(vocab_size, device=targets.device) == targets[:, None]
        logits[:, :vocab_size] = values.exp() - is_target.to(values.dtype)
        logits[:, vocab_size:] = 0
    return -values.gather(1, targets[:, None])[:, 0]


def cross_entropy(x, weight, targets, vocab_size, fp8=False, losses_of=losses_of):
    """Losses (N,) in nats, float32, of logits x (N, C) @ weight (P, C).T over the first `vocab_size` of P rows; 0 where
    the target (N,) is IGNORED. Under autocast the products run in its precision; with `fp8` those that have a gradient
    are made of 8-bit numbers: of the logits, not of the gradient. `losses_of` is the function above, or another of its
    meaning."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    if torch.is_grad_enabled():
        return counted_only(lambda its: OnePass.apply(x, weight, its, vocab_size, fp8, losses_of), targets)
    return losses_of_logits(F.linear(x, weight), targets, vocab_size, losses_of)


def losses_of_logits(logits, targets, vocab_size, losses_of=losses_of):
    """Losses (N,) of logits (N, P) without gradients; 0 where the target is IGNORED."""
    return counted_only(lambda its: losses_of(logits, its, vocab_size, gradient=False), targets)


def counted_only(losses, targets):
    """`losses` of targets that all exist; 0, without gradient, where one is IGNORED."""
    counted = targets != IGNORED
    return losses(targets.where(counted, 0)) * counted


class OnePass(torch.autograd.Function):
    """Keeps, instead of logits, their gradient, written over them."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, fp8, losses_of):
        logits = fp8_linear(x, weight) if fp8 else F.linear(x, weight)
        losses = losses_of(logits, targets, vocab_size, gradient=True)
        ctx.save_for_backward(x, weight, logits)
        return losses

    @staticmethod
    def backward(ctx, upstream):
        x, weight, gradient = ctx.saved_tensors
        upstream = upstream[:, None]  # stays float32: rounded, it would be one error in all gradients
        to_x, scaled = (upstream * (gradient @ weight)).to(x.dtype), (upstream * x).to(x.dtype)
        return to_x, gradient.T @ scaled, None, None, None, None
