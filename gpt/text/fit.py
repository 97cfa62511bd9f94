"""Settings that follow from the size of the text: the tokenizer, the share to validate on, the context and the batch.

Each rule is a function of numbers alone: the same sizes give the same settings, on every machine and every rank."""

import math
from collections.abc import Container

# Below so many bytes of text: this tokenizer. N grows more slowly than the text, so that each id is seen often enough.
TOKENIZERS = (
    (100_000, "byte"),
    (1_000_000, "bpe:1024"),
    (20_000_000, "bpe:2048"),
    (200_000_000, "bpe:8192"),
    (math.inf, "bpe:32768"),
)
CONTEXT = 128  # tokens that a validation split should fill at least; block_size of the preset demo
TOKEN_CHARACTERS = 5  # at most so many characters per token of prose, but for the tokenizer byte
LARGEST_SHARE = 0.2  # a validation share never grows beyond this
LEAST_CONTEXT = 8  # a context that would have to be shorter is not shortened: the data are refused


def tokenizer_for(text_bytes: int) -> str:
    """Returns the name of the tokenizer for a model that is trained from scratch on `text_bytes` bytes of text. Neither
    byte nor bpe:N needs a download."""
    return next(name for limit, name in TOKENIZERS if text_bytes < limit)


def validation_share(fraction: float, characters: int, tokenizer: str) -> float:
    """Returns `fraction`, the share of a text to validate on, or the larger share that is one context long. `tokenizer`
    is the name of the tokenizer, `characters` the length of the text. A fraction of 0, no validation, stays."""
    needed = (CONTEXT + 1) * (1 if tokenizer == "byte" else TOKEN_CHARACTERS)
    grown = min(math.ceil(1000 * needed / characters) / 1000, LARGEST_SHARE)
    return max(fraction, grown) if fraction else 0.0


def windows_per_epoch(tokens: int, block_size: int) -> int:
    """Returns the number of training windows in an epoch over `tokens` tokens: see gpt/text/windows.py."""
    return max(tokens // block_size - 1, int(tokens > block_size))


def longest_context(tokens: int, windows: int) -> int:
    """Returns the largest block_size with which an epoch over `tokens` tokens has at least `windows` windows."""
    return tokens - 1 if windows <= 1 else tokens // (windows + 1)


def shrink_to_data(
    block_size: int, global_batch_size: int, fixed: Container[str], train_tokens: int, val_tokens: int, unit: int
) -> dict[str, int]:
    """Returns the settings that must be smaller for the data, name -> new value: a context that fits into both splits
    (`val_tokens` 0: no validation), and a batch of no more windows than an epoch has. The batch is a multiple of
    `unit`, ranks x micro-batch size. Settings named in `fixed` stay. Returns {} if the context would be shorter than
    LEAST_CONTEXT: the data are then refused.

    shrink_to_data(128, 16, (), 870, 100, unit=1) == {"block_size": 99, "global_batch_size": 7}
    """
    context, batch = block_size, global_batch_size
    if "block_size" not in fixed:
        windows = 1 if "global_batch_size" in fixed else unit
        longest = min(longest_context(train_tokens, windows), val_tokens - 1 if val_tokens else block_size)
        context = min(block_size, longest)
        if context < min(block_size, LEAST_CONTEXT):
            return {}
    if "global_batch_size" not in fixed:
        batch = shrink_batch(batch, windows_per_epoch(train_tokens, context), unit)
    values = {"block_size": (block_size, context), "global_batch_size": (global_batch_size, batch)}
    return {name: new for name, (old, new) in values.items() if new != old}


def shrink_to_examples(global_batch_size: int, fixed: Container[str], examples: int, unit: int) -> dict[str, int]:
    """Returns what shrink_to_data returns, for data of `examples` examples: these are cut to the context, so it
    stays."""
    batch = shrink_batch(global_batch_size, examples, unit)
    fits = batch == global_batch_size or "global_batch_size" in fixed
    return {} if fits else {"global_batch_size": batch}


def shrink_batch(global_batch_size: int, per_epoch: int, unit: int) -> int:
    """Returns a batch of no more windows or examples than an epoch has, and a multiple of `unit`; if there is none, the
    batch as it is."""
    return min(global_batch_size, per_epoch // unit * unit) or global_batch_size
