"""The Triton kernel of attention against plain torch: on a GPU, or by Triton's interpreter where there is none."""

from triton_helpers import run_with_triton

PROGRAM = """
import torch
from gpt.attention import LayerCache, cached_attention
from gpt.kernels import triton_attention

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
    for width, capacity, splits in ((16, 24, 1), (24, 130, 2), (64, 200, 4), (64, 600, 8)):
        triton_attention.splits_for = lambda _, splits=splits: splits
        qkv = torch.randn(4, 1, 3 * 2 * width, device=device).to(dtype)
        keys, values = torch.randn(2, 4, 2, capacity, width, device=device).to(dtype)
        positions = torch.tensor([[0], [capacity - 1], [capacity // 2], [min(64, capacity - 2)]], device=device)
        plain = LayerCache(keys.clone(), values.clone(), positions, False)
        expected = cached_attention(qkv, 2, plain)
        for row, (position,) in enumerate(positions.tolist()):
            values[row, :, position + 1 :] = float("nan")  # beyond a row's end nothing is read
        layer = LayerCache(keys, values, positions, False)
        found = triton_attention.decode_attention(qkv, 2, layer)
        assert found.shape == expected.shape and found.dtype == dtype
        assert (found - expected).abs().max() < bound, (dtype, width, capacity)
        for row, (position,) in enumerate(positions.tolist()):  # the new key and value, and nothing else, are stored
            assert torch.equal(keys[row], plain.keys[row])
            assert torch.equal(values[row, :, : position + 1], plain.values[row, :, : position + 1])
            assert values[row, :, position + 1 :].isnan().all()
        row = LayerCache(keys[1:2].clone(), values[1:2].clone(), positions[1:2], False)
        assert torch.equal(triton_attention.decode_attention(qkv[1:2], 2, row), found[1:2])
print("done")
"""


def test_attention_of_one_token_a_row_is_that_of_two_plain_products():
    run_with_triton(PROGRAM)
