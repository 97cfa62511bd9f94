"""The step for all rows: what it reports, what a warm-up leaves, steps as CUDA graphs, and memory."""

import itertools

import pytest
import torch
from fake_gpu_helpers import GPU, FakeGpu, RunAtOnce
from generation_helpers import CONFIG, EOT, PROMPTS, generator_of, random_model, window_logits
from graph_helpers import capture_on_cpu, captured_generator

from gpt.errors import ResourceError
from gpt.generate import step
from gpt.generate.backend import Backend
from gpt.generate.sequence import in_order
from gpt.generate.step import CapturedStep, Step, Window, unchanged
from gpt.model import KVCache
from gpt.quantize import to_int8

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def generator():
    return generator_of(random_model())


def test_log_probabilities_are_the_unfiltered_models_in_any_window(generator):
    (completion,) = generator.generate("abc", max_new_tokens=60, top_k=3, seed=5, ignore_eot=True, logprobs=True)[0]
    logits = window_logits(generator.model, b"abc", completion.ids)
    expected = [values.double().log_softmax(-1)[i].item() for i, values in zip(completion.ids, logits, strict=True)]
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_the_likeliest_tokens_are_those_of_the_unfiltered_model(generator):
    settings = {"max_new_tokens": 40, "seed": 5, "ignore_eot": True, "top_k": 4, "logprobs": True, "top_logprobs": 5}
    (completion,) = generator.generate("abc", **settings)[0]
    logits = window_logits(generator.model, b"abc", completion.ids)
    for values, chosen, logprob, likeliest in zip(
        logits, completion.ids, completion.logprobs, completion.top_logprobs, strict=True
    ):
        expected = values.double().log_softmax(-1).topk(5)
        assert [i for i, _ in likeliest] == expected.indices.tolist()
        assert [value for _, value in likeliest] == pytest.approx(expected.values.tolist(), abs=1e-4)
        assert dict(likeliest).get(chosen, logprob) == pytest.approx(logprob, abs=1e-6)
    assert generator.generate("abc", max_new_tokens=3)[0][0].top_logprobs is None


def test_steps_run_to_warm_up_leave_no_trace(generator):
    decoder_step = Step(Backend(generator.model), 2, EOT)
    cache = decoder_step.cache
    cache.lengths += torch.tensor([3, 7])
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    tensors = (cache.lengths, *cache.keys, *cache.values, decoder_step.next, decoder_step.turns)
    before = [tensor.clone() for tensor in tensors]
    with unchanged(decoder_step), torch.inference_mode():
        cache.lengths.zero_()
        decoder_step.choose_next()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


# ---- steps as CUDA graphs

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def device(request, monkeypatch):
    """Returns a device on which steps can be captured: a GPU, or a CPU with stand-ins for what a GPU does."""
    if request.param == "cpu":
        capture_on_cpu(monkeypatch)
    return torch.device(request.param)


def generator_on(device, captures):
    return captured_generator(random_model().to(device), captures)


SAMPLED = {"temperature": 2.0, "top_p": 0.8}
ONE_BY_ONE = [  # settings of one call after the other
    {"temperature": 0.0},
    SAMPLED,  # few candidates do not decide some of its rows
    SAMPLED | {"logprobs": True},
    SAMPLED | {"logprobs": True, "top_logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.7, "top_p": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "frequency_penalty": 1.0},
    {"temperature": 0.0, "presence_penalty": 0.5, "no_repeat_ngram": 2, "logprobs": True},
    SAMPLED | {"no_repeat_ngram": 1},
]


def assert_same_texts(found, expected):
    """Asserts that Completions are equal, the log-probabilities up to the rounding of another prefill."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.ids == theirs.ids
        if theirs.logprobs:
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        if theirs.top_logprobs:
            for our_top, their_top in zip(ours.top_logprobs, theirs.top_logprobs, strict=True):
                assert [i for i, _ in our_top] == [i for i, _ in their_top]


def test_captured_steps_choose_what_steps_one_by_one_choose(device, monkeypatch):
    monkeypatch.setattr("gpt.generate.sampling.CANDIDATES", 20)
    plain, captured = (generator_on(device, captures) for captures in (False, True))
    common = {"max_new_tokens": 50, "seed": 2, "rows": 3, "num_samples": 2}
    for settings in ONE_BY_ONE:
        found, expected = (generator.generate(PROMPTS, **common, **settings) for generator in (captured, plain))
        assert_same_texts(itertools.chain(*found), itertools.chain(*expected))
    kinds = set(captured.idle_decoder.launcher.graphs)
    counts, reports, filters, without_seen, narrow, repeats = map(set, zip(*kinds, strict=True))
    assert (counts, reports, without_seen, narrow) == ({1, 4}, {None, 0, 3}, {True, False}, {True, False})
    assert (len(filters), repeats) == (4, {(0, 0), (3, 0), (3, 256), (0, 256)})


def test_rows_of_captured_steps_may_change_from_greedy_to_sampled_and_get_a_penalty_late(device):
    params = [
        generator_on(device, False).params(max_new_tokens=30, seed=3, rows=2, ignore_eot=True, **settings)
        for settings in ONE_BY_ONE
    ]
    texts = []
    for captures in (False, True):
        generator = generator_on(device, captures)
        events = in_order(generator.events([f"prompt {number}" for number in range(len(params))], params))
        texts.append([sequence.completion for sequence, _ in events if sequence.finish_reason])
    assert_same_texts(*texts)
    assert len(generator.idle_decoder.launcher.graphs) >= 3


FORMS = {"bf16": lambda model: model.bfloat16(), "fp16": lambda model: model.half(), "int8": to_int8}


def step_of(form, settings):
    """Returns a Step whose three rows have a text with these settings."""
    generator = generator_of(FORMS[form](random_model()))
    params, backend = generator.params(ignore_eot=True, **settings), Backend(generator.model)
    backend.captures = True
    made = Step(backend, 3, EOT, banned=[3, 4], stops=[7])
    made.reset(params.top_logprobs if params.logprobs else None)
    for row in range(3):
        made.set_text(row, params, [1, 2, 3], [])
    made.set_params(dict.fromkeys(range(3), params))
    made.set_windows([Window(row, [1, 2, 3], 0) for row in range(3)])
    return made


@pytest.mark.parametrize(
    ("form", "narrow", "settings"),
    [
        *(("bf16", narrow, settings) for narrow in (True, False) for settings in ONE_BY_ONE),
        *((form, True, settings) for form in ("fp16", "int8") for settings in (ONE_BY_ONE[0], ONE_BY_ONE[-1])),
    ],
    ids=str,
)
def test_on_a_gpu_the_host_reads_nothing_in_a_captured_step(monkeypatch, form, settings, narrow):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    gpu = FakeGpu()
    launcher = CapturedStep(gpu.move(step_of(form, settings)))
    launcher.new_graph, launcher.step.narrow = RunAtOnce, narrow
    with gpu, torch.inference_mode():
        chosen = launcher.capture(2).result
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}[form]
    assert gpu.product_types() == {dtype}
    assert {buffer.dtype for buffer in (*launcher.step.cache.keys, *launcher.step.cache.values)} == {dtype}
    assert (chosen.ids.shape, chosen.ids.dtype, chosen.ids.device) == ((2, 3), torch.int64, GPU)
    assert chosen.logprobs is None or chosen.logprobs.dtype == torch.float32


# ---- memory


def test_out_of_memory_names_rows_and_context_and_the_flag_to_lower(generator, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(step, "free_memory", lambda _: 10_000)
        with pytest.raises(ResourceError, match=r"out of memory: 8 rows, context of 24 tokens: .* GiB; lower --rows"):
            generator.generate(["a"] * 20, rows=8)

    def full(*_, **_named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    broken = generator_of(random_model())
    broken.model.forward = full
    with pytest.raises(ResourceError, match=r"out of memory: 2 rows, context of 24 tokens: .*; lower --rows"):
        broken.generate(["a"] * 20, rows=2)
    broken.model.hidden = lambda *_: torch.zeros(1 << 50)  # as the CPU's allocator says it
    broken.backends.clear()
    with pytest.raises(ResourceError, match=r"out of memory: 3 rows, context of 24 tokens: .*; lower --rows"):
        broken.generate(["abc"] * 20, rows=3)


def test_no_more_rows_are_chosen_than_memory_has_room_for(generator, monkeypatch):
    row = 2 * CONFIG.n_layer * CONFIG.block_size * CONFIG.n_embd * 4
    cache = KVCache(CONFIG, 1)
    assert step.row_bytes(generator.model) == row == sum(t.nbytes for t in (*cache.keys, *cache.values))
    for free, rows in ((row * 7, 3), (1, 0), (10**12, 8)):
        monkeypatch.setattr("gpt.generate.generator.free_memory", lambda _, free=free: free)
        assert generator.most_rows() == rows
