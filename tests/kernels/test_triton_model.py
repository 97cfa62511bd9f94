"""The decode step in Triton against the model's own forward pass: on a GPU, or by Triton's interpreter."""

from triton_helpers import run_with_triton

PROGRAM = """
import itertools
import torch
from gpt.kernels import triton_model
from gpt.model import GPT, KVCache, ModelConfig
from gpt.quantize import to_int8

device = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = torch.tensor([130, 150, 65, 64, 63, 128, 199, 1, 0])
torch.manual_seed(0)
types = ((torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01))
kinds = [(*kind, 48) for kind in itertools.product(types, (False, True), (1, 3, 9))]
kinds.append((types[0], False, 2, 272))  # wider than one tile
if device == "cpu":  # the interpreter takes some milliseconds for each program
    triton_model.tile_of = lambda *_: (16, 256, 4)
for (dtype, bound), int8, rows, width in kinds:
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=width, block_size=200), 130).eval()
    for parameter in model.parameters():  # gains, shifts and biases that are not 1 or 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = model.to(device, dtype)
    model = to_int8(model) if int8 else model
    ids, caches = torch.randint(130, (rows,), device=device), [KVCache(model.config, rows, dtype, device) for _ in "ab"]
    for ours, theirs in zip((*caches[0].keys, *caches[0].values), (*caches[1].keys, *caches[1].values)):
        theirs.copy_(ours.normal_())
    for cache in caches:
        cache.lengths.copy_(LENGTHS[:rows])
        cache.is_empty = False
    with torch.inference_mode():
        expected = model(ids[:, None], cache=caches[0])
        found = triton_model.TritonModel(model).decode(ids, caches[1])
    assert found.shape == expected.shape and found.dtype == dtype
    assert (found - expected).abs().max() < bound * expected.abs().max(), (dtype, int8, rows, width)
    assert torch.equal(caches[0].lengths, caches[1].lengths)
    for ours, theirs in zip((*caches[0].keys, *caches[0].values), (*caches[1].keys, *caches[1].values)):
        assert (ours - theirs).abs().max() < bound * ours.abs().max()
print("done")
"""


def test_a_step_in_triton_is_that_of_the_model():
    run_with_triton(PROGRAM)
