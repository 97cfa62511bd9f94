"""Causal attention with its weights kept: values and gradients against exact arithmetic."""

import pytest
import torch
import torch.nn.functional as F

from gpt.attention import KeptWeights, causal_attention, keeps_weights

CPU = torch.device("cpu")


def parts(length, dtype=torch.float32, scale=1.0):
    """q, k, v of 2 rows, 3 heads of width 16, as views of one tensor, as the model makes them."""
    draw = torch.Generator().manual_seed(length)
    x = (scale * torch.randn(2, length, 3, 3, 16, generator=draw)).to(dtype).requires_grad_()
    return x, x.permute(2, 0, 3, 1, 4)


def exact(q, k, v):
    """Attention position by position: (B, H, T, D)."""
    rows = []
    for t in range(q.shape[2]):
        scores = (k[:, :, : t + 1] @ q[:, :, t, :, None])[..., 0] / 4  # the root of the width
        rows.append((scores.softmax(-1)[..., None] * v[:, :, : t + 1]).sum(2))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("length", [1, 2, 37])
def test_kept_weights_give_values_and_gradients_of_attention(length):
    x, (q, k, v) = parts(length)
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
    wanted = exact(q.double(), k.double(), v.double())
    found = KeptWeights.apply(q, k, v)
    torch.testing.assert_close(found, wanted.float(), atol=2e-6, rtol=0)
    [expected] = torch.autograd.grad(wanted, x, upstream.double())
    torch.testing.assert_close(torch.autograd.grad(found, x, upstream)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.0])  # scores have its square as standard deviation
def test_in_bf16_training_keeps_the_weights_and_errs_no_more_than_the_fused_kernel(scale):
    x, (q, k, v) = parts(256, torch.bfloat16, scale)
    with torch.autocast("cpu", torch.bfloat16):
        kept = causal_attention(q, k, v)
    assert "KeptWeights" in str(kept.grad_fn)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    wanted = exact(q.double(), k.double(), v.double())
    [expected] = torch.autograd.grad(wanted.sum(), x)
    errors = [error(y, wanted) + error(torch.autograd.grad(y.sum(), x)[0], expected) for y in (kept, fused)]
    assert errors[0] < 1.3 * errors[1]


def error(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def test_where_it_does_not_pay_the_fused_kernel_is_used():
    assert keeps_weights(512, torch.bfloat16, CPU, 0.0)
    assert not keeps_weights(513, torch.bfloat16, CPU, 0.0)  # too much memory
    assert not keeps_weights(64, torch.float32, CPU, 0.0)
    assert not keeps_weights(64, torch.bfloat16, CPU, 0.1)
    assert not keeps_weights(64, torch.bfloat16, torch.device("cuda"), 0.0)
    _, (q, k, v) = parts(64, torch.float32)
    assert "FlashAttention" in str(causal_attention(q, k, v).grad_fn)
