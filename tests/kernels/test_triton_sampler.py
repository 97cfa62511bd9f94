"""The Triton sampler against its plain twin: on a GPU, or by Triton's interpreter where it is installed without one."""

from triton_helpers import run_with_triton

SETUP = """
import warnings

import torch
from sampling_helpers import MIXED, filters_of, params, random_logits

from gpt.generate.sampling import (
    NOT_FINITE, SamplingParams, choose, draw, last_kept, random_draws, ranking, stream
)
from gpt.kernels import triton_sampler
from gpt.kernels.triton_sampler import GROUP, choose_next, new_scratch

warnings.simplefilter("ignore")  # NumPy's, about overflows that are meant, in the interpreter
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EOT = 0


def launch(logits, filters, keys, turns, ignores_eot=None, banned=None, scratch=None):
    for name in ("temperature", "top_k", "top_p", "min_p"):
        setattr(filters, name, getattr(filters, name).to(device))
    rows = len(logits)
    streams, next_ids = torch.tensor([stream(*key) for key in keys]).to(device), torch.full((rows,), 7, device=device)
    ignores_eot = torch.zeros(rows, dtype=torch.bool) if ignores_eot is None else ignores_eot
    before = turns.clone()
    logits, ignores_eot = logits.to(device), ignores_eot.to(device)
    ids = choose_next(logits, filters, streams, turns, next_ids, ignores_eot, EOT, banned, scratch)
    assert torch.equal(turns, before + 1) and torch.equal(next_ids, ids.clamp(min=0))
    return ids.cpu()


def plain_draws(keys, turns):
    return torch.cat([random_draws(*key, turn, 1) for key, turn in zip(keys, turns.tolist(), strict=True)])


def keys_and_turns(rows):
    keys = [(2**64 - 1 - 3**row, f"question {row}" if row % 2 else 2**40 + row, row) for row in range(rows)]
    return keys, (torch.arange(rows) * 1001).to(device)
"""

TWIN = """
OWN = [
    params(top_k=1), params(top_k=5), params(top_p=0.1), params(top_p=0.5), params(top_p=0.95),
    params(top_k=5, top_p=0.9), params(min_p=0.1, top_p=0.7, top_k=40), params(temperature=1e30, top_p=0.5),
    params(temperature=0.3, top_k=50, top_p=0.95), params(min_p=1.0), SamplingParams(temperature=0.0, top_k=3),
]
ROWS = [row for row in MIXED if row.repetition_penalty == 1] + OWN
KINDS = {
    "random": lambda logits: logits,
    "ties": lambda logits: (logits * 2).round() / 2,
    "flat": lambda logits: logits * 0,
    "bf16": lambda logits: logits.bfloat16(),
    "fp16, far from 0": lambda logits: (logits - 35).half(),
    "one outlier": lambda logits: logits.scatter(1, torch.tensor([[logits.shape[1] // 2]] * len(logits)), 1e38),
}
seed = differing = 0
for vocabulary, block in ((1, 32), (2, 32), (5, 32), (257, 128), (1000, 256), (8195, 4096)):
    triton_sampler.BLOCK = block
    for kind, change in KINDS.items():
        seed += 1
        rows = [*ROWS, params(top_k=vocabulary), params(top_k=max(1, vocabulary - 1))][seed % 2 :: 2]
        padded = torch.full((len(rows), vocabulary + 5), float("nan"))
        padded[:, :vocabulary] = random_logits(len(rows), vocabulary, seed)
        padded = change(padded) if kind != "one outlier" else padded
        logits = change(padded[:, :vocabulary]) if kind == "one outlier" else padded[:, :vocabulary]
        keys, turns = keys_and_turns(len(rows))
        draws, filters = plain_draws(keys, turns), filters_of(*rows)
        scratch = new_scratch(len(rows), vocabulary, device)
        found = launch(logits, filters, keys, turns, scratch=scratch)
        filters = filters_of(*rows)
        differing += (found != choose(logits.float(), filters, draws)).sum().item()

        # From the kernel's own weights, the whole-number part must give exactly the kernel's ids.
        drawn = filters.temperature > 0
        weights = scratch.weights[:, 0, :vocabulary].cpu().long() & 0xFFFFFFFF
        scaled = logits.float() - logits.float().amax(-1, keepdim=True)
        scaled = scaled / filters.temperature.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        assert torch.equal(scratch.depths[:, 0, :vocabulary].cpu()[drawn].abs(), scaled[drawn].abs())
        own = (scaled.softmax(-1) * 2**32).round().long()
        error = ((weights - own).abs() - own / 2**18)[drawn]
        assert error.max() <= 1, (vocabulary, kind, error.max(), weights[drawn][error > 1], own[drawn][error > 1])
        places = ranking(scaled)
        expected = draw(weights * (places <= last_kept(scaled, weights, places, filters)[0]), draws)
        expected = torch.where(drawn, expected, logits.float().argmax(-1))
        assert torch.equal(found, expected), (vocabulary, kind, found, expected)
assert differing <= 2, differing  # the rounding of e^x, at the border of two tokens
print("done")
"""

EDGES = """
triton_sampler.BLOCK, vocabulary = 64, 150
settings = [params(), params(top_k=20, top_p=0.9), SamplingParams(temperature=0.0), params(min_p=0.01)]
keys, turns = keys_and_turns(4)
draws = plain_draws(keys, turns)
logits = random_logits(4, vocabulary, 1)
logits[:, EOT] += 30


def check(logits, expected, turns=turns, **options):
    for rows in (slice(0, 4), slice(1, 3)):  # no row depends on another
        own = {name: value[rows] if name == "ignores_eot" else value for name, value in options.items()}
        found = launch(logits[rows], filters_of(*settings[rows]), keys[rows], turns[rows].clone(), **own)
        assert torch.equal(found, expected[rows]), (found, expected)


plain = choose(logits, filters_of(*settings), draws)
assert (plain == EOT).all()
check(logits, plain)
ignores = torch.tensor([True, False, True, True])
without = logits.clone()
without[:, EOT].masked_fill_(ignores, torch.finfo(torch.float32).min)
expected = choose(without, filters_of(*settings), draws)
assert ((expected != EOT) == ignores).all()
check(logits, expected, ignores_eot=ignores)
damaged = logits.clone()
damaged[ignores, EOT] = float("nan")  # not looked at
check(damaged, expected, ignores_eot=ignores)

banned = torch.zeros(vocabulary, dtype=torch.bool, device=device)
banned[torch.tensor([EOT, 5, *range(70, 140)])] = True
expected = choose(logits, filters_of(*settings), draws, banned=banned.nonzero()[:, 0].cpu())
assert not banned.cpu()[expected].any()
check(logits, expected, banned=banned)

for value in (float("inf"), -float("inf"), float("nan")):
    damaged = logits.clone()
    damaged[1, 149] = damaged[2, 0] = value
    check(damaged, choose(damaged, filters_of(*settings), draws))
    assert launch(damaged, filters_of(*settings), keys, turns.clone()).tolist()[1:3] == [NOT_FINITE] * 2

# Random numbers: with equal logits, all 2^30 of them are spread over the ids.
turns = torch.tensor([0, 1, 511, 2**31], device=device)
filters = filters_of(*[params()] * 4)
for seed in (0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1):
    for prompt_id in (0, 1, 2**32, 2**64 - 1, "", "a text"):
        keys = [(seed, prompt_id, sample) for sample in (0, 1, 77, 2**31)]
        draws = plain_draws(keys, turns)
        found = launch(torch.zeros(4, 128), filters, keys, turns.clone())
        assert torch.equal(found, draws >> 23)
print("done")
"""


BOUNDS = """
settings = [params(), params(top_k=5, top_p=0.9), params(top_p=0.5), params(min_p=0.1)]
for vocabulary in (1, 257, 2049):  # at the size of a block that users get
    for setting in settings:
        scratch = new_scratch(2, vocabulary, device)
        for tensor in scratch:
            tensor.fill_(77)
        keys, turns = keys_and_turns(1)
        launch(random_logits(1, vocabulary, 1), filters_of(setting), keys, turns, scratch=scratch)
        assert all((tensor[1] == 77).all() for tensor in scratch), (vocabulary, setting)
print("done")
"""


def test_ids_are_those_of_the_plain_sampler_for_every_setting_size_and_type():
    run_with_triton(SETUP + TWIN)


def test_end_of_text_bans_damaged_logits_and_random_numbers_are_those_of_the_plain_sampler():
    run_with_triton(SETUP + EDGES)


def test_a_row_writes_nothing_beyond_its_own_scratch():
    run_with_triton(SETUP + BOUNDS)
