"""The data of a run, opened and checked: shards, tokenizer, training windows, validation set."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt.errors import InputError, tell
from gpt.text.reader import TokenReader, Verifier
from gpt.text.shards import Dataset, open_dataset
from gpt.text.tokenizer import Tokenizer, load_tokenizer
from gpt.text.windows import Windows, require_tokens, validation_batches


class Corpus:
    """The shards in `folder` as training windows and a validation set. `foreign_tokenizer` names the tokenizer of
    shards that do not name theirs. If `verify` is "full", `verifier` checks their sha256 in the background once it is
    started. Raises InputError if there is too little text for one batch."""

    def __init__(
        self, folder: Path, foreign_tokenizer: str, verify: str, block_size: int, global_batch_size: int, seed: int
    ):
        dataset = open_dataset(folder, foreign_tokenizer)
        if dataset.notice:
            tell(dataset.notice)
        self.block_size, self.shard_list = block_size, dataset.shard_list
        self.tokenizer = open_tokenizer(dataset, foreign_tokenizer)
        vocab_size = self.tokenizer.vocab_size
        self.readers = {split: TokenReader(shards, vocab_size) for split, shards in dataset.splits.items() if shards}
        self.windows = Windows(self.readers["train"], block_size, seed)
        if self.windows.per_epoch < global_batch_size:
            raise InputError(
                f"{folder}: the training split has {self.windows.per_epoch} windows of {block_size} tokens, "
                f"global_batch_size is {global_batch_size}; lower it or give more text"
            )
        if self.has_validation():
            require_tokens("val", self.readers["val"], block_size)
        self.byte_lengths = self.tokenizer.byte_lengths()
        shards = [shard for shards in dataset.splits.values() for shard in shards]
        self.verifier = Verifier(shards if verify == "full" else [], vocab_size)

    def has_validation(self) -> bool:
        return "val" in self.readers

    def validation(
        self, batch_size: int, eval_tokens: int, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the batches (ids, targets) of the validation set, always the same: those of rank `rank` of `ranks`."""
        return validation_batches(self.readers["val"], self.block_size, batch_size, eval_tokens, rank, ranks)

    def close(self) -> None:
        for reader in self.readers.values():
            reader.close()


def open_tokenizer(dataset: Dataset, foreign_tokenizer: str) -> Tokenizer:
    """Returns the tokenizer of a data folder; `foreign_tokenizer` names that of a foreign one."""
    if dataset.tokenizer is None:
        return load_tokenizer(foreign_tokenizer or "gpt2")
    if foreign_tokenizer:
        raise InputError(
            f"{dataset.folder}: the data names its own tokenizer, {dataset.tokenizer['name']}; leave out --tokenizer"
        )
    tokenizer = load_tokenizer(dataset.folder)
    check_tokenizer(str(dataset.folder), dataset.tokenizer, tokenizer)
    return tokenizer


def check_tokenizer(owner: str, entry: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raises InputError unless `entry`, of the tokenizer that `owner` was made with, is that of the data's
    `tokenizer`."""
    if entry["identity"] != tokenizer.identity:
        raise InputError(
            f"tokenizers differ: {owner} has {entry['name']} ({entry['identity'][:12]}), the data {tokenizer.name} "
            f"({tokenizer.identity[:12]}); prepare the data with --tokenizer {owner}"
        )
