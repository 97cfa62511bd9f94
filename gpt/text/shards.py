"""Token shards on disk: write, open, check. The format is llm.c's published one plus a manifest, `dataset.json`.

A shard is a header of 256 little-endian int32 (magic, version, token count) and then the ids: uint16 with magic
20240520 and version 1, uint32 with magic 20240801 and version 7. A folder is valid once its manifest, written last,
is there. Files are read by position and never memory-mapped: a map of a file that somebody truncates ends the
process."""

import contextlib
import errno
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt.errors import InputError, IntegrityError, ResourceError
from gpt.files import inside, is_folder, sha256_of, write_durably

FORMAT_VERSION = 1
HEADER_BYTES = 256 * 4
HEADERS = {"uint16": (20240520, 1), "uint32": (20240801, 7)}
DTYPES = {magic: (dtype, version) for dtype, (magic, version) in HEADERS.items()}
MANIFEST = "dataset.json"
SPLITS = ("train", "val")
READ_TRIES = 3
RETRY_SECONDS = 0.2


# ---- writing


class ShardWriter:
    """Writes the ids of one split as `<split>_000000.bin`, `<split>_000001.bin`, … of `shard_tokens` ids each.

    A shard is a `.tmp` file until it is complete. `close()` returns the manifest's entries."""

    def __init__(self, folder, split, dtype, shard_tokens):
        self.folder, self.split, self.dtype, self.shard_tokens = Path(folder), split, np.dtype(dtype), shard_tokens
        self.entries = []
        self.file = None
        self.tokens = self.documents = self.source_bytes = 0

    def write(self, ids, documents=0, source_bytes=0):
        """Append `ids`, the first of which begin `documents` documents and stand for `source_bytes` bytes of text."""
        ids = np.asarray(ids)
        if len(ids) and int(ids.max()) > np.iinfo(self.dtype).max:
            raise InputError(f"token id {ids.max()} does not fit {self.dtype.name}; use --dtype uint32")
        if self.file is None and len(ids):
            self.open()
        self.documents += documents
        self.source_bytes += source_bytes
        while len(ids):
            room = self.shard_tokens - self.tokens
            self.put(ids[:room].astype(self.dtype.newbyteorder("<")).tobytes())
            self.tokens += min(room, len(ids))
            ids = ids[room:]
            if self.tokens == self.shard_tokens:
                self.finish()
                if len(ids):
                    self.open()

    def open(self):
        self.name = f"{self.split}_{len(self.entries):06d}.bin"
        self.temporary = self.folder / f"{self.name}.tmp"
        self.file = open(self.temporary, "wb", buffering=0)
        self.put(header(self.dtype.name, 0))

    def put(self, data):
        """Write all of `data`; a raw file may take only a part of it at a time."""
        view = memoryview(data)
        try:
            while view:
                view = view[self.file.write(view) :]
        except OSError as error:
            self.discard()
            raise writing_failed(self.folder / self.name, error) from None

    def finish(self):
        """Give the current shard its token count and its final name."""
        try:
            self.file.seek(0)
            self.put(header(self.dtype.name, self.tokens))
            os.fsync(self.file.fileno())
            self.file.close()
            digest = sha256_of(self.temporary)
            os.replace(self.temporary, self.folder / self.name)
        except OSError as error:
            self.discard()
            raise writing_failed(self.folder / self.name, error) from None
        self.entries.append(
            {
                "name": self.name,
                "tokens": self.tokens,
                "documents": self.documents,
                "source_bytes": self.source_bytes,
                "sha256": digest,
            }
        )
        self.file = None
        self.tokens = self.documents = self.source_bytes = 0

    def close(self):
        if self.file is not None:
            self.finish()
        return self.entries

    def discard(self):
        """Drop the unfinished shard, after a failure."""
        if self.file is not None:
            self.file.close()
            self.temporary.unlink(missing_ok=True)
            self.file = None


def header(dtype, tokens):
    numbers = np.zeros(256, dtype="<i4")
    numbers[:2] = HEADERS[dtype]
    numbers[2] = np.int64(tokens).astype(np.int32)  # a shard of 2^31 tokens or more is refused by prepare's settings
    return numbers.tobytes()


def write_manifest(folder, tokenizer, dtype, splits, source):
    """Write `dataset.json`, which makes the folder valid. `tokenizer` is {"name", "identity", "vocab_size", "eot"},
    `splits` maps a split to ShardWriter entries, `source` says where the text came from."""
    manifest = {"format_version": FORMAT_VERSION, "tokenizer": tokenizer, "dtype": dtype} | {
        "splits": splits,
        "source": source,
    }
    try:
        write_durably(Path(folder) / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise writing_failed(Path(folder) / MANIFEST, error) from None


def writing_failed(path, error):
    if error.errno in (errno.ENOSPC, errno.EDQUOT if hasattr(errno, "EDQUOT") else errno.ENOSPC, errno.EFBIG):
        return ResourceError(f"no space left writing {path.name}: {path.parent}; free some space and run again")
    return ResourceError(f"writing {path.name} failed: {path.parent}: {error.strerror}; make it writable and run again")


# ---- opening


@dataclass(frozen=True)
class Shard:
    """One file of ids, its size checked against its header."""

    path: Path
    offset: int  # bytes before the first id
    dtype: str
    tokens: int
    sha256: str | None  # None in a foreign folder


@dataclass(frozen=True)
class Dataset:
    """The splits of a folder. `tokenizer` is the manifest's record of it, or None in a foreign folder; `notice` is a
    line for the user (what was taken for granted, what is not read), or empty."""

    folder: Path
    splits: dict  # split name -> tuple of Shards, in order
    tokenizer: dict | None
    notice: str

    @property
    def record(self):
        """What a checkpoint keeps of the data: per shard its name, tokens and sha256."""
        return {
            split: [[s.path.name, s.tokens, s.sha256] for s in shards] for split, shards in sorted(self.splits.items())
        }


def open_dataset(folder, foreign_tokenizer=""):
    """The Dataset of a folder with a manifest, or of a foreign one; headers, lengths and names are checked.

    `foreign_tokenizer` is the user's word on what a foreign folder was made with. Raises InputError for a folder that
    holds no shards, IntegrityError for one that is damaged."""
    folder = Path(folder)
    if not is_folder(folder):
        raise InputError(f"{folder}: no such data folder; make one with: python data/prepare.py INPUT --out {folder}")
    if (folder / MANIFEST).exists():
        return open_manifest(folder)
    return open_foreign(folder, foreign_tokenizer)


def open_manifest(folder):
    try:
        manifest = json.loads(persist(folder / MANIFEST, (folder / MANIFEST).read_bytes))
        version = manifest["format_version"]
        if version > FORMAT_VERSION:
            raise IntegrityError(
                f"{folder / MANIFEST}: data format {version}, this program reads up to {FORMAT_VERSION}; update it"
            )
        tokenizer, dtype = {key: manifest["tokenizer"][key] for key in ("name", "identity")}, manifest["dtype"]
        splits = {
            split: tuple(listed_shard(folder, entry, dtype) for entry in manifest["splits"][split])
            for split in manifest["splits"]
        }
        if not splits["train"]:
            raise ValueError("no train shards")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{folder / MANIFEST}: not a dataset manifest ({error!r}); re-run data preparation"
        ) from None
    return Dataset(folder, splits, tokenizer, warn_unlisted(folder, splits))


def listed_shard(folder, entry, dtype):
    name, tokens, digest = entry["name"], int(entry["tokens"]), str(entry["sha256"])
    path = inside(folder, name)
    if not path.exists():
        raise IntegrityError(f"{name}: the manifest lists it, {folder} lacks it; restore it or re-run data preparation")
    shard = check_header(path)
    if (shard.dtype, shard.tokens) != (dtype, tokens):
        raise IntegrityError(
            f"{path}: {shard.tokens} {shard.dtype} tokens, the manifest says {tokens} {dtype}; re-run data preparation"
        )
    return Shard(path, shard.offset, dtype, tokens, digest)


def warn_unlisted(folder, splits):
    """One line about shard-like files that the manifest does not list, or nothing."""
    listed = {shard.path.name for shards in splits.values() for shard in shards}
    others = sorted(p.name for p in folder.glob("*.bin") if p.name not in listed)
    return f"warning: {folder}: not in the manifest, not read: {', '.join(others)}" if others else ""


def open_foreign(folder, tokenizer):
    """Shards made by other programs: public `*train*.bin` with llm.c's header, nanoGPT's headerless `train.bin`,
    uint16 `.npy`."""
    if any(folder.glob("*.tmp")):
        raise InputError(f"{folder}: an unfinished data preparation; run it again")
    splits = {}
    for split in SPLITS:
        paths = sorted(p for p in folder.iterdir() if p.suffix in (".bin", ".npy") and split_of(p.name) == split)
        splits[split] = tuple(foreign_shard(path, split) for path in paths)
    shards = [shard for found in splits.values() for shard in found]
    if not splits["train"]:
        raise InputError(f"{folder}: no token shards: needs {MANIFEST} or *train*.bin files; see data/prepare.py")
    plain_gpt2 = all(s.dtype == "uint16" and s.offset == HEADER_BYTES for s in shards)
    if not tokenizer and not plain_gpt2:
        raise InputError(f"{folder}: the shards do not say their tokenizer; give --tokenizer NAME")
    said = f"tokenizer {tokenizer}" if tokenizer else "tokenizer gpt2 (uint16 shards with a header)"
    return Dataset(folder, splits, None, f"{folder}: no manifest; assuming {said}, {len(shards)} shards unhashed")


def split_of(name):
    """The split that a foreign file's name says, or None: "medieval_train_000.bin" -> "train"."""
    return next((split for split in SPLITS if split in name), None)


def foreign_shard(path, split):
    if path.suffix == ".npy":
        return npy_shard(path)
    if path.name == f"{split}.bin" and read_magic(path) not in DTYPES:
        size = size_of(path)
        if size % 2:
            raise IntegrityError(f"{path}: {size} bytes is no whole number of uint16 tokens (truncated?); restore it")
        return Shard(path, 0, "uint16", size // 2, None)
    return check_header(path)


def npy_shard(path):
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            offset = file.tell()
    except (ValueError, OSError) as error:
        raise IntegrityError(f"{path}: not a .npy file of token ids ({error}); restore it") from None
    if dtype != np.dtype("<u2") or len(shape) != 1:
        raise IntegrityError(f"{path}: {dtype} array of shape {shape}; needs one dimension of uint16")
    return check_size(Shard(path, offset, "uint16", shape[0], None))


def read_magic(path):
    return int.from_bytes(read_start(path, 4), "little")


def check_header(path):
    """The Shard of a file with llm.c's header. Raises IntegrityError unless header and size agree."""
    start = read_start(path, HEADER_BYTES)
    if len(start) < HEADER_BYTES:
        raise IntegrityError(f"{path}: {len(start)} bytes, a header has {HEADER_BYTES} (truncated?); restore it")
    magic, version, tokens = (int(n) for n in np.frombuffer(start[:12], dtype="<i4"))
    dtype, known_version = DTYPES.get(magic, (None, None))
    if dtype is None:
        raise IntegrityError(f"{path}: not a token shard (magic 0x{magic & 0xFFFFFFFF:08x}); re-run data preparation")
    if version != known_version or tokens < 0:
        raise IntegrityError(
            f"{path}: token shard of version {version} with {tokens} tokens; needs version {known_version}"
        )
    return check_size(Shard(path, HEADER_BYTES, dtype, tokens, None))


def check_size(shard):
    size, wanted = size_of(shard.path), shard.offset + shard.tokens * np.dtype(shard.dtype).itemsize
    if size != wanted:
        raise IntegrityError(
            f"{shard.path}: {size} bytes, header says {wanted} ({'truncated' if size < wanted else 'too long'}?); "
            "re-run data preparation"
        )
    return shard


def size_of(path):
    return persist(path, os.stat, path).st_size


# ---- reading by position


class PositionedFile:
    """A file open for reads by position, from any thread. What the system refuses is tried READ_TRIES times, then a
    ResourceError."""

    def __init__(self, path):
        self.path, self.lock = path, threading.Lock()
        self.file = persist(path, open, path, "rb", 0)

    def read(self, offset, size):
        """The `size` bytes at `offset`; fewer only where the file ends."""
        data = b""
        while piece := persist(self.path, self.read_some, offset + len(data), size - len(data)):
            data += piece
        return data

    def read_some(self, offset, size):
        if hasattr(os, "pread"):
            return os.pread(self.file.fileno(), size, offset)
        with self.lock:  # Windows
            self.file.seek(offset)
            return self.file.read(size)

    def close(self):
        self.file.close()


def persist(path, action, *args):
    """`action(*args)`, tried again a moment later when the system refuses it. Raises ResourceError the last time."""
    for tries_left in reversed(range(READ_TRIES)):
        try:
            return action(*args)
        except OSError as error:
            if not tries_left:
                raise ResourceError(
                    f"{path}: reading failed {READ_TRIES} times: {error.strerror} (errno {error.errno}); "
                    "make it readable"
                ) from None
            time.sleep(RETRY_SECONDS)
    return None


def read_start(path, size):
    with contextlib.closing(PositionedFile(path)) as file:
        return file.read(0, size)
