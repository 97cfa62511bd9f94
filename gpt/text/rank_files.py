"""Rank files (lines of a token's bytes and its rank): tiktoken's own, by name, and a user's `x.tiktoken`."""

import base64
import binascii
import contextlib
import hashlib
import io
import os
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import tiktoken

from gpt.errors import InputError, IntegrityError, ResourceError, note
from gpt.files import cache_folder, make_private, read_json, read_limited
from gpt.text.huggingface import Vocabulary

ENVIRONMENT_LOCK = threading.Lock()
LIMIT_BYTES = 1 << 26  # limit for a download; the largest file has 3.6 MB
HOST = "https://openaipublic.blob.core.windows.net/"
P50K = {"encodings/p50k_base.tiktoken": "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069"}
O200K = {"encodings/o200k_base.tiktoken": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"}
# Name of an encoding -> the files at HOST that tiktoken reads for it, with their sha256.
RANK_FILES = {
    "gpt2": {
        "gpt-2/encodings/main/vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "gpt-2/encodings/main/encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    },
    "r50k_base": {"encodings/r50k_base.tiktoken": "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"},
    "p50k_base": P50K,
    "p50k_edit": P50K,
    "cl100k_base": {
        "encodings/cl100k_base.tiktoken": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
    },
    "o200k_base": O200K,
    "o200k_harmony": O200K,
}


def read_rank_file(path: Path) -> Vocabulary:
    """Returns the Vocabulary of a rank file, `path` = x.tiktoken (lines of base64 bytes and rank), and of x.json beside
    it, {"pattern": text, "special_tokens": {text: id}}. Raises InputError if one is missing or a value in it is wrong,
    IntegrityError if x.json is no JSON object or a file is too long."""
    settings = path.with_suffix(".json")
    for needed in (path, settings):
        if not needed.is_file():
            raise InputError(
                f'{needed}: no such file; a rank file x.tiktoken needs x.json {{"pattern", "special_tokens"}}'
            )
    ranks = {}
    for number, line in enumerate((read_limited(path) or b"").splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise InputError(f"{path}:{number}: expected base64 bytes and a rank; restore the file") from None
    values = read_json(settings) or {}
    pattern, special_tokens = values.get("pattern"), values.get("special_tokens")
    if not isinstance(pattern, str) or not isinstance(special_tokens, dict):
        raise InputError(f'{settings}: expected {{"pattern": text, "special_tokens": {{text: id}}}}; correct it')
    return Vocabulary(path.stem, ranks, pattern, special_tokens)


def named_encoding(name: str) -> tiktoken.Encoding:
    """Returns tiktoken's encoding `name`, whose files it downloads if the cache folder lacks them.

    tiktoken itself downloads without a time limit and deletes a damaged file first, so it gets a folder that holds the
    files of RANK_FILES. Encodings of plug-ins and newer versions are left to tiktoken. Raises InputError if a file
    cannot be had, IntegrityError if the one in the cache is damaged."""
    cache = tiktoken_cache()
    files = RANK_FILES.get(name, {}).items()
    contents = [rank_file(name, HOST + path, sha256, cache) for path, sha256 in files]
    try:
        with tiktoken_reads(cache, dict(contents)):
            return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # the errors of requests are OSErrors
        place = cache or "a folder named by TIKTOKEN_CACHE_DIR"
        raise InputError(f"tokenizer {name}: {error}; go online, or put its files into {place}") from None


def tiktoken_cache() -> Path | None:
    """Returns the folder that keeps tiktoken's files: TIKTOKEN_CACHE_DIR, else a private folder, because tiktoken would
    use a folder in /tmp, where other users can write. Returns None if that variable is empty, or if there is no home
    folder."""
    given = os.environ.get("TIKTOKEN_CACHE_DIR")
    if given is not None:
        return Path(given) if given else None
    cache = cache_folder()
    return cache / "tiktoken" if cache else None


def rank_file(name: str, url: str, sha256: str, cache: Path | None) -> tuple[str, bytes]:
    """Returns tiktoken's name for the file at `url`, and its content, from `cache` or from the network. A damaged file
    stays in the cache until a good one replaces it. If the download fails, raises IntegrityError for a damaged file,
    InputError for a missing one."""
    cached_name = hashlib.sha1(url.encode()).hexdigest()
    path = cache / cached_name if cache else None
    cached = read_limited(path) if path else None
    if cached is not None and hashlib.sha256(cached).hexdigest() == sha256:
        return cached_name, cached
    from gpt.text.download import fetch

    file = io.BytesIO()
    try:
        fetch(url, file, sha256, LIMIT_BYTES)
    except ResourceError as error:
        if cached is not None:
            raise IntegrityError(
                f"tokenizer file {path}: sha256 mismatch (expected {sha256}); restore it or go online"
            ) from None
        place = path or "a folder named by TIKTOKEN_CACHE_DIR"
        raise InputError(f"tokenizer {name} needs a file: {error}, to {place}") from None
    if path:
        keep(path, file.getvalue())
    return cached_name, file.getvalue()


def keep(path: Path, data: bytes) -> None:
    """Writes a file into the cache, for the next time. Ignores a failure."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4()}.tmp")  # several processes may be here at once
    try:
        make_private(path.parent)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def tiktoken_reads(cache: Path | None, files: dict[str, bytes]) -> Iterator[None]:
    """Within this context tiktoken reads its files in `cache`, or in a temporary folder of `files` (name -> content) if
    they could not be kept. One caller at a time has this context: the setting belongs to the process."""
    with ENVIRONMENT_LOCK, contextlib.ExitStack() as cleanup:
        folder = cache
        if folder is None or not all(read_limited(folder / name) == data for name, data in files.items()):
            folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
            for name, data in files.items():
                (folder / name).write_bytes(data)
            if cache:
                note("warning", f"{cache}: cannot be written; the tokenizer's files are downloaded again the next time")
        given = os.environ.get("TIKTOKEN_CACHE_DIR")
        os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
        try:
            yield
        finally:
            del os.environ["TIKTOKEN_CACHE_DIR"]
            if given is not None:
                os.environ["TIKTOKEN_CACHE_DIR"] = given
