"""Attention of one new token per row over a static cache, as one Triton kernel. The plain-torch version,
attention.masked_attention, takes six kernels and reads the whole cache.

Shapes: R rows, H heads, S cache positions, D width of a head."""

import torch
import triton
import triton.language as tl

BLOCK = 64  # positions read at once


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    q, keys, values, positions, out, row_stride, head_stride, H, S, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes one row and head: softmax over the positions from 0 to the row's position, block by block with a running
    maximum and sum, as in FlashAttention (Dao et al. 2022, arXiv:2205.14135). The result does not depend on other
    rows."""
    row, head = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, WIDTH)  # WIDTH: D rounded up to a power of two
    query = tl.load(q + row * row_stride + head * head_stride + lane, mask=lane < D, other=0.0).to(tl.float32) * scale
    last = tl.load(positions + row)
    base = (row * H + head).to(tl.int64) * S * D
    maximum = tl.full((), float("-inf"), tl.float32)
    weight_sum = tl.zeros((), tl.float32)
    weighted_sum = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, last + 1, BLOCK):
        position = start + tl.arange(0, BLOCK)
        exists = position <= last
        offset = base + position[:, None] * D + lane[None, :]
        mask = exists[:, None] & (lane < D)[None, :]
        key = tl.load(keys + offset, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(exists, tl.sum(key * query[None, :], axis=1), float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        weights, correction = tl.exp(scores - new_maximum), tl.exp(maximum - new_maximum)
        value = tl.load(values + offset, mask=mask, other=0.0).to(tl.float32)
        weighted_sum = weighted_sum * correction + tl.sum(weights[:, None] * value, axis=0)
        weight_sum = weight_sum * correction + tl.sum(weights, axis=0)
        maximum = new_maximum
    result = (weighted_sum / weight_sum).to(out.dtype.element_ty)
    tl.store(out + (row * H + head) * D + lane, result, mask=lane < D)


def decode_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Returns the attention (R, H, 1, D) of q (R, H, 1, D) to the positions from 0 to `positions` (R, 1) of keys and
    values (R, H, S, D)."""
    rows, heads, _, width = q.shape
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty(rows, heads, 1, width, dtype=q.dtype, device=q.device)
    attend[(rows, heads)](
        q, keys, values, positions, out, q.stride(0), q.stride(1), heads, keys.shape[2], width**-0.5,
        D=width, WIDTH=1 << (width - 1).bit_length(), BLOCK=BLOCK,
    )  # fmt: skip
    return out
