"""Whole examples in batches: the examples of a run as a pure function of (seed, n), and the fixed validation set.

The data are examples if they have masks: these say where an example begins and which of its tokens are learned. Epoch e
visits the N examples in an order drawn from (seed, e). Example n of the run is example n % N of epoch n // N.

A step takes the next examples, sorts them by length, and deals them out to the ranks and to micro-batches. Each
micro-batch is padded on the right, to a multiple of PADDING tokens. Positions begin at 0 in every example, and causal
attention needs no mask: no token sees the padding after it. The loss is the mean over the step's targets, so sorting
and dealing change it by rounding alone.

In a micro-batch a token that is not learned is stored as ~id, which is negative: see gpt.loss.inputs_and_targets."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gpt.errors import InputError, IntegrityError, note
from gpt.loss import NOT_LEARNED
from gpt.text.reader import TokenReader
from gpt.text.shards import FIRST, TARGET, mask_path
from gpt.text.windows import in_order

PADDING = 64  # a row of a micro-batch is a multiple of so many tokens long, or as long as the context


class Index(NamedTuple):
    """The examples of a split from which a model of some context can learn: int64 arrays (N,)."""

    starts: np.ndarray  # places in the stream of ids
    lengths: np.ndarray  # in tokens; at most the context and one more
    targets: np.ndarray  # numbers of tokens that are learned
    cut: int  # number of these examples that are longer
    dropped: int  # number of other examples, which have no target within that length


def index_examples(mask: np.ndarray, block_size: int) -> Index:
    """Returns the Index of a split with this mask (tokens,) for a model with a context of `block_size` tokens."""
    starts, targets = np.flatnonzero(mask & FIRST), np.flatnonzero(mask & (FIRST | TARGET) == TARGET)
    whole = np.diff(np.append(starts, len(mask)))
    lengths = np.minimum(whole, block_size + 1)
    counts = np.searchsorted(targets, starts + lengths) - np.searchsorted(targets, starts)
    learns = counts > 0
    cut = int((whole > lengths)[learns].sum())
    return Index(starts[learns], lengths[learns], counts[learns], cut, int((~learns).sum()))


class ExampleStream:
    """The examples of a run, an endless sequence over one split: see the top of this file. `mask` is that of the
    split. Raises InputError if the split has no example to learn from, IntegrityError if it does not begin with an
    example."""

    one_shape = False  # batches have several shapes

    def __init__(
        self,
        split: str,
        reader: TokenReader,
        mask: np.ndarray,
        block_size: int,
        seed: int,
        padding: int = PADDING,
    ):
        self.reader, self.mask, self.block_size, self.seed, self.padding = reader, mask, block_size, seed, padding
        path = reader.shards[0].path
        if not mask[0] & FIRST:
            raise IntegrityError(f"{mask_path(path)}: no example begins at its first token; re-run data preparation")
        self.index = index_examples(mask, block_size)
        self.per_epoch = len(self.index.starts)
        if not self.per_epoch:
            raise InputError(
                f"{path.parent}: no example of {split} has something to learn in its first {block_size + 1} tokens; "
                "give other examples or a larger --block_size"
            )
        self.mean_tokens = float(np.mean(self.index.lengths - 1))

    def tell_lost(self, split: str) -> None:
        """Prints a note about examples that are cut to the context, or that have nothing to learn within it; a warning
        if most of those to learn from are cut."""
        index = self.index
        parts = [f"{index.cut:,} are cut to {self.block_size + 1} tokens"] if index.cut else []
        parts += [f"{index.dropped:,} have nothing to learn there and are left out"] if index.dropped else []
        text = f"{split}: of {self.per_epoch + index.dropped:,} examples {', '.join(parts)}"
        if split == "train" and 2 * index.cut > self.per_epoch:
            advice = "give shorter examples, or a model with a longer context"
            note("warning", f"{text}: the model will hardly learn where an answer ends; {advice}")
        elif parts:
            note("info", text)

    def example(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of example `n` of the run, cut to the context and one more, and their mask; both (T,)."""
        number = self.numbers(n, 1)[0]
        start, length = int(self.index.starts[number]), int(self.index.lengths[number])
        return self.reader.read(start, length), self.mask[start : start + length]

    def numbers(self, first: int, count: int) -> np.ndarray:
        """Returns which examples of the split are examples `first` to `first + count` (exclusive) of the run, int64."""
        return in_order(np.arange(first, first + count, dtype=np.int64), self.per_epoch, self.seed)[1]

    def tokens(self, first: int, count: int) -> int:
        """Returns how many tokens the model reads in examples `first` to `first + count`, without padding."""
        return int((self.index.lengths[self.numbers(first, count)] - 1).sum())

    def place(self, n: int) -> str:
        """Returns where example `n` begins, for messages: "train_000003.bin offset 812"."""
        index, offset = self.reader.place(int(self.index.starts[self.numbers(n, 1)[0]]))
        return f"{self.reader.shards[index].path.name} offset {offset}"

    def share(self, first: int, count: int, rank: int, ranks: int, micro_batch_size: int) -> list[np.ndarray]:
        """Returns the share of rank `rank` of `ranks` of examples `first` to `first + count`, as micro-batches: int64
        (micro_batch_size, T + 1), where a token that is not learned is ~id. All ranks get equally many."""
        chosen = self.by_length(self.numbers(first, count))[rank::ranks]
        parts = [chosen[i : i + micro_batch_size] for i in range(0, len(chosen), micro_batch_size)]
        return [self.padded(part, len(part)) for part in parts]

    def by_length(self, chosen: np.ndarray) -> np.ndarray:
        """Returns the examples `chosen` with the longest first, so that a step needs most memory at its beginning."""
        return chosen[np.argsort(-self.index.lengths[chosen], kind="stable")]

    def padded(self, chosen: np.ndarray, rows: int) -> np.ndarray:
        """Returns examples as the first rows of an array, int64 (rows, T + 1); further rows are padding."""
        longest = int(self.index.lengths[chosen].max(initial=2)) - 1
        width = min(-(-longest // self.padding) * self.padding, self.block_size)
        tokens = np.full((rows, width + 1), NOT_LEARNED, dtype=np.int64)
        for row, example in zip(tokens, chosen, strict=False):
            start, length = int(self.index.starts[example]), int(self.index.lengths[example])
            ids = self.reader.read(start, length)
            row[:length] = np.where(self.mask[start : start + length] & TARGET, ids, ~ids)
        return tokens

    def validation(self, batch_size: int, eval_tokens: int, rank: int = 0, ranks: int = 1) -> Iterator[np.ndarray]:
        """Yields the first examples of the split in which `eval_tokens` tokens are learned (0: all examples), sorted by
        length, as tokens (batch_size, T + 1) for gpt.loss.inputs_and_targets. The ranks take turns and get equally many
        batches; the last rows of the last one may be padding."""
        enough = self.per_epoch
        if eval_tokens:
            enough = min(enough, int(np.searchsorted(np.cumsum(self.index.targets), eval_tokens)) + 1)
        chosen = self.by_length(np.arange(enough))
        for turn in range(0, enough, batch_size * ranks):
            first = turn + rank * batch_size
            yield self.padded(chosen[first : first + batch_size], batch_size)

    def held_out(self, count: int, most_ids: int) -> list[tuple[list[int], list[int]]]:
        """Returns up to `count` examples of the split, evenly chosen, as (ids before the first that is learned, up to
        `most_ids` ids that are learned there)."""
        result = []
        for number in sorted({number * self.per_epoch // count for number in range(count)}):
            start, length = int(self.index.starts[number]), int(self.index.lengths[number])
            ids = self.reader.read(start, length).tolist()
            learned = (self.mask[start : start + length] & TARGET) != 0
            learned[0] = False  # the first token is never a target
            first = int(np.argmax(learned))
            end = first + int(np.argmin(np.append(learned[first:], False)))
            result.append((ids[:first], ids[first:end][:most_ids]))
        return result
