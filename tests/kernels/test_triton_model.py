"""The decode step in Triton against the model's own forward pass: on a GPU, or by Triton's interpreter; and what its
launches are given, on a fake GPU."""

import pytest
import torch
from fake_gpu_helpers import GPU, FakeGpu
from generation_helpers import generator_of, random_model
from graph_helpers import tensors_in
from triton_helpers import run_with_triton

from gpt.generate import backend
from gpt.generate.backend import Backend, fused_choice
from gpt.generate.step import Step, Window
from gpt.kernels import select
from gpt.quantize import to_int8

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
kinds = [(types[0], *kind, 48) for kind in itertools.product((False, True), (1, 3, 9))]
kinds += [(type_, *kind, 48) for type_ in types[1:] for kind in ((False, 1), (False, 9), (True, 3))]
kinds.append((types[0], False, 2, 272))  # wider than one tile
if device == "cpu":  # the interpreter takes some milliseconds for each program
    triton_model.tile_of = lambda *_: (16, 256, 4)
for (dtype, bound), int8, rows, width in kinds:
    layers = 1 if device == "cpu" and rows == 9 else 2  # these take the interpreter most of its time
    model = GPT(ModelConfig(n_layer=layers, n_head=2, n_embd=width, block_size=200), 130).eval()
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


# ---- on a fake GPU, where kernels are launched but do nothing

FORMS = {"bf16": lambda model: model.bfloat16(), "fp16": lambda model: model.half(), "int8": to_int8}
SETTINGS = [{"top_k": 5}, {"repetition_penalty": 1.3, "logprobs": True, "no_repeat_ngram": 2}]


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched."""
    jit = pytest.importorskip("triton.runtime.jit", reason="needs Triton")
    names = []

    def launch(kernel, *given, grid, warmup, **settings):
        assert all(tensor.device == GPU for tensor in tensors_in((given, settings)))
        names.append(kernel.fn.__name__)

    monkeypatch.setattr(jit.JITFunction, "run", launch)
    monkeypatch.setattr(select, "triton_works", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return names


def step_of(model, rows, settings):
    """Returns a Step on plain torch whose rows have a text with these settings."""
    params = generator_of(model).params(**settings)
    step = Step(Backend(model), rows, 256)
    step.reset(0 if params.logprobs else None)
    for row in range(rows):
        step.set_text(row, params, [5, 6], [])
    step.set_params(dict.fromkeys(range(rows), params))
    step.set_windows([Window(row, [5, 6], 0) for row in range(rows)])
    return step


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "few"), [(1, ("int8", "bf16", "fp16")), (3, ("int8",)), (9, ())])
def test_on_a_gpu_the_host_reads_nothing_in_a_step(monkeypatch, launches, form, rows, few, settings):
    from gpt.kernels.triton_sampler import choose_next

    monkeypatch.setattr(backend, "triton_sampler", lambda *_: choose_next)
    gpu, step = FakeGpu(), step_of(FORMS[form](random_model()), rows, settings)
    own = gpu.move(step).backend
    own.decode, own.choose_step, own.draws_ahead = select.gpu_decode(own.model), fused_choice(own.model), False
    with gpu, torch.inference_mode():
        chosen = step.choose_next()
    products = ["linear", "attend", "linear", "linear", "linear"] if form in few else ["add_norm", "attend", "add_norm"]
    last = ["linear" if form in few else "add_norm", "choose_row"]
    assert launches == products * 2 + last
    assert (chosen.ids.shape, chosen.ids.dtype, chosen.ids.device) == ((rows,), torch.int64, GPU)
    assert gpu.product_types() <= {own.model.dtype}
