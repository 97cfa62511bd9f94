"""Rank files: tiktoken's own, by name, from a cache or the network; and a user's `x.tiktoken` with its `x.json`."""

import base64
import binascii
import contextlib
import functools
import hashlib
import io
import os
from pathlib import Path

import tiktoken
import tiktoken.load

from gpt.errors import InputError, IntegrityError, ResourceError
from gpt.files import cache_folder, make_private
from gpt.text.download import download
from gpt.text.huggingface import Vocabulary, read_bytes, read_json

LIMIT_BYTES = 1 << 26  # of a download; the largest has 3.6 MB


def read_rank_file(path):
    """The Vocabulary of `x.tiktoken` (lines of base64 bytes and rank) and `x.json` {"pattern", "special_tokens"}."""
    settings = path.with_suffix(".json")
    for needed in (path, settings):
        if not needed.is_file():
            raise InputError(
                f'{needed}: no such file; a rank file x.tiktoken needs x.json {{"pattern", "special_tokens"}}'
            )
    ranks = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise InputError(f"{path}:{number}: expected base64 bytes and a rank; restore the file") from None
    found = read_json(settings)
    pattern, special_tokens = found.get("pattern"), found.get("special_tokens")
    if not isinstance(pattern, str) or not isinstance(special_tokens, dict):
        raise InputError(f'{settings}: expected {{"pattern": text, "special_tokens": {{text: id}}}}; correct it')
    return Vocabulary(path.stem, ranks, pattern, special_tokens)


def named_encoding(name):
    """tiktoken's Encoding of that name."""
    with own_cache(name):
        return tiktoken.get_encoding(name)


@contextlib.contextmanager
def own_cache(name):
    """Meanwhile tiktoken reads its rank files through us: its own step deletes a damaged file, waits without limit for
    the network and trusts a shared folder in /tmp."""
    original = tiktoken.load.read_file_cached
    tiktoken.load.read_file_cached = functools.partial(rank_file, name)
    try:
        yield
    finally:
        tiktoken.load.read_file_cached = original


def download_folder() -> Path | None:
    """Returns the folder for downloaded rank files: TIKTOKEN_CACHE_DIR (tiktoken's own variable), else one in the cache
    folder. Returns None if the variable is empty or there is no cache folder."""
    if "TIKTOKEN_CACHE_DIR" in os.environ:
        return Path(os.environ["TIKTOKEN_CACHE_DIR"]) if os.environ["TIKTOKEN_CACHE_DIR"] else None
    cache = cache_folder()
    return cache / "tiktoken" if cache else None


def rank_file(name, url, expected_hash=None):
    """The bytes of a rank file from the cache, else from the network. Never those of a damaged file."""
    folder = download_folder()
    path = folder / hashlib.sha1(url.encode()).hexdigest() if folder else None
    damaged = False
    if path and path.exists():
        data = read_bytes(path)
        if expected_hash is None or hashlib.sha256(data).hexdigest() == expected_hash:
            return data
        damaged = True
    file = io.BytesIO()
    try:
        download(url, file, expected_hash, LIMIT_BYTES)
    except ResourceError as error:
        if damaged:
            raise IntegrityError(
                f"tokenizer file {path}: sha256 mismatch (expected {expected_hash}); restore it or go online"
            ) from None
        raise InputError(
            f"tokenizer {name} needs a file: {error}, to {path or 'a folder named by TIKTOKEN_CACHE_DIR'}"
        ) from None
    store(path, file.getvalue())
    return file.getvalue()


def store(path, data):
    """Keep a download for the next time, where that is possible."""
    if path is None:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        make_private(path.parent)
        temporary.write_bytes(data)
        os.replace(temporary, path)
