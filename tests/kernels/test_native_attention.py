"""The C++ attention of a training step against exact arithmetic, and against the plain torch that it replaces."""

import math

import pytest
import torch

from gpt.attention import causal_attention
from gpt.kernels import build
from gpt.kernels.native_attention import NativeAttention
from gpt.kernels.select import native_kernels, native_names
from gpt.model import GPT, REFERENCE, ModelConfig, Ops
from gpt.train.runtime import MachineConfig, Runtime

SHAPES = [  # rows, positions, heads, width of a head
    (1, 1, 1, 2),
    (2, 2, 3, 8),
    (3, 37, 3, 18),
    (2, 64, 2, 16),
    (1, 65, 2, 80),
    (2, 130, 2, 34),
    (1, 256, 3, 64),
    (1, 300, 1, 128),
]
TYPES = [(torch.float32, 5e-6), (torch.bfloat16, 0.01)]  # and a bound for their relative errors


@pytest.fixture
def ours(kernels):
    return NativeAttention(build.load_library(build.TRAINING))


def drawn(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# ---- attention


def exact(qkv, heads):
    """Attention in float64, position by position."""
    rows, positions, width = qkv.shape
    q, k, v = qkv.double().view(rows, positions, 3, heads, -1).permute(2, 0, 3, 1, 4)
    out = []
    for t in range(positions):
        scores = (k[:, :, : t + 1] @ q[:, :, t, :, None])[..., 0] / math.sqrt(q.shape[-1])
        out.append((scores.softmax(-1)[..., None] * v[:, :, : t + 1]).sum(2))
    return torch.stack(out, 1).reshape(rows, positions, width // 3)


def passes(attention, qkv, heads, upstream):
    """(values, gradient of qkv)"""
    qkv = qkv.clone().requires_grad_()
    out = attention(qkv, heads)
    assert ("AttentionFunction" in str(out.grad_fn)) == isinstance(attention, NativeAttention)
    return out.detach(), torch.autograd.grad(out, qkv, upstream.to(out.dtype))[0]


def error(found, wanted):
    return (found.double() - wanted).norm() / (wanted.norm() + 1e-3)


@pytest.mark.parametrize(("dtype", "bound"), TYPES)
@pytest.mark.parametrize("scale", [1.0, 3.0])  # scores have its square as standard deviation
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_and_its_gradient_err_no_more_than_torchs_fused_kernel(shape, scale, dtype, bound, ours):
    rows, positions, heads, width = shape
    qkv = drawn(rows, positions, 3 * heads * width, seed=positions, scale=scale).to(dtype)
    upstream = drawn(rows, positions, heads * width, seed=1).to(dtype)
    wanted = passes(exact, qkv.double(), heads, upstream)
    fused = passes(causal_attention, qkv, heads, upstream)
    for found, theirs, right in zip(passes(ours, qkv, heads, upstream), fused, wanted, strict=True):
        assert error(found, right) <= 1.5 * error(theirs, right) + bound / 10
        assert error(found, right) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_gives_a_position_nothing_of_later_ones_and_a_row_nothing_of_others(dtype, ours):
    qkv, upstream = drawn(2, 100, 3 * 64).to(dtype), drawn(2, 100, 64, seed=1).to(dtype)
    other = qkv.clone()
    other[0, 71:], other[1] = 5.0, -5.0
    before, after = ours(qkv, 2), ours(other, 2)
    assert torch.equal(before[0, :71], after[0, :71])
    assert not torch.equal(before[0, 71:], after[0, 71:])
    upstream[0, 71:] = 0
    gradient = passes(ours, qkv, 2, upstream)[1]
    assert not gradient[0, 71:].any()
    assert gradient[0, :71].any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_the_same_bits_whatever_the_threads(dtype, ours, one_thread):
    qkv, upstream = drawn(3, 150, 3 * 96).to(dtype), drawn(3, 150, 96, seed=1).to(dtype)
    one = passes(ours, qkv, 3, upstream)
    torch.set_num_threads(2)
    assert all(map(torch.equal, one, passes(ours, qkv, 3, upstream)))


def test_what_attention_reads_need_not_be_contiguous(ours):
    wide = drawn(2, 40, 200).bfloat16()
    upstream = drawn(32, 40, 2).bfloat16().permute(2, 1, 0)
    cut = wide[..., 4:100]
    found = passes(ours, cut, 2, upstream)
    assert all(map(torch.equal, found, passes(ours, cut.contiguous(), 2, upstream.contiguous())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
def test_attention_hides_no_damage(part, value, dtype, ours):
    qkv, upstream = drawn(1, 50, 3 * 32).to(dtype), drawn(1, 50, 32, seed=1).to(dtype)
    qkv[0, 20, 32 * part + 3] = value
    values, gradient = passes(ours, qkv, 1, upstream)
    assert values[0, :16].isfinite().all()  # the 16 that are read together may see each other's
    assert not values[0, 20].isfinite().all()
    assert gradient.isnan().any()


def test_attention_leaves_to_torch_what_it_does_not_take(ours):
    for qkv in (drawn(1, 5, 3 * 14).double(), drawn(1, 5, 3 * 14).bfloat16()):  # another type; an odd width in bf16
        assert torch.equal(ours(qkv, 2), causal_attention(qkv, 2))
    torch.manual_seed(0)
    dropped = ours(torch.ones(1, 64, 3 * 16).bfloat16(), 1, 0.5)
    assert (dropped != 1).any()


# ---- the model with them


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 5e-6), ("bf16", 0.02)])
def test_a_models_losses_and_gradients_are_those_of_plain_torch(dtype, bound, kernels):
    run = Runtime(MachineConfig(device="cpu", dtype=dtype, threads=1))
    ids = torch.randint(211, (3, 41), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    targets[0, :10] = -1
    found, config = [], ModelConfig(2, 3, 48, 40)
    for ops in (REFERENCE, Ops(**native_kernels(native_names(config, run.dtype), wait=False))):
        torch.manual_seed(0)
        model = GPT(config, 211)
        with run.autocast():
            losses = model(ids[:, :-1], targets, ops=ops)
        losses.sum().backward()
        found.append([losses.detach(), *(p.grad for p in model.parameters())])
    for theirs, mine in zip(*found, strict=True):
        assert (mine - theirs).norm() <= bound * theirs.norm()
    assert not torch.equal(found[0][0], found[1][0])
