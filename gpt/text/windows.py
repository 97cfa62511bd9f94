"""Batches: the training stream as a pure function of (seed, n), the fixed validation set, and prefetch.

The shards of a split are one stream of ids. Epoch e cuts it, from an offset drawn from (seed, e), into windows of
block_size + 1 ids that overlap by one, and visits them in an order drawn from (seed, e). Window n of the run is window
n % N of epoch n // N, so the number of windows seen so far is all there is to resume."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gpt.errors import InputError
from gpt.loss import IGNORED

FEISTEL_ROUNDS = 6


class Windows:
    """The infinite training stream of one split, read through `reader` (a TokenReader)."""

    def __init__(self, reader, block_size, seed):
        require_tokens("train", reader, block_size)
        self.reader, self.block_size, self.seed = reader, block_size, seed
        self.offsets = min(block_size, len(reader) - block_size)  # how many different starts an epoch may have
        self.per_epoch = (len(reader) - self.offsets) // block_size

    def start(self, n):
        """First id of each window in `n`, an int64 array."""
        epoch, index = np.divmod(n, self.per_epoch)
        starts = np.empty_like(n)
        for e in np.unique(epoch):
            here = epoch == e
            offset = int(mix(self.seed, int(e), 0)[0]) % self.offsets
            starts[here] = offset + permute(index[here], self.per_epoch, (self.seed, int(e))) * self.block_size
        return starts

    def place(self, n):
        """Where window `n` begins, for messages: "train_000003.bin offset 812"."""
        index, offset = self.reader.place(int(self.start(np.array([n], dtype=np.int64))[0]))
        return f"{self.reader.shards[index].path.name} offset {offset}"

    def take(self, first, count):
        """Windows `first` to `first + count` of the run: ids (count, block_size + 1), int64."""
        starts = self.start(np.arange(first, first + count, dtype=np.int64))
        return np.stack([self.reader.read(int(start), self.block_size + 1) for start in starts])


class Prefetch:
    """Takes batches of windows, of each the share of rank `rank` of `ranks`, with the next one read in the background
    meanwhile. `ready` is applied there too: it turns the array into what a step needs (a tensor, in pinned memory for a
    GPU)."""

    def __init__(self, windows, ready, rank=0, ranks=1):
        self.windows, self.ready, self.rank, self.ranks = windows, ready, rank, ranks
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self.coming = {}  # (first, count) -> future

    def take(self, first, count):
        """This rank's part of windows `first` to `first + count`: of equal parts in the order of the ranks."""
        wanted = self.coming.pop((first, count), None) or self.submit(first, count)
        batch = wanted.result()
        self.coming = {(first + count, count): self.submit(first + count, count)}
        return batch

    def submit(self, first, count):
        share = count // self.ranks
        return self.pool.submit(lambda: self.ready(self.windows.take(first + self.rank * share, share)))

    def close(self):
        self.pool.shutdown(wait=True, cancel_futures=True)


def validation_batches(reader, block_size, batch_size, eval_tokens, rank=0, ranks=1):
    """The first `eval_tokens` targets (0 = all) of a split in order, as ids (B, T) and targets (B, T) with B =
    batch_size and T = block_size always: what the last window and the last batch lack is padding with target IGNORED.
    The ranks take them in turns, and each gets as many as the others, the last of which may be all padding."""
    targets = len(reader) - 1 if eval_tokens == 0 else min(eval_tokens, len(reader) - 1)
    size = block_size * batch_size
    for turn in range(0, targets, size * ranks):
        first = turn + rank * size
        count = max(0, min(size, targets - first))
        ids = np.zeros(size, dtype=np.int64)
        wanted = np.full(size, IGNORED, dtype=np.int64)
        if count:
            stream = reader.read(first, count + 1)
            ids[:count], wanted[:count] = stream[:-1], stream[1:]
        yield ids.reshape(batch_size, block_size), wanted.reshape(batch_size, block_size)


def require_tokens(split, reader, block_size):
    if len(reader) < block_size + 1:
        raise InputError(
            f"{split} has {len(reader)} tokens; needs at least {block_size + 1} (block_size+1); "
            "give more text or a smaller --block_size"
        )


def permute(index, size, key):
    """Image of each `index` (int64 array) under a permutation of range(size) that `key`, two ints, picks: a Feistel
    network on the next even number of bits, walked until the value falls inside (Black and Rogaway 2002)."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    value = index.astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    while outside.any():
        left, right = value[outside] >> shift, value[outside] & mask
        for round_number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (mix(*key, 1 + round_number, right) & mask)
        value[outside] = (left << shift) | right
        outside[outside] = value[outside] >= size
    return value.astype(np.int64)


def mix(*words):
    """A 64-bit hash of the words (ints or uint64 arrays of one shape), uint64 array. Source of the mixing step:
    splitmix64 (Steele et al. 2014)."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        word = word if isinstance(word, np.ndarray) else np.array([word & (2**64 - 1)], dtype=np.uint64)
        state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
