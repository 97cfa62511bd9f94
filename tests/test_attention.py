"""Attention against its formula in float64, over whole sequences and over a cache."""

import math

import pytest
import torch

from gpt.attention import LayerCache, cached_attention, causal_attention

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, HEADS, WIDTH, LONGEST = 3, 2, 8, 12  # WIDTH: of a head


def random_qkv(tokens, rows=ROWS, seed=0):
    return torch.randn(rows, tokens, 3 * HEADS * WIDTH, generator=torch.Generator().manual_seed(seed))


def formula(qkv):
    """Returns attention (B, T, C) of queries, keys and values (B, T, 3 C), position by position in float64."""
    queries, keys, values = qkv.double().view(*qkv.shape[:2], 3, HEADS, WIDTH).unbind(2)
    result = torch.empty_like(queries)
    for row, position, head in torch.cartesian_prod(*map(torch.arange, queries.shape[:3])).tolist():
        before = slice(position + 1)
        scores = keys[row, before, head] @ queries[row, position, head] / math.sqrt(WIDTH)
        result[row, position, head] = scores.softmax(0) @ values[row, before, head]
    return result.flatten(2)


def new_layer(rows=ROWS, dtype=torch.float32, fill=0.0):
    keys, values = torch.full((2, rows, HEADS, LONGEST, WIDTH), fill, dtype=dtype)
    return LayerCache(keys, values, torch.empty(0), is_empty=False)


def test_each_position_attends_to_itself_and_the_earlier_ones():
    qkv = random_qkv(7)
    torch.testing.assert_close(causal_attention(qkv, HEADS).double(), formula(qkv), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_attention_over_a_cache_is_that_over_the_whole_for_tokens_split_5_1_1_3_2(dtype, bound):
    qkv, layer = random_qkv(LONGEST).to(dtype), new_layer(dtype=dtype)
    pieces, start = [], 0
    for length in (5, 1, 1, 3, 2):
        layer.positions = torch.arange(start, start + length).expand(ROWS, -1)
        pieces.append(cached_attention(qkv[:, start : start + length], HEADS, layer))
        start += length
    torch.testing.assert_close(torch.cat(pieces, 1).double(), formula(qkv), rtol=0, atol=bound)


def test_each_row_attends_up_to_its_own_position_and_to_nothing_beyond():
    qkv, layer, lengths = random_qkv(LONGEST), new_layer(fill=1e3), torch.tensor([1, 5, 11])
    for row, length in enumerate(lengths):
        own = LayerCache(layer.keys[row : row + 1], layer.values[row : row + 1], torch.arange(length)[None], True)
        own.append(qkv[row : row + 1, :length], HEADS)
    layer.positions = lengths[:, None]
    found = cached_attention(qkv[torch.arange(ROWS), lengths][:, None], HEADS, layer)
    expected = formula(qkv)[torch.arange(ROWS), lengths][:, None]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_attention_is_the_same_bits_beside_any_rows(dtype):
    torch.set_num_threads(2)  # which thread computes a row must not matter
    seen = []
    for seed in range(4):
        qkv, layer = random_qkv(LONGEST, seed=seed).to(dtype), new_layer(dtype=dtype)
        slot = seed % ROWS
        qkv[slot] = random_qkv(LONGEST, rows=1, seed=99).to(dtype)[0]
        for position in range(LONGEST):
            layer.positions = torch.full((ROWS, 1), position)
            last = cached_attention(qkv[:, position : position + 1], HEADS, layer)
        seen.append(last[slot])
    assert all(torch.equal(seen[0], other) for other in seen)
