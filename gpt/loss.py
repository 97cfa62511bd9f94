"""Cross-entropy over a large vocabulary: loss and gradient in one pass over the logits, which are there once, in the
precision of the products.

Shapes: N positions, C width, V vocabulary, P its padded size (P >= V)."""

import torch
import torch.nn.functional as F

IGNORED = -1  # a target that counts for nothing
CPU_ROWS, GPU_ROWS = 64, 2048  # positions at a time in float32: on a CPU they stay in its cache


def cross_entropy(x, weight, targets, vocab_size):
    """Losses (N,) in nats, float32, of logits x (N, C) @ weight (P, C).T over the first `vocab_size` of P rows; 0 where
    the target (N,) is IGNORED. Under autocast the products run in its precision."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled():
        losses, _ = losses_of(F.linear(x, weight), targets, vocab_size, gradient=False)
        return losses
    return OnePass.apply(x, weight, targets, vocab_size)


class OnePass(torch.autograd.Function):
    """Keeps, instead of logits, their gradient, written over them."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size):
        losses, gradient = losses_of(F.linear(x, weight), targets, vocab_size, gradient=True)
        ctx.save_for_backward(x, weight, gradient)
        return losses

    @staticmethod
    def backward(ctx, upstream):
        x, weight, gradient = ctx.saved_tensors
        upstream = upstream[:, None].to(x.dtype)
        return upstream * (gradient @ weight), gradient.T @ (upstream * x), None, None


def losses_of(logits, targets, vocab_size, gradient):
    """Losses (N,) of logits (N, P), and with `gradient` that of each loss by its logits, written over them."""
    if torch.compiler.is_compiling():
        rows = max(1, len(logits))
    else:
        rows = CPU_ROWS if logits.device.type == "cpu" else GPU_ROWS
    losses = []
    for some, its in zip(logits.split(rows), targets.split(rows), strict=True):
        counted = its != IGNORED
        its = its.where(counted, 0)[:, None]
        values = some[:, :vocab_size].float()
        total = values.logsumexp(-1, keepdim=True)
        losses.append((total - values.gather(1, its))[:, 0] * counted)
        if gradient:
            values = (values - total).exp_().scatter_add_(1, its, values.new_full(its.shape, -1.0))
            some[:, :vocab_size] = values * counted[:, None]
            some[:, vocab_size:] = 0
    return torch.cat(losses), logits
