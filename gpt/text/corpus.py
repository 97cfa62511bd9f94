"""The data of a run, opened and checked: shards, tokenizer, training windows, validation set."""

import functools
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt.errors import InputError, tell
from gpt.text.example_stream import ExampleStream
from gpt.text.examples import shown_example
from gpt.text.reader import TokenReader, Verifier, read_masks
from gpt.text.shards import Dataset
from gpt.text.tokenizer import Tokenizer, load_tokenizer
from gpt.text.windows import Windows, held_out_windows, require_tokens, validation_batches


class Corpus:
    """The shards of `dataset` as training windows, or examples if they have masks, and a validation set.
    `foreign_tokenizer` names the tokenizer of shards that do not name theirs. If `verify` is "full", the thread
    `verifier` checks the sha256 of the shards in the background once it is started. Raises InputError if there is too
    little text for one batch."""

    def __init__(
        self, dataset: Dataset, foreign_tokenizer: str, verify: str, block_size: int, global_batch_size: int, seed: int
    ):
        if dataset.notice:
            tell(dataset.notice)
        self.dataset, self.block_size, self.shard_list = dataset, block_size, dataset.shard_list
        self.tokenizer = open_tokenizer(dataset, foreign_tokenizer)
        vocab_size = self.tokenizer.vocab_size
        self.readers = {split: TokenReader(shards, vocab_size) for split, shards in dataset.splits.items() if shards}
        self.training: Windows | ExampleStream
        self.validation: Callable[..., Iterator[np.ndarray]]
        """(batch size, eval_tokens, rank, ranks) -> batches of tokens for gpt.loss.inputs_and_targets, the same at
        every call; only there if has_validation()"""
        self.find_held_out: Callable[[int, int], list[tuple[list[int], list[int]]]]
        """see held_out; only there if has_validation()"""
        if dataset.has_examples:
            self.open_examples(seed)
        else:
            self.open_windows(seed)
        if self.training.per_epoch < global_batch_size:
            units = "examples" if dataset.has_examples else f"windows of {block_size} tokens"
            raise InputError(
                f"{dataset.folder}: the training split has {self.training.per_epoch} {units}, "
                f"global_batch_size is {global_batch_size}; lower it or give more text"
            )
        self.byte_lengths = self.tokenizer.byte_lengths()
        shards = [shard for shards in dataset.splits.values() for shard in shards]
        self.verifier = Verifier(shards if verify == "full" else [], vocab_size)

    def check_tokenizer(self, owner: str, entry: dict[str, Any], tokenizer: str) -> None:
        """Raises InputError unless the data has the tokenizer of `owner`, whose manifest entry is `entry`: see
        `check_tokenizer`. The error gives the command that prepares the same text with `tokenizer`, a name or folder
        that data/prepare.py takes, into a new folder."""
        out = f"{self.dataset.folder}-{Path(tokenizer).resolve().name}"
        words = [*(self.dataset.recipe or ["INPUT"]), "--tokenizer", tokenizer, "--out", out]
        advice = f"prepare the data with it, for --data {shlex.quote(out)}: python data/prepare.py {shlex.join(words)}"
        check_tokenizer(owner, entry, self.tokenizer, advice)

    def open_windows(self, seed: int) -> None:
        self.training = Windows(self.readers["train"], self.block_size, seed)
        if self.has_validation():
            require_tokens("val", self.readers["val"], self.block_size)
            self.validation = functools.partial(validation_batches, self.readers["val"], self.block_size)
            self.find_held_out = functools.partial(held_out_windows, self.readers["val"], self.block_size // 2)

    def open_examples(self, seed: int) -> None:
        streams = {
            split: ExampleStream(split, reader, read_masks(reader.shards), self.block_size, seed)
            for split, reader in self.readers.items()
        }
        for split, stream in streams.items():
            stream.tell_lost(split)
        self.training = streams["train"]
        if self.has_validation():
            self.validation, self.find_held_out = streams["val"].validation, streams["val"].held_out

    @property
    def has_messages(self) -> bool:
        """Whether the data are conversations."""
        return self.dataset.has_examples and bool(self.tokenizer.additions.chat_template)

    def has_validation(self) -> bool:
        return "val" in self.readers

    def held_out(self, count: int, most_ids: int) -> list[tuple[list[int], list[int]]]:
        """Returns up to `count` prompts from the validation set, evenly chosen: the ids of each, and up to `most_ids`
        ids that follow it there. Those of examples are the prompt and the first thing to learn."""
        if not self.has_validation():
            return []
        return self.find_held_out(count, most_ids)

    def tell_first_example(self) -> None:
        """Prints the first example of the run as the model reads it; nothing for plain text."""
        if isinstance(self.training, ExampleStream):
            shown = shown_example(*self.training.example(0), self.tokenizer, in_colour=False)
            tell(f"info: the first example:\n{shown}")

    def sample_prompt(self) -> list[int]:
        """Returns the ids after which a run shows what its model writes: those of an empty prompt for plain text, else
        the prompt of an example."""
        if not isinstance(self.training, ExampleStream):
            return self.tokenizer.encode_prompt("")
        [(prompt, _)] = self.held_out(1, 0) or self.training.held_out(1, 0)
        return prompt

    def description(self) -> str:
        """Returns in words what a run learns from and validates on."""
        parts = [f"{self.dataset.tokens('train'):,} tokens to read"]
        if isinstance(self.training, ExampleStream):
            index = self.training.index
            parts = [f"{self.training.per_epoch:,} examples of {int(index.lengths.sum()):,} tokens"]
            parts += [f"{int(index.targets.sum()):,} of these are learned"]
            parts += [f"{index.cut:,} examples are cut to the context"] if index.cut else []
            parts += [f"{index.dropped:,} without anything to learn are left out"] if index.dropped else []
        if self.has_validation():
            parts.append(f"{self.dataset.tokens('val'):,} tokens kept back to validate on")
        return ", ".join(parts)

    def close(self) -> None:
        for reader in self.readers.values():
            reader.close()


def open_tokenizer(dataset: Dataset, foreign_tokenizer: str) -> Tokenizer:
    """Returns the tokenizer that the manifest of `dataset` names, else the tokenizer called `foreign_tokenizer` ("":
    gpt2). Raises InputError if both are given, or if the tokenizer in the folder is not that of the manifest."""
    if dataset.tokenizer is None:
        return load_tokenizer(foreign_tokenizer or "gpt2")
    if foreign_tokenizer:
        raise InputError(
            f"{dataset.folder}: the data names its own tokenizer, {dataset.tokenizer['name']}; leave out --tokenizer"
        )
    tokenizer = load_tokenizer(dataset.folder)
    check_tokenizer(str(dataset.folder), dataset.tokenizer, tokenizer, "re-run data preparation")
    return tokenizer


def check_tokenizer(owner: str, entry: dict[str, Any], tokenizer: Tokenizer, advice: str) -> None:
    """Raises InputError, which ends with `advice`, unless `tokenizer`, that of the data, has the identity in `entry`,
    the manifest entry of the tokenizer with which `owner` was made."""
    if entry["identity"] != tokenizer.identity:
        raise InputError(
            f"tokenizers differ: {owner} has {entry['name']} ({entry['identity'][:12]}), the data {tokenizer.name} "
            f"({tokenizer.identity[:12]}); {advice}"
        )
