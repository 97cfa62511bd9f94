"""The step for all rows: what it reports, what a warm-up leaves, and memory."""

import pytest
import torch
from generation_helpers import CONFIG, EOT, generator_of, random_model, window_logits

from gpt.errors import ResourceError
from gpt.generate import step
from gpt.generate.backend import Backend
from gpt.generate.step import Step, unchanged
from gpt.model import KVCache

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
    for free, rows in ((row * 7, 3), (1, 1), (10**12, 8)):
        monkeypatch.setattr("gpt.generate.generator.free_memory", lambda _, free=free: free)
        assert generator.fitting_rows(100) == rows
