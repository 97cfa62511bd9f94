"""What the tests of both versions of the sampler share: settings, logits, and a slow and simple reference."""

import dataclasses
import math

import numpy as np
import torch

from gpt.generate.repeats import FORBIDDEN
from gpt.generate.sampling import UNITS, Filters, SamplingParams

OFF = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)


def params(**values):
    return dataclasses.replace(OFF, **values)


MIXED = [
    SamplingParams(),
    params(),
    params(temperature=0.0),
    params(temperature=0.0, repetition_penalty=1.7),
    params(top_k=5),
    params(top_k=1, temperature=3.0),
    params(temperature=1e-30),
    params(top_p=1e-12),
    params(top_k=40, top_p=0.7, min_p=0.01, repetition_penalty=1.3, temperature=0.6),
    params(min_p=0.2),
    params(top_k=10**30),
    params(repetition_penalty=0.8),
]
SOME_FILTERS = [
    {},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 12, "top_p": 0.7},
    {"temperature": 0.6, "top_k": 8},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
    {"top_p": 1e-9},
    {"top_p": 1 - 1e-12},
]


def random_logits(rows, vocabulary, seed, ties=False):
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    return (logits * 2).round() / 2 if ties else logits


def filters_of(*rows):
    """The Filters of these SamplingParams, one per row."""
    filters = Filters(len(rows))
    filters.assign(dict(enumerate(rows)))
    filters.upload()
    return filters


def same_for_all(settings, rows):
    """The Filters of `rows` rows of the same SamplingParams."""
    filters = filters_of(settings)
    for name in ("temperature", "top_k", "top_p", "min_p", "penalty"):
        setattr(filters, name, getattr(filters, name).expand(rows).contiguous())
    return filters


def discouraged(logits, prompt, ids, settings):
    """One row's logits after the settings that look at its whole text, word by word as they are defined."""
    logits, text, n = logits.clone(), [*prompt, *ids], settings.no_repeat_ngram
    for token in set(ids):
        logits[token] -= ids.count(token) * settings.frequency_penalty + settings.presence_penalty
    for start in range(len(text) - n + 1) if n else ():
        if text[start : start + n - 1] == text[len(text) - n + 1 :]:
            logits[text[start + n - 1]] = FORBIDDEN
    return logits


def softmax(values):
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def brute_force(logits, settings):
    """The kept ids of one row, in float64 and step by step as the design says."""
    scaled = logits.double().numpy() / settings.temperature
    order = np.argsort(-scaled, kind="stable")
    keep = np.ones(len(order), dtype=bool)
    if 0 < settings.top_k < len(order):
        keep &= scaled[order] >= scaled[order[settings.top_k - 1]]
    probabilities = softmax(np.where(keep, scaled[order], -np.inf))
    nucleus = int(np.searchsorted(probabilities.cumsum(), settings.top_p - 1e-12)) + 1
    if settings.top_p < 1:
        keep &= np.arange(len(order)) < nucleus
    probabilities = softmax(np.where(keep, scaled[order], -np.inf))
    keep &= probabilities >= settings.min_p * probabilities[0] * (1 - 1e-9)
    return set(order[keep & (probabilities > 2.0 / UNITS)].tolist())


def assert_distribution(ids, logits, settings):
    """That the frequencies of ids (N,) are those of one row's kept tokens."""
    expected = np.zeros(len(logits))
    keep = sorted(brute_force(logits, settings))
    expected[keep] = softmax(logits.double().numpy()[keep] / settings.temperature) * len(ids)
    counts = np.bincount(ids, minlength=len(logits))
    assert (counts[expected == 0] == 0).all()
    statistic = ((counts[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    freedom = len(keep) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4
