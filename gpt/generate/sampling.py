"""Logits -> next ids: penalty, temperature, top-k, top-p, min-p, and one reproducible draw per row and position.

Shapes: B rows, V vocabulary, W candidates (W <= V), likeliest first. Every number that a choice hangs on is a tensor: a
step with `choose` in it can be compiled, or captured in a CUDA graph, and its rows' settings be changed afterwards."""

import hashlib
import math
from dataclasses import dataclass, replace

import torch

CANDIDATES = 768  # likeliest tokens looked at before all of V is sorted; above V / 64 torch.topk is three times slower
NOT_FINITE, UNDECIDED = -1, -2  # in place of an id
TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
WORD = 0xFFFFFFFF
LAST_PLACE = (1 << 63) - 1
UNITS = 1 << 32  # what probability 1 is in whole numbers, and how many values a draw may have: their product, with the
DRAWS = 1 << 30  # softmax's rounding, stays below 2^63


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

    @property
    def filtering(self):
        """Whether some tokens are left out: greedy leaves out all but one."""
        return self.temperature == 0 or self.top_k > 0 or round(self.top_p * DRAWS) < DRAWS or self.min_p > 0

    def problems(self):
        """What is wrong with these values, in words; empty if nothing."""
        rules = [
            (0 <= self.temperature < math.inf, f"temperature {self.temperature} must be finite and 0 (greedy) or more"),
            (self.top_k >= 0, f"top_k {self.top_k} must be 0 (off) or more"),
            (0 < self.top_p <= 1, f"top_p {self.top_p} must be above 0 and at most 1 (off)"),
            (0 <= self.min_p <= 1, f"min_p {self.min_p} must be at least 0 (off) and at most 1"),
            (
                0 < self.repetition_penalty < math.inf,
                f"repetition_penalty {self.repetition_penalty} must be above 0 and finite",
            ),
        ]
        return [text for fine, text in rules if not fine]


class Filters:
    """SamplingParams of B rows, as tensors (B,) that a compiled or captured step reads anew each time. What the host
    remembers of them (`kind`) only saves work; a step captured under one kind is right for that kind alone."""

    def __init__(self, rows, device=None):
        self.temperature = torch.zeros(rows, device=device)
        self.top_k = torch.zeros(rows, dtype=torch.int64, device=device)  # 0 is off
        self.top_p = torch.zeros(rows, dtype=torch.int64, device=device)  # in units of 1 / DRAWS; DRAWS is off
        self.min_p = torch.full((rows,), -math.inf, device=device)  # its logarithm; -inf is off
        self.penalty = torch.ones(rows, device=device)
        self.busy = {}  # row -> its SamplingParams
        self.update_kind()

    def set(self, row, params):
        """Give `row` these SamplingParams; None makes it idle, which is greedy. Does not wait for the device."""
        self.busy[row] = params
        if params is None:
            del self.busy[row]
            params = SamplingParams(temperature=0)
        if params.temperature == 0:  # as a filter: a nucleus of nothing, of which the likeliest token stays
            params = replace(params, top_k=0, top_p=0, min_p=0)
        self.temperature[row].fill_(within_float32(params.temperature) if params.temperature else 0)
        self.top_k[row].fill_(min(params.top_k, WORD))
        self.top_p[row].fill_(round(params.top_p * DRAWS))
        self.min_p[row].fill_(math.log(params.min_p) if params.min_p else -math.inf)
        self.penalty[row].fill_(within_float32(params.repetition_penalty))
        self.update_kind()

    def update_kind(self):
        rows = self.busy.values()
        self.greedy = all(params.temperature == 0 for params in rows)
        self.filtering = any(params.filtering for params in rows)
        self.penalizes = any(params.repetition_penalty != 1 for params in rows)

    @property
    def kind(self):
        """Whether all rows are greedy, whether some leave tokens out, whether some have a repetition penalty."""
        return self.greedy, self.filtering, self.penalizes


def within_float32(value):
    return min(max(value, TINY), HUGE)


def choose(logits, filters, draws, seen=None, banned=None, narrow=False):
    """Logits (B, V) float32 and draws (B,) below DRAWS -> next ids (B,); NOT_FINITE for a row whose logits are not all
    finite. Each row is a pure function of its own logits, settings and draw.

    `seen` (B, V) marks the tokens that the repetition penalty is for; `banned` are ids (N,) that are never chosen.
    `narrow` looks at the CANDIDATES likeliest tokens only and gives UNDECIDED for a row that they do not decide."""
    finite = logits.abs().amax(-1) < math.inf
    if filters.penalizes:
        logits = penalize(logits, seen, filters.penalty[:, None])
    if banned is not None:
        logits = logits.index_fill(1, banned, -math.inf)
    if filters.greedy:
        return logits.argmax(-1).masked_fill(~finite, NOT_FINITE)  # of a tie the lowest id
    weights, decided = kept_weights(logits, filters, narrow)
    return draw(weights, draws).masked_fill(~decided, UNDECIDED).masked_fill(~finite, NOT_FINITE)


def penalize(logits, seen, penalty):
    """Logits (B, V) with those of `seen` tokens divided by the penalty (B, 1), or multiplied where negative; always
    finite. Source: Keskar et al. 2019, arXiv:1909.05858, as in transformers."""
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty).clamp(-HUGE, HUGE)
    return torch.where(seen, penalized, logits)


def draw(weights, draws):
    """Ids (B,) by inverse cumulative distribution over weights (B, V), in the order of the ids; none of weight 0.

    In whole numbers: sums are exact in any order and on any device, and `target` stays below the last of them."""
    mass = weights.cumsum(-1)
    target = mass[:, -1:] * draws[:, None] // DRAWS
    ids = torch.searchsorted(mass, target, right=True)[:, 0]
    return ids.clamp(max=weights.shape[-1] - 1)  # only nan logits get past the end


def kept_weights(logits, filters, narrow=False):
    """Probabilities at each row's temperature in units of 1 / UNITS, int64 (B, V), 0 for tokens that top-k, top-p or
    min-p leave out; and which rows are decided (B,): all, unless `narrow`."""
    # The maximum becomes 0 first: no temperature, however low, makes an infinity or a nan.
    scaled = (logits - logits.amax(-1, keepdim=True)) / filters.temperature[:, None].clamp(min=TINY)
    weights = (scaled.softmax(-1) * UNITS).round().long()
    if not filters.filtering:
        return weights, torch.ones_like(weights[:, 0], dtype=torch.bool)
    places = ranking(scaled)
    # Only on a CPU does it cost nothing to wait for a result and go on by it; a compiled step cannot.
    may_ask = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    last, decided = last_kept(scaled, weights, places, filters, CANDIDATES if narrow or may_ask else None)
    if not narrow and may_ask and not decided.all():
        last, decided = last_kept(scaled, weights, places, filters)
    return weights * (places <= last), decided


def ranking(values):
    """Whole numbers that rise from the likeliest token to the least likely, ties by id; int64 (B, V) of values <= 0.
    Their high halves are the values' bits, which rise as negative values fall; their low halves are the ids."""
    ids = torch.arange(values.shape[-1], device=values.device)
    return (values.view(torch.int32) & 0x7FFFFFFF).long() << 32 | ids


def last_kept(scaled, weights, places, filters, candidates=None):
    """The place (B, 1) of the last token that each row's filters keep, as far as its likeliest `candidates` (None: all
    tokens) show, and whether they decide it (B,). `scaled` (B, V) are logits over the temperature, 0 for the likeliest.
    Sources: Holtzman et al. 2020, arXiv:1904.09751 (top-p); Nguyen et al. 2024, arXiv:2407.01082 (min-p)."""
    vocabulary = places.shape[-1]
    width = min(candidates or vocabulary, vocabulary)
    best = places.topk(width, largest=False).values if width < vocabulary else places.sort(-1).values
    values, weights, total = scaled.gather(1, best & WORD), weights.gather(1, best & WORD), weights.sum(-1, True)
    top_k, top_p, min_p = filters.top_k[:, None], filters.top_p[:, None], filters.min_p[:, None]
    limited = (top_k > 0) & (top_k < vocabulary)
    border = values.gather(1, top_k.masked_fill(~limited, width).clamp(max=width) - 1)
    keep = values >= border  # with ties, as transformers
    mass = (weights * keep).cumsum(-1)
    keep &= (mass - weights) * DRAWS < mass[:, -1:].where(limited, total) * top_p
    keep &= values >= min_p
    end = keep.sum(-1, keepdim=True).clamp(1, width) - 1  # what is kept is a beginning of the row
    unfiltered = ~limited & (top_p == DRAWS) & min_p.isneginf()
    # Enough if the next token is among the candidates too, and top-k's last one with its ties.
    decided = unfiltered | (width == vocabulary) | (end < width - 1) & (~limited | (border > values[:, -1:]))
    return best.gather(1, end).masked_fill(unfiltered, LAST_PLACE), decided[:, 0]


def top_logprobs(logits, count):
    """Of logits (B, V) the ids and log-probabilities in nats, (B, count) each, of the likeliest tokens, ties by id."""
    logprobs = logits.log_softmax(-1)
    ids = ranking(logprobs).topk(count, largest=False).values & WORD
    return ids, logprobs.gather(1, ids)


def stream_words(prompt_id):
    """The two 32-bit words that stand for a prompt's id in the counter: an integer modulo 2^64, or a string's hash."""
    if isinstance(prompt_id, str):
        digest = hashlib.blake2b(prompt_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        prompt_id = int.from_bytes(digest, "little")
    return prompt_id & WORD, (prompt_id >> 32) & WORD


def random_draws(seed, prompt_id, sample, start, count, device=None):
    """Uniform whole numbers below DRAWS, int64 (count,), for positions start, start + 1, …: a pure function of its
    arguments, so that none depends on what else is generated. 0 <= seed < 2^64."""
    positions = torch.arange(start, start + count, device=device)
    words = [positions] + [torch.full_like(positions, word) for word in (sample, *stream_words(prompt_id))]
    return philox(words, seed)[0] >> 2


def philox(words, key):
    """Philox4x32-10: four int64 tensors of 32-bit words and a 64-bit key -> four more. Source: Salmon et al. 2011,
    "Parallel random numbers: as easy as 1, 2, 3". int64 products wrap, which leaves their low and high words right."""
    a, b, c, d = words
    low, high = key & WORD, key >> 32
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = (right >> 32 & WORD) ^ b ^ low, right & WORD
        c, d = (left >> 32 & WORD) ^ d ^ high, left & WORD
        low, high = (low + 0x9E3779B9) & WORD, (high + 0xBB67AE85) & WORD
    return a, b, c, d
