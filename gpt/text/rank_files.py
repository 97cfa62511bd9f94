"""Rank files (lines of a token's bytes and its rank): tiktoken's own, by name, and a user's `x.tiktoken`."""

import base64
import binascii
import hashlib
import io
import os
import uuid
from pathlib import Path

import tiktoken

from gpt.errors import InputError, IntegrityError, ResourceError
from gpt.files import cache_folder, make_private, read_json
from gpt.text.huggingface import Vocabulary, read_limited

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
    for number, line in enumerate(read_limited(path).splitlines(), 1):
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

    tiktoken itself downloads without a time limit and deletes a damaged file first, so the files of RANK_FILES are put
    in its cache folder before it looks for them. Encodings of plug-ins and newer versions are left to tiktoken. If a
    download fails, raises InputError for a missing file, IntegrityError for a damaged file in the cache."""
    folder = tiktoken_cache()
    for path, sha256 in RANK_FILES.get(name, {}).items():
        ensure_cached(name, HOST + path, sha256, folder)
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # the errors of requests are OSErrors
        raise InputError(f"tokenizer {name}: {error}; go online, or put its files into {folder}") from None


def tiktoken_cache() -> Path:
    """Returns tiktoken's cache folder. Sets TIKTOKEN_CACHE_DIR to a private folder if the user has not set it:
    otherwise tiktoken would use a folder in /tmp, where other users can write. Raises InputError if there is no home
    folder."""
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        cache = cache_folder()
        if cache is None:
            raise InputError("tokenizer files: no home folder to keep them in; set TIKTOKEN_CACHE_DIR to a folder")
        os.environ["TIKTOKEN_CACHE_DIR"] = str(cache / "tiktoken")
    return Path(os.environ["TIKTOKEN_CACHE_DIR"])


def ensure_cached(name: str, url: str, sha256: str, folder: Path) -> None:
    """Downloads `url`, a file of the encoding `name`, into tiktoken's cache folder, unless a file with this `sha256` is
    there. A damaged file stays until a good one replaces it. If the download fails, raises IntegrityError for a damaged
    file, InputError for a missing one. Raises ResourceError if the file cannot be stored."""
    path = folder / hashlib.sha1(url.encode()).hexdigest()  # tiktoken's name for it
    damaged = path.exists()
    if damaged and hashlib.sha256(read_limited(path)).hexdigest() == sha256:
        return
    from gpt.text.download import fetch

    data = io.BytesIO()
    try:
        fetch(url, data, sha256, LIMIT_BYTES)
    except ResourceError as error:
        if damaged:
            raise IntegrityError(
                f"tokenizer file {path}: sha256 mismatch (expected {sha256}); restore it or go online"
            ) from None
        raise InputError(f"tokenizer {name} needs a file: {error}, to {path}") from None
    temporary = path.with_name(f"{path.name}.{uuid.uuid4()}.tmp")  # several processes may download it at the same time
    try:
        make_private(folder)
        temporary.write_bytes(data.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        raise ResourceError(
            f"keeping a tokenizer file failed: {folder}: {error.strerror}; set TIKTOKEN_CACHE_DIR to another folder"
        ) from None
