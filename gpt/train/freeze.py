"""Frozen parameters: they get no gradient, no update and no optimizer state."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from gpt.checkpoint.weights import PREFIX, huggingface_name
from gpt.errors import InputError
from gpt.model import GPT

NAMES = "wte, wpe, h.0.attn.c_attn, ln_f"


def freeze(model: GPT, patterns: str) -> None:
    """Freezes the parameters of `model` that `patterns` names, separated by commas: see `matches`. Raises InputError if
    a pattern matches no parameter, or if none is left to train."""
    if patterns and not split_patterns(patterns):
        raise InputError(f"freeze: {patterns!r} names no parameter; names are like {NAMES}")
    for pattern in split_patterns(patterns):
        matched = [p for name, p in model.named_parameters() if matches(name, [pattern])]
        if not matched:
            raise InputError(f"freeze: {pattern} matches no parameter; names are like {NAMES}")
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"freeze: {patterns} matches every parameter, and leaves none to train; give fewer patterns")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Returns whether a pattern matches our parameter `name`, Hugging Face's name for it, or the module that it belongs
    to: "h.0.*", "h.0" and "blocks.0" match "blocks.0.ln_1.bias"."""
    theirs = huggingface_name(name)
    names = (name, theirs, PREFIX + theirs)
    return any(fnmatchcase(n, p) or fnmatchcase(n, f"{p}.*") for n in names for p in patterns)


def split_patterns(patterns: str) -> list[str]:
    """Returns the patterns in a setting: split_patterns("wte, h.0.*") == ["wte", "h.0.*"]."""
    return [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
