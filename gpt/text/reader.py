"""Token shards as one stream of ids: TokenReader, and the Verifier that checks them in the background."""

import contextlib
import hashlib
import threading
from collections.abc import Iterable

import numpy as np

from gpt.errors import IntegrityError
from gpt.text.shards import FIRST, TARGET, PositionedFile, Shard, check_size, mask_path

BLOCK_BYTES = 1 << 22  # read size while hashing


class TokenReader:
    """The shards of one split as a single stream of ids. Several threads may use it. Its methods raise IntegrityError
    for an id that the tokenizer does not have or a file that has become shorter, ResourceError if reading fails."""

    def __init__(self, shards: Iterable[Shard], vocab_size: int):
        self.shards, self.vocab_size = tuple(shards), vocab_size
        self.starts = np.concatenate([[0], np.cumsum([shard.tokens for shard in self.shards])]).astype(np.int64)
        self.files = [PositionedFile(shard.path) for shard in self.shards]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, start: int) -> tuple[int, int]:
        """Returns the index of the shard that holds id `start` of the stream, and the id's offset in it."""
        index = int(np.searchsorted(self.starts, start, side="right")) - 1
        return index, start - int(self.starts[index])

    def read(self, start: int, count: int) -> np.ndarray:
        """Returns ids `start` to `start + count` (exclusive) of the stream, int64 (count,)."""
        ids = np.empty(count, dtype=np.int64)
        index, first = self.place(start)
        done = 0
        while done < count:
            size = min(count - done, self.shards[index].tokens - first)
            ids[done : done + size] = read_ids(self.files[index], self.shards[index], first, size, self.vocab_size)[1]
            done += size
            index, first = index + 1, 0
        return ids

    def close(self) -> None:
        for file in self.files:
            file.close()


def read_ids(file: PositionedFile, shard: Shard, first: int, count: int, vocab_size: int) -> tuple[bytes, np.ndarray]:
    """Returns ids `first` to `first + count` (exclusive) of a shard, as bytes and as numbers. Raises IntegrityError if
    the file has become shorter or an id is not below `vocab_size`."""
    dtype = np.dtype(shard.dtype).newbyteorder("<")
    data = file.read(shard.offset + first * dtype.itemsize, count * dtype.itemsize)
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
    return data, ids


class Verifier(threading.Thread):
    """Checks sha256 and ids of all shards in a background thread. `check` raises the error found so far, if any; `wait`
    first waits until all shards are checked. Call `wait` before a checkpoint is written."""

    def __init__(self, shards: Iterable[Shard], vocab_size: int):
        super().__init__(name="verify-shards", daemon=True)
        self.shards, self.vocab_size = list(shards), vocab_size
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            for shard in self.shards:
                verify(shard, self.vocab_size)
        except Exception as error:  # any error: shards that were not checked must not pass
            self.error = error

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def wait(self) -> None:
        if self.ident is not None:  # started
            self.join()
        self.check()


def verify(shard: Shard, vocab_size: int) -> None:
    """Raises IntegrityError unless shard and mask have their recorded sha256 and the ids are below `vocab_size`."""
    block = BLOCK_BYTES // np.dtype(shard.dtype).itemsize
    with contextlib.closing(PositionedFile(shard.path)) as file:
        digest = hashlib.sha256(file.read(0, shard.offset))
        for first in range(0, shard.tokens, block):
            data, _ = read_ids(file, shard, first, min(block, shard.tokens - first), vocab_size)
            digest.update(data)
    check_size(shard)
    digests = [(shard.path, shard.sha256, digest.hexdigest())]
    if shard.mask_sha256 is not None:
        mask = read_masks([shard]).tobytes()
        digests.append((mask_path(shard.path), shard.mask_sha256, hashlib.sha256(mask).hexdigest()))
    for path, recorded, found in digests:
        if recorded is not None and found != recorded:
            raise IntegrityError(f"{path}: sha256 mismatch; restore it or re-run data preparation")


def read_masks(shards: Iterable[Shard]) -> np.ndarray:
    """Returns the masks of shards as one uint8 array (tokens,): see TARGET and FIRST. Raises IntegrityError if a file
    has become shorter or is no mask, ResourceError if reading fails."""
    masks = []
    for shard in shards:
        with contextlib.closing(PositionedFile(mask_path(shard.path))) as file:
            masks.append(np.frombuffer(file.read(0, shard.tokens), dtype=np.uint8))
        if len(masks[-1]) < shard.tokens or masks[-1].max(initial=0) > TARGET | FIRST:
            raise IntegrityError(f"{mask_path(shard.path)}: not a mask; restore it or re-run data preparation")
    return np.concatenate(masks)
