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

`search` finds the depth of the k-th likeliest token without sorting. Each pass over the row divides a band of depths
into five parts, counts the tokens down to each border, and keeps the part in which the count reaches k. An example with
50,257 tokens and k = 50:

    depth <= 4.8: 87 tokens    <= 9.6: 4,195    <= 14.4: 29,791    <= 19.2: 48,583    the 50th lies in (0, 4.8]
    depth <= 0.96: 1 token     <= 1.92: 3       <= 2.88: 8         <= 3.84: 28        the 50th lies in (3.84, 4.8]

After COARSE passes, the tokens down to the end of the band (here 87) are copied to a short list, and the search goes on
there until the band holds a single depth. Top-p is the same search with sums of weights instead of counts.

The draw needs no sort either: the sums of the kept weights of each GROUP of ids show in which group the running sum
passes `target`, and a running sum within this group shows the id.

Shapes: R rows, V vocabulary."""

# mypy: allow-untyped-defs

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

BLOCK = 2048  # tokens read at once
GROUP = tl.constexpr(32)  # neighbouring ids whose weights are added up for the draw
WARPS = 16
NOT_FINITE = tl.constexpr(-1)  # in place of an id
COARSE = tl.constexpr(2)  # passes over the whole row before the short list is made
EXACT = tl.constexpr(1 << 30)  # more passes than a search can need
DRAWS, DRAW_BITS = tl.constexpr(1 << 30), tl.constexpr(30)  # random numbers and top_p are in units of 1 / DRAWS
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
    for block in tl.range(0, tl.cdiv(V, BLOCK), loop_unroll_factor=2):
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
def weigh(depths, weights, blocks, scale, BLOCK: tl.constexpr):
    """Stores the weights. Returns their sum and the number of tokens with a weight."""
    lane = tl.arange(0, BLOCK)
    sums, counts = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int32)
    for block in range(blocks):
        scaled = tl.exp(-tl.load(depths + block * BLOCK + lane)) * scale
        rounded = tl.where(scaled < NO_FRACTION, scaled + NO_FRACTION - NO_FRACTION, scaled)
        weight = tl.minimum(rounded, MOST).to(tl.uint32)
        tl.store(weights + block * BLOCK + lane, weight.to(tl.int32, bitcast=True))
        sums += weight.to(tl.int64)
        counts += (weight > 0).to(tl.int32)
    tl.debug_barrier()
    return tl.sum(sums, axis=0), tl.sum(counts, axis=0)


@triton.jit
def load_weights(weights, places):
    """Returns stored weights as int64."""
    return tl.load(weights + places).to(tl.uint32, bitcast=True).to(tl.int64)


# ---- top-k and top-p


@triton.jit
def search(depths, weights, blocks, need, high, passes, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the least depth down to which the tokens are at least `need` in number (COUNTS) or in weight, which they
    must be down to the depth `high`. After `passes` passes it returns a depth that may be greater."""
    lane, part = tl.arange(0, BLOCK)[None, :], tl.arange(1, 5)[:, None]
    low = -TINY  # the result is in the band (low, high]
    nearest, farthest, turn = low, high, 0  # nearest, farthest: depths of tokens in the band
    while (nearest < farthest) & (turn < passes):
        borders = low + (high - low) * 0.2 * part  # (4, 1): they divide the band into 5 parts
        sums = tl.zeros((4, BLOCK), tl.int32 if COUNTS else tl.int64)
        least, most = tl.full((1, BLOCK), INFINITY, tl.float32), tl.full((1, BLOCK), -INFINITY, tl.float32)
        for block in tl.range(0, blocks, loop_unroll_factor=2):
            depth = tl.load(depths + block * BLOCK + lane)
            size = 1 if COUNTS else load_weights(weights, block * BLOCK + lane)
            sums += tl.where(depth <= borders, size, 0)
            inside = (depth > low) & (depth <= high)
            least = tl.minimum(least, tl.where(inside, depth, INFINITY))
            most = tl.maximum(most, tl.where(inside, depth, -INFINITY))
        nearest, farthest = tl.min(least), tl.max(most)
        enough = tl.sum(sums, axis=1)[:, None] >= need
        low = tl.max(tl.where(enough, low, borders))
        high = tl.minimum(tl.min(tl.where(enough, borders, high)), farthest)
        turn += 1
    return high


@triton.jit
def make_short_list(depths, weights, blocks, last, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Copies depths and weights of the tokens down to the depth `last` to places from WIDTH on. Returns the number of
    blocks. Each lane fills its own place of each block, so blocks may have gaps, which get an infinite depth."""
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros((BLOCK,), tl.int32)
    for block in range(blocks):
        depth, weight = tl.load(depths + block * BLOCK + lane), tl.load(weights + block * BLOCK + lane)
        near = depth <= last
        tl.store(depths + WIDTH + counts * BLOCK + lane, depth, mask=near)
        tl.store(weights + WIDTH + counts * BLOCK + lane, weight, mask=near)
        counts += near.to(tl.int32)
    longest = tl.max(counts, axis=0)
    for block in range(longest):
        tl.store(depths + WIDTH + block * BLOCK + lane, INFINITY, mask=block >= counts)
    tl.debug_barrier()
    return longest


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
    return tl.maximum((total * top_p + (DRAWS - 1)) >> DRAW_BITS, 1)


@triton.jit
def find_border(depths, weights, blocks, total, counted, top_k, top_p, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the depth of the last token that top-k and top-p keep, and the weight that the kept tokens must reach.
    `counted` is the number of tokens with a weight; the others need not be looked at."""
    border, need = DEEPEST + 0.0, share(total, top_p)  # + 0.0: a constexpr could not change
    limited = (top_k > 0) & (top_k < counted)
    if limited:
        border = search(depths, weights, blocks, top_k, border, COARSE, True, BLOCK)
    else:
        border = search(depths, weights, blocks, need, border, COARSE, False, BLOCK)
    blocks = make_short_list(depths, weights, blocks, border, WIDTH, BLOCK)
    depths += WIDTH
    weights += WIDTH
    if limited:
        border = search(depths, weights, blocks, top_k, border, EXACT, True, BLOCK)
        need = share(weight_until(depths, weights, blocks, border, BLOCK), top_p)
    if top_p < DRAWS:
        border = search(depths, weights, blocks, need, border, EXACT, False, BLOCK)
    return border, need


# ---- the draw


@triton.jit
def group_sums(values, BLOCK: tl.constexpr):
    """Returns the sums of each GROUP of `values` (BLOCK,)."""
    return tl.sum(tl.reshape(values, (BLOCK // GROUP, GROUP)), axis=1)


@triton.jit
def add_up(depths, weights, masses, ties, blocks, border, BLOCK: tl.constexpr):
    """Stores for each group of ids the sum of the weights before the border, and the number of tokens at the border.
    Returns the sum of all weights before the border, and the weight that each token at the border has."""
    lane, group = tl.arange(0, BLOCK), tl.arange(0, BLOCK // GROUP)
    before, tie_weights = tl.zeros((BLOCK // GROUP,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    for block in range(blocks):
        depth, weight = tl.load(depths + block * BLOCK + lane), load_weights(weights, block * BLOCK + lane)
        mass = group_sums(tl.where(depth < border, weight, 0), BLOCK)
        tl.store(masses + block * (BLOCK // GROUP) + group, mass)
        tl.store(ties + block * (BLOCK // GROUP) + group, group_sums((depth == border).to(tl.int32), BLOCK))
        before += mass
        tie_weights = tl.maximum(tie_weights, tl.where(depth == border, weight, 0))
    tl.debug_barrier()
    return tl.sum(before, axis=0), tl.max(tie_weights, axis=0)


@triton.jit
def draw(depths, weights, masses, ties, V, border, quota, tie_weight, number, GROUPS: tl.constexpr):
    """Returns the id at number / 2^30 of the kept weights, in the order of the ids: those of the tokens before the
    border, and of the first `quota` tokens at the border."""
    group, lane = tl.arange(0, GROUPS), tl.arange(0, GROUP)
    mass = tl.load(masses + group, mask=group * GROUP < V, other=0)
    tie = tl.load(ties + group, mask=group * GROUP < V, other=0).to(tl.int64)
    left = quota - (tl.cumsum(tie, axis=0) - tie)  # of the quota, at the start of each group
    mass += tl.minimum(tl.maximum(left, 0), tie) * tie_weight
    target = tl.sum(mass, axis=0) * number >> DRAW_BITS
    chosen = tl.sum((tl.cumsum(mass, axis=0) <= target).to(tl.int32), axis=0)
    target -= tl.sum(tl.where(group < chosen, mass, 0), axis=0)
    left_there = tl.sum(tl.where(group == chosen, left, 0), axis=0)
    depth, weight = tl.load(depths + chosen * GROUP + lane), load_weights(weights, chosen * GROUP + lane)
    tied = depth == border
    kept = (depth < border) | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= left_there))
    passed = tl.cumsum(tl.where(kept, weight, 0), axis=0) <= target
    return chosen * GROUP + tl.sum(passed.to(tl.int32), axis=0)


@triton.jit
def random_number(stream, turn):
    """Returns the random number of a turn, below 2^30: see sampling.random_draws. `stream`: see sampling.stream."""
    low, high, sample = tl.load(stream + 1), tl.load(stream + 2), tl.load(stream + 3)
    words = tl.philox(tl.load(stream), turn.to(tl.uint32), sample.to(tl.uint32), low.to(tl.uint32), high.to(tl.uint32))
    return (words[0] >> 2).to(tl.int64)


# ---- the kernel


@triton.jit(do_not_specialize=["eot"])
def choose_row(
    logits, row_stride, V, readable, temperatures, top_ks, top_ps, min_ps, streams, turns, next, ids, ignores_eot, eot,
    banned, depths, weights, masses, ties,
    BANS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chooses the next id of one row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    ignored = tl.where(tl.load(ignores_eot + row) != 0, eot, -1)
    top, chosen, finite = survey(logits, V, readable, ignored, banned, BANS, BLOCK)
    temperature, turn = tl.load(temperatures + row), tl.load(turns + row)
    if finite & (temperature > 0):
        depths, weights = depths + row * 2 * WIDTH, weights + row * 2 * WIDTH
        masses, ties = masses + row * GROUPS, ties + row * GROUPS
        blocks = tl.cdiv(V, BLOCK)
        top_k, top_p, border = tl.load(top_ks + row), tl.load(top_ps + row), -tl.load(min_ps + row)
        powers = store_depths(logits, V, readable, ignored, banned, top, temperature, depths, BANS, BLOCK)
        need, counted = weigh(depths, weights, blocks, UNITS / powers, BLOCK)
        if ((top_k > 0) & (top_k < counted)) | (top_p < DRAWS):
            last, need = find_border(depths, weights, blocks, need, counted, top_k, top_p, WIDTH, BLOCK)
            border = tl.minimum(border, last)
        before, tie_weight = add_up(depths, weights, masses, ties, blocks, border, BLOCK)
        quota = tl.cdiv(need - before, tl.maximum(tie_weight, 1))
        number = random_number(streams + row * 4, turn)
        chosen = draw(depths, weights, masses, ties, V, border, quota, tie_weight, number, GROUPS)
    result = tl.where(finite, chosen, NOT_FINITE).to(tl.int64)
    tl.store(ids + row, result)
    tl.store(next + row, tl.maximum(result, 0))
    tl.store(turns + row, turn + 1)


class Scratch(NamedTuple):
    """Memory of the kernel. W: places of a list, a multiple of BLOCK; G: groups of ids, a power of 2."""

    depths: torch.Tensor  # (R, 2, W) float32, of all tokens and of the short list
    weights: torch.Tensor  # (R, 2, W) int32, with the bits of uint32
    masses: torch.Tensor  # (R, G) int64
    ties: torch.Tensor  # (R, G) int32


def new_scratch(rows: int, vocabulary: int, device: torch.device) -> Scratch:
    width = triton.cdiv(vocabulary, BLOCK) * BLOCK
    groups = triton.next_power_of_2(width // GROUP.value)
    shapes = (rows, 2, width), (rows, 2, width), (rows, groups), (rows, groups)
    types = torch.float32, torch.int32, torch.int64, torch.int32
    pairs = zip(shapes, types, strict=True)
    return Scratch(*[torch.empty(shape, dtype=dtype, device=device) for shape, dtype in pairs])


def choose_next(
    logits: torch.Tensor, filters: Any, streams: torch.Tensor, turns: torch.Tensor, next: torch.Tensor,
    ignores_eot: torch.Tensor, eot: int, banned: torch.Tensor | None = None, scratch: Scratch | None = None,
) -> torch.Tensor:  # fmt: skip
    """Returns the next ids (R,), NOT_FINITE where a row's logits are not all finite. Copies them, at least 0, to `next`
    (R,) and increments `turns` (R,) int64. `logits` (R, V) may be float32, bfloat16 or float16; `filters` is a
    sampling.Filters, `streams` (R, 4) int64 has a sampling.stream per row, `ignores_eot` (R,) bool marks rows that
    never choose `eot`, `banned` (V,) bool ids that are never chosen. The repetition penalty is not applied."""
    assert logits.stride(1) == 1 and streams.is_contiguous()
    rows, vocabulary = logits.shape
    scratch = scratch or new_scratch(rows, vocabulary, logits.device)
    ids = torch.empty_like(next)
    choose_row[(rows,)](
        logits, logits.stride(0), vocabulary, readable(logits),
        filters.temperature, filters.top_k, filters.top_p, filters.min_p, streams, turns, next, ids,
        ignores_eot, eot, ignores_eot if banned is None else banned, *scratch,
        BANS=banned is not None, WIDTH=scratch.depths.shape[2], GROUPS=scratch.masses.shape[1], BLOCK=BLOCK,
        num_warps=WARPS, enable_fp_fusion=False,  # tokens of equal depths must get equal weights
    )  # fmt: skip
    return ids


def readable(logits: torch.Tensor) -> int:
    """Returns how many logits of each row may be read: those of logits (R, V), and their padding if memory has it."""
    (rows, vocabulary), stride = logits.shape, logits.stride(0)
    end = (logits.storage_offset() + rows * stride) * logits.itemsize
    return stride if stride > vocabulary and end <= logits.untyped_storage().nbytes() else vocabulary
