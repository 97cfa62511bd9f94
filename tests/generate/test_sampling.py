"""Sampling against known answers of Random123, transformers' processors, brute force and the distributions."""

import math

import numpy as np
import pytest
import torch
from sampling_helpers import (
    MIXED,
    SOME_FILTERS,
    assert_distribution,
    brute_force,
    filters_of,
    params,
    random_logits,
    same_for_all,
    softmax,
)

from gpt.device import upload
from gpt.generate import sampling
from gpt.generate.sampling import (
    CANDIDATES,
    DRAWS,
    NOT_FINITE,
    UNDECIDED,
    UNITS,
    Filters,
    SamplingParams,
    choose,
    draws_of_streams,
    kept_weights,
    likeliest,
    penalize,
    philox,
    random_draws,
    stream,
)

pytestmark = pytest.mark.usefixtures("one_thread")

KNOWN = [  # counter, key, result: kat_vectors of Random123, philox4x32 with 10 rounds
    (("00000000",) * 4, ("00000000",) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (("ffffffff",) * 4, ("ffffffff",) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        ("243f6a88", "85a308d3", "13198a2e", "03707344"),
        ("a4093822", "299f31d0"),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def kept_ids(logits, settings):
    """For each row the set of ids that can be drawn."""
    weights, _ = kept_weights(logits, same_for_all(settings, len(logits)))
    return [set(row.nonzero()[:, 0].tolist()) for row in weights]


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    words = [torch.tensor([int(word, 16)]) for word in counter]
    result = philox(words, int(key[1] + key[0], 16))
    assert " ".join(f"{word.item():08x}" for word in result) == expected


def test_settings_of_many_rows_are_those_of_each_and_only_changes_are_copied(monkeypatch):
    settings = [params(top_k=3), params(), params(temperature=0.0), params(top_p=0.5, min_p=0.1)]
    copied, rows = [], dict(enumerate(settings))
    monkeypatch.setattr(sampling, "upload", lambda *given: copied.append(given) or upload(*given))
    together, one_by_one = Filters(4), filters_of(*settings)
    copied.clear()
    for _ in range(2):
        together.assign(rows)
        together.upload()
    assert len(copied) == 4  # all but the penalty, once
    assert together.kind == one_by_one.kind
    for name in sampling.FILTERS:
        assert torch.equal(getattr(together, name), getattr(one_by_one, name))


def test_draws_of_several_streams_are_those_of_each():
    keys, starts = [(0, 1, 0), (7, "a", 3), (1 << 63, -5, 2), ((1 << 64) - 1, 9, 1)], [0, 512, 3, 1 << 20]
    together = draws_of_streams(torch.tensor([stream(*key) for key in keys]), torch.tensor(starts), 40)
    for draws, key, start in zip(together, keys, starts, strict=True):
        assert torch.equal(draws, random_draws(*key, start, 40))


def test_draws_are_a_pure_function_of_seed_prompt_sample_and_position():
    whole = random_draws(7, "a", 3, 0, 100)
    assert torch.equal(whole[40:60], random_draws(7, "a", 3, 40, 20))
    others = [
        random_draws(8, "a", 3, 0, 100),
        random_draws(7, "b", 3, 0, 100),
        random_draws(7, "a", 4, 0, 100),
        random_draws(7, 1, 3, 0, 100),
        random_draws(7 + (1 << 32), "a", 3, 0, 100),
        random_draws(7, 1 + (1 << 32), 3, 0, 100),
    ]
    assert len({tuple(row.tolist()) for row in [whole, *others]}) == 7
    assert ((whole >= 0) & (whole < DRAWS)).all()


def test_draws_are_uniform():
    draws = random_draws(0, 1, 0, 0, 1 << 16).double() / DRAWS
    counts = torch.histc(draws, bins=64, min=0, max=1)
    assert ((counts - 1024) ** 2 / 1024).sum() < 110  # 63 degrees of freedom: exceeded once in 4,000 seeds
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.02


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("vocabulary", [50, 3000])
@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 40},
        {"top_k": 2999},
        {"top_k": 10**6},
        {"top_p": 1e-6},
        {"top_p": 0.3},
        {"top_p": 0.95},
        {"top_p": 0.9999},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"temperature": 0.5, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 2.0, "top_k": 30, "top_p": 0.7},
    ],
)
def test_the_kept_tokens_are_those_of_a_brute_force_reference(values, vocabulary, ties):
    logits, settings = random_logits(4, vocabulary, seed=vocabulary, ties=ties), params(**values)
    for row, ids in enumerate(kept_ids(logits, settings)):
        expected = brute_force(logits[row], settings)
        probabilities = softmax(logits[row].double().numpy() / settings.temperature)
        # float32 may put tokens that weigh less than its own rounding on either side of an edge
        assert probabilities[list(ids ^ expected)].sum() < 2e-7


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 10},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"temperature": 0.7, "top_k": 50, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 1.5, "repetition_penalty": 1.3, "top_p": 0.95},
    ],
)
def test_kept_tokens_and_probabilities_are_those_of_transformers_processors(values):
    process = pytest.importorskip("transformers.generation.logits_process")
    settings, logits = params(**values), random_logits(6, 2500, seed=5)
    prompt = torch.randint(2500, (6, 12), generator=torch.Generator().manual_seed(3))
    theirs = process.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)(prompt, logits.clone())
    theirs = process.TemperatureLogitsWarper(settings.temperature)(prompt, theirs)
    if settings.top_k:
        theirs = process.TopKLogitsWarper(settings.top_k)(prompt, theirs)
    if settings.top_p < 1:
        theirs = process.TopPLogitsWarper(settings.top_p)(prompt, theirs)
    if settings.min_p:
        theirs = process.MinPLogitsWarper(settings.min_p)(prompt, theirs)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, prompt, True)
    filters = same_for_all(settings, 6)
    weights, _ = kept_weights(penalize(logits, seen, filters.penalty[:, None]), filters)
    ours = weights / weights.sum(1, keepdim=True)
    torch.testing.assert_close(ours, theirs.softmax(-1), rtol=1e-4, atol=1e-8)
    assert [set(row.nonzero()[:, 0].tolist()) for row in ours] == [
        set(row.nonzero()[:, 0].tolist()) for row in theirs.softmax(-1) > 2 / UNITS
    ]


@pytest.mark.parametrize(
    "values",
    [
        {"top_p": 0.9},
        {"top_k": CANDIDATES - 24, "top_p": 0.99},
        {"top_k": CANDIDATES, "top_p": 0.5},
        {"top_k": 2 * CANDIDATES, "top_p": 0.1},
        {"top_k": 3},
        {"min_p": 0.3},
        {},
        {"temperature": 0.0},
    ],
)
def test_looking_at_few_candidates_gives_the_draws_of_sorting_all_tokens_or_none(values, monkeypatch):
    sharp, flat = random_logits(8, 4000, seed=1), random_logits(8, 4000, seed=2) * 0.01
    draws = random_draws(1, 1, 0, 0, 8)
    filters = filters_of(params(**values), *[params(top_k=5)] * 7)
    for logits in (sharp, flat, sharp.round(), torch.zeros(8, 4000), torch.cat([sharp[:4], flat[:4]])):
        with monkeypatch.context() as patch:
            patch.setattr("gpt.generate.sampling.CANDIDATES", 10**9)
            every = choose(logits, filters, draws)
        assert torch.equal(choose(logits, filters, draws), every)
        narrow = choose(logits, filters, draws, narrow=True)
        assert ((narrow == every) | (narrow == UNDECIDED)).all()
        assert (every >= 0).all()
        assert narrow[0] != UNDECIDED or logits is not sharp or values.get("top_k", 0) >= CANDIDATES


def test_candidates_that_all_tie_do_not_decide():
    filters = filters_of(params(top_p=0.01), params(top_k=3), params(min_p=0.5), params())
    narrow = choose(torch.zeros(4, 2 * CANDIDATES), filters, random_draws(1, 1, 0, 0, 4), narrow=True)
    assert (narrow[1:3] == UNDECIDED).all()  # top-k keeps all ties, min-p likewise
    assert narrow[0] != UNDECIDED  # of ties at top-p's border the lowest ids stay
    assert narrow[3] != UNDECIDED  # it leaves nothing out


@pytest.mark.parametrize("narrow", [True, False])
def test_rows_of_different_settings_get_what_each_gets_alone(narrow):
    rows = len(MIXED)
    logits, draws = random_logits(rows, 3000, seed=4), random_draws(2, 1, 0, 0, rows)
    seen = random_logits(rows, 3000, seed=5) > 3
    together = choose(logits, filters_of(*MIXED), draws, seen, narrow=narrow)
    for row, settings in enumerate(MIXED):
        here = slice(row, row + 1)
        assert choose(logits[here], filters_of(settings), draws[here], seen[here]) == together[row]
    assert (
        choose(logits.flip(0), filters_of(*MIXED[::-1]), draws.flip(0), seen.flip(0)).tolist()[::-1]
        == together.tolist()
    )


def test_an_idle_row_counts_for_nothing():
    filters = filters_of(params(top_k=3, repetition_penalty=1.1), params(temperature=0.0), params())
    assert filters.kind == (False, True, True)
    filters.assign({0: None})
    assert filters.kind == (False, True, False)  # greedy leaves tokens out
    filters.assign({1: None})
    assert filters.kind == (False, False, False)
    filters.assign({2: None})
    assert filters.kind == Filters(3).kind == (True, False, False)


@pytest.mark.parametrize("narrow", [True, False])
def test_choosing_without_a_look_at_results_gives_the_same_ids(monkeypatch, narrow):
    logits, draws, filters = random_logits(12, 3000, seed=4), random_draws(2, 1, 0, 0, 12), filters_of(*MIXED)
    expected = choose(logits, filters, draws, logits > 2, narrow=narrow)
    monkeypatch.setattr(sampling, "host_can_read", lambda _: False)
    assert torch.equal(choose(logits, filters, draws, logits > 2, narrow=narrow), expected)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("values", SOME_FILTERS)
def test_100000_draws_have_the_distribution_of_the_kept_tokens(values, ties):
    settings, logits, count = params(**values), random_logits(1, 30, seed=9, ties=ties) / 2, 100_000
    draws = random_draws(11, 1, 0, 0, count)
    ids = choose(logits.expand(count, -1), same_for_all(settings, count), draws).numpy()
    assert_distribution(ids, logits[0], settings)


@pytest.mark.parametrize("draw", [0, 1, DRAWS // 2, DRAWS - 1])
@pytest.mark.parametrize("values", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"temperature": 1e-6}])
def test_no_draw_however_extreme_gives_a_token_of_probability_zero(values, draw):
    logits = torch.full((2, 2000), -200.0)
    logits[0, [100, 1000, 1900]] = torch.tensor([1.0, 2.0, 1.5])
    logits[1, 1999] = 0.0
    ids = choose(logits, same_for_all(params(**values), 2), torch.full((2,), draw))
    assert ids[0].item() in (100, 1000, 1900)
    assert ids[1].item() == 1999


def test_temperature_zero_takes_the_likeliest_token_and_of_a_tie_the_lowest_id():
    logits = torch.zeros(2, 5000)
    logits[0, [4000, 17, 3000]] = 5.0
    for settings in (params(temperature=0.0), params()):  # all rows greedy, or only some
        filters = filters_of(params(temperature=0.0), params(temperature=0.0), settings)
        ids = choose(torch.cat([logits, logits[:1]]), filters, torch.full((3,), DRAWS - 1))
        assert ids.tolist()[:2] == [17, 0]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-300])
def test_fault_086_the_smallest_temperatures_are_greedy(temperature):
    logits = random_logits(4, 3000, seed=6) * 30
    ids = choose(logits, same_for_all(params(temperature=temperature), 4), random_draws(3, 1, 0, 0, 4))
    assert ids.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "values, named",
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 2.0}, "top_p 2.0"),
        ({"top_p": math.nan}, "top_p nan"),
        ({"min_p": 1.5}, "min_p 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty inf"),
    ],
)
def test_fault_086_settings_out_of_range_are_named(values, named):
    (problem,) = params(**values).problems()
    assert problem.startswith(named)


def test_all_problems_of_the_settings_are_listed():
    assert len(SamplingParams(temperature=-1, top_k=-1, top_p=0, min_p=2, repetition_penalty=0).problems()) == 5
    assert SamplingParams().problems() == []


def test_fault_087_a_row_with_a_nan_or_an_infinity_is_marked_and_the_others_are_not():
    logits = random_logits(4, 3000, seed=8)
    logits[1, 5], logits[2, 7] = math.nan, -math.inf
    for settings in (params(), SamplingParams(), params(temperature=0.0)):
        for narrow in (True, False):
            ids = choose(logits, same_for_all(settings, 4), random_draws(1, 1, 0, 0, 4), narrow=narrow)
            assert (ids == NOT_FINITE).tolist() == [False, True, True, False]


def test_banned_ids_are_never_chosen():
    logits = random_logits(1, 40, seed=2)
    banned = logits[0].topk(2).indices
    for settings in (params(), params(temperature=0.0), params(top_k=1)):
        filters = same_for_all(settings, 500)
        ids = choose(logits.expand(500, -1), filters, random_draws(1, 1, 0, 0, 500), banned=banned)
        assert not set(ids.tolist()) & set(banned.tolist())


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_the_most_extreme_repetition_penalties_still_give_a_token(penalty):
    logits = random_logits(2, 50, seed=2) * 1e5
    for settings in (params(repetition_penalty=penalty), params(temperature=0.0, repetition_penalty=penalty)):
        ids = choose(logits, same_for_all(settings, 2), torch.tensor([0, DRAWS - 1]), seen=logits > 0)
        assert ((ids >= 0) & (ids < 50)).all()


@pytest.mark.parametrize("ties", [False, True])
def test_the_likeliest_tokens_are_numpys(ties):
    logits = random_logits(3, 500, seed=3, ties=ties)
    logprobs = logits.log_softmax(-1)
    ids = likeliest(logprobs, 20)
    for row in range(3):
        expected = np.log(softmax(logits[row].double().numpy()))
        assert ids[row].tolist() == np.argsort(-logits[row].numpy(), kind="stable")[:20].tolist()
        np.testing.assert_allclose(logprobs[row], expected, atol=2e-6)
