"""Token shards on disk: write, open, check. The format is that of llm.c, plus a manifest, `dataset.json`.

A shard is a header of 256 little-endian int32 (magic, version, token count) and then the ids: uint16 with magic
20240520 and version 1, uint32 with magic 20240801 and version 7. A folder is valid once its manifest, written last,
exists. Files are read by position and never memory-mapped: a map of a file that somebody truncates ends the process."""

import contextlib
import errno
import json
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from gpt.errors import InputError, IntegrityError, ResourceError
from gpt.files import inside, is_folder, read_json, sha256_of, write_durably

FORMAT_VERSION = 2  # of data with masks; data without have version 1, which older programs read
HEADER_BYTES = 256 * 4
HEADERS = {"uint16": (20240520, 1), "uint32": (20240801, 7)}
DTYPES = {magic: (dtype, version) for dtype, (magic, version) in HEADERS.items()}
MANIFEST = "dataset.json"
SPLITS = ("train", "val")
TARGET, FIRST = 1, 2  # bits of a mask: the token is learned; it is the first of an example, and as such never learned
READ_TRIES = 3
RETRY_SECONDS = 0.2

Result = TypeVar("Result")


# ---- writing


class ShardWriter:
    """Writes the ids of one split as `<split>_000000.bin`, `<split>_000001.bin`, … of `shard_tokens` ids each; with
    `masks`, also `<split>_000000.mask`, …: a byte per id, see TARGET and FIRST.

    `entries` are the manifest's entries of these files; `close` completes and returns them."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int, masks: bool = False):
        self.folder, self.split, self.dtype, self.shard_tokens = Path(folder), split, np.dtype(dtype), shard_tokens
        self.masks = masks
        self.entries: list[dict[str, Any]] = []
        self.file: IO[bytes] | None = None
        self.mask_file: IO[bytes] | None = None

    def write(self, ids: np.ndarray, documents: int = 0, source_bytes: int = 0, mask: np.ndarray | None = None) -> None:
        """Appends `ids`, in which `documents` documents begin and which stand for `source_bytes` bytes of text, and
        with masks their `mask`, uint8. If they go into several shards, both numbers are added to the first. Raises
        InputError for an id that does not fit the dtype."""
        ids, mask = np.asarray(ids), np.zeros(0, dtype=np.uint8) if mask is None else mask.astype(np.uint8)
        assert len(mask) == (len(ids) if self.masks else 0)
        if len(ids) and int(ids.max()) > np.iinfo(self.dtype).max:
            raise InputError(f"token id {ids.max()} does not fit {self.dtype.name}; use --dtype uint32")
        while len(ids):
            file = self.file or self.open()
            entry = self.entries[-1]
            room = self.shard_tokens - entry["tokens"]
            with writing(self.path):
                file.write(ids[:room].astype(self.dtype.newbyteorder("<")).tobytes())
                if self.mask_file:
                    self.mask_file.write(mask[:room].tobytes())
            entry["tokens"] += len(ids[:room])
            entry["documents"] += documents
            entry["source_bytes"] += source_bytes
            ids, mask, documents, source_bytes = ids[room:], mask[room:], 0, 0
            if entry["tokens"] == self.shard_tokens:
                self.close()

    def open(self) -> IO[bytes]:
        """Begins the next shard and returns its file. `close` writes the token count into its header."""
        name = f"{self.split}_{len(self.entries):06d}.bin"
        self.path = self.folder / name
        with writing(self.path):
            self.file = open(self.path, "wb")
            self.file.write(header(self.dtype.name, 0))
            self.mask_file = open(mask_path(self.path), "wb") if self.masks else None
        self.entries.append({"name": name, "tokens": 0, "documents": 0, "source_bytes": 0})
        return self.file

    def close(self) -> list[dict[str, Any]]:
        """Completes the current shard, if there is one. Returns the entries of all shards."""
        if self.file is not None:
            with writing(self.path):
                self.file.seek(0)
                self.file.write(header(self.dtype.name, self.entries[-1]["tokens"]))
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                self.entries[-1]["sha256"] = sha256_of(self.path)
                if self.mask_file:
                    self.mask_file.flush()
                    os.fsync(self.mask_file.fileno())
                    self.mask_file.close()
                    self.entries[-1]["mask_sha256"] = sha256_of(mask_path(self.path))
            self.file = self.mask_file = None
        return self.entries

    def discard(self) -> None:
        """Removes the unfinished shard, after a failure."""
        if self.file is not None:
            for file, path in ((self.file, self.path), (self.mask_file, mask_path(self.path))):
                with contextlib.suppress(OSError):  # a full disk: what is in the buffer cannot be written
                    if file:
                        file.close()
                path.unlink(missing_ok=True)
            self.file = self.mask_file = None


def mask_path(shard: Path) -> Path:
    """Returns the path of a shard's mask: "train_000000.bin" -> "train_000000.mask"."""
    return shard.with_suffix(".mask")


def header(dtype: str, tokens: int) -> bytes:
    return struct.pack("<3i", *HEADERS[dtype], tokens).ljust(HEADER_BYTES, b"\0")


def write_manifest(
    folder: Path, tokenizer: dict[str, Any], dtype: str, splits: dict[str, Any], source: dict[str, Any]
) -> None:
    """Writes `dataset.json`, which makes the folder valid. `tokenizer` is {"name", "identity", "vocab_size", "eot"},
    `splits` maps a split to ShardWriter's entries, `source` says where the text came from."""
    has_masks = any("mask_sha256" in entry for entries in splits.values() for entry in entries)
    version = FORMAT_VERSION if has_masks else 1
    manifest = {"format_version": version, "tokenizer": tokenizer, "dtype": dtype}
    manifest |= {"splits": splits, "source": source}
    with writing(folder / MANIFEST):
        write_durably(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError within this context into a ResourceError about writing `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise ResourceError(
                f"no space left writing {path.name}: {path.parent}; free some space and run again"
            ) from None
        raise ResourceError(
            f"writing {path.name} failed: {path.parent}: {error.strerror}; make it writable and run again"
        ) from None


# ---- opening


@dataclass(frozen=True)
class Shard:
    """One file of token ids. Its size fits its number of tokens: that in its header, if it has one."""

    path: Path
    offset: int  # bytes before the first id
    dtype: str
    tokens: int
    sha256: str | None  # None in a foreign folder: see Dataset
    mask_sha256: str | None = None  # None: the shard has no mask, all of its tokens are learned


@dataclass(frozen=True)
class Dataset:
    """The splits of a folder. `tokenizer` is the manifest's entry for the tokenizer, or None in a foreign folder, which
    has no manifest and comes from another program; `notice` is a line for the user (what is assumed, what is not read),
    or "". `recipe`: the words of the command line that prepared the folder, without tokenizer and output folder; empty
    if they are not known."""

    folder: Path
    splits: dict[str, tuple[Shard, ...]]
    tokenizer: dict[str, str] | None
    notice: str
    recipe: tuple[str, ...] = ()

    @property
    def shard_list(self) -> dict[str, list[list[Any]]]:
        """Split -> [name, tokens, sha256] of every shard and mask, as checkpoints store it."""
        result: dict[str, list[list[Any]]] = {}
        for split, shards in sorted(self.splits.items()):
            result[split] = [[s.path.name, s.tokens, s.sha256] for s in shards]
            result[split] += [
                [mask_path(s.path).name, s.tokens, s.mask_sha256] for s in shards if s.mask_sha256 is not None
            ]
        return result

    @property
    def has_examples(self) -> bool:
        """Whether the data are examples, with masks that say what of them is learned."""
        return self.splits["train"][0].mask_sha256 is not None

    def tokens(self, split: str) -> int:
        """Returns the number of tokens of a split; 0 if there is none."""
        return sum(shard.tokens for shard in self.splits.get(split, ()))


def open_dataset(folder: Path, foreign_tokenizer: str = "") -> Dataset:
    """Returns the Dataset of a folder with a manifest, or of a foreign one; checks headers, lengths and names.

    `foreign_tokenizer` names the tokenizer of a foreign folder ("": not known). Raises InputError for a folder that
    holds no shards, IntegrityError for a damaged folder."""
    folder = Path(folder)
    if not is_folder(folder):
        raise InputError(f"{folder}: no such data folder; make one with: python data/prepare.py INPUT --out {folder}")
    manifest = read_json(folder / MANIFEST)
    return open_foreign(folder, foreign_tokenizer) if manifest is None else open_manifest(folder, manifest)


def open_manifest(folder: Path, manifest: dict[str, Any]) -> Dataset:
    path = folder / MANIFEST
    try:
        version, dtype = manifest["format_version"], manifest["dtype"]
        if version > FORMAT_VERSION:
            raise IntegrityError(f"{path}: data format {version}, this program reads up to {FORMAT_VERSION}; update it")
        tokenizer = {key: manifest["tokenizer"][key] for key in ("name", "identity")}
        splits = {
            split: tuple(listed_shard(folder, entry, dtype) for entry in entries)
            for split, entries in manifest["splits"].items()
        }
        recipe = tuple(map(str, manifest.get("source", {}).get("recipe", ())))
        if not splits["train"]:
            raise ValueError("no train shards")
        if len({shard.mask_sha256 is None for shards in splits.values() for shard in shards}) > 1:
            raise ValueError("some shards have masks and some have none")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path}: not a dataset manifest ({error!r}); re-run data preparation") from None
    return Dataset(folder, splits, tokenizer, warn_unlisted(folder, splits), recipe)


def listed_shard(folder: Path, entry: dict[str, Any], dtype: str) -> Shard:
    name, tokens, digest = entry["name"], int(entry["tokens"]), str(entry["sha256"])
    path = inside(folder, name)
    if not path.exists():
        raise IntegrityError(f"{name}: the manifest lists it, {folder} lacks it; restore it or re-run data preparation")
    shard = check_header(path)
    if (shard.dtype, shard.tokens) != (dtype, tokens):
        raise IntegrityError(
            f"{path}: {shard.tokens} {shard.dtype} tokens, the manifest says {tokens} {dtype}; re-run data preparation"
        )
    mask_digest = str(entry["mask_sha256"]) if "mask_sha256" in entry else None
    if mask_digest is not None and not mask_path(path).exists():
        raise IntegrityError(f"{mask_path(path)}: missing; restore it or re-run data preparation")
    return check_size(Shard(path, shard.offset, dtype, tokens, digest, mask_digest))


def warn_unlisted(folder: Path, splits: dict[str, tuple[Shard, ...]]) -> str:
    """Returns a warning about .bin files that the manifest does not list, or "" if there are none."""
    listed = {shard.path.name for shards in splits.values() for shard in shards}
    others = sorted(p.name for p in folder.glob("*.bin") if p.name not in listed)
    return f"warning: {folder}: not in the manifest, not read: {', '.join(others)}" if others else ""


def open_foreign(folder: Path, tokenizer: str) -> Dataset:
    """Returns the Dataset of shards that other programs made: public `*train*.bin` with llm.c's header, nanoGPT's
    headerless `train.bin`, uint16 `.npy`. Raises InputError if there are no training shards, or if `tokenizer` is ""
    and not all shards are uint16 with a header, for which gpt2 is assumed."""
    if any(folder.glob("*.tmp")):
        raise InputError(f"{folder}: an unfinished data preparation; run it again")
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".npy"))
    splits = {
        split: tuple(foreign_shard(path, split) for path in paths if split_of(path.name) == split) for split in SPLITS
    }
    shards = [shard for split in SPLITS for shard in splits[split]]
    if not splits["train"]:
        raise InputError(f"{folder}: no token shards: needs {MANIFEST} or *train*.bin files; see data/prepare.py")
    plain_gpt2 = all(s.dtype == "uint16" and s.offset == HEADER_BYTES for s in shards)
    if not tokenizer and not plain_gpt2:
        raise InputError(f"{folder}: the shards do not say their tokenizer; give --tokenizer NAME")
    name = tokenizer or "gpt2 (uint16 shards with a header)"
    return Dataset(
        folder, splits, None, f"{folder}: no manifest; assuming tokenizer {name}, {len(shards)} shards unhashed"
    )


def split_of(name: str) -> str | None:
    """Returns the split in the name of a foreign file: "train" for "medieval_train_000.bin". Returns None if there is
    no split in it."""
    return next((split for split in SPLITS if split in name), None)


def foreign_shard(path: Path, split: str) -> Shard:
    if path.suffix == ".npy":
        return npy_shard(path)
    if path.name == f"{split}.bin" and int.from_bytes(read_start(path, 4), "little") not in DTYPES:
        size = size_of(path)
        if size % 2:
            raise IntegrityError(f"{path}: {size} bytes is no whole number of uint16 tokens (truncated?); restore it")
        return Shard(path, 0, "uint16", size // 2, None)
    return check_header(path)


def npy_shard(path: Path) -> Shard:
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


def check_header(path: Path) -> Shard:
    """Returns the Shard of a file with llm.c's header. Raises IntegrityError unless the header is valid and the file
    has the size that it gives."""
    start = read_start(path, HEADER_BYTES)
    if len(start) < HEADER_BYTES:
        raise IntegrityError(f"{path}: {len(start)} bytes, a header has {HEADER_BYTES} (truncated?); restore it")
    magic, version, tokens = struct.unpack_from("<3i", start)
    if magic not in DTYPES:
        raise IntegrityError(f"{path}: not a token shard (magic 0x{magic & 0xFFFFFFFF:08x}); re-run data preparation")
    dtype, known_version = DTYPES[magic]
    if version != known_version or tokens < 0:
        raise IntegrityError(
            f"{path}: token shard of version {version} with {tokens} tokens; needs version {known_version}"
        )
    return check_size(Shard(path, HEADER_BYTES, dtype, tokens, None))


def check_size(shard: Shard) -> Shard:
    """Returns `shard`. Raises IntegrityError unless its file has the size that its offset, dtype and number of tokens
    give, and its mask a byte for each token."""
    sizes = {shard.path: shard.offset + shard.tokens * np.dtype(shard.dtype).itemsize}
    if shard.mask_sha256 is not None:
        sizes[mask_path(shard.path)] = shard.tokens
    for path, expected in sizes.items():
        size, says = size_of(path), "header says" if path == shard.path else "needs"
        if size != expected:
            problem = "truncated" if size < expected else "too long"
            raise IntegrityError(f"{path}: {size} bytes, {says} {expected} ({problem}?); re-run data preparation")
    return shard


def size_of(path: Path) -> int:
    return persist(path, os.stat, path).st_size


# ---- reading by position


class PositionedFile:
    """A file open for reads by position, from any thread."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        self.file: IO[bytes] = persist(path, open, path, "rb", 0)

    def read(self, offset: int, size: int) -> bytes:
        """Returns the `size` bytes at `offset`; fewer only if the file ends before. Raises ResourceError if reading
        fails READ_TRIES times."""
        data = b""
        while block := persist(self.path, self.read_some, offset + len(data), size - len(data)):
            data += block
        return data

    def read_some(self, offset: int, size: int) -> bytes:
        with self.lock:
            self.file.seek(offset)
            return self.file.read(size)

    def close(self) -> None:
        self.file.close()


def persist(path: Path, action: Callable[..., Result], *arguments: Any) -> Result:
    """Returns `action(*arguments)`. After an OSError, calls it again RETRY_SECONDS later. Raises ResourceError, which
    names `path`, after READ_TRIES failures."""
    for _ in range(READ_TRIES):
        try:
            return action(*arguments)
        except OSError as error:
            reason = f"{error.strerror} (errno {error.errno})"
            time.sleep(RETRY_SECONDS)
    raise ResourceError(f"{path}: reading failed {READ_TRIES} times: {reason}; make it readable")


def read_start(path: Path, size: int) -> bytes:
    with contextlib.closing(PositionedFile(path)) as file:
        return file.read(0, size)
