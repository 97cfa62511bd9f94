"""Batches: the windows of a run as a pure function of (seed, n), the fixed validation set, and prefetch.

The shards of a split are one stream of ids. Epoch e cuts it, from an offset drawn from (seed, e), into windows of
block_size + 1 ids that overlap by one, and visits them in an order drawn from (seed, e). Window n of the run is window
n % N of epoch n // N, where N is the number of windows in an epoch; the number of windows seen is all that resuming
needs.

16 ids, block_size 4, seed 1: there are 4 possible offsets, and N = (16 - 4) // 4 = 3 windows in each epoch.

    epoch 0, offset 3:  windows begin at 3, 7 and 11     order 0 2 1     so n = 0, 1, 2 begin at 3, 11, 7
    epoch 1, offset 1:  windows begin at 1, 5 and 9      order 2 0 1     so n = 3, 4, 5 begin at 9, 1, 5

Window 0 holds ids 3 to 7 of the stream: 3 to 6 are the input and 4 to 7 their targets."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from gpt.errors import InputError
from gpt.loss import NOT_LEARNED
from gpt.text.fit import windows_per_epoch
from gpt.text.reader import TokenReader

FEISTEL_ROUNDS = 6
PROMPT_TOKENS = 32  # of a prompt that is the beginning of a held-out text


class Windows:
    """The windows of a run, an endless sequence over the shards of one split: see the top of this file."""

    one_shape = True  # all batches of a run have one shape

    def __init__(self, reader: TokenReader, block_size: int, seed: int):
        require_tokens("train", reader, block_size)
        self.reader, self.block_size, self.seed = reader, block_size, seed
        self.mean_tokens = float(block_size)
        self.offsets = min(block_size, len(reader) - block_size)  # number of possible offsets of an epoch
        self.per_epoch = windows_per_epoch(len(reader), block_size)

    def start(self, n: np.ndarray) -> np.ndarray:
        """Returns the places in the stream where the windows numbered `n` begin; both are int64 (count,)."""
        epochs, places = in_order(n, self.per_epoch, self.seed)
        starts = places * self.block_size
        for epoch in map(int, np.unique(epochs)):
            starts[epochs == epoch] += int(mix(self.seed, epoch, 0)[0]) % self.offsets
        return starts

    def place(self, n: int) -> str:
        """Returns where window `n` begins, for messages: "train_000003.bin offset 812"."""
        index, offset = self.reader.place(int(self.start(np.array([n], dtype=np.int64))[0]))
        return f"{self.reader.shards[index].path.name} offset {offset}"

    def tokens(self, first: int, count: int) -> int:
        """Returns how many tokens the model reads in windows `first` to `first + count`."""
        return count * self.block_size

    def share(self, first: int, count: int, rank: int, ranks: int, _micro_batch_size: int) -> np.ndarray:
        """Returns the share of rank `rank` of `ranks` of windows `first` to `first + count`: ids (count / ranks,
        block_size + 1). The ranks get equal shares, in their order."""
        return self.take(first + rank * (count // ranks), count // ranks)

    def take(self, first: int, count: int) -> np.ndarray:
        """Returns windows `first` to `first + count` (exclusive) of the run: ids (count, block_size + 1), int64."""
        starts = self.start(np.arange(first, first + count, dtype=np.int64))
        return np.stack([self.reader.read(int(start), self.block_size + 1) for start in starts])


class Prefetch:
    """Returns the share of rank `rank` of `ranks` of each batch of a `stream`, Windows or an ExampleStream, and reads
    the next batch in the background. The background also applies `ready`, which turns an array into what a step needs
    (a tensor, in pinned memory for a GPU)."""

    def __init__(
        self,
        stream: Any,
        ready: Callable[[np.ndarray], Any],
        rank: int = 0,
        ranks: int = 1,
        micro_batch_size: int = 1,
    ):
        self.stream, self.ready, self.place = stream, ready, (rank, ranks, micro_batch_size)
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self.next: dict[tuple[int, int], Future[Any]] = {}  # (first, count) -> the batch that is being read

    def take(self, first: int, count: int) -> Any:
        """Returns this rank's share of windows or examples `first` to `first + count`: of windows one array, of
        examples a list of micro-batches. Then the share of the next `count` is read in the background."""
        current = self.next.pop((first, count), None) or self.submit(first, count)
        batch = current.result()
        self.next = {(first + count, count): self.submit(first + count, count)}
        return batch

    def submit(self, first: int, count: int) -> Future[Any]:
        return self.pool.submit(self.read, first, count)

    def read(self, first: int, count: int) -> Any:
        share = self.stream.share(first, count, *self.place)
        return [self.ready(part) for part in share] if isinstance(share, list) else self.ready(share)

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


def validation_batches(
    reader: TokenReader, block_size: int, batch_size: int, eval_tokens: int, rank: int = 0, ranks: int = 1
) -> Iterator[np.ndarray]:
    """Yields the first `eval_tokens` targets (0 = all) of a split in order, as tokens (batch_size, block_size + 1) for
    gpt.loss.inputs_and_targets: neighbouring rows overlap by one. Padding, which is not learned, fills the last row and
    the last batch. The ranks take turns and get equally many batches; the last batch of a rank may be all padding."""
    total = len(reader) - 1 if eval_tokens == 0 else min(eval_tokens, len(reader) - 1)
    size = block_size * batch_size
    for turn in range(0, total, size * ranks):
        first = turn + rank * size
        count = max(0, min(size, total - first))
        tokens = np.full(size + 1, NOT_LEARNED, dtype=np.int64)
        if count:
            tokens[: count + 1] = reader.read(first, count + 1)
        yield np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1)[::block_size].copy()


def held_out_windows(
    reader: TokenReader, longest_prompt: int, count: int, most_ids: int
) -> list[tuple[list[int], list[int]]]:
    """Returns `count` prompts of a split, evenly chosen: the ids of each, at most PROMPT_TOKENS and `longest_prompt`,
    and up to `most_ids` ids that follow it."""
    prompt = max(1, min(PROMPT_TOKENS, longest_prompt, len(reader) // 2))
    following = min(most_ids, len(reader) - prompt)
    starts = [number * (len(reader) - prompt - following) // count for number in range(count)]
    rows = [reader.read(start, prompt + following) for start in sorted(set(starts))]
    return [(row[:prompt].tolist(), row[prompt:].tolist()) for row in rows]


def in_order(n: np.ndarray, per_epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the epochs of the items numbered `n` of a run that visits `per_epoch` items in each epoch, in an order
    drawn from (seed, epoch), and which of the items these are; all are int64 (count,)."""
    epochs, places = np.divmod(n, per_epoch)
    for epoch in map(int, np.unique(epochs)):
        chosen = epochs == epoch
        places[chosen] = permute(places[chosen], per_epoch, (seed, epoch))
    return epochs, places


def require_tokens(split: str, reader: TokenReader, block_size: int) -> None:
    """Raises InputError if a split is too short for one window."""
    if len(reader) < block_size + 1:
        raise InputError(
            f"{split} has {len(reader)} tokens; needs at least {block_size + 1} (block_size+1); "
            "give more text or a smaller --block_size"
        )


def permute(index: np.ndarray, size: int, key: tuple[int, int]) -> np.ndarray:
    """Returns the image of each `index` (int64) under a permutation of range(size) that `key` picks: a Feistel network
    on the next even number of bits, applied again until the value is below `size` (Black and Rogaway 2002)."""
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


def mix(*words: int | np.ndarray) -> np.ndarray:
    """Returns a 64-bit hash of the words (ints, or uint64 arrays of one shape) as a uint64 array. Source of the mixing
    step: splitmix64 (Steele et al. 2014)."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        word = word if isinstance(word, np.ndarray) else np.array([word & (2**64 - 1)], dtype=np.uint64)
        state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
