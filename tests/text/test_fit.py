"""Settings by the size of the text: against a search over all contexts and batches, and at the borders of the table."""

import itertools

import pytest

from gpt.text.fit import (
    CONTEXT,
    LARGEST_SHARE,
    LEAST_CONTEXT,
    longest_context,
    shrink_to_data,
    tokenizer_for,
    validation_share,
    windows_per_epoch,
)


@pytest.mark.parametrize(
    ("size", "name"),
    [
        (1, "byte"),
        (60_000, "byte"),
        (99_999, "byte"),
        (100_000, "bpe:1024"),
        (999_999, "bpe:1024"),
        (2_000_000, "bpe:2048"),
        (11_000_000, "bpe:2048"),
        (100_000_000, "bpe:8192"),
        (10**12, "bpe:32768"),
    ],
)
def test_the_tokenizer_follows_from_the_number_of_bytes(size, name):
    assert tokenizer_for(size) == name


def windows_of(tokens, block_size):
    """The number of windows by gpt/text/windows.py's description: cut the stream from the latest offset on."""
    latest = min(block_size, tokens - block_size) - 1
    return len([start for start in range(latest, tokens, block_size) if start + block_size < tokens])


def test_the_windows_of_an_epoch_are_those_that_fit_behind_any_offset():
    for tokens, block_size in itertools.product(range(2, 80), range(1, 40)):
        expected = windows_of(tokens, block_size) if tokens > block_size else 0
        assert windows_per_epoch(tokens, block_size) == expected, (tokens, block_size)


def test_the_longest_context_is_the_longest():
    for tokens, windows in itertools.product(range(2, 80), range(1, 9)):
        enough = [size for size in range(1, tokens) if windows_per_epoch(tokens, size) >= windows]
        assert longest_context(tokens, windows) == max(enough, default=0), (tokens, windows)


def searched(block_size, batch, fixed, train, val, unit):
    """What shrink_to_data returns, by trying all contexts and batches from the largest on."""
    contexts = [block_size] if "block_size" in fixed else range(block_size, LEAST_CONTEXT - 1, -1)
    fewest = 1 if "global_batch_size" in fixed else unit
    fit = [n for n in contexts if n < train and (n < val or not val) and windows_per_epoch(train, n) >= fewest]
    context = next(iter(fit), None if "block_size" not in fixed else block_size)
    if context is None:
        return {}
    batches = [batch] if "global_batch_size" in fixed else [n for n in range(batch, 0, -1) if n % unit == 0]
    size = next((n for n in batches if n <= windows_per_epoch(train, context)), batch)
    new = {"block_size": context, "global_batch_size": size}
    return {name: value for name, value in new.items() if value != {"block_size": block_size}.get(name, batch)}


@pytest.mark.parametrize("fixed", [(), ("block_size",), ("global_batch_size",), ("block_size", "global_batch_size")])
@pytest.mark.parametrize("unit", [1, 2, 4])
def test_context_and_batch_are_the_largest_that_the_data_can_fill(fixed, unit):
    for train, val in itertools.product((5, 9, 10, 17, 33, 64, 100, 321, 2000), (0, 3, 9, 20, 33, 500)):
        got = shrink_to_data(32, 16, fixed, train, val, unit)
        assert got == searched(32, 16, fixed, train, val, unit), (train, val)


@pytest.mark.parametrize(
    ("train", "val", "expected"),
    [
        (870, 130, {"global_batch_size": 5}),  # 1 KB in bytes, with a validation split that has grown
        (200, 45, {"block_size": 44, "global_batch_size": 3}),  # 1 KB in GPT-2's tokens
        (4750, 251, {}),
        (10**8, 10**6, {}),
    ],
)
def test_small_texts_under_the_preset_demo(train, val, expected):
    assert shrink_to_data(128, 16, (), train, val, 1) == expected


def test_data_that_no_allowed_setting_fits_change_nothing():
    assert shrink_to_data(128, 16, ("block_size", "global_batch_size"), 100, 50, 1) == {}
    assert shrink_to_data(128, 16, (), LEAST_CONTEXT, 0, 1) == {}
    assert shrink_to_data(128, 16, (), 1000, LEAST_CONTEXT, 1) == {}
    assert shrink_to_data(4, 16, (), 1000, 5, 1) == {}
    assert shrink_to_data(4, 16, (), 20, 5, 1) == {"global_batch_size": 4}


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:1024", "gpt2"])
@pytest.mark.parametrize("characters", [20, 1_000, 5_000, 60_000, 10**8])
def test_the_validation_share_is_a_context_long_or_a_fifth_of_the_text(tokenizer, characters):
    share = validation_share(0.05, characters, tokenizer)
    held = share * characters / (1 if tokenizer == "byte" else 5)
    assert 0.05 <= share <= LARGEST_SHARE
    assert share == LARGEST_SHARE or held >= CONTEXT + 1
    assert share == 0.05 or share == LARGEST_SHARE or held < CONTEXT + 1 + characters / 1000


def test_no_validation_and_a_large_share_stay():
    assert validation_share(0, 100, "byte") == 0
    assert validation_share(0.4, 100, "byte") == 0.4
