"""The penalties for a text's own tokens and n-grams against their definitions, on every back end, past the context."""

import itertools
import random

import numpy as np
import pytest
import torch
from generation_helpers import EOT, PROMPTS, generator_of, random_model, window_logits
from graph_helpers import read_nothing
from sampling_helpers import discouraged, params, random_logits

from gpt.generate.decode import Decoder
from gpt.generate.repeats import FORBIDDEN, Repeats, equal_before
from gpt.generate.sequence import in_order
from gpt.generate.step import Step

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = [
    {"no_repeat_ngram": 2},
    {"no_repeat_ngram": 3},
    {"no_repeat_ngram": 1},
    {"no_repeat_ngram": 10**30},
    {"frequency_penalty": 1.5},
    {"frequency_penalty": -0.5},
    {"presence_penalty": 2.0},
    {"presence_penalty": -2.0, "frequency_penalty": 2.0},
    {"frequency_penalty": 0.7, "presence_penalty": 0.3, "no_repeat_ngram": 2},
    {},
]


def texts_of(rows, vocabulary, seed):
    """Returns a (prompt, ids) for each row: ids of few different tokens, so that much repeats."""
    draw = random.Random(seed)
    lengths = [(draw.randrange(1, 9), draw.randrange(0, 40)) for _ in range(rows)]
    return [tuple([draw.randrange(vocabulary) for _ in range(count)] for count in pair) for pair in lengths]


def filled(texts, settings, vocabulary):
    repeats = Repeats(len(texts), vocabulary, torch.device("cpu"))
    for row, (text, own) in enumerate(zip(texts, settings, strict=True)):
        repeats.begin(row, own, *text)
    return repeats


def lowered(repeats, logits):
    logits = logits.clone()
    for part in repeats.used:
        part.discourage(logits)
    return logits


# ---- against the definitions


@pytest.mark.parametrize("seed", range(5))
def test_equal_before_counts_what_stands_before_each_place_and_at_the_end(seed):
    text = texts_of(1, 3, seed)[0][1] * (seed + 1)
    for place, count in enumerate(equal_before(text)):
        equal = [n for n in range(place + 1) if text[place - n : place] == text[len(text) - n :]]
        assert count == max(equal)
    assert equal_before([]) == []


@pytest.mark.parametrize("vocabulary", [3, 50])
def test_logits_are_those_of_the_definitions_however_a_text_came_about(vocabulary):
    settings = [params(**own) for own in SETTINGS]
    texts, logits = texts_of(len(settings), vocabulary, seed=1), random_logits(len(settings), vocabulary, seed=2)
    whole = lowered(filled(texts, settings, vocabulary), logits)
    for row, (prompt, ids) in enumerate(texts):
        torch.testing.assert_close(whole[row], discouraged(logits[row], prompt, ids, settings[row]))
    grown = filled([(prompt, []) for prompt, _ in texts], settings, vocabulary)
    longest = max(len(ids) for _, ids in texts)
    for turn in range(longest + 1):
        for row, (_, ids) in enumerate(texts):
            if len(ids) == turn:
                assert torch.equal(lowered(grown, logits)[row], whole[row])
        grown.reserve(np.full(len(texts), turn), 1)
        for part in grown.used:
            part.append(torch.tensor([ids[turn] if turn < len(ids) else 0 for _, ids in texts]))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_forbidden_tokens_are_those_of_transformers(n):
    process = pytest.importorskip("transformers.generation.logits_process").NoRepeatNGramLogitsProcessor(n)
    for seed in range(20):
        [(prompt, ids)] = texts_of(1, 4, seed)
        logits = random_logits(1, 6, seed=seed)
        theirs = process(torch.tensor([[*prompt, *ids]]), logits.clone())
        ours = lowered(filled([(prompt, ids)], [params(no_repeat_ngram=n)], 6), logits)
        assert torch.equal(ours.masked_fill(ours == FORBIDDEN, -torch.inf), theirs)


def test_a_text_of_any_length_keeps_its_tokens():
    repeats = filled([([1, 2], [])], [params(no_repeat_ngram=3)], 10)
    ids, kinds = [random.Random(0).randrange(10) for _ in range(2000)], set()
    for turn, token in enumerate(ids):
        repeats.reserve(np.array([turn]), 1)
        kinds.add(repeats.kind)
        for part in repeats.used:
            part.append(torch.tensor([token]))
    logits = random_logits(1, 10, seed=1)
    assert torch.equal(lowered(repeats, logits)[0], discouraged(logits[0], [1, 2], ids, params(no_repeat_ngram=3)))
    assert len(kinds) == 4  # 256, 512, 1024, 2048 places


def test_rows_without_these_settings_keep_their_logits_to_the_bit_and_cost_nothing():
    logits = random_logits(3, 50, seed=3)
    texts = texts_of(3, 50, seed=4)
    for own in ({"no_repeat_ngram": 1}, {"frequency_penalty": 2.0}):
        repeats = filled(texts, [params(), params(**own), params()], 50)
        assert torch.equal(lowered(repeats, logits)[[0, 2]], logits[[0, 2]])
        repeats.begin(1, None)
        assert repeats.used == [] and repeats.kind == (0, 0)
    unused = filled(texts, [params(repetition_penalty=1.3)] * 3, 50)
    assert not unused.used and not any(tensor.numel() > 3 for part in unused.parts for tensor in part.tensors)


@pytest.mark.parametrize(
    "values, named",
    [
        ({"frequency_penalty": 2.1}, "frequency_penalty 2.1 must be from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty nan"),
        ({"presence_penalty": -3.0}, "presence_penalty -3.0 must be from -2 to 2"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram -1 must be 0 (off) or more"),
    ],
)
def test_fault_086_penalties_out_of_range_are_named(values, named):
    assert params(**values).problems()[0].startswith(named)
    assert params(frequency_penalty=-2.0, presence_penalty=2.0, no_repeat_ngram=1).problems() == []


# ---- in generation, past the context of 24


@pytest.fixture(scope="module")
def generator():
    return generator_of(random_model())


def expected_greedy(model, prompt, ids, settings):
    """Returns the margin by which each of `ids` is the likeliest token by the definitions, without a cache."""
    margins = []
    for turn, logits in enumerate(window_logits(model, prompt, ids)):
        logits[EOT] = FORBIDDEN
        logits = discouraged(logits, prompt, ids[:turn], settings)
        margins.append((logits[ids[turn]] - logits.max()).item())
    return margins


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_greedy_texts_are_those_of_the_definitions_with_any_window_and_in_refilled_rows(request, values, backend):
    if backend == "native":
        request.getfixturevalue("kernels")
    generator = generator_of(random_model(), backend)
    common = {"max_new_tokens": 70, "temperature": 0.0, "ignore_eot": True, "seed": 0, "rows": 2}
    texts = generator.generate(PROMPTS, **common, **values)
    for prompt, (completion,) in zip(PROMPTS, texts, strict=True):
        margins = expected_greedy(generator.model, list(prompt.encode()) or [EOT], completion.ids, params(**values))
        assert min(margins) > -1e-3 and len(margins) == 70


def test_no_pair_of_tokens_comes_twice_in_prompt_and_text(generator):
    for settings in ({"temperature": 0.0}, {"temperature": 0.5, "top_p": 0.5}):
        [[completion]] = generator.generate("abcab", max_new_tokens=120, no_repeat_ngram=2, seed=1, **settings)
        text = [*b"abcab", *completion.ids]
        pairs = list(itertools.pairwise(text))
        assert len(set(pairs)) == len(pairs) - 1  # "ab" twice, in the prompt itself


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_a_text_with_penalties_does_not_depend_on_the_rows_beside_it(request, backend):
    if backend == "native":
        request.getfixturevalue("kernels")
    generator = generator_of(random_model(), backend)
    common = {"max_new_tokens": 60, "seed": 3, "rows": 3, "ignore_eot": True}
    mixed = [own | common for own in SETTINGS if own.get("no_repeat_ngram", 0) < 10**9]
    prompts = [f"prompt {number}" for number in range(len(mixed))]
    events = in_order(generator.events(prompts, [generator.params(**own) for own in mixed]))
    together = [sequence.completion for sequence, _ in events if sequence.finish_reason]
    for number, own in enumerate(mixed):
        [[alone]] = generator.generate([prompts[number]], prompt_ids=[number + 1], **own)
        assert alone == together[number]


def test_undecided_rows_go_back_to_the_text_they_had(generator, monkeypatch):
    settings = {"max_new_tokens": 50, "seed": 2, "rows": 3, "temperature": 2.0, "top_p": 0.8, "no_repeat_ngram": 1}
    settings |= {"frequency_penalty": 1.0}
    expected = generator.generate(PROMPTS, **settings)
    repeated, repeat, reset = [], Decoder.repeat, Step.reset
    monkeypatch.setattr("gpt.generate.sampling.CANDIDATES", 20)
    read_nothing(monkeypatch)
    monkeypatch.setattr(Step, "reset", lambda step, report: (reset(step, report), setattr(step, "narrow", True)))
    monkeypatch.setattr(Decoder, "repeat", lambda *words: repeated.append(1) or repeat(*words))
    assert generator_of(generator.model).generate(PROMPTS, **settings) == expected
    assert repeated


def test_answers_that_go_on_after_a_kill_are_the_same(generator):
    params = [generator.params(max_new_tokens=40, seed=1, rows=2, **own) for own in SETTINGS[:3] + SETTINGS[4:]]
    prompts = ["ab" * n for n in range(len(params))]
    whole = [s.completion for s, _ in in_order(generator.events(prompts, params)) if s.finish_reason]
    rest = [s.completion for s, _ in in_order(generator.events(prompts, params, skip=4)) if s.finish_reason]
    assert rest == whole[4:]


def test_log_probabilities_are_those_before_the_penalties(generator):
    settings = {"max_new_tokens": 30, "temperature": 0.0, "frequency_penalty": 2.0, "no_repeat_ngram": 1}
    [[completion]] = generator.generate("abc", logprobs=True, ignore_eot=True, **settings)
    logits = window_logits(generator.model, b"abc", completion.ids)
    expected = [values.log_softmax(-1)[token].item() for values, token in zip(logits, completion.ids, strict=True)]
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)
