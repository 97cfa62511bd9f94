"""Several padded prompts in one pass against each prompt by itself, and the bits of a text beside any others."""

import math

import pytest
import torch
from fake_gpu_helpers import GPU, FakeGpu, RunAtOnce
from generation_helpers import check_greedy, random_model, window_logits
from graph_helpers import Recorded, capture_on_cpu, captured_generator, row_of

from gpt.generate import prefill
from gpt.generate.backend import Backend
from gpt.generate.prefill import NARROWEST, PASS_TOKENS, PaddedPrefill, passes, width_for
from gpt.kernels.cuda_graph import CudaGraph
from gpt.model import GPT, KVCache, ModelConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT, LONG = NARROWEST, 4 * NARROWEST
SIZE = 2 * LONG + 40
LENGTHS = [0, 1, 2, SHORT - 1, SHORT, SHORT + 1, LONG, LONG + 1, 2 * LONG, SIZE - 1]


@pytest.fixture(scope="module")
def model():
    return random_model(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=SIZE))


def ids_of(length, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, 257, (length,), generator=generator).tolist()


def filled(model, texts, rows, cache=None):
    """Returns a cache in which the texts, row -> ids, are prefilled together."""
    cache = cache or KVCache(model.config, rows, model.dtype, model.device)
    new_graph = Recorded if model.device.type == "cpu" else lambda: CudaGraph(torch.device("cuda", 0))
    with torch.inference_mode():
        PaddedPrefill(Backend(model), cache, new_graph).fill(texts)
    return cache


@torch.inference_mode()
def alone(model, ids):
    cache = KVCache(model.config, 1, model.dtype, model.device)
    Backend(model).prefill(torch.tensor([ids], device=model.device), cache)
    return row_of(cache, 0, len(ids))


# ---- what a pass writes


@pytest.mark.parametrize("rows", [1, 3, 8, 12])
def test_a_pass_writes_what_each_prompt_by_itself_writes(model, rows):
    for start in range(0, len(LENGTHS), rows):
        texts = {row: ids_of(length) for row, length in enumerate(LENGTHS[start : start + rows])}
        cache = filled(model, texts, rows)
        for row, ids in texts.items():
            if ids:
                torch.testing.assert_close(row_of(cache, row, len(ids)), alone(model, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [2, 5, 24, SHORT, SHORT + 1])
def test_a_context_shorter_than_a_pass_is_filled_to_its_last_place_but_one(size):
    model = random_model(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=size))
    texts = {row: ids_of(length) for row, length in enumerate((size - 1, 1, size // 2))}
    cache = filled(model, texts, 3)
    for row, ids in texts.items():
        torch.testing.assert_close(row_of(cache, row, len(ids)), alone(model, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, SHORT, SHORT + 1, LONG + 1, SIZE - 1])
def test_the_bits_of_a_text_depend_neither_on_its_row_nor_on_the_other_texts(dtype, length):
    model = random_model(ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=SIZE)).to(dtype)
    ids, rows = ids_of(length, seed=5), 12
    expected = row_of(filled(model, {0: ids}, rows), 0, length)
    for row in (1, 7, 11):
        others = {other: ids_of(LENGTHS[(other + row) % len(LENGTHS)], row) for other in range(row % 2, rows)}
        cache = filled(model, others | {row: ids}, rows)
        assert torch.equal(row_of(cache, row, length), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_on_a_gpu_the_bits_of_a_text_depend_neither_on_its_row_nor_on_the_other_texts(dtype, bound):
    model = GPT(ModelConfig(n_layer=2, n_head=12, n_embd=768, block_size=SIZE), 257).to("cuda", dtype).eval()
    for length in (1, 31, SHORT, SHORT + 1, LONG + 1, SIZE - 1):
        ids = ids_of(length, seed=5)
        expected = row_of(filled(model, {0: ids}, 64), 0, length)
        torch.testing.assert_close(expected, alone(model, ids), rtol=0, atol=bound)
        for row in (1, 3, 30, 63):
            others = {other: ids_of(LENGTHS[(other + row) % len(LENGTHS)], row) for other in range(row % 2, 64)}
            assert torch.equal(row_of(filled(model, others | {row: ids}, 64), row, length), expected)


def test_rows_that_are_not_filled_keep_all_but_the_last_position(model):
    cache = KVCache(model.config, 4)
    for buffer in (*cache.keys, *cache.values):
        buffer.normal_()
    before = [row_of(cache, row, SIZE - 1) for row in (0, 3)]
    filled(model, {1: ids_of(SIZE - 1), 2: ids_of(7)}, 4, cache)
    assert all(torch.equal(row_of(cache, row, SIZE - 1), kept) for row, kept in zip((0, 3), before, strict=True))


def test_what_damaged_weights_left_in_the_cache_does_not_reach_a_later_text(model):
    texts = {0: ids_of(LONG + 30), 2: ids_of(3)}
    expected, cache = filled(model, texts, 3), KVCache(model.config, 3)
    for number, buffer in enumerate((*cache.keys, *cache.values)):
        buffer.fill_(math.nan if number % 2 else math.inf)
    filled(model, texts, 3, cache)
    for row, ids in texts.items():
        assert torch.equal(row_of(cache, row, len(ids)), row_of(expected, row, len(ids)))


def test_on_a_gpu_a_pass_reads_nothing_on_the_host_and_cudnn_plans_no_attention(model, monkeypatch):
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []

    def recorded(*given, **settings):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*given, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    gpu, model = FakeGpu(), random_model(model.config).bfloat16()
    padded = gpu.move(PaddedPrefill(Backend(model), KVCache(model.config, 3, model.dtype), RunAtOnce))
    with gpu, torch.inference_mode():
        for width in (SHORT, LONG):
            padded.inputs[width] = torch.empty(3, 2 * width + 1, dtype=torch.int64, device=GPU)
            padded.capture(width)
    assert seen and not any(seen)
    assert gpu.product_types() == {torch.bfloat16}


# ---- passes


def test_texts_share_passes_of_few_shapes():
    texts = {row: ids_of(length) for row, length in enumerate([31] * 64 + [0, 700, 300, SHORT + 1])}
    shapes = [values.shape for values in passes(texts, rows=68, positions=1024)]
    many, few = PASS_TOKENS // SHORT, PASS_TOKENS // LONG
    assert shapes == [(many, 2 * SHORT + 1)] * (64 // many) + [(few, 2 * LONG + 1)] + [(1, 2 * 1024 + 1)] * 2


def test_the_width_of_a_pass_follows_from_the_length_alone():
    widths = [width_for(tokens, 1024) for tokens in (1, 64, 65, 256, 257, 1023)]
    assert widths == [64, 64, 256, 256, 1024, 1024]
    assert [width_for(tokens, 700) for tokens in (256, 257, 699)] == [256, 700, 700]
    assert width_for(20, 24) == 24 and width_for(3000, 4096) == 4096


def test_every_token_of_a_text_is_read_once_at_its_position():
    texts = {row: ids_of(length) for row, length in enumerate(LENGTHS)}
    found = {}
    for values in passes(texts, rows=len(texts), positions=SIZE):
        width = values.shape[1] // 2
        for *pairs, row in values.tolist():
            for token, position in zip(pairs[:width], pairs[width:], strict=True):
                if position != SIZE - 1:
                    assert found.setdefault((row, position), token) == token
    assert found == {(row, place): token for row, ids in texts.items() for place, token in enumerate(ids)}


def test_each_shape_is_captured_once(model):
    graphs, cache = [], KVCache(model.config, 2)
    padded = PaddedPrefill(Backend(model), cache, lambda: graphs.append(Recorded()) or graphs[-1])
    with torch.inference_mode():
        for length in (3, SHORT, 5, LONG, LONG - 9, LONG + 3, SIZE - 1):
            padded.fill({0: ids_of(length), 1: ids_of(length - 1)})
            torch.testing.assert_close(row_of(cache, 0, length), alone(model, ids_of(length)), rtol=0, atol=1e-4)
    assert len(graphs) == 3


# ---- in generation


def test_fault_084_texts_of_padded_prompts_are_those_of_the_uncached_rule_past_the_context(monkeypatch):
    capture_on_cpu(monkeypatch)
    monkeypatch.setattr(prefill, "NARROWEST", 8)
    monkeypatch.setattr(prefill, "PASS_TOKENS", 32)
    model = random_model(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=48))
    prompts = ["a", "bc", "d" * 8, "The nine.", "0123456789abcdef+", "x" * 33, "yz" * 24]
    settings = {"max_new_tokens": 80, "temperature": 0.0, "ignore_eot": True, "seed": 0, "rows": 5}
    texts = captured_generator(model).generate(prompts, **settings)
    check_greedy(model, prompts, texts, 1e-4)
    again = captured_generator(model).generate(prompts[::-1], **settings)
    assert [[text.ids for text in samples] for samples in again[::-1]] == [[text.ids for text in own] for own in texts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_text_is_the_same_bits_whatever_the_other_rows_hold(monkeypatch, dtype):
    capture_on_cpu(monkeypatch)
    monkeypatch.setattr(prefill, "NARROWEST", 8)
    monkeypatch.setattr(prefill, "PASS_TOKENS", 32)
    generator = captured_generator(random_model(ModelConfig(1, 4, 64, 48)).to(dtype))
    seen = set()
    for others in ([], ["bb" * 9, "c", "dd"], [f"{n} neighbour" for n in range(7)], ["e" * 40] * 2):
        prompts, ids = [*others, "a prompt of 24 characters", "tail"], [*range(len(others)), "same", 99]
        texts = generator.generate(prompts, ids, max_new_tokens=60, seed=3, rows=4, ignore_eot=True, logprobs=True)
        (text,) = texts[len(others)]
        seen.add((tuple(text.ids), tuple(text.logprobs)))
    assert len(seen) == 1


def test_samples_of_a_prompt_are_copied_and_prompts_of_one_token_need_no_pass(monkeypatch, model):
    capture_on_cpu(monkeypatch)
    filled_rows = []
    monkeypatch.setattr(PaddedPrefill, "fill", record_fill(PaddedPrefill.fill, filled_rows))
    prompts = ["several words", "z", "two"]
    settings = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eot": True, "rows": 5, "num_samples": 4}
    texts = captured_generator(model).generate(prompts, **settings)
    assert sum(len(ids) > 0 for texts in filled_rows for ids in texts.values()) <= 3
    for prompt, samples in zip(prompts, texts, strict=True):
        assert all(sample.ids == samples[0].ids for sample in samples)
        for chosen, values in zip(samples[0].ids, window_logits(model, prompt.encode(), samples[0].ids), strict=True):
            values[256] = -math.inf
            assert values[chosen] >= values.max() - 1e-4


def record_fill(fill, calls):
    def recorded(self, texts):
        calls.append(texts)
        fill(self, texts)

    return recorded
