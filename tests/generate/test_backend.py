"""Every back end against the uncached rule and against plain torch: native, compiled, int8; and which one is picked."""

import functools
import math
import re
from types import SimpleNamespace

import pytest
import torch
from fake_gpu_helpers import GPU, FakeGpu
from generation_helpers import PROMPTS, check_greedy, generator_of, greedy, random_model

from gpt.errors import InputError
from gpt.generate import backend
from gpt.generate.backend import BACKENDS, Backend, Compiled, compile_static, fused_choice, pick_backend
from gpt.generate.sampling import NOT_FINITE, WORD, SamplingParams, choose, philox
from gpt.generate.step import Step, Window
from gpt.kernels import select
from gpt.kernels.native_model import NativeModel
from gpt.model import GPT, REFERENCE, KVCache, ModelConfig
from gpt.quantize import to_int8

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def generator():
    return generator_of(random_model())


# ---- picking


def test_what_cannot_run_here_is_refused_with_the_reason(generator):
    with pytest.raises(InputError, match="captured: CUDA graphs need a CUDA device"):
        generator_of(generator.model, "captured").generate("a")
    with pytest.raises(InputError, match="native: needs"):
        generator_of(random_model().double(), "native").generate("a")


@pytest.mark.parametrize(("device", "language"), [("cpu", r"C\+\+"), ("cuda", "C")])
def test_fault_132_the_compiled_back_end_without_a_compiler_is_refused(generator, monkeypatch, device, language):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    model = generator.model if device == "cpu" else gpu_model()
    with pytest.raises(InputError, match=f"^backend compiled: no {language} compiler found; install one"):
        pick_backend("compiled", model, 1, 1)


def test_a_short_text_does_not_wait_for_the_kernels_to_be_built_and_a_long_job_does(generator, monkeypatch):
    calls = []
    for name, result in (("load_library", None), ("build_now", object()), ("start_background_build", None)):
        monkeypatch.setattr(select.build, name, lambda _, name=name, result=result: calls.append(name) or result)
    monkeypatch.setattr(backend, "supports", lambda _: True)
    monkeypatch.setattr(backend, "native_is_faster", lambda *_: True)
    assert (
        pick_backend("auto", generator.model, 10_000, 1) == "eager"
    )  # ten thousand steps of so small a model are short too
    assert calls == ["load_library", "start_background_build"]
    with torch.device("meta"):
        large = GPT(ModelConfig(), 50257)
    large.position.weight = torch.nn.Parameter(torch.zeros(1, 768))  # says "cpu"
    assert pick_backend("auto", large, 100, 1) == "eager"
    assert pick_backend("auto", large, 1000, 1) == "native"
    assert calls[4:] == ["build_now"]


def gpu_model(device="cuda"):
    """Returns what pick_backend reads of a model on a GPU."""
    return SimpleNamespace(device=torch.device(device))


def test_on_a_gpu_auto_captures():
    assert pick_backend("auto", gpu_model(), 10**9, 1) == "captured"
    assert pick_backend("auto", gpu_model("mps"), 10**9, 1) == "eager"


def test_a_model_that_training_has_compiled_generates_without_compiling():
    compiled = []
    model = random_model()
    model.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward)
    generator_of(model).generate("abc", max_new_tokens=3)
    assert not compiled
    with torch.no_grad():
        model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))
    assert compiled  # as in training


# ---- native

FORMS = {"fp32": GPT.float, "bf16": GPT.bfloat16, "fp16": GPT.half, "int8": to_int8}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 3])
def test_fault_083_native_greedy_text_is_that_of_the_uncached_rule(kernels, form, rows):
    reference, model = random_model(), FORMS[form](random_model())
    generator = generator_of(model, "native")
    prompts = PROMPTS[: max(rows, 2)]
    found = greedy(generator, prompts, rows=rows)
    assert list(generator.backends) == ["native"]
    if form == "int8":  # rounds the inputs of products where plain torch does not
        reference = Uncached(NativeModel(model, kernels))
    check_greedy(reference, prompts, found, {"fp32": 1e-4, "int8": 0, "bf16": 0.5, "fp16": 0.05}[form])


class Uncached:
    """A NativeModel that is called like a GPT, and reads all ids anew at every call."""

    def __init__(self, native):
        self.native, self.config = native, native.config

    def __call__(self, ids):
        cache = KVCache(self.config, len(ids))
        self.native.prefill(ids[:, :-1], cache)
        return self.native.decode(ids[:, -1], cache).clone()


@pytest.mark.parametrize("form", FORMS)
def test_a_native_text_is_the_same_bits_in_any_number_of_rows(kernels, form):
    model = random_model(ModelConfig(n_layer=1, n_head=4, n_embd=64, block_size=32))
    model = FORMS[form](model)
    generator, prompts = generator_of(model, "native"), ["bb" * 9, "c", "the same prompt", "dd", "e" * 30]
    settings = {"max_new_tokens": 40, "seed": 3, "ignore_eot": True, "logprobs": True}
    found = [generator.generate(prompts, range(5), rows=rows, **settings) for rows in (1, 2, 5, 7)]
    torch.set_num_threads(2)
    found.append(generator.generate(prompts, range(5), rows=3, **settings))
    assert all(each == found[0] for each in found)


def test_native_draws_are_those_of_plain_torch(kernels, generator):
    native = generator_of(generator.model, "native")
    settings = {"max_new_tokens": 61, "seed": 4, "rows": 3, "num_samples": 2, "repetition_penalty": 1.3, "top_k": 9}
    agree = [
        ours.ids == theirs.ids
        for pair in zip(native.generate(PROMPTS, **settings), generator.generate(PROMPTS, **settings), strict=True)
        for ours, theirs in zip(*pair, strict=True)
    ]
    assert sum(agree) >= 7  # of 8: a draw at the border of two tokens falls to either by rounding


# ---- compiled


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fault_083_compiled_greedy_text_is_that_of_the_uncached_rule(dtype):
    model = random_model().to(dtype)
    for prompts in (PROMPTS[:1], PROMPTS[:3]):
        found = greedy(generator_of(model, "compiled"), prompts)
        check_greedy(model, prompts, found, 1e-4 if dtype == torch.float32 else 0.5)


def test_a_compiled_step_copies_no_layer_of_the_cache(monkeypatch):
    model = random_model(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64))
    cache = KVCache(model.config, 4)
    cache.is_empty = False
    compiled = torch.compile(Backend(model).decode, dynamic=False, fullgraph=True)
    source = generated_source(monkeypatch, lambda: compiled(torch.tensor([1, 2, 3, 4]), cache))
    shapes = [re.findall(r"\d+", shape) for shape in re.findall(r"empty_strided_\w+\(\(([\d, ]+)\)", source)]
    assert shapes
    assert not [shape for shape in shapes if math.prod(map(int, shape)) >= cache.keys[0].numel()]


def generated_source(monkeypatch, run):
    """Returns the source that torch's compiler generates in run(), without compiling it."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    def stop(graph):
        raise Generated(graph.codegen()[0].value)

    monkeypatch.setattr(GraphLowering, "compile_to_module", stop)
    failure = pytest.raises(torch._dynamo.exc.BackendCompilerFailed)
    with torch.inference_mode(), config.patch({"cpp.simdlen": 1, "force_disable_caches": True}), failure as failed:
        run()
    assert isinstance(failed.value.inner_exception, Generated)
    return str(failed.value.inner_exception)


class Generated(Exception):
    """Ends a compilation."""


# ---- int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fault_083_int8_greedy_text_is_that_of_its_own_uncached_version(dtype):
    generator = generator_of(to_int8(random_model().to(dtype)))
    tolerance = 1e-4 if dtype == torch.float32 else 0.5
    check_greedy(generator.model, PROMPTS, greedy(generator, PROMPTS), tolerance)


# ---- on a GPU, as far as a CPU shows it


def test_without_triton_a_gpu_runs_the_step_in_plain_torch(monkeypatch):
    monkeypatch.setattr(select, "triton_works", lambda _: False)
    model = random_model()
    assert select.gpu_ops(model.device) is REFERENCE and select.gpu_decode(model) is None


def plain_choose_next(logits, filters, streams, turns, next_ids, ignores_eot, eot, banned=None):
    """Does in plain torch, row by row, what triton_sampler.choose_next does."""
    logits = logits.clone()
    logits[ignores_eot, eot] = torch.finfo(torch.float32).min
    words = [[*stream[[3, 1, 2]], stream[0].item() & (WORD << 32 | WORD)] for stream in streams]
    draws = [philox([turn, *row[:3]], row[3])[0] >> 2 for turn, row in zip(turns, words, strict=True)]
    banned = None if banned is None else banned.nonzero()[:, 0]
    ids = choose(logits, SimpleNamespace(**vars(filters) | {"penalizes": False}), torch.stack(draws), banned=banned)
    turns += 1
    next_ids.copy_(ids.clamp(min=0))
    return ids


class Fused(Backend):
    """Plain torch with a `choose_step` like that of the back ends on a GPU."""

    def __init__(self, model):
        super().__init__(model)
        self.choose_step, self.draws_ahead = fused_choice(model), False


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 20, "ignore_eot": True},
        {"temperature": 0.0, "ignore_eot": True},
        {"top_p": 0.8, "repetition_penalty": 1.4, "num_samples": 3, "rows": 2},
        {"frequency_penalty": 0.4, "logprobs": True, "top_logprobs": 2, "no_repeat_ngram": 3},
    ],
)
def test_a_sampler_that_draws_by_itself_chooses_the_same_texts(generator, monkeypatch, settings):
    names, settings = [1, "b", 2**40, "d"], {"seed": 2**64 - 5, "max_new_tokens": 60} | settings  # most texts slide
    expected = generator.generate(PROMPTS, names, **settings)
    monkeypatch.setattr(backend, "triton_sampler", lambda *_: plain_choose_next)
    monkeypatch.setitem(BACKENDS, "eager", Fused)
    assert generator_of(generator.model).generate(PROMPTS, names, **settings) == expected


def test_the_penalty_before_the_fused_sampler_hides_no_infinite_logit(generator, monkeypatch):
    monkeypatch.setattr(backend, "triton_sampler", lambda *_: plain_choose_next)
    step = Step(Fused(generator.model), 1, 256)
    step.set_params({0: SimpleNamespace(sampling=SamplingParams(repetition_penalty=2.0), ignore_eot=True)})
    step.set_windows([Window(0, [5, 6], 0)])
    for value in (math.inf, -math.inf, math.nan):
        logits = torch.zeros(1, 257)
        logits[0, 5] = value
        assert step.choose(logits).tolist() == [NOT_FINITE]
    assert step.next.tolist() == [0] and step.turns.tolist() == [3]


def test_without_the_triton_sampler_the_plain_sampler_is_used(generator, monkeypatch):
    monkeypatch.setattr(backend, "triton_sampler", lambda *_: None)
    assert fused_choice(generator.model) is None


@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize("triton", [False, True])
def test_on_a_gpu_the_compiled_step_is_one_graph_of_the_model_alone(monkeypatch, form, triton):
    graphs = []
    keep = functools.partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    monkeypatch.setattr(torch, "compile", keep)
    monkeypatch.setattr(select, "triton_works", lambda _: triton)
    monkeypatch.setattr(backend, "triton_sampler", lambda *_: None)
    if triton:
        pytest.importorskip("triton", reason="needs Triton")
        monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)  # as with a GPU
    gpu, model = FakeGpu(), random_model().bfloat16() if form == "bf16" else to_int8(random_model())
    step = Step(Backend(model), 3, 256)
    step.set_params(dict.fromkeys(range(3), generator_of(model).params(top_k=5)))
    step.set_windows([Window(row, [5, 6], 0) for row in range(3)])
    gpu.move(step)
    step.backend, step.narrow = Compiled(step.backend.model), True
    with gpu.without_checks(), torch.inference_mode():
        chosen = [step.choose_next().ids for _ in range(3)]
    assert len(graphs) == 1  # sampling.choose is not compiled: some versions of torch cannot
    assert {ids.device for ids in chosen} == {GPU}
    kernels = [node for node in graphs[0].graph.nodes if "triton" in str(node.target)]
    assert len(kernels) == (2 if triton else 0)  # one for each layer


def test_more_shapes_than_are_compiled_are_an_error(monkeypatch):
    monkeypatch.setattr(backend, "MOST_SHAPES", 1)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    function = compile_static(lambda x: x + 1)
    assert function(torch.zeros(1)) == 1
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        function(torch.zeros(2))


def test_a_prompt_on_a_gpu_never_makes_cudnn_plan_its_attention():
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    seen, before = [], enabled()
    model = SimpleNamespace(device=torch.device("cuda"), hidden=lambda *_: seen.append(enabled()))
    Backend(model).prefill(None, None)
    assert seen == [False]
    assert enabled() == before
