"""Attention of one new token per row over a static cache, as one Triton kernel that also appends the token's key and
value. The plain-torch version, attention.cached_attention, takes eleven kernels and reads the whole cache.

Shapes: R rows, H heads, S cache positions, D width of a head, C = H D."""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt.attention import LayerCache

TILE_BYTES = 8192  # of keys read at once; a program holds four such tiles in shared memory, of which GPUs have 64 KiB


@triton.jit
def begin(PDL: tl.constexpr):
    """With programmatic dependent launch: waits until all earlier kernels have written their results, and lets the next
    kernel start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def append(new, keys, values, place, H, query, lane, exists, D: tl.constexpr, WIDTH: tl.constexpr):
    """Stores the key and value of the new token at `place` in the cache. Returns the running maximum, sum of weights
    and sum of weighted values (WIDTH,) over this one position."""
    key = tl.load(new + H * D, mask=exists, other=0.0)
    value = tl.load(new + 2 * H * D, mask=exists, other=0.0)
    tl.store(keys + place + lane, key, mask=exists)
    tl.store(values + place + lane, value, mask=exists)
    return tl.sum(query * key.to(tl.float32), axis=0), tl.full((), 1.0, tl.float32), value.to(tl.float32)


@triton.jit
def attend_to_block(
    maximum, total, summed, keys, values, base, start, end, query, lane, exists, D: tl.constexpr, BLOCK: tl.constexpr
):
    """Returns the running maximum, sum of weights and sum of weighted values with the positions from `start` to
    start + BLOCK, below `end`, added, as in FlashAttention (Dao et al. 2022, arXiv:2205.14135)."""
    position = start + tl.arange(0, BLOCK)
    inside = position < end
    offset, mask = base + position[:, None] * D + lane[None, :], inside[:, None] & exists[None, :]
    key = tl.load(keys + offset, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(values + offset, mask=mask, other=0.0).to(tl.float32)
    scores = tl.where(inside, tl.sum(key * query[None, :], axis=1), float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
    weights, correction = tl.exp(scores - new_maximum), tl.exp(maximum - new_maximum)
    summed = summed * correction + tl.sum(weights[:, None] * value, axis=0)
    return new_maximum, total * correction + tl.sum(weights, axis=0), summed


@triton.jit
def combine(
    part, counter, split, lane, maximum, total, summed, target, exists, WIDTH: tl.constexpr, SPLITS: tl.constexpr
):
    """Stores one of SPLITS parts in memory. The program that does so last adds all parts, always in the same order."""
    tl.store(part + split * WIDTH + lane, summed)
    maxima, totals = part + SPLITS * WIDTH, part + SPLITS * WIDTH + SPLITS
    tl.store(maxima + split, maximum)
    tl.store(totals + split, total)
    tl.debug_barrier()  # all threads have stored before one of them counts
    if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(counter, 0)
        s = tl.arange(0, SPLITS)
        each_maximum = tl.load(maxima + s, cache_modifier=".cg")
        each_total = tl.load(totals + s, cache_modifier=".cg")
        each_sum = tl.load(part + s[:, None] * WIDTH + lane[None, :], cache_modifier=".cg")
        share = tl.where(each_total > 0, tl.exp(each_maximum - tl.max(each_maximum, axis=0)), 0.0)
        result = tl.sum(each_sum * share[:, None], axis=0) / tl.sum(each_total * share, axis=0)
        tl.store(target, result.to(target.dtype.element_ty), mask=exists)


@triton.jit
def attend(
    qkv, keys, values, positions, parts, counters, out, H, S,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Computes one row and head over one of SPLITS parts of the row's context. The part that has the row's position
    appends the new key and value there. The result does not depend on other rows."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane, number = tl.arange(0, WIDTH), row * H + head  # WIDTH: D rounded up to a power of two
    exists, target = lane < D, out + number * D + lane
    begin(PDL)
    new, last = qkv + row * 3 * H * D + head * D + lane, tl.load(positions + row)
    query = tl.load(new, mask=exists, other=0.0).to(tl.float32) * D**-0.5
    base = number.to(tl.int64) * S * D
    span = tl.cdiv(tl.cdiv(last + 1, SPLITS), BLOCK) * BLOCK
    first = split * span
    maximum, total = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.float32)
    summed = tl.zeros((WIDTH,), tl.float32)
    if (last >= first) & (last < first + span):
        maximum, total, summed = append(new, keys, values, base + last * D, H, query, lane, exists, D, WIDTH)
    end = tl.minimum(first + span, last)  # the new position is done already
    for start in tl.range(first, end, BLOCK, num_stages=3):
        maximum, total, summed = attend_to_block(
            maximum, total, summed, keys, values, base, start, end, query, lane, exists, D, BLOCK
        )
    if SPLITS == 1:
        tl.store(target, (summed / total).to(out.dtype.element_ty), mask=exists)
    else:
        part = parts + number * SPLITS * (WIDTH + 2)
        combine(part, counters + number, split, lane, maximum, total, summed, target, exists, WIDTH, SPLITS)


def decode_attention(
    qkv: Tensor, heads: int, layer: LayerCache, counters: Tensor | None = None, pdl: bool = False
) -> Tensor:
    """Does what attention.cached_attention does for one new token per row: appends the keys and values of qkv
    (R, 1, 3 C) to the cache and returns the attention (R, 1, C). `counters` (R H,) int32 are 0, before and after."""
    rows, _, capacity, width = layer.keys.shape
    splits = splits_for(rows * heads)
    padded = 1 << (width - 1).bit_length()
    parts = torch.empty(rows * heads * splits * (padded + 2), device=qkv.device)
    counters = new_counters(rows * heads, qkv.device) if counters is None else counters
    out = torch.empty(rows, 1, heads * width, dtype=qkv.dtype, device=qkv.device)
    attend[(rows, heads, splits)](
        qkv.contiguous(), layer.keys, layer.values, layer.positions, parts, counters, out, heads, capacity,
        D=width, WIDTH=padded, BLOCK=block_for(padded * qkv.itemsize), SPLITS=splits, **launch_options(pdl),
    )  # fmt: skip
    return out


def block_for(position_bytes: int) -> int:
    """Returns how many positions are read at once if the key of one takes `position_bytes`."""
    return max(1, min(64, TILE_BYTES // position_bytes))


def new_counters(programs: int, device: torch.device) -> Tensor:
    """Returns the counters of the parts that are done, for `programs` rows and heads."""
    return torch.zeros(programs, dtype=torch.int32, device=device)


def splits_for(programs: int) -> int:
    """Returns into how many parts the context is split, so that `programs` rows and heads fill a GPU."""
    return 8 if programs <= 128 else 4 if programs <= 384 else 1


def launch_options(pdl: bool) -> dict[str, bool]:
    """Returns the arguments of a launch with or without programmatic dependent launch. Triton's interpreter knows the
    first of them only."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
