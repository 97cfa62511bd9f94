"""Logits -> next ids: penalty, temperature, top-k, top-p, min-p, and one reproducible draw per row and position.

Shapes: B rows, V vocabulary, W candidates (W <= V), likeliest first."""

import hashlib
import math
from dataclasses import dataclass

import torch

CANDIDATES = 1024  # likeliest tokens looked at before all of V is sorted: on a CPU that is seven times as fast
TINY = torch.finfo(torch.float32).tiny
WORD = 0xFFFFFFFF
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


def choose(logits, params, draws, seen=None, banned=None):
    """Logits (B, V) float32 and draws (B,) below DRAWS -> next ids (B,); -1 for a row whose logits are not all finite.

    `seen` (B, V) marks the tokens that the repetition penalty is for; `banned` are ids (N,) that are never chosen."""
    finite = logits.isfinite().all(-1)
    if params.repetition_penalty != 1:
        logits = penalize(logits, seen, params.repetition_penalty)
    if banned is not None:
        logits = logits.index_fill(1, banned, -math.inf)
    ids = logits.argmax(-1) if params.temperature == 0 else draw(logits, params, draws)  # argmax: lowest id of a tie
    return ids.where(finite, -1)


def penalize(logits, seen, penalty):
    """Logits (B, V) with those of `seen` tokens divided by the penalty, or multiplied where negative. Source: Keskar et
    al. 2019, arXiv:1909.05858, as in transformers."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def draw(logits, params, draws):
    """Ids (B,) by inverse cumulative distribution over the kept tokens; never one of probability 0.

    In whole numbers: sums are exact in any order and on any device, and `target` stays below the last of them."""
    weights, ids = kept_weights(logits, params)
    mass = weights.cumsum(-1)
    target = mass[:, -1:] * draws[:, None] // DRAWS
    place = (mass <= target).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)  # only nan logits get past the end
    return ids.gather(1, place)[:, 0]


def kept_weights(logits, params):
    """Probabilities at `params.temperature` in units of 1 / UNITS, int64 (B, W), 0 for tokens that top-k, top-p or
    min-p leave out, and their ids (B, W). Each row is a pure function of its own logits."""
    # The maximum becomes 0 first: no temperature, however low, makes an infinity or a nan.
    scaled = (logits - logits.amax(-1, keepdim=True)) / max(params.temperature, TINY)
    weights = (scaled.softmax(-1) * UNITS).round().long()
    vocabulary, total = logits.shape[-1], weights.sum(-1, keepdim=True)
    if not (params.top_k or params.top_p < 1 or params.min_p > 0):
        return weights, torch.arange(vocabulary, device=logits.device).expand_as(weights)
    if logits.device.type == "cpu" and vocabulary > CANDIDATES:  # only on a CPU does the `if` below cost nothing
        values, ids = likeliest(scaled, CANDIDATES)
        candidates = weights.gather(1, ids)
        keep = kept(values, candidates, total, params)
        # Enough if even the tokens tied with the last kept one are among the candidates.
        if (values.where(keep, math.inf).amin(-1) > values[:, -1]).all():
            return candidates * keep, ids
    values, ids = scaled.sort(dim=-1, descending=True, stable=True)
    candidates = weights.gather(1, ids)
    return candidates * kept(values, candidates, total, params), ids


def likeliest(values, count):
    """The `count` largest of values (B, V) and their ids, in the order of a stable sort: ties by id."""
    ids = values.topk(count, sorted=False).indices.sort(dim=-1).values
    values, order = values.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def kept(values, weights, total, params):
    """Which of the candidates, likeliest first, the filters keep, bool (B, W): always a beginning of each row, never an
    empty one. `values` (B, W) are logits over the temperature, 0 for the likeliest; `weights` (B, W) are of the whole
    vocabulary's `total` (B, 1). Sources: Holtzman et al. 2020, arXiv:1904.09751 (top-p); Nguyen et al. 2024,
    arXiv:2407.01082 (min-p)."""
    keep = torch.ones_like(values, dtype=torch.bool)
    if params.top_k:
        keep &= values >= values[:, min(params.top_k, values.shape[-1]) - 1, None]
    if params.top_p < 1:
        mass = (weights * keep).cumsum(-1)
        total = mass[:, -1:] if params.top_k else total
        keep[:, 1:] &= mass[:, :-1] * DRAWS < total * round(params.top_p * DRAWS)
    if params.min_p > 0:
        keep &= values >= math.log(params.min_p)
    return keep


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
