"""Token shards as one stream of ids: TokenReader, and the Verifier that checks them in the background."""

import contextlib
import hashlib
import threading

import numpy as np

from gpt.errors import IntegrityError
from gpt.text.shards import PositionedFile, check_size

BLOCK_BYTES = 1 << 22  # read size while hashing


class TokenReader:
    """The shards of one split as a single stream of ids. Safe to use from several threads. Raises IntegrityError for
    an id that the tokenizer does not have or a file that has become shorter, ResourceError if reading fails."""

    def __init__(self, shards, vocab_size):
        self.shards, self.vocab_size = tuple(shards), vocab_size
        self.starts = np.concatenate([[0], np.cumsum([shard.tokens for shard in self.shards])]).astype(np.int64)
        self.files = [PositionedFile(shard.path) for shard in self.shards]

    def __len__(self):
        return int(self.starts[-1])

    def place(self, start):
        """(index of the shard, offset in it) of id `start` of the stream."""
        index = int(np.searchsorted(self.starts, start, side="right")) - 1
        return index, start - int(self.starts[index])

    def read(self, start, count):
        """Ids `start` to `start + count` of the stream, int64 (count,)."""
        out = np.empty(count, dtype=np.int64)
        index, first = self.place(start)
        done = 0
        while done < count:
            here = min(count - done, self.shards[index].tokens - first)
            out[done : done + here] = self.read_shard(index, first, here)
            done += here
            index, first = index + 1, 0
        return out

    def read_shard(self, index, first, count):
        shard = self.shards[index]
        width = np.dtype(shard.dtype).itemsize
        data = self.files[index].read(shard.offset + first * width, count * width)
        return ids_of(shard, data, first, count, self.vocab_size)

    def close(self):
        for file in self.files:
            file.close()


def ids_of(shard, data, first, count, vocab_size):
    """The `count` ids that `data`, read from id `first` on, must hold. Raises IntegrityError if it does not."""
    dtype = np.dtype(shard.dtype).newbyteorder("<")
    if len(data) != count * dtype.itemsize:
        check_size(shard)
        raise IntegrityError(f"{shard.path}: {len(data)} bytes at token {first}, not {count} tokens; restore it")
    ids = np.frombuffer(data, dtype=dtype)
    if count and int(ids.max()) >= vocab_size:
        bad = int(np.argmax(ids >= vocab_size))
        raise IntegrityError(
            f"{shard.path}: token {ids[bad]} at offset {first + bad}, vocab_size {vocab_size}; "
            "re-run data preparation or give the right --tokenizer"
        )
    return ids


class Verifier(threading.Thread):
    """Checks sha256 and ids of all shards in the background, ahead of training. `check()` raises what was found so far;
    `wait()` also waits for the end, before a checkpoint is written."""

    def __init__(self, shards, vocab_size):
        super().__init__(name="verify-shards", daemon=True)
        self.shards, self.vocab_size = list(shards), vocab_size
        self.error = None

    def run(self):
        try:
            for shard in self.shards:
                verify(shard, self.vocab_size)
        except Exception as error:  # whatever it is: what was not checked must not pass
            self.error = error

    def check(self):
        if self.error is not None:
            raise self.error

    def wait(self):
        if self.ident is not None:
            self.join()
        self.check()


def verify(shard, vocab_size):
    """Raises IntegrityError unless the shard has its recorded sha256 and only ids below `vocab_size`."""
    width = np.dtype(shard.dtype).itemsize
    with contextlib.closing(PositionedFile(shard.path)) as file:
        digest = hashlib.sha256(file.read(0, shard.offset))
        for first in range(0, shard.tokens, BLOCK_BYTES // width):
            count = min(BLOCK_BYTES // width, shard.tokens - first)
            data = file.read(shard.offset + first * width, count * width)
            digest.update(data)
            ids_of(shard, data, first, count, vocab_size)
    check_size(shard)
    if shard.sha256 is not None and digest.hexdigest() != shard.sha256:
        raise IntegrityError(f"{shard.path}: sha256 mismatch; restore it or re-run data preparation")
