"""The order of training windows, the validation set, prefetch."""

import threading

import numpy as np
import pytest
import torch

from gpt.errors import InputError, IntegrityError
from gpt.loss import IGNORED, inputs_and_targets
from gpt.text.windows import Prefetch, Windows, held_out_windows, mix, permute, require_tokens, validation_batches

MASK = 2**64 - 1
GOLDEN = [71145379, 193827747, 102587299, 113509283, 58195877, 31671520, 15277149]
SMALL_GOLDEN = [580, 800, 930, 340, 410, 300, 0, 320, 480, 600, 980, 780]


class Stream:
    """A stand-in for TokenReader whose id at each place is the place."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return self.tokens

    def read(self, start, count):
        assert start >= 0
        assert start + count <= self.tokens
        return np.arange(start, start + count, dtype=np.int64)


# ---- the order once more, in plain Python


def plain_mix(*words):
    """splitmix64's finalizer over the words, in integers."""
    state = 0
    for word in words:
        state = ((state ^ (word & MASK)) + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


def plain_permute(value, size, seed, epoch):
    bits = 1
    while 1 << (2 * bits) < size:
        bits += 1
    while True:
        left, right = value >> bits, value & ((1 << bits) - 1)
        for number in range(1, 7):
            left, right = right, left ^ (plain_mix(seed, epoch, number, right) & ((1 << bits) - 1))
        value = (left << bits) | right
        if value < size:
            return value


def plain_start(seed, n, tokens, block_size):
    """DESIGN §4: where window n begins."""
    m = min(block_size, tokens - block_size)
    per_epoch = (tokens - m) // block_size
    epoch, index = divmod(n, per_epoch)
    return plain_mix(seed, epoch, 0) % m + plain_permute(index, per_epoch, seed, epoch) * block_size


def starts(tokens, block_size, seed, numbers):
    return Windows(Stream(tokens), block_size, seed).start(np.array(numbers, dtype=np.int64)).tolist()


def test_the_order_equals_the_plain_python_one():
    for tokens, block_size, seed in [(100, 8, 1337), (33, 32, 0), (64, 32, 7), (1_000_003, 32, 2**64 - 1), (65, 1, 5)]:
        numbers = [*range(40), 10**6, 10**9]
        expected = [plain_start(seed, n, tokens, block_size) for n in numbers]
        assert starts(tokens, block_size, seed, numbers) == expected


def test_the_order_is_pinned_for_ever():
    assert starts(300_000_000, 1024, 1337, [0, 1, 2, 3, 292_968, 10**6, 10**12]) == GOLDEN
    assert starts(1000, 10, 42, range(12)) == SMALL_GOLDEN


def test_the_mixing_step_is_splitmix64():
    # first outputs of splitmix64 seeded with 0 and with 1234567, as published with the generator
    assert int(mix(0)[0]) == 0xE220A8397B1DCDAF
    assert int(mix(1234567)[0]) == 6457827717110365317


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 63, 64, 65, 100, 255, 257, 1000, 4096, 4097, 10_000])
def test_a_permutation_is_a_bijection(size):
    for key in [(0, 0), (1337, 3), (2**63, 10**6)]:
        image = permute(np.arange(size, dtype=np.int64), size, key)
        assert np.array_equal(np.sort(image), np.arange(size))


def test_permutations_of_different_seeds_and_epochs_differ():
    index = np.arange(1000, dtype=np.int64)
    images = {permute(index, 1000, (seed, epoch)).tobytes() for seed in range(5) for epoch in range(5)}
    assert len(images) == 25
    assert index.tobytes() not in images


def test_a_permutation_mixes_near_and_far():
    image = permute(np.arange(10_000, dtype=np.int64), 10_000, (1337, 0))
    assert abs(np.corrcoef(np.arange(10_000), image)[0, 1]) < 0.03
    assert 3000 < np.abs(np.diff(image)).mean() < 3700  # a third of the size for an order by chance


def test_the_example_of_three_windows_in_an_epoch():
    windows = Windows(Stream(16), 4, 1)
    assert (windows.offsets, windows.per_epoch) == (4, 3)
    assert windows.start(np.arange(6)).tolist() == [3, 11, 7, 9, 1, 5]
    assert windows.take(0, 1).tolist() == [[3, 4, 5, 6, 7]]


# ---- windows


@pytest.mark.parametrize(
    ("tokens", "block_size"), [(9, 8), (10, 8), (15, 8), (16, 8), (17, 8), (24, 8), (100, 8), (101, 7), (50, 1)]
)
@pytest.mark.parametrize("seed", [0, 1337])
def test_every_window_comes_once_per_epoch_whatever_the_offset(tokens, block_size, seed):
    offsets = min(block_size, tokens - block_size)
    windows = Windows(Stream(tokens), block_size, seed)
    assert windows.per_epoch == (tokens - offsets) // block_size
    seen = set()
    for epoch in range(40):
        first = epoch * windows.per_epoch
        batch = windows.take(first, windows.per_epoch)
        assert batch.shape == (windows.per_epoch, block_size + 1)
        assert (np.diff(batch, axis=1) == 1).all()  # block_size + 1 ids that follow each other
        begins = sorted(batch[:, 0].tolist())
        assert begins[0] < offsets
        assert begins == [begins[0] + i * block_size for i in range(windows.per_epoch)]
        assert begins[-1] + block_size < tokens
        seen.add(begins[0])
    assert len(seen) > 1 or offsets == 1
    assert seen <= set(range(offsets))
    assert seen == set(range(offsets)) or offsets > 4


def test_a_batch_may_straddle_two_epochs():
    windows = Windows(Stream(100), 8, 1)
    both = windows.take(windows.per_epoch - 2, 5)
    apart = [windows.take(windows.per_epoch - 2, 2), windows.take(windows.per_epoch, 3)]
    assert np.array_equal(both, np.concatenate(apart))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 64])
def test_the_stream_does_not_depend_on_how_it_is_cut_into_batches(size):
    windows = Windows(Stream(777), 16, 99)
    whole = windows.take(0, 192)
    cut = [windows.take(first, min(size, 192 - first)) for first in range(0, 192, size)]
    assert np.array_equal(np.concatenate(cut), whole)


def test_epochs_and_seeds_bring_other_orders():
    one, two = Windows(Stream(1000), 10, 1), Windows(Stream(1000), 10, 2)
    n = one.per_epoch
    orders = [w.start(np.arange(e * n, (e + 1) * n)).tobytes() for w in (one, two) for e in range(3)]
    assert len(set(orders)) == 6


def test_fault_062_the_first_batch_after_a_million_steps_needs_no_replay():
    read = []

    class Counting(Stream):
        def read(self, start, count):
            read.append(start)
            return super().read(start, count)

    batch = Windows(Counting(100_000), 64, 1337).take(512 * 10**6, 512)
    assert len(read) == len(batch) == 512


def test_place_names_the_shard_and_the_offset_in_it():
    class Shard:
        def __init__(self, name):
            self.path = type("P", (), {"name": name})

    class TwoShards(Stream):
        shards = (Shard("train_000000.bin"), Shard("train_000001.bin"))

        def place(self, start):
            return divmod(start, 500)

    windows = Windows(TwoShards(1000), 10, 3)
    for n in range(120):
        shard, offset = divmod(int(windows.take(n, 1)[0, 0]), 500)
        assert windows.place(n) == f"train_00000{shard}.bin offset {offset}"


def test_fault_024_a_stream_shorter_than_a_window_is_refused_with_both_numbers():
    require_tokens("val", Stream(1025), 1024)
    with pytest.raises(InputError, match=r"val has 1024 tokens; needs at least 1025 \(block_size\+1\)"):
        require_tokens("val", Stream(1024), 1024)
    with pytest.raises(InputError, match="train has 8 tokens; needs at least 9"):
        Windows(Stream(8), 8, 0)


# ---- validation


def pairs(batches):
    """The ids and targets of batches, as the model gets them."""
    for tokens in batches:
        yield tuple(part.numpy() for part in inputs_and_targets(torch.from_numpy(tokens)))


@pytest.mark.parametrize("tokens", [9, 10, 16, 17, 18, 33, 64, 65, 66, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_validation_covers_each_target_once_in_order_with_its_context(tokens, batch_size):
    covered = []
    for ids, targets in pairs(validation_batches(Stream(tokens), 8, batch_size, 0)):
        assert ids.shape == targets.shape == (batch_size, 8)
        counted = targets != IGNORED
        assert (targets[counted] == ids[counted] + 1).all()  # the next id, which here is one more
        assert (ids[counted] % 8 == np.nonzero(counted)[1]).all()  # windows begin at multiples of block_size
        covered += targets[counted].tolist()
    assert covered == list(range(1, tokens))


def test_validation_windows_do_not_depend_on_the_batch_size():
    def rows(batch_size):
        batches = validation_batches(Stream(100), 8, batch_size, 0)
        return [row for batch in batches for row in batch.tolist() if any(token >= 0 for token in row[1:])]

    assert rows(1) == rows(4) == rows(50)


@pytest.mark.parametrize(("eval_tokens", "ranks"), [(0, 2), (0, 3), (8, 2), (50, 4)])
def test_ranks_share_the_validation_set_and_get_equally_many_batches(eval_tokens, ranks):
    shares = [list(validation_batches(Stream(100), 8, 3, eval_tokens, rank, ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1

    def counted(batches):
        return sorted(i for _, targets in pairs(batches) for i in targets[targets != IGNORED].tolist())

    assert counted([batch for share in shares for batch in share]) == counted(
        validation_batches(Stream(100), 8, 3, eval_tokens)
    )


@pytest.mark.parametrize(("eval_tokens", "expected"), [(0, 99), (1, 1), (8, 8), (50, 50), (99, 99), (10**9, 99)])
def test_eval_tokens_limits_the_validation_set(eval_tokens, expected):
    batches = validation_batches(Stream(100), 8, 3, eval_tokens)
    assert sum(int((targets != IGNORED).sum()) for _, targets in pairs(batches)) == expected


# ---- prefetch


def test_prefetch_gives_the_same_batches_as_reading_directly():
    windows = Windows(Stream(500), 8, 5)
    ahead = Prefetch(windows, lambda array: array * 2)
    for first, count in [(0, 4), (4, 4), (8, 4), (100, 4), (104, 2), (106, 2), (0, 4)]:
        assert np.array_equal(ahead.take(first, count), windows.take(first, count) * 2)
    ahead.close()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_shares_of_all_ranks_one_after_the_other_are_the_batch_of_one_process(ranks):
    windows = Windows(Stream(500), 8, 5)
    ahead = [Prefetch(windows, lambda array: array, rank, ranks) for rank in range(ranks)]
    for first in (0, 8, 16):
        assert np.array_equal(np.concatenate([share.take(first, 8) for share in ahead]), windows.take(first, 8))
    for share in ahead:
        share.close()


def test_prefetch_reads_the_next_batch_in_another_thread():
    asked, next_one = [], threading.Event()

    class Watched(Windows):
        def take(self, first, count):
            asked.append((first, threading.current_thread() is threading.main_thread()))
            if first == 4:
                next_one.set()
            return super().take(first, count)

    ahead = Prefetch(Watched(Stream(500), 8, 5), lambda array: array)
    ahead.take(0, 4)
    assert next_one.wait(10)
    ahead.close()
    assert asked == [(0, False), (4, False)]


def test_prefetch_raises_the_error_of_its_thread_where_the_batch_is_taken():
    class Damaged(Windows):
        def take(self, first, count):
            if first >= 4:
                raise IntegrityError("train_000000.bin: truncated")
            return super().take(first, count)

    ahead = Prefetch(Damaged(Stream(500), 8, 5), lambda array: array)
    ahead.take(0, 4)
    with pytest.raises(IntegrityError, match="truncated"):
        ahead.take(4, 4)
    ahead.close()


# ---- what a report asks


@pytest.mark.parametrize("tokens", [1000, 90, 20, 3, 2])
def test_held_out_prompts_are_pieces_of_the_split_with_what_follows_them(tokens):
    pieces = held_out_windows(Stream(tokens), 16, 3, 60)
    assert len(pieces) == (3 if tokens >= 90 else 1)
    for prompt, following in pieces:
        assert [*prompt, *following] == list(range(prompt[0], prompt[0] + len(prompt) + len(following)))
        assert 1 <= len(prompt) <= 16 and 1 <= len(following) <= 60
    if tokens == 1000:
        spans = [set(prompt + following) for prompt, following in pieces]
        assert [len(span) for span in spans] == [76] * 3 and len(set.union(*spans)) == 3 * 76  # none overlap
        assert max(map(max, spans)) - min(map(min, spans)) > 600
