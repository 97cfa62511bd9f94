"""The data of a run, opened and checked: shards, tokenizer, training windows, validation set."""

from gpt.errors import InputError, tell
from gpt.text.reader import TokenReader, Verifier
from gpt.text.shards import open_dataset
from gpt.text.tokenizer import load_tokenizer
from gpt.text.windows import Windows, require_tokens, validation_batches


class Corpus:
    """The shards in `folder` as training windows and a validation set. `foreign_tokenizer` names the tokenizer of
    shards that do not say theirs; with `verify` "full" their sha256 is checked in the background once `verifier` is
    started. Raises InputError if there is too little text for one batch."""

    def __init__(self, folder, foreign_tokenizer, verify, block_size, global_batch_size, seed):
        dataset = open_dataset(folder, foreign_tokenizer)
        if dataset.notice:
            tell(dataset.notice)
        self.folder, self.block_size, self.record = folder, block_size, dataset.record
        self.tokenizer = self.open_tokenizer(dataset, foreign_tokenizer)
        vocab_size = self.tokenizer.vocab_size
        self.readers = {split: TokenReader(shards, vocab_size) for split, shards in dataset.splits.items() if shards}
        self.windows = Windows(self.readers["train"], block_size, seed)
        if self.windows.per_epoch < global_batch_size:
            raise InputError(
                f"{folder}: the training split has {self.windows.per_epoch} windows of {block_size} tokens, "
                f"global_batch_size is {global_batch_size}; lower it or give more text"
            )
        if "val" in self.readers:
            require_tokens("val", self.readers["val"], block_size)
        self.byte_lengths = self.tokenizer.byte_lengths()
        every = [shard for shards in dataset.splits.values() for shard in shards]
        self.verifier = Verifier(every if verify == "full" else [], vocab_size)

    def open_tokenizer(self, dataset, foreign_tokenizer):
        if dataset.tokenizer is None:
            return load_tokenizer(foreign_tokenizer or "gpt2")
        if foreign_tokenizer:
            raise InputError(
                f"{self.folder}: the data names its own tokenizer, {dataset.tokenizer['name']}; leave out --tokenizer"
            )
        tokenizer = load_tokenizer(self.folder)
        check_tokenizer(str(self.folder), dataset.tokenizer, tokenizer)
        return tokenizer

    def has_validation(self):
        return "val" in self.readers

    def validation(self, batch_size, eval_tokens, rank=0, ranks=1):
        """Batches (ids, targets) of the validation set, always the same: those of rank `rank` of `ranks`."""
        return validation_batches(self.readers["val"], self.block_size, batch_size, eval_tokens, rank, ranks)

    def close(self):
        for reader in self.readers.values():
            reader.close()


def check_tokenizer(what, record, tokenizer):
    """Raise InputError unless `record`, which `what` was made with, is of the data's `tokenizer`."""
    if record["identity"] != tokenizer.identity:
        raise InputError(
            f"tokenizers differ: {what} has {record['name']} ({record['identity'][:12]}), the data {tokenizer.name} "
            f"({tokenizer.identity[:12]}); prepare the data with --tokenizer {what}"
        )
