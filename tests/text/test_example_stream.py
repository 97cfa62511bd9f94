"""Whole examples in batches: which examples a step takes, how they are dealt out and padded, what validation reads."""

import itertools

import numpy as np
import pytest
from training_helpers import make_examples, random_examples

from gpt.errors import InputError, IntegrityError
from gpt.text.example_stream import PADDING, ExampleStream, index_examples
from gpt.text.reader import TokenReader, read_masks
from gpt.text.shards import FIRST, TARGET, open_dataset


def stream_of(folder, examples, block_size=128, seed=7, shard_tokens=500):
    shards = open_dataset(make_examples(folder, examples, shard_tokens=shard_tokens)).splits["train"]
    return ExampleStream("train", TokenReader(shards, 257), read_masks(shards), block_size, seed)


def rows_of(micro_batches):
    """The examples in micro-batches, each as (ids, number of its last ids that are learned), without the padding."""
    rows = []
    for row in itertools.chain(*micro_batches):
        learned = row >= 0
        last = int(np.flatnonzero(learned)[-1])  # an example ends with a target
        rows.append((np.where(learned, row, ~row)[: last + 1].tolist(), int(learned.sum())))
    return rows


# ---- the stream


@pytest.mark.parametrize("size", [1, 7, 50])
def test_every_example_comes_once_an_epoch_and_in_another_order_in_the_next(tmp_path, size):
    examples = random_examples(50)
    stream = stream_of(tmp_path, examples)
    assert stream.per_epoch == 50
    epochs = []
    for epoch in range(2):
        firsts = range(epoch * 50, epoch * 50 + 50, size)
        counts = [min(size, epoch * 50 + 50 - first) for first in firsts]
        batches = [stream.share(first, count, 0, 1, 4) for first, count in zip(firsts, counts, strict=True)]
        epochs.append([row for batch in batches for row in rows_of(batch)])
        assert sorted(epochs[-1]) == sorted(examples)
    assert size == 50 or epochs[0] != epochs[1]  # a step is sorted by length


def test_a_step_depends_on_the_seed_and_on_its_first_example_alone(tmp_path):
    examples = random_examples(50)
    stream, again = (stream_of(tmp_path / name, examples) for name in "ab")
    other = stream_of(tmp_path / "c", examples, seed=8)
    for first in (0, 30, 45, 10**12):  # the second to last spans two epochs
        batch = rows_of(stream.share(first, 10, 0, 1, 10))
        assert batch == rows_of(again.share(first, 10, 0, 1, 10)) != rows_of(other.share(first, 10, 0, 1, 10))


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 1), (1, 3), (1, 12), (2, 3), (3, 4), (4, 1)])
def test_a_step_is_the_same_on_any_number_of_ranks_and_micro_batches(tmp_path, ranks, micro_batch_size):
    stream = stream_of(tmp_path, random_examples(50, longest=120))
    whole = rows_of(stream.share(24, 12, 0, 1, 12))
    shares = [stream.share(24, 12, rank, ranks, micro_batch_size) for rank in range(ranks)]
    assert sorted(row for share in shares for row in rows_of(share)) == sorted(whole)
    assert {len(share) for share in shares} == {12 // ranks // micro_batch_size}
    for share in shares:
        assert all(len(part) == micro_batch_size for part in share)
        widths = [part.shape[1] for part in share]
        assert widths == sorted(widths, reverse=True)
        for part in share:
            longest = max(len(ids) for ids, _ in rows_of([part]))
            assert part.shape[1] - 1 == max(1, -(-(longest - 1) // PADDING)) * PADDING


def test_rows_are_never_longer_than_the_context(tmp_path):
    stream = stream_of(tmp_path, random_examples(20, longest=100), block_size=70)
    widths = {part.shape[1] for part in stream.share(0, 20, 0, 1, 1)}
    assert widths == {65, 71}


def test_the_tokens_of_a_step_are_those_that_the_model_reads_without_padding(tmp_path):
    examples = random_examples(30)
    stream = stream_of(tmp_path, examples)
    for first, count in ((0, 30), (5, 8), (27, 9)):
        rows = rows_of(stream.share(first, count, 0, 1, 1))
        assert stream.tokens(first, count) == sum(len(ids) - 1 for ids, _ in rows)
    assert stream.mean_tokens == pytest.approx(sum(len(ids) - 1 for ids, _ in examples) / 30)


def test_a_message_names_the_shard_and_the_place_of_an_example(tmp_path):
    examples = random_examples(30)
    stream = stream_of(tmp_path, examples)
    ids = np.concatenate([ids for ids, _ in examples])
    for n in range(40):
        name, offset = stream.place(n).split(" offset ")
        start = 500 * int(name[6:12]) + int(offset)
        row = stream.share(n, 1, 0, 1, 1)[0][0]
        assert ids[start : start + 2].tolist() == np.where(row < 0, ~row, row)[:2].tolist()


# ---- examples that are too long, or teach nothing


def test_examples_are_cut_to_the_context_and_counted_and_those_without_a_target_there_left_out(tmp_path, capsys):
    ids = list(range(100, 200))
    examples = [(ids, 95), (ids, 10), (ids[:33], 1), (ids[:34], 1), (ids[:5], 3), (ids[:9], 0)]
    stream = stream_of(tmp_path, examples, block_size=32)
    expected = [(ids[:33], 28), (ids[:33], 1), (ids[:5], 3)]
    assert sorted(rows_of(stream.share(0, 3, 0, 1, 1))) == sorted(expected)
    assert (stream.per_epoch, stream.index.cut, stream.index.dropped) == (3, 1, 3)
    stream.tell_lost("train")
    assert capsys.readouterr().err == (
        "info: train: of 6 examples 1 are cut to 33 tokens, 3 have nothing to learn there and are left out\n"
    )
    with pytest.raises(InputError, match="no example of train has something to learn in its first 33 tokens"):
        stream_of(tmp_path / "none", [(ids, 10), (ids[:9], 0)], block_size=32)


@pytest.mark.parametrize(("long", "kind"), [(0, ""), (3, "info"), (4, "warning")])
def test_answers_whose_ends_are_mostly_cut_away_are_warned_of(long, kind, tmp_path, capsys):
    stream = stream_of(tmp_path, [(list(range(50)), 40)] * long + [(list(range(20)), 5)] * 3, block_size=32)
    stream.tell_lost("val")
    assert "warning" not in capsys.readouterr().err  # nothing is learned from it
    stream.tell_lost("train")
    said = capsys.readouterr().err
    assert said.partition(":")[0] == kind
    assert ("the model will hardly learn where an answer ends" in said) == (kind == "warning")


@pytest.mark.parametrize("seed", range(5))
def test_the_index_is_that_of_a_loop_over_the_mask(seed):
    numbers = np.random.default_rng(seed)
    first = numbers.random(400) < 0.15  # with 3 the first token says that it is learned, which it never is
    mask = np.where(first, numbers.integers(2, 4, 400), numbers.integers(0, 2, 400)).astype(np.uint8)
    mask[0] = 3
    expected, cut, dropped = [], 0, 0
    borders = [place for place in range(400) if mask[place] & 2] + [400]
    for start, end in itertools.pairwise(borders):
        learned = sum(int(bits) == 1 for bits in mask[start : min(end, start + 9)])
        dropped += learned == 0
        if learned:
            cut += end - start > 9
            expected.append((start, min(end - start, 9), learned))
    index = index_examples(mask, 8)
    assert list(zip(*(array.tolist() for array in index[:3]), strict=True)) == expected
    assert (index.cut, index.dropped) == (cut, dropped)


def test_a_mask_that_begins_within_an_example_is_refused(tmp_path):
    shards = open_dataset(make_examples(tmp_path, random_examples(9))).splits["train"]
    mask = read_masks(shards).copy()
    mask[0] = 0
    with pytest.raises(IntegrityError, match=r"train_000000\.mask: no example begins at its first token"):
        ExampleStream("train", TokenReader(shards, 257), mask, 128, 1)


# ---- validation


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_validation_reads_each_example_once_on_any_number_of_ranks(tmp_path, ranks, batch_size):
    examples = random_examples(17)
    stream = stream_of(tmp_path, examples)
    shares = [list(stream.validation(batch_size, 0, rank, ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(tokens) == batch_size for share in shares for tokens in share)
    read = [tokens[(tokens[:, 1:] >= 0).any(1)] for share in shares for tokens in share]
    assert sorted(rows_of(read)) == sorted(examples)


def test_validation_takes_the_first_examples_with_enough_targets(tmp_path):
    examples = [(list(range(10)), 3)] * 20
    stream = stream_of(tmp_path, examples)
    for eval_tokens, expected in ((1, 3), (3, 3), (4, 6), (59, 60), (60, 60), (1000, 60), (0, 60)):
        assert sum((tokens >= 0).sum() for tokens in stream.validation(4, eval_tokens)) == expected


# ---- what a report asks


def test_held_out_prompts_are_examples_up_to_what_is_learned_first(tmp_path):
    examples = [([10 * n + k for k in range(6)], n % 4 + 1) for n in range(9)]
    expected = [(ids[: 6 - learned], ids[6 - learned :][:3]) for ids, learned in examples]
    stream = stream_of(tmp_path, examples)
    stream.mask = np.where(stream.mask & FIRST, FIRST | TARGET, stream.mask)  # it never is a target
    assert stream.held_out(9, 3) == stream.held_out(50, 3) == expected
    assert stream.held_out(3, 3) == [expected[0], expected[3], expected[6]]
