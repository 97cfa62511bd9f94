"""Logits -> next ids as one Triton kernel, one program per row: what `choose` of gpt/generate/sampling.py computes in
about a hundred kernels. From equal weights both choose equal ids; the weights may differ by the rounding of e^x.

For each row:

    depth  = (greatest logit - logit) / temperature     0 for the likeliest token, positive for the others
    power  = e^-depth
    weight = round(power / sum of powers * 2^32)        a whole number: its sums are exact in any order
    border = the depth of the last token that top-k, top-p and min-p keep
    quota  = the number of tokens at the border that are kept: those of the lowest ids
    target = sum of the kept weights * random number // 2^30
    the chosen id is the first at which the sum of the kept weights, in the order of the ids, passes `target`

`search` finds the depth of the k-th likeliest token without sorting. Each pass over the row counts the tokens down to
three depths at once and keeps the quarter in which the count reaches k. An example with k = 50, from depth 0 to 24:

    depth <= 6: 234 tokens    <= 12: 9,000    <= 18: 40,000     the 50th lies in (0, 6]
    depth <= 1.5: 9 tokens    <= 3: 31        <= 4.5: 88        the 50th lies in (3, 4.5]

After COARSE passes, the tokens down to the band's end (here 88 of 50,257) are copied to a short list, and the search
goes on there until the band holds a single depth. Top-p is the same search with sums of weights instead of counts.

The draw needs no sort either: the sum of the kept weights of each BLOCK of ids shows in which block the running sum
passes `target`, and a running sum within this block shows the id.

Shapes: R rows, V vocabulary, N blocks of ids."""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 2048  # tokens read at once
WARPS = 16
NOT_FINITE = tl.constexpr(-1)  # in place of an id
COARSE = tl.constexpr(2)  # passes over the whole row before the short list is made
UNLIMITED = tl.constexpr(1 << 30)
DRAW_BITS = tl.constexpr(30)  # random numbers and top_p are in units of 2^-30
UNITS = tl.constexpr(4294967296.0)  # the weight of probability 1
MOST = tl.constexpr(4294967040.0)  # the largest float32 below 2^32: weights are stored in 32 bits
NO_FRACTION = tl.constexpr(8388608.0)  # 2^23, from which float32 values are whole numbers
DEEPEST = tl.constexpr(24.0)  # deeper tokens have the weight 0, as e^-24 * 2^32 < 0.5
TINY, LOWEST = tl.constexpr(torch.finfo(torch.float32).tiny), tl.constexpr(torch.finfo(torch.float32).min)
INFINITY = tl.constexpr(float("inf"))


# ---- logits -> weights


@triton.jit
def load_logits(logits, ids, V, readable, ignored):
    """Returns the logits of `ids` as float32; the lowest float for the id `ignored` and for ids from V on. If
    `readable` is a multiple of 16, several logits are read by one instruction."""
    values = tl.load(logits + ids, mask=ids < readable, other=0).to(tl.float32)
    return tl.where((ids < V) & (ids != ignored), values, LOWEST)


@triton.jit
def ban(values, banned, ids, V, BANS: tl.constexpr):
    """Returns logits that are -inf for banned ids."""
    if BANS:
        values = tl.where(tl.load(banned + ids, mask=ids < V, other=0) != 0, -INFINITY, values)
    return values


@triton.jit
def survey(logits, V, readable, ignored, banned, BANS: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the greatest logit, the lowest id that has it, and whether all logits are finite."""
    lane = tl.arange(0, BLOCK)
    greatest = tl.full((BLOCK,), -INFINITY, tl.float32)
    likeliest = lane
    damaged = tl.zeros((BLOCK,), tl.int32)
    for block in range(tl.cdiv(V, BLOCK)):
        ids = block * BLOCK + lane
        values = load_logits(logits, ids, V, readable, ignored)
        damaged = tl.where(tl.abs(values) < INFINITY, damaged, 1)  # nan is not below infinity either
        values = ban(values, banned, ids, V, BANS)
        likeliest = tl.where(values > greatest, ids, likeliest)
        greatest = tl.maximum(values, greatest)
    top = tl.max(greatest, axis=0)
    return top, tl.min(tl.where(greatest == top, likeliest, V), axis=0), tl.max(damaged, axis=0) == 0


@triton.jit
def store_depths(
    logits, V, readable, ignored, banned, top, temperature, depths, BANS: tl.constexpr, BLOCK: tl.constexpr
):
    """Stores the depth of each token; infinity up to the end of the last block. Returns the sum of the powers."""
    lane = tl.arange(0, BLOCK)
    powers = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.cdiv(V, BLOCK)):
        ids = block * BLOCK + lane
        values = ban(load_logits(logits, ids, V, readable, ignored), banned, ids, V, BANS)
        depth = tl.where(ids < V, tl.div_rn(top - values, temperature), INFINITY)
        powers += tl.exp(-depth)
        tl.store(depths + ids, depth)
    tl.debug_barrier()
    return tl.sum(powers, axis=0)


@triton.jit
def weigh(depths, weights, blocks, scale, N: tl.constexpr, BLOCK: tl.constexpr):
    """Stores the weights. Returns the sum of each block's weights, (N,), and the number of tokens with a weight."""
    lane, number = tl.arange(0, BLOCK), tl.arange(0, N)
    masses = tl.zeros((N,), tl.int64)
    counts = tl.zeros((BLOCK,), tl.int32)
    for block in range(blocks):
        scaled = tl.exp(-tl.load(depths + block * BLOCK + lane)) * scale
        rounded = tl.where(scaled < NO_FRACTION, scaled + NO_FRACTION - NO_FRACTION, scaled)
        weight = tl.minimum(rounded, MOST).to(tl.uint32)
        tl.store(weights + block * BLOCK + lane, weight.to(tl.int32, bitcast=True))
        masses = tl.where(number == block, tl.sum(weight.to(tl.int64), axis=0), masses)
        counts += (weight > 0).to(tl.int32)
    tl.debug_barrier()
    return masses, tl.sum(counts, axis=0)


@triton.jit
def load_weights(weights, places):
    return tl.load(weights + places).to(tl.uint32, bitcast=True).to(tl.int64)


# ---- top-k and top-p


@triton.jit
def search(depths, weights, blocks, need, high, passes, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the least depth down to which the tokens are at least `need` in number (COUNTS) or in weight, which they
    must be down to the depth `high`. After `passes` passes it returns a depth that may be greater."""
    lane = tl.arange(0, BLOCK)
    low = -TINY  # the result is in the band (low, high]
    nearest, farthest = low, high  # depths of tokens in the band
    turn = 0
    while (nearest < farthest) & (turn < passes):
        step = (high - low) * 0.25
        a, b, c = low + step, low + 2 * step, low + 3 * step
        until_a = tl.zeros((BLOCK,), tl.int32 if COUNTS else tl.int64)
        until_b, until_c = until_a, until_a
        least, most = tl.full((BLOCK,), INFINITY, tl.float32), tl.full((BLOCK,), -INFINITY, tl.float32)
        for block in range(blocks):
            depth = tl.load(depths + block * BLOCK + lane)
            if COUNTS:
                size = tl.full((BLOCK,), 1, tl.int32)
            else:
                size = load_weights(weights, block * BLOCK + lane)
            until_a += tl.where(depth <= a, size, 0)
            until_b += tl.where(depth <= b, size, 0)
            until_c += tl.where(depth <= c, size, 0)
            inside = (depth > low) & (depth <= high)
            least = tl.minimum(least, tl.where(inside, depth, INFINITY))
            most = tl.maximum(most, tl.where(inside, depth, -INFINITY))
        nearest, farthest = tl.min(least, axis=0), tl.max(most, axis=0)
        sum_a, sum_b, sum_c = tl.sum(until_a, axis=0), tl.sum(until_b, axis=0), tl.sum(until_c, axis=0)
        low = tl.where(sum_c < need, c, tl.where(sum_b < need, b, tl.where(sum_a < need, a, low)))
        high = tl.where(sum_a >= need, a, tl.where(sum_b >= need, b, tl.where(sum_c >= need, c, high)))
        high = tl.minimum(high, farthest)
        turn += 1
    return high


@triton.jit
def make_short_list(depths, weights, blocks, last, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Copies depths and weights of the tokens down to the depth `last` to places from WIDTH on. Fills the last block
    with tokens of infinite depth. Returns the number of blocks."""
    lane = tl.arange(0, BLOCK)
    count = 0
    for block in range(blocks):
        depth, weight = tl.load(depths + block * BLOCK + lane), tl.load(weights + block * BLOCK + lane)
        near = depth <= last
        places = WIDTH + count + tl.cumsum(near.to(tl.int32), axis=0) - 1
        tl.store(depths + places, depth, mask=near)
        tl.store(weights + places, weight, mask=near)
        count += tl.sum(near.to(tl.int32), axis=0)
    tl.store(depths + WIDTH + count + lane, tl.full((BLOCK,), INFINITY, tl.float32))
    tl.store(weights + WIDTH + count + lane, tl.zeros((BLOCK,), tl.int32))
    tl.debug_barrier()
    return tl.cdiv(count, BLOCK)


@triton.jit
def weight_until(depths, weights, blocks, last, BLOCK: tl.constexpr):
    """Returns the sum of the weights down to the depth `last`."""
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.int64)
    for block in range(blocks):
        near = tl.load(depths + block * BLOCK + lane) <= last
        sums += tl.where(near, load_weights(weights, block * BLOCK + lane), 0)
    return tl.sum(sums, axis=0)


@triton.jit
def share(total, top_p):
    """Returns the weight that the kept tokens must reach: top_p of the total, rounded up, and at least 1."""
    return tl.maximum((total * top_p + (UNLIMITED - 1)) >> DRAW_BITS, 1)


@triton.jit
def find_border(depths, weights, blocks, total, counted, top_k, top_p, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the depth of the last token that top-k and top-p keep, and the weight that the kept tokens must reach.
    `counted` is the number of tokens with a weight; the others need not be looked at."""
    border, need = DEEPEST + 0.0, share(total, top_p)
    limited = (top_k > 0) & (top_k < counted)
    if limited:
        border = search(depths, weights, blocks, top_k, border, COARSE, True, BLOCK)
    else:
        border = search(depths, weights, blocks, need, border, COARSE, False, BLOCK)
    blocks = make_short_list(depths, weights, blocks, border, WIDTH, BLOCK)
    if limited:
        border = search(depths + WIDTH, weights + WIDTH, blocks, top_k, border, UNLIMITED, True, BLOCK)
        need = share(weight_until(depths + WIDTH, weights + WIDTH, blocks, border, BLOCK), top_p)
    if top_p < UNLIMITED:
        border = search(depths + WIDTH, weights + WIDTH, blocks, need, border, UNLIMITED, False, BLOCK)
    return border, need


@triton.jit
def kept_masses(depths, weights, blocks, border, need, N: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the sum of the kept weights of each block, (N,), and the quota that is left at the start of each block,
    (N,). Tokens at the border have equal weights; they are kept, in the order of their ids, until the sum of all kept
    weights reaches `need`."""
    lane, number = tl.arange(0, BLOCK), tl.arange(0, N)
    masses, ties = tl.zeros((N,), tl.int64), tl.zeros((N,), tl.int64)
    tie_weights = tl.zeros((BLOCK,), tl.int64)
    for block in range(blocks):
        depth, weight = tl.load(depths + block * BLOCK + lane), load_weights(weights, block * BLOCK + lane)
        tie = depth == border
        masses = tl.where(number == block, tl.sum(tl.where(depth < border, weight, 0), axis=0), masses)
        ties = tl.where(number == block, tl.sum(tie.to(tl.int32), axis=0).to(tl.int64), ties)
        tie_weights = tl.maximum(tie_weights, tl.where(tie, weight, 0))
    tie_weight = tl.max(tie_weights, axis=0)
    missing, divisor = need - tl.sum(masses, axis=0), tl.maximum(tie_weight, 1)
    left = (missing + divisor - 1) // divisor - (tl.cumsum(ties, axis=0) - ties)
    kept = tl.minimum(tl.maximum(left, 0), ties)
    return masses + kept * tie_weight, left


# ---- the draw


@triton.jit
def random_number(stream, turn):
    """Returns the random number of a turn, below 2^30: see sampling.random_draws. `stream`: see sampling.stream."""
    low, high, sample = tl.load(stream + 1), tl.load(stream + 2), tl.load(stream + 3)
    words = tl.philox(tl.load(stream), turn.to(tl.uint32), sample.to(tl.uint32), low.to(tl.uint32), high.to(tl.uint32))
    return (words[0] >> 2).to(tl.int64)


@triton.jit
def draw(depths, weights, border, masses, left, number, N: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the id at number / 2^30 of the kept weights, in the order of the ids."""
    index, lane = tl.arange(0, N), tl.arange(0, BLOCK)
    target = tl.sum(masses, axis=0) * number >> DRAW_BITS
    block = tl.sum((tl.cumsum(masses, axis=0) <= target).to(tl.int32), axis=0)
    target -= tl.sum(tl.where(index < block, masses, 0), axis=0)
    quota = tl.sum(tl.where(index == block, left, 0), axis=0)
    depth, weight = tl.load(depths + block * BLOCK + lane), load_weights(weights, block * BLOCK + lane)
    tie = (depth == border).to(tl.int32)
    kept = (depth < border) | ((tie > 0) & (tl.cumsum(tie, axis=0) <= quota))
    passed = tl.cumsum(tl.where(kept, weight, 0), axis=0) <= target
    return block * BLOCK + tl.sum(passed.to(tl.int32), axis=0)


# ---- the kernel


@triton.jit
def choose_row(
    logits, row_stride, V, readable, temperatures, top_ks, top_ps, min_ps, streams, turns, next, ids, ignores_eot, eot,
    banned, depths, weights, BANS: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chooses the next id of one row. WIDTH: places of a list of depths or weights, of which a row has two."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    ignored = tl.where(tl.load(ignores_eot + row) != 0, eot, -1)
    top, likeliest, finite = survey(logits, V, readable, ignored, banned, BANS, BLOCK)
    temperature, turn = tl.load(temperatures + row), tl.load(turns + row)
    chosen = likeliest
    if finite & (temperature > 0):
        depths += row * 2 * WIDTH
        weights += row * 2 * WIDTH
        top_k, top_p, limit = tl.load(top_ks + row), tl.load(top_ps + row), -tl.load(min_ps + row)
        blocks = tl.cdiv(V, BLOCK)
        powers = store_depths(logits, V, readable, ignored, banned, top, temperature, depths, BANS, BLOCK)
        masses, counted = weigh(depths, weights, blocks, UNITS / powers, N, BLOCK)
        border, left = limit, tl.zeros((N,), tl.int64)
        need = tl.sum(masses, axis=0)
        searched = ((top_k > 0) & (top_k < counted)) | (top_p < UNLIMITED)
        if searched:
            border, need = find_border(depths, weights, blocks, need, counted, top_k, top_p, WIDTH, BLOCK)
            border = tl.minimum(border, limit)
        if searched | (limit < INFINITY):
            masses, left = kept_masses(depths, weights, blocks, border, need, N, BLOCK)
        chosen = draw(depths, weights, border, masses, left, random_number(streams + row * 4, turn), N, BLOCK)
    chosen = tl.where(finite, chosen, NOT_FINITE).to(tl.int64)
    tl.store(ids + row, chosen)
    tl.store(next + row, tl.maximum(chosen, 0))
    tl.store(turns + row, turn + 1)


def choose_next(
    logits: torch.Tensor, filters: Any, streams: torch.Tensor, turns: torch.Tensor, next: torch.Tensor,
    ignores_eot: torch.Tensor, eot: int, banned: torch.Tensor | None = None,
    lists: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Returns the next ids (R,), NOT_FINITE where a row's logits are not all finite. Copies them, at least 0, to `next`
    (R,) and increments `turns` (R,) int64. `logits` (R, V) may be float32, bfloat16 or float16; `filters` is a
    sampling.Filters, `streams` (R, 4) int64 has a sampling.stream per row, `ignores_eot` (R,) bool marks rows that
    never choose `eot`, `banned` (V,) bool ids that are never chosen. The repetition penalty is not applied. `lists` is
    memory for depths and weights: see `new_lists`."""
    assert logits.stride(1) == 1 and streams.is_contiguous()
    rows, vocabulary = logits.shape
    depths, weights = lists or new_lists(rows, vocabulary, logits.device)
    ids = torch.empty_like(next)
    choose_row[(rows,)](
        logits, logits.stride(0), vocabulary, readable(logits),
        filters.temperature, filters.top_k, filters.top_p, filters.min_p, streams, turns, next, ids,
        ignores_eot, eot, ignores_eot if banned is None else banned, depths, weights,
        BANS=banned is not None, WIDTH=depths.shape[2], N=triton.next_power_of_2(triton.cdiv(vocabulary, BLOCK)),
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return ids


def readable(logits: torch.Tensor) -> int:
    """Returns how many logits of each row may be read: those of logits (R, V), and their padding if memory has it."""
    (rows, vocabulary), stride = logits.shape, logits.stride(0)
    end = (logits.storage_offset() + rows * stride) * logits.itemsize
    return stride if stride > vocabulary and end <= logits.untyped_storage().nbytes() else vocabulary


def new_lists(rows: int, vocabulary: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns memory for the depths and the weights of all tokens, and of a short list that has one more block."""
    shape = rows, 2, (triton.cdiv(vocabulary, BLOCK) + 1) * BLOCK
    return torch.empty(shape, device=device), torch.empty(shape, dtype=torch.int32, device=device)
