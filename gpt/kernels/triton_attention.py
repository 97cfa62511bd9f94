"""Attention of one new token a row over a static cache, as one Triton kernel; its plain twin is
attention.masked_attention, which reads all of the cache and takes six kernels.

Shapes: R rows, H heads, S cache positions, D width of a head."""

import torch
import triton
import triton.language as tl

BLOCK = 64  # positions read at once


@triton.jit
def attend(
    q, keys, values, positions, out, row_stride, head_stride, H, S, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each row and head: softmax over positions 0 to the row's own, block by block, as Dao et al. 2022
    (arXiv:2205.14135) do it. What a row computes does not depend on how much the others hold."""
    row, head = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, WIDTH)  # D, up to the next power of two
    query = tl.load(q + row * row_stride + head * head_stride + lane, mask=lane < D, other=0.0).to(tl.float32) * scale
    last = tl.load(positions + row)
    base = (row * H + head).to(tl.int64) * S * D
    best = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    summed = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, last + 1, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place <= last
        where = base + place[:, None] * D + lane[None, :]
        there = inside[:, None] & (lane < D)[None, :]
        key = tl.load(keys + where, mask=there, other=0.0).to(tl.float32)
        scores = tl.where(inside, tl.sum(key * query[None, :], axis=1), float("-inf"))
        highest = tl.maximum(best, tl.max(scores, axis=0))
        weights, shrink = tl.exp(scores - highest), tl.exp(best - highest)
        value = tl.load(values + where, mask=there, other=0.0).to(tl.float32)
        summed = summed * shrink + tl.sum(weights[:, None] * value, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        best = highest
    result = (summed / total).to(out.dtype.element_ty)
    tl.store(out + (row * H + head) * D + lane, result, mask=lane < D)


def decode_attention(q, keys, values, positions):
    """q (R, H, 1, D) over positions 0 to `positions` (R, 1) of keys and values (R, H, S, D) -> (R, H, 1, D)."""
    rows, heads, _, width = q.shape
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty(rows, heads, 1, width, dtype=q.dtype, device=q.device)
    attend[(rows, heads)](
        q, keys, values, positions, out, q.stride(0), q.stride(1), heads, keys.shape[2], width**-0.5,
        D=width, WIDTH=1 << (width - 1).bit_length(), BLOCK=BLOCK,
    )  # fmt: skip
    return out
