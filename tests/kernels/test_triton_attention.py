"""The Triton kernel against its plain twin: on a GPU, or by Triton's interpreter where it is installed without one."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT

PROGRAM = """
import torch
from gpt.kernels.triton_attention import decode_attention
from gpt.attention import masked_attention

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
    for width, capacity in ((16, 24), (24, 130), (64, 200)):
        q, k, v = torch.randn(3, 1, 3, 2, width, device=device).to(dtype).permute(2, 0, 3, 1, 4)
        keys, values = torch.randn(2, 3, 2, capacity, width, device=device).to(dtype)
        positions = torch.tensor([[0], [capacity - 1], [capacity // 2]], device=device)
        expected = masked_attention(q, keys, values, positions)
        for row, (position,) in enumerate(positions.tolist()):
            values[row, :, position + 1 :] = float("nan")  # beyond a row's end nothing is read
        found = decode_attention(q, keys, values, positions)
        assert found.shape == expected.shape and found.dtype == dtype
        assert (found - expected).abs().max() < bound, (dtype, width, capacity)
        alone = decode_attention(q[1:2], keys[1:2], values[1:2], positions[1:2])
        assert torch.equal(alone, found[1:2])
print("done")
"""


def test_attention_of_one_token_a_row_is_that_of_two_plain_products():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: pip install triton (a CUDA build of torch brings it)")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "InterpreterError" in done.stderr and "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this version of Triton cannot interpret its kernels with this version of NumPy")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
