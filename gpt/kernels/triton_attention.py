"""Attention of one new token per row over a static cache, as one Triton kernel that also appends the token's key and
value. The plain-torch version, attention.cached_attention, takes eleven kernels and reads the whole cache.

Shapes: R rows, H heads, S cache positions, D width of a head, C = H D."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt.attention import LayerCache

BLOCK = 64  # positions read at once


@triton.jit
def begin(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """With programmatic dependent launch: waits until all earlier kernels have written their results, and lets the next
    kernel start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    qkv, keys, values, positions, parts, counters, out, H, S,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Computes one of SPLITS parts of one row and head. Stores the new key and value in the cache, if its position is
    in this part, and attends to the part's positions, block by block with a running maximum and sum, as in
    FlashAttention (Dao et al. 2022, arXiv:2205.14135). The program that ends last combines the parts."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane = tl.arange(0, WIDTH)  # WIDTH: D rounded up to a power of two
    exists = lane < D
    begin(PDL)
    new = qkv + row * 3 * H * D + head * D + lane
    query = tl.load(new, mask=exists, other=0.0).to(tl.float32) * D**-0.5
    last = tl.load(positions + row)
    base = (row * H + head).to(tl.int64) * S * D
    span = tl.cdiv(tl.cdiv(last + 1, SPLITS), BLOCK) * BLOCK
    first = split * span
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    summed = tl.zeros((WIDTH,), tl.float32)
    if (last >= first) & (last < first + span):
        key = tl.load(new + H * D, mask=exists, other=0.0)
        value = tl.load(new + 2 * H * D, mask=exists, other=0.0)
        tl.store(keys + base + last * D + lane, key, mask=exists)
        tl.store(values + base + last * D + lane, value, mask=exists)
        maximum = tl.sum(query * key.to(tl.float32), axis=0)
        total += 1.0
        summed += value.to(tl.float32)
    end = tl.minimum(first + span, last)
    for start in tl.range(first, end, BLOCK, num_stages=3):
        position = start + tl.arange(0, BLOCK)
        inside = position < end
        where = base + position[:, None] * D + lane[None, :]
        mask = inside[:, None] & exists[None, :]
        key = tl.load(keys + where, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(values + where, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(inside, tl.sum(key * query[None, :], axis=1), float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        weights, correction = tl.exp(scores - new_maximum), tl.exp(maximum - new_maximum)
        summed = summed * correction + tl.sum(weights[:, None] * value, axis=0)
        total = total * correction + tl.sum(weights, axis=0)
        maximum = new_maximum
    target = out + (row * H + head) * D + lane
    if SPLITS == 1:
        tl.store(target, (summed / total).to(out.dtype.element_ty), mask=exists)
    else:
        part = parts + (row * H + head) * SPLITS * (WIDTH + 2)
        tl.store(part + split * WIDTH + lane, summed)
        tl.store(part + SPLITS * WIDTH + split, maximum)
        tl.store(part + SPLITS * WIDTH + SPLITS + split, total)
        tl.debug_barrier()  # all threads have stored before one of them counts
        if tl.atomic_add(counters + row * H + head, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(counters + row * H + head, 0)
            s = tl.arange(0, SPLITS)
            maxima = tl.load(part + SPLITS * WIDTH + s, cache_modifier=".cg")
            totals = tl.load(part + SPLITS * WIDTH + SPLITS + s, cache_modifier=".cg")
            share = tl.where(totals > 0, tl.exp(maxima - tl.max(maxima, axis=0)), 0.0)
            sums = tl.load(part + s[:, None] * WIDTH + lane[None, :], cache_modifier=".cg")
            result = tl.sum(sums * share[:, None], axis=0) / tl.sum(totals * share, axis=0)
            tl.store(target, result.to(out.dtype.element_ty), mask=exists)


def decode_attention(qkv: Tensor, heads: int, layer: LayerCache, pdl: bool = False) -> Tensor:
    """Does what attention.cached_attention does for one new token per row: appends the keys and values of qkv
    (R, 1, 3 C) to the cache and returns the attention (R, 1, C)."""
    rows, _, capacity, width = layer.keys.shape
    splits = splits_for(rows * heads)
    padded = 1 << (width - 1).bit_length()
    parts = torch.empty(rows * heads * splits * (padded + 2), device=qkv.device)
    counters = torch.zeros(rows * heads, dtype=torch.int32, device=qkv.device)
    out = torch.empty(rows, 1, heads * width, dtype=qkv.dtype, device=qkv.device)
    attend[(rows, heads, splits)](
        qkv.contiguous(), layer.keys, layer.values, layer.positions, parts, counters, out, heads, capacity,
        D=width, WIDTH=padded, BLOCK=BLOCK, SPLITS=splits, **launch_options(pdl),
    )  # fmt: skip
    return out


def splits_for(programs: int) -> int:
    """Returns into how many parts the context is split, so that `programs` rows and heads fill a GPU."""
    return 8 if programs <= 128 else 4 if programs <= 384 else 1


def launch_options(pdl: bool) -> dict[str, bool]:
    """Returns the arguments of a launch with or without programmatic dependent launch. Triton's interpreter knows the
    first of them only."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
