"""Texts in row slots against brute force without a cache, and everything that must not change a text."""

import gc
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from generation_helpers import CONFIG, EOT, PROMPTS, generator_of, greedy, random_model, window_logits
from graph_helpers import capture_on_cpu, row_of
from sampling_helpers import filters_of
from torch.utils._python_dispatch import TorchDispatchMode

from gpt.errors import NonFiniteError
from gpt.generate import step
from gpt.generate.backend import Backend
from gpt.generate.decode import Decoder
from gpt.generate.sampling import SamplingParams, choose, random_draws
from gpt.generate.sequence import GenerationParams, Sequence
from gpt.generate.step import DRAWS_AHEAD
from gpt.model import ModelConfig
from gpt.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def generator():
    return generator_of(random_model())


# ---- the cache and the context's edge


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[:3], PROMPTS, ["x" * 24]])
def test_fault_083_084_cached_greedy_text_is_that_of_the_uncached_rule_across_the_context_edge(generator, prompts):
    for prompt, (completion,) in zip(prompts, greedy(generator, prompts), strict=True):
        ids = list(prompt.encode()) or [EOT]
        assert len(completion.ids) == 80  # the context is 24: the edge is crossed four times and more
        logits = window_logits(generator.model, ids, completion.ids)
        for chosen, values in zip(completion.ids, logits, strict=True):
            values[EOT] = -math.inf
            assert values[chosen] >= values.max() - 1e-4


def test_a_prompt_of_exactly_the_context_is_read_whole_before_its_first_token(generator):
    prompt = "abcdefghijklmnopqrstuvwx"
    (completion,) = greedy(generator, prompt, count=1)[0]
    with torch.no_grad():
        logits = generator.model(torch.tensor([list(prompt.encode())]))[0]
    logits[EOT] = -math.inf
    assert completion.ids == [logits.argmax().item()]


def test_the_repetition_penalty_counts_what_is_in_the_window_and_nothing_else(generator):
    penalty, window, size = 1.5, list(b"abcab"), CONFIG.block_size
    (completion,) = greedy(generator, "abcab", count=60, repetition_penalty=penalty)[0]
    for chosen in completion.ids:
        if len(window) > size:
            window = window[-(size // 2) :]
        with torch.no_grad():
            logits = generator.model(torch.tensor([window]))[0]
        for seen in set(window):
            logits[seen] = logits[seen] * penalty if logits[seen] < 0 else logits[seen] / penalty
        logits[EOT] = -math.inf
        assert logits[chosen] >= logits.max() - 1e-4
        window.append(chosen)


def test_a_context_of_one_token_still_generates():
    generator = generator_of(random_model(ModelConfig(1, 1, 16, 1)))
    (completion,) = greedy(generator, "a", count=5)[0]
    assert len(completion.ids) == 5


# ---- rows


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_is_the_same_bits_whatever_the_other_rows_hold(dtype, rows):
    torch.set_num_threads(2)  # which thread a row falls to must not matter
    config = ModelConfig(n_layer=1, n_head=4, n_embd=64, block_size=32)
    generator = generator_of(random_model(config).to(dtype))
    neighbours = [["bb" * 9, "c", "dd"], [f"{n} neighbour" for n in range(4)]]
    seen = set()
    for before in neighbours:
        for after in (["tail"], []):
            prompts = [*before, "the same prompt", *after]
            ids = [*range(len(before)), "same", *range(50, 50 + len(after))]
            completions = generator.generate(
                prompts, ids, max_new_tokens=24, seed=3, rows=rows, ignore_eot=True, logprobs=True
            )
            (completion,) = completions[len(before)]
            seen.add((tuple(completion.ids), tuple(completion.logprobs)))
    assert len(seen) == 1


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_are_refilled_and_results_stay_in_the_order_of_the_prompts(generator, rows):
    prompts = [f"prompt {n}" for n in range(5)]  # their texts cross the context's edge
    together = greedy(generator, prompts, count=30, rows=rows, num_samples=2)
    assert together == [[greedy(generator, prompt, count=30, rows=rows)[0][0]] * 2 for prompt in prompts]


def test_the_cache_has_no_more_rows_than_asked_for_however_many_prompts_wait(generator, monkeypatch):
    made, original = [], step.KVCache
    monkeypatch.setattr(step, "KVCache", lambda config, rows, *rest: made.append(rows) or original(config, rows, *rest))
    greedy(generator, ["x"] * 20, count=2, rows=2)
    greedy(generator, ["x"] * 20, count=2)
    assert made == [2, 8]
    backend = Backend(generator.model)
    assert [backend.slots(rows) for rows in (1, 3, 4, 5, 8, 9)] == [1, 3, 4, 8, 8, 12]


def test_fault_087_what_damaged_weights_left_in_the_cache_does_not_reach_a_later_text():
    generator = generator_of(random_model())
    expected = greedy(generator, "abc")
    weight = generator.model.blocks[0].attn.qkv.weight
    whole = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    with pytest.raises(NonFiniteError):
        greedy(generator, "abcdefghijkl")
    with torch.no_grad():
        weight.copy_(whole)
    assert greedy(generator, "abc") == expected


def test_an_interrupt_within_a_step_spoils_no_later_text(monkeypatch):
    generator, decode, interrupts = generator_of(random_model()), Backend.decode, []

    def interrupted(self, ids, cache):
        logits = decode(self, ids, cache)
        if interrupts:
            raise interrupts.pop()
        return logits

    monkeypatch.setattr(Backend, "decode", interrupted)
    expected = [greedy(generator, prompts, rows=4) for prompts in (["ab"] * 5, ["abc"])]
    interrupts.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        greedy(generator, ["ab"] * 5, rows=4)
    assert [greedy(generator, prompts, rows=4) for prompts in (["abc"], ["ab"] * 5)] == expected[::-1]


def test_each_prompt_may_have_settings_of_its_own(generator):
    settings = [
        {"temperature": 0.0, "max_new_tokens": 9},
        {"top_k": 3, "max_new_tokens": 30, "seed": 8, "stop": ("e",)},
        {"top_p": 0.5, "num_samples": 3, "ignore_eot": True, "max_new_tokens": 40, "repetition_penalty": 1.5},
        {"min_p": 0.2, "top_p": 1.0, "logprobs": True, "max_new_tokens": 12},
    ]
    params = [generator.params(**{"seed": 1, "rows": 4} | each) for each in settings]
    found = {}
    for sequence, _ in generator.events(PROMPTS, params, [1, 2, 3, 4]):
        if sequence.finish_reason:
            found[sequence.prompt_number, sequence.sample] = sequence.completion
    for number, each in enumerate(settings):
        alone = generator.generate([PROMPTS[number]], [number + 1], **{"seed": 1, "rows": 4} | each)[0]
        assert [found[number, sample] for sample in range(len(alone))] == alone
    assert len(found) == 6


def test_fault_087_logits_that_are_not_finite_are_an_error_that_names_the_token(generator):
    model = random_model()
    with torch.no_grad():
        model.position.weight[8] = math.nan  # reached by the sixth token after a prompt of four
    with pytest.raises(NonFiniteError, match="non-finite logits at token 6"):
        generator_of(model).generate("abcd", ignore_eot=True)


@torch.inference_mode()
@pytest.mark.parametrize("captures", [False, True])
def test_a_prompt_is_copied_only_from_rows_that_keep_it(generator, captures, monkeypatch):
    """Rows 0 to 2 are free, row 3 goes on. One after the other, the free rows get what other free rows have held."""
    capture_on_cpu(monkeypatch)
    a, b, c, d = ([number] * 5 + [7] for number in range(4))
    backend = Backend(generator.model)
    backend.captures = captures
    decoder, passes = Decoder(backend, 4, EOT), []
    fill = decoder.launcher.prefill
    decoder.launcher.prefill = lambda texts: passes.append(texts) or fill(texts)
    decoder.fill_caches({0: a, 1: a, 2: b, 3: c})
    expected = [row_of(decoder.step.cache, row, 5) for row in (0, 2, 3)]
    decoder.fill_caches({0: b, 1: c, 2: a})
    decoder.fill_caches({0: b, 2: d})
    decoder.fill_caches({1: b, 2: c})
    assert [list(texts) for texts in passes] == [[0, 2, 3], [0, 2], [2], []]
    for row, values in zip((0, 1, 2, 3), (expected[1], expected[1], expected[2], expected[2]), strict=True):
        assert torch.equal(row_of(decoder.step.cache, row, 5), values)


class Operations(TorchDispatchMode):
    """Counts the operations within a context. On a GPU each is at least one launch."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("samples", [1, 2])
def test_the_start_of_many_texts_takes_no_more_operations_than_that_of_few(samples):
    counts = []
    for texts in (samples, 64):
        backend = Backend(random_model())
        backend.reads_beyond = False  # as with Triton's attention
        decoder = Decoder(backend, 64, EOT)
        decoder.launcher = SimpleNamespace(prefill=lambda _: None)  # for its passes see test_prefill.py
        params = GenerationParams(sampling=SamplingParams(top_k=5), seed=1, ignore_eot=True)
        prompts = [[1, 2, number] for number in range(64)]
        started = {n: Sequence(n, 0, prompts[n // samples], n, 0, params, load_tokenizer("byte")) for n in range(texts)}
        with Operations() as operations:
            decoder.start(started)
            decoder.step.draw_ahead(1)
        counts.append(operations.count)
    assert counts[1] <= counts[0]


# ---- launches of several steps, fetched late


def launching(generator, steps, lag):
    """Returns the same generator with launches of several steps whose results are fetched later, as on a GPU."""
    ahead = generator_of(generator.model)
    take = ahead.take_decoder

    def take_decoder(name, rows):
        decoder = take(name, rows)
        decoder.launcher = SimpleNamespace(
            launch=decoder.step.launch, prefill=decoder.step.prefill, most=steps, lag=lag
        )
        return decoder

    ahead.take_decoder = take_decoder
    return ahead


def recorded_launches(generator, most, prompts, **settings):
    """Returns the numbers of steps of all launches, and the texts."""
    ahead, counts = launching(generator, most, 1), []
    launch = step.Step.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step.Step, "launch", lambda self, count: counts.append(count) or launch(self, count))
        texts = ahead.generate(prompts, ignore_eot=True, seed=1, **settings)
    return counts, [len(text.ids) for samples in texts for text in samples]


def test_launches_grow_from_one_step_and_end_with_the_longest_text():
    generator = generator_of(random_model(ModelConfig(1, 1, 16, 256)))
    counts, _ = recorded_launches(generator, 16, "a", max_new_tokens=65)
    assert counts == [1, 4, 16, 16, 16, 4, 4, 4]
    counts, lengths = recorded_launches(generator, 16, ["a", "b", "c"], max_new_tokens=30, rows=3)
    assert counts == [1, 4, 16, 4, 4, 1] and lengths == [30] * 3
    counts, lengths = recorded_launches(generator, 16, ["a", "b"], max_new_tokens=21, rows=1)
    assert counts == [1, 4, 16] * 2 and lengths == [21] * 2
    counts, lengths = recorded_launches(generator, 16, ["x" * 250], max_new_tokens=20)
    assert sum(counts) == 20 and lengths == [20]  # 7 places are left before the context's edge
    assert recorded_launches(generator, 1, ["a"], max_new_tokens=3)[0] == [1, 1, 1]


def test_the_first_token_comes_before_a_second_launch(generator):
    ahead = launching(generator, 16, 1)
    events = ahead.events(["abc", "de"], [ahead.params(max_new_tokens=30, seed=1, ignore_eot=True)] * 2)
    next(events)
    decoder = events.gi_frame.f_locals["decoder"]
    assert not decoder.in_flight and set(decoder.step.launched[:2]) == {1}


@pytest.mark.parametrize(("steps", "lag"), [(1, 1), (3, 1), (4, 0), (5, 2)])
def test_texts_are_the_same_however_many_steps_a_launch_has_and_however_late_its_results_come(generator, steps, lag):
    settings = {"max_new_tokens": 61, "seed": 4, "rows": 3, "num_samples": 2, "logprobs": True, "top_logprobs": 3}
    settings |= {"repetition_penalty": 1.3, "stop": ("a", "zz")}  # texts end at different times; most slide
    assert launching(generator, steps, lag).generate(PROMPTS, **settings) == generator.generate(PROMPTS, **settings)


def test_every_token_is_that_of_its_own_positions_draw_over_three_blocks_of_draws(generator):
    settings = {"max_new_tokens": 2 * step.DRAWS_AHEAD + 20, "seed": 1, "temperature": 5.0, "top_p": 1.0}
    (completion,) = launching(generator, 7, 1).generate("a", ignore_eot=True, **settings)[0]
    filters = filters_of(SamplingParams(temperature=5.0, top_p=1.0))
    logits = window_logits(generator.model, b"a", completion.ids)
    banned = torch.tensor([EOT])
    expected = [
        choose(values[None], filters, random_draws(1, 1, 0, turn, 1), banned=banned).item()
        for turn, values in enumerate(logits)
    ]
    different = [turn for turn, pair in enumerate(zip(completion.ids, expected, strict=True)) if pair[0] != pair[1]]
    assert len(different) <= 2  # rounding at the border of two tokens


def test_fault_087_a_non_finite_logit_is_named_though_later_steps_are_under_way():
    model = random_model()
    with torch.no_grad():
        model.position.weight[8] = math.nan  # reached by the sixth token after a prompt of four
    with pytest.raises(NonFiniteError, match="non-finite logits at token 6"):
        launching(generator_of(model), 3, 1).generate("abcd", ignore_eot=True)


def test_a_row_that_few_candidates_do_not_decide_is_taken_back_and_repeated(generator, monkeypatch):
    monkeypatch.setattr("gpt.generate.sampling.CANDIDATES", 20)
    settings = {"max_new_tokens": 50, "seed": 2, "rows": 3, "num_samples": 2, "logprobs": True}
    settings |= {"top_p": 0.8, "temperature": 2.0, "repetition_penalty": 1.2}
    expected = generator.generate(PROMPTS, **settings)
    monkeypatch.setattr(Backend, "captures", True)
    monkeypatch.setattr("gpt.generate.decode.CapturedStep", lambda step: step)
    ahead = launching(generator, 4, 1)
    assert ahead.generate(PROMPTS, **settings) == expected
    assert not ahead.idle_decoder.step.narrow


def test_texts_longer_than_one_block_of_draws_go_on_with_new_draws(generator):
    count = 2 * DRAWS_AHEAD + 10
    (completion,) = generator.generate("a", max_new_tokens=count, seed=1, ignore_eot=True, top_p=1.0, temperature=9.0)[
        0
    ]
    assert len(completion.ids) == count
    assert completion.ids[:DRAWS_AHEAD] != completion.ids[DRAWS_AHEAD : 2 * DRAWS_AHEAD]


# ---- memory


def test_fault_094_tensors_do_not_pile_up_over_many_tokens_and_carry_no_graph(generator):
    def tensors():
        gc.collect()
        return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]

    left = {id(found) for found in tensors() if found.grad_fn}  # by earlier tests of this process
    events = generator.events(["abc"], [generator.params(max_new_tokens=10_000, ignore_eot=True, seed=1)])
    counts = [len(tensors()) for n, _ in zip(range(801), events, strict=False) if n in (30, 800)]
    print(counts)
    assert counts[1] <= counts[0]
    assert not any(found.grad_fn for found in tensors() if id(found) not in left)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eager", "native"])
def test_fault_094_the_memory_of_20000_tokens_past_the_context_is_flat(kernels, name):
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux's /proc")
    generator = generator_of(random_model(ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=128)), name)
    params, used = generator.params(max_new_tokens=20_000, ignore_eot=True, seed=1), []
    for number, _ in enumerate(generator.events(["abc"], [params])):
        if number % 1000 == 999:
            used.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert len(used) == 20
    assert max(used) <= used[0] * 1.05
