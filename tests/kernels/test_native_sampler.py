"""The C++ version of the sampler against its plain-torch twin, brute force and the distributions."""

import math

import pytest
import torch
from sampling_helpers import (
    MIXED,
    SOME_FILTERS,
    assert_distribution,
    filters_of,
    params,
    random_logits,
    same_for_all,
)

from gpt.generate.backend import Backend
from gpt.generate.sampling import (
    DRAWS,
    NOT_FINITE,
    UNITS,
    SamplingParams,
    choose,
    draw,
    kept_weights,
    random_draws,
)
from gpt.generate.sequence import GenerationParams
from gpt.generate.step import Step, Window
from gpt.kernels.native_sampler import NativeSampler
from gpt.model import GPT, ModelConfig

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 20_011  # not a multiple of anything that a loop could step by
LOGITS = {
    "sharp": random_logits(50, VOCABULARY, seed=1),
    "flat": random_logits(50, VOCABULARY, seed=2) * 0.2,
    "ties": random_logits(50, VOCABULARY, seed=3, ties=True),
    "bf16": random_logits(50, VOCABULARY, seed=4).bfloat16().float(),
}


@pytest.fixture
def native(kernels):
    return choose_by(NativeSampler(kernels))


def choose_by(sampler):
    """Returns a function that is called like sampling.choose."""

    def choose_ids(logits, filters, draws, seen=None, banned=None, narrow=False):
        assert len(draws) == len(filters.temperature) == len(logits)
        return sampler.call(logits, filters, draws[:, None], seen, banned)()

    return choose_ids


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("values", [*SOME_FILTERS, {"top_p": 0.95}, {"top_k": 5000, "top_p": 0.9}, {"top_k": 10**6}])
def test_it_chooses_what_the_torch_version_chooses(native, kind, values):
    logits = LOGITS[kind]
    rows = len(logits)
    filters, others = same_for_all(params(**values), rows), 0
    weights, _ = kept_weights(logits, filters)
    mass = weights.cumsum(-1)
    total = mass[:, -1]
    least = weights.masked_fill(weights == 0, UNITS).amin(-1)
    for turn in range(20):
        draws = random_draws(turn, kind, 0, 0, rows)
        ids, target = native(logits, filters, draws)[:, None], total * draws // DRAWS
        end, weight = mass.gather(1, ids)[:, 0], weights.gather(1, ids)[:, 0]
        others += (ids[:, 0] != draw(weights, draws)).sum()
        # Rounding may move a border between two tokens a little, or leave the least likely one in or out.
        assert (torch.maximum(end - weight - target, target - end) <= 1e-6 * total + least).all()
    assert others <= 20 * rows / 1000


@pytest.mark.parametrize("number", [0, DRAWS - 1])
@pytest.mark.parametrize("kind", LOGITS)
def test_the_first_and_the_last_token_that_it_keeps_are_the_torch_versions(native, kind, number):
    logits, draws = LOGITS[kind][: len(MIXED)], torch.full((len(MIXED),), number)
    seen = logits > 1
    expected = choose(logits, filters_of(*MIXED), draws, seen)
    assert native(logits, filters_of(*MIXED), draws, seen).tolist() == expected.tolist()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("values", SOME_FILTERS)
def test_100000_draws_have_the_distribution_of_the_kept_tokens(native, values, ties):
    settings, logits, count = params(**values), random_logits(1, 30, seed=9, ties=ties) / 2, 100_000
    ids = native(logits.expand(count, -1), same_for_all(settings, count), random_draws(11, 1, 0, 0, count))
    assert_distribution(ids.numpy(), logits[0], settings)


def test_rows_of_different_settings_get_what_each_gets_alone_with_any_number_of_threads(native):
    rows = len(MIXED)
    logits, draws, seen = LOGITS["sharp"][:rows], random_draws(2, 1, 0, 0, rows), LOGITS["flat"][:rows] > 0.3
    together = native(logits, filters_of(*MIXED), draws, seen)
    torch.set_num_threads(2)
    assert torch.equal(native(logits, filters_of(*MIXED), draws, seen), together)
    for row, settings in enumerate(MIXED):
        here = slice(row, row + 1)
        assert native(logits[here], filters_of(settings), draws[here], seen[here]) == together[row]


def test_logits_seen_and_draws_may_be_parts_of_larger_tensors(native):
    logits, seen, draws = LOGITS["sharp"][:4], LOGITS["flat"][:4] > 0, random_draws(2, 1, 0, 0, 4)
    filters = same_for_all(SamplingParams(repetition_penalty=1.5), 4)
    expected = native(logits.contiguous(), filters, draws, seen)
    wide, wider = torch.zeros(4, VOCABULARY + 5), torch.zeros(4, VOCABULARY + 3, dtype=torch.bool)
    wide[:, :VOCABULARY], wider[:, :VOCABULARY] = logits, seen
    given = wide[:, :VOCABULARY], filters, torch.stack([draws, draws], 1)[:, 0], wider[:, :VOCABULARY]
    assert torch.equal(native(*given), expected)


def test_rows_that_are_not_finite_are_marked_and_the_others_are_not(native):
    logits = random_logits(5, 3000, seed=8)
    logits[1, 5], logits[2, 2999], logits[3, 0] = math.nan, math.inf, -math.inf
    for settings in (params(), SamplingParams(), params(temperature=0.0)):
        ids = native(logits, same_for_all(settings, 5), random_draws(1, 1, 0, 0, 5))
        assert (ids == NOT_FINITE).tolist() == [False, True, True, True, False]


def test_banned_ids_are_never_chosen(native):
    logits = random_logits(1, 40, seed=2)
    banned = logits[0].topk(2).indices
    for settings in (params(), params(temperature=0.0), params(top_k=1)):
        draws = random_draws(1, 1, 0, 0, 500)
        ids = native(logits.expand(500, -1), same_for_all(settings, 500), draws, banned=banned)
        assert torch.equal(ids, choose(logits.expand(500, -1), same_for_all(settings, 500), draws, banned=banned))
        assert not set(ids.tolist()) & set(banned.tolist())


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-6, 1e-3, 1e3, 1e300])
@pytest.mark.parametrize("values", [{}, {"top_k": 700}, {"top_p": 0.5}, {"min_p": 0.1, "repetition_penalty": 1e300}])
def test_the_most_extreme_settings_give_what_the_torch_version_gives(native, temperature, values):
    logits = LOGITS["ties"][:8]
    filters, draws = same_for_all(params(temperature=temperature, **values), 8), random_draws(2, 1, 0, 0, 8)
    expected = choose(logits, filters, draws, logits > 0)
    assert native(logits, filters, draws, logits > 0).tolist() == expected.tolist()


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 65, 1000])
def test_vocabularies_of_any_size(native, vocabulary):
    logits, draws = random_logits(20, vocabulary, seed=vocabulary), random_draws(2, 1, 0, 0, 20)
    for settings in MIXED:
        filters = same_for_all(settings, 20)
        assert (
            native(logits, filters, draws, logits > 0).tolist() == choose(logits, filters, draws, logits > 0).tolist()
        )
    equal = torch.zeros(20, vocabulary)
    filters = same_for_all(params(top_p=0.5), 20)
    assert native(equal, filters, draws).tolist() == choose(equal, filters, draws).tolist()


def test_the_end_of_a_step_is_that_of_plain_torch_in_every_respect(kernels, monkeypatch):
    """Draws that go around, rows begun anew, a penalty that begins late, banned ids, end-of-text that is not chosen,
    rows that are not finite."""
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8), 300)
    native, eot, other = NativeSampler(kernels), 299, 7
    monkeypatch.setattr("gpt.generate.step.choose", choose_by(native))
    ours, theirs = (Step(Backend(model), 3, eot, banned=[other, 9]) for _ in range(2))
    given = torch.empty(3, 300)  # at the same address at every step, as the native model's
    generator = torch.Generator().manual_seed(0)
    for turn in range(1200):
        logits = torch.randn(3, 300, generator=generator) * 4
        logits[:, other] = 50
        logits[turn % 3, eot] = 40
        if turn % 97 == 5:
            logits[1, 3] = math.nan
        for step in (ours, theirs):
            begin(step, turn)
            if step.seen is not None:
                step.seen.scatter_(1, step.next[:, None], True)
        expected = theirs.choose(logits.clone())
        assert torch.equal(native.choose(given.copy_(logits), ours), expected)
        assert torch.equal(ours.next, theirs.next)
        assert torch.equal(ours.turns, theirs.turns)


def begin(step, turn):
    """Does what is due before step `turn`: rows start at 0, one again at 500, another, with a penalty, at 800."""
    for row in range(3):
        if turn == 0 or (turn, row) in ((500, 1), (800, 2)):
            settings = SamplingParams(temperature=0.9, top_k=5 * row, repetition_penalty=1.3 if turn == 800 else 1.0)
            step.set_params({row: GenerationParams(sampling=settings, ignore_eot=row != 1)})
            step.set_windows([Window(row, [row, 4], turn=0)])
            step.set_streams({row: (1, 2, row)})
    step.draw_ahead(1)
    step.launched += 1
