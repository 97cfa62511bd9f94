"""Logits -> next ids: penalty, temperature, top-k, top-p, min-p, and one reproducible draw per row and position.

torch.multinomial works with floats, whose sums depend on the order of addition: on device, threads and batch. Here a
probability is a weight, a whole number of units of 2^-32, so that sums are exact in any order. The random number is a
whole number below 2^30, which Philox computes from seed, prompt, sample and position alone. So equal weights give the
same token on every device. A draw is the inverse of the cumulative distribution; with 10 units instead of 2^32, and the
random number 6 of 8 instead of 2^30:

    token         0   1   2   3
    weight        5   3   0   2     token 2 is left out by top-k, top-p or min-p
    running sum   5   8   8  10     target = 10 * 6 // 8 = 7: the first running sum above 7 is that of token 1

Shapes: B rows, V vocabulary, W candidates (W <= V), likeliest first. Every value that a choice depends on is a tensor,
so that a step with `choose` in it can be captured in a CUDA graph, and its settings changed afterwards."""

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from gpt.device import upload

FILTERS = ("temperature", "top_k", "top_p", "min_p", "penalty")  # the tensors of Filters
CANDIDATES = 768  # likeliest tokens looked at before all of V is sorted; above V / 64 torch.topk is three times slower
NOT_FINITE, UNDECIDED = -1, -2  # in place of an id
TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
WORD = 0xFFFFFFFF  # the largest 32-bit number
LAST_PLACE = (1 << 63) - 1
UNITS = 1 << 32  # the weight of probability 1
DRAWS = 1 << 30  # random numbers are below it; UNITS * DRAWS, with the rounding of softmax, is below 2^63


@dataclass(frozen=True)
class SamplingParams:
    temperature: float = 0.8
    """divides the logits: below 1 likelier, above 1 more surprising text; 0 is greedy"""
    top_k: int = 0
    """draw only from the k likeliest tokens; 0 is off"""
    top_p: float = 0.95
    """draw only from the likeliest tokens that together have this probability; 1 is off"""
    min_p: float = 0.0
    """draw only from tokens at least this share as likely as the likeliest; 0 is off"""
    repetition_penalty: float = 1.0
    """above 1 makes tokens already in the window less likely; 1 is off"""
    frequency_penalty: float = 0.0
    """taken from a token's logit for each time that the text, without its prompt, has the token, as OpenAI defines it;
    from -2 to 2, 0 is off"""
    presence_penalty: float = 0.0
    """taken once from the logits of all tokens that the text, without its prompt, has; from -2 to 2, 0 is off"""
    no_repeat_ngram: int = 0
    """never repeat this many tokens in a row that prompt and text have already; 0 is off"""

    @property
    def filtering(self) -> bool:
        """Whether these settings leave out some tokens; greedy leaves out all but one."""
        return self.temperature == 0 or self.top_k > 0 or round(self.top_p * DRAWS) < DRAWS or self.min_p > 0

    def problems(self) -> list[str]:
        """Returns what is wrong with these values, in words."""
        penalty = self.repetition_penalty
        rules = [
            (0 <= self.temperature < math.inf, f"temperature {self.temperature} must be finite and 0 (greedy) or more"),
            (self.top_k >= 0, f"top_k {self.top_k} must be 0 (off) or more"),
            (0 < self.top_p <= 1, f"top_p {self.top_p} must be above 0 and at most 1 (off)"),
            (0 <= self.min_p <= 1, f"min_p {self.min_p} must be at least 0 (off) and at most 1"),
            (0 < penalty < math.inf, f"repetition_penalty {penalty} must be above 0 and finite"),
            (abs(self.frequency_penalty) <= 2, f"frequency_penalty {self.frequency_penalty} must be from -2 to 2"),
            (abs(self.presence_penalty) <= 2, f"presence_penalty {self.presence_penalty} must be from -2 to 2"),
            (self.no_repeat_ngram >= 0, f"no_repeat_ngram {self.no_repeat_ngram} must be 0 (off) or more"),
        ]
        return [text for is_fine, text in rules if not is_fine]


class Filters:
    """The SamplingParams of B rows as tensors (B,), so that a captured step sees every change of them.

    `kind` says which parts of `choose` these settings need. `choose` leaves out the others, so a step that was captured
    under one kind must not be replayed under another."""

    def __init__(self, rows: int, device: torch.device | None = None):
        self.temperature = torch.zeros(rows, device=device)
        self.top_k = torch.zeros(rows, dtype=torch.int64, device=device)  # 0 is off
        self.top_p = torch.zeros(rows, dtype=torch.int64, device=device)  # in units of 1 / DRAWS; DRAWS is off
        self.min_p = torch.full((rows,), -math.inf, device=device)  # logarithm of min_p; -inf is off
        self.penalty = torch.ones(rows, device=device)
        self.params: dict[int, SamplingParams] = {}  # row -> its SamplingParams, for rows that are not idle
        # On the host: the values that the tensors shall hold, and those that were uploaded last.
        self.values = {name: getattr(self, name).cpu().numpy().copy() for name in FILTERS}
        self.uploaded = {name: values.copy() for name, values in self.values.items()}
        self.update_kind()

    def assign(self, settings: dict[int, SamplingParams | None]) -> None:
        """Sets the SamplingParams of rows, on the host, and `kind`; `upload` copies them to the device. None makes a
        row idle, which is greedy."""
        for row, params in settings.items():
            self.assign_row(row, params)
        self.update_kind()

    def upload(self) -> None:
        """Copies the values that `assign` has set to the device, one copy for each tensor that changes. Does not wait
        for the device."""
        for name, values in self.values.items():
            if not np.array_equal(values, self.uploaded[name]):
                self.uploaded[name] = values.copy()
                upload(getattr(self, name), values)

    def assign_row(self, row: int, params: SamplingParams | None) -> None:
        if params is None:
            self.params.pop(row, None)
            params = SamplingParams(temperature=0)
        else:
            self.params[row] = params
        if params.temperature == 0:  # a top-p of 0 keeps the likeliest token alone
            params = replace(params, top_k=0, top_p=0, min_p=0)
        self.values["temperature"][row] = within_float32(params.temperature) if params.temperature else 0
        self.values["top_k"][row] = min(params.top_k, WORD)
        self.values["top_p"][row] = round(params.top_p * DRAWS)
        self.values["min_p"][row] = math.log(params.min_p) if params.min_p else -math.inf
        self.values["penalty"][row] = within_float32(params.repetition_penalty)

    def update_kind(self) -> None:
        rows = self.params.values()
        self.greedy = all(params.temperature == 0 for params in rows)
        self.filtering = any(params.filtering for params in rows)
        self.penalizes = any(params.repetition_penalty != 1 for params in rows)

    @property
    def kind(self) -> tuple[bool, bool, bool]:
        """Whether all rows are greedy, whether any row leaves tokens out, whether any row has a repetition penalty."""
        return self.greedy, self.filtering, self.penalizes


def within_float32(value: float) -> float:
    return min(max(value, TINY), HUGE)


def choose(
    logits: torch.Tensor,
    filters: Filters,
    draws: torch.Tensor,
    seen: torch.Tensor | None = None,
    banned: torch.Tensor | None = None,
    narrow: bool = False,
) -> torch.Tensor:
    """Returns the next ids (B,) for logits (B, V) float32 and random numbers `draws` (B,) int64, below DRAWS. The id is
    NOT_FINITE where a row's logits are not all finite. No row's id depends on another row.

    `seen` (B, V) bool marks the tokens that the repetition penalty applies to; ids in `banned` (N,) are never chosen.
    With `narrow` only the CANDIDATES likeliest tokens count; a row that they do not decide gets UNDECIDED."""
    finite = logits.abs().amax(-1) < math.inf
    if filters.penalizes:
        logits = penalize(logits, seen, filters.penalty[:, None])
    if banned is not None:
        logits = logits.index_fill(1, banned, -math.inf)
    if filters.greedy:
        return logits.argmax(-1).masked_fill(~finite, NOT_FINITE)  # the lowest id of a tie
    weights, decided = kept_weights(logits, filters, narrow)
    return draw(weights, draws).masked_fill(~decided, UNDECIDED).masked_fill(~finite, NOT_FINITE)


def penalize(logits: torch.Tensor, seen: torch.Tensor | None, penalty: torch.Tensor) -> torch.Tensor:
    """Returns logits (B, V) in which those of `seen` tokens are divided by the penalty (B, 1) if they are positive,
    else multiplied; always finite. Source: Keskar et al. 2019, arXiv:1909.05858, as in transformers."""
    assert seen is not None
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty).clamp(-HUGE, HUGE)
    return torch.where(seen, penalized, logits)


def draw(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Returns ids (B,), drawn from `weights` (B, V) int64 by the random numbers `draws` (B,): see the top of this
    file."""
    sums = weights.cumsum(-1)
    target = sums[:, -1:] * draws[:, None] // DRAWS
    ids = torch.searchsorted(sums, target, right=True)[:, 0]
    return ids.clamp(max=weights.shape[-1] - 1)  # only a row with nan logits gets past the end


def kept_weights(logits: torch.Tensor, filters: Filters, narrow: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weights (B, V) int64 at each row's temperature, 0 for tokens that top-k, top-p or min-p leave out,
    and whether each row is decided, (B,) bool: always true unless `narrow`."""
    # The maximum becomes 0 first, so that even the lowest temperature makes no infinity or nan.
    scaled = (logits - logits.amax(-1, keepdim=True)) / filters.temperature[:, None].clamp(min=TINY)
    weights = (scaled.softmax(-1) * UNITS).round().long()
    if not filters.filtering:
        return weights, torch.ones_like(weights[:, 0], dtype=torch.bool)
    places = ranking(scaled)
    can_read = host_can_read(logits.device)
    last, decided = last_kept(scaled, weights, places, filters, CANDIDATES if narrow or can_read else None)
    if not narrow and can_read and not decided.all():
        last, decided = last_kept(scaled, weights, places, filters)
    return weights * (places <= last), decided


def host_can_read(device: torch.device) -> bool:
    """Returns whether the host may read a result to decide what to do next. On a GPU it would wait for all earlier
    work, and a step that is captured cannot hold a read."""
    return device.type == "cpu"


def ranking(values: torch.Tensor) -> torch.Tensor:
    """Returns sort keys, int64 (B, V), for float32 values (B, V) that are at most 0: the largest value has the smallest
    key, and of equal values the lower id. The upper 32 bits of a key are the value's bits without its sign, which grow
    as the value falls; the lower 32 bits are the id."""
    ids = torch.arange(values.shape[-1], device=values.device)
    return (values.view(torch.int32) & 0x7FFFFFFF).long() << 32 | ids


def last_kept(
    scaled: torch.Tensor, weights: torch.Tensor, places: torch.Tensor, filters: Filters, candidates: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the place (B, 1) of the last token that each row's filters keep, and whether the `candidates` likeliest
    tokens (None: all) suffice to decide it, (B,) bool. `scaled` are logits over temperature, at most 0, `places` their
    `ranking`, both (B, V). Sources: Holtzman et al. 2020, arXiv:1904.09751 (top-p); Nguyen et al. 2024,
    arXiv:2407.01082 (min-p)."""
    vocabulary = places.shape[-1]
    width = min(candidates or vocabulary, vocabulary)
    best = places.topk(width, largest=False).values if width < vocabulary else places.sort(-1).values
    values, weights, total = scaled.gather(1, best & WORD), weights.gather(1, best & WORD), weights.sum(-1, True)
    top_k, top_p, min_p = filters.top_k[:, None], filters.top_p[:, None], filters.min_p[:, None]
    limited = (top_k > 0) & (top_k < vocabulary)
    border = values.gather(1, top_k.masked_fill(~limited, width).clamp(max=width) - 1)
    keep = values >= border  # keeps ties, as transformers does
    sums = (weights * keep).cumsum(-1)
    keep &= (sums - weights) * DRAWS < sums[:, -1:].where(limited, total) * top_p
    keep &= values >= min_p
    end = keep.sum(-1, keepdim=True).clamp(1, width) - 1  # the kept tokens are the first ones of `best`
    unfiltered = ~limited & (top_p == DRAWS) & min_p.isneginf()
    # Decided if the token after the last kept one is a candidate too, and if top-k's border has no ties beyond.
    decided = unfiltered | (width == vocabulary) | (end < width - 1) & (~limited | (border > values[:, -1:]))
    return best.gather(1, end).masked_fill(unfiltered, LAST_PLACE), decided[:, 0]


def likeliest(logprobs: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the ids (B, count) of the likeliest tokens by log-probabilities (B, V), ties by id."""
    return ranking(logprobs).topk(count, largest=False).values & WORD


def random_draws(
    seed: int, prompt_id: int | str, sample: int, start: int, count: int, device: torch.device | None = None
) -> torch.Tensor:
    """Returns uniform whole numbers below DRAWS, int64 (count,), for positions start, start + 1, …: a pure function of
    its arguments. 0 <= seed < 2^64."""
    positions = torch.arange(start, start + count, device=device)
    _, low, high, sample = stream(seed, prompt_id, sample)
    return philox([positions, *[torch.full_like(positions, word) for word in (sample, low, high)]], seed)[0] >> 2


def stream(seed: int, prompt_id: int | str, sample: int) -> tuple[int, int, int, int]:
    """Returns the numbers that, with the position, decide a random number: the seed as int64, the lower and the upper
    word of the prompt's id, and the sample."""
    if isinstance(prompt_id, str):
        digest = hashlib.blake2b(prompt_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        prompt_id = int.from_bytes(digest, "little")
    return (seed ^ 1 << 63) - (1 << 63), prompt_id & WORD, prompt_id >> 32 & WORD, sample


def draws_of_streams(streams: torch.Tensor, starts: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the random_draws (N, count) of `streams` (N, 4), each as `stream` returns it, from positions `starts`
    (N,) on."""
    positions = starts[:, None] + torch.arange(count, device=starts.device)
    seed, low, high, sample = streams[:, :, None].unbind(1)  # (N, 1) each
    return philox([positions, sample, low, high], seed)[0] >> 2


def philox(words: list[torch.Tensor], key: int | torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns the four output words of Philox4x32-10 for four input words and a 64-bit key; words are 32 bits, in int64
    tensors. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". int64 products overflow, but
    their low and high 32 bits are right."""
    a, b, c, d = words
    low, high = key & WORD, key >> 32 & WORD
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = (right >> 32 & WORD) ^ b ^ low, right & WORD
        c, d = (left >> 32 & WORD) ^ d ^ high, left & WORD
        low, high = (low + 0x9E3779B9) & WORD, (high + 0xBB67AE85) & WORD
    return a, b, c, d
