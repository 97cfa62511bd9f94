"""Reads documents. The files, folders, globs or stdin that the user names become TextSources, which become Pieces.

A document is a text file, a line of JSONL, or stdin as a whole. A large document comes in several pieces, so that
memory does not grow with it."""

import codecs
import contextlib
import glob
import gzip
import io
import itertools
import os
import re
import shutil
import stat
import sys
import tempfile
import tokenize
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from gpt.errors import InputError, ResourceError
from gpt.files import json_object

BLOCK_BYTES = 1 << 16
KINDS = {".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl"}  # suffix -> kind of source
MARK_BAD_BYTES = "gpt.mark_bad_bytes"  # error handler of codecs: bad bytes become a lone surrogate
codecs.register_error(MARK_BAD_BYTES, lambda error: ("\udfff", error.end))  # type: ignore[attr-defined]


class Piece(NamedTuple):
    """Text of a document, all or a part of it. Every document has at least one piece."""

    document: int  # number of the document, from 0
    name: str
    text: str
    replaced: int = 0  # characters of `text` that became U+FFFD
    readable: bool = True  # False: the document cannot be decoded, so it is dropped


@dataclass(frozen=True)
class TextSource:
    """A file of documents. `spool` is an open file in place of `path`, for stdin and downloads."""

    name: str
    kind: str  # text, jsonl or python
    path: Path = Path()
    spool: IO[bytes] | None = None


@dataclass(frozen=True)
class Reading:
    """How the bytes of files become text: the encoding, what happens to bad bytes, and the field of a JSONL object that
    holds its text."""

    encoding: str = "utf-8"
    errors: str = "strict"  # strict, replace or skip
    field: str = "text"

    @property
    def codec(self) -> tuple[str, str]:
        """Encoding and error handler."""
        return self.encoding, MARK_BAD_BYTES if self.errors == "replace" else "strict"


# ---- what the user names


def find_sources(inputs: Iterable[str], spool_folder: Path) -> tuple[list[TextSource], int]:
    """Returns the sources that `inputs` name, in order, and the number of files and linked folders in folders that were
    passed over. Copies stdin to a temporary file in `spool_folder`.

    Raises InputError for a name that no file has, a pipe, a device, a link that leads nowhere, an unreadable folder or
    a closed stdin."""
    sources, skipped = [], 0
    for name in inputs:
        if name == "-":
            if sys.stdin is None:
                raise InputError("stdin: closed; pipe the text into it")
            sources.append(TextSource("stdin", "text", spool=spool(sys.stdin.buffer, spool_folder)))
            continue
        for path in matches(name):
            more, passed_over = folder_sources(path) if os.path.isdir(path) else ([file_source(path)], 0)
            sources += more
            skipped += passed_over
    return sources, skipped


def matches(name: str) -> list[str]:
    """Returns the files and folders that a name or pattern stands for, sorted. A pattern with ** gives files alone,
    because it finds the files inside folders by itself. Raises InputError if there are none."""
    if os.path.lexists(name):
        return [name]
    paths = sorted(set(glob.glob(name, recursive=True)))
    if "**" in name:
        paths = [path for path in paths if not os.path.isdir(path)]
    if not paths:
        raise InputError(f"{name}: no such file; give files, folders, globs, or - for stdin")
    return paths


def spool(stream: IO[bytes], folder: Path) -> IO[bytes]:
    """Returns an unnamed temporary copy of `stream` in `folder`, because every document is read twice."""
    try:
        copy = tempfile.TemporaryFile(dir=folder)
        shutil.copyfileobj(stream, copy, BLOCK_BYTES)
    except OSError as error:
        raise ResourceError(f"copying the input failed: {folder}: {error.strerror}; free some space") from None
    return copy


def file_source(name: str | Path) -> TextSource:
    if not os.path.exists(name):
        raise InputError(f"{name}: a link that leads nowhere; correct it")
    if not stat.S_ISREG(os.stat(name).st_mode):
        raise InputError(f"{name}: not a regular file (a pipe or device?); use - for stdin")
    return TextSource(str(name), KINDS.get(plain_suffix(name), "text"), Path(name))


def plain_suffix(name: str | Path) -> str:
    """Returns the suffix of a name without its `.gz`: plain_suffix("a.jsonl.gz") == ".jsonl"."""
    return Path(str(name).lower().removesuffix(".gz")).suffix


def folder_sources(folder: str) -> tuple[list[TextSource], int]:
    """Returns the sources in a folder and its subfolders, sorted by their path from there, and the number of files and
    linked folders that were passed over. Passes over hidden files, files with other suffixes, and linked folders.
    Raises InputError if there are no sources."""
    paths, skipped = [], 0
    for parent, folders, files in os.walk(folder, onerror=refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        skipped += sum(os.path.islink(os.path.join(parent, name)) for name in folders)
        for name in files:
            path = Path(parent, name)
            if name.startswith(".") or plain_suffix(name) not in KINDS or not path.is_file():
                skipped += 1
            else:
                paths.append(path)
    if not paths:
        raise InputError(f"{folder}: no {', '.join(KINDS)} files in it; give the files themselves")
    paths.sort(key=lambda path: path.relative_to(folder).as_posix())
    return [file_source(path) for path in paths], skipped


def refuse_folder(error: OSError) -> None:
    raise InputError(f"{error.filename}: {error.strerror}; make it readable") from None


# ---- reading


def read_pieces(sources: Iterable[TextSource], reading: Reading) -> Iterator[Piece]:
    """Yields the pieces of all documents of `sources`, in order. Raises InputError, naming file and place, for text
    that cannot be decoded or a line that is not the JSON it should be; ResourceError if reading fails."""
    readers = {"text": text_pieces, "jsonl": jsonl_pieces, "python": python_pieces}
    numbers = itertools.count()
    for source in sources:
        try:
            with open_source(source) as file:
                yield from readers[source.kind](source.name, file, reading, numbers)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{source.name}: damaged gzip file ({error}); restore it") from None
        except PermissionError:
            raise InputError(f"{source.name}: permission denied; make it readable") from None
        except OSError as error:
            raise ResourceError(f"reading failed: {source.name}: {error.strerror}; try again") from None


def open_source(source: TextSource) -> contextlib.AbstractContextManager[Any]:
    if source.spool is not None:
        source.spool.seek(0)
        return contextlib.nullcontext(source.spool)
    return gzip.open(source.path) if source.name.lower().endswith(".gz") else open(source.path, "rb")


def text_pieces(name: str, file: IO[bytes], reading: Reading, numbers: Iterator[int]) -> Iterator[Piece]:
    """Yields the pieces of one document, which is the whole file. `numbers` gives the number of the next document."""
    document = next(numbers)
    blocks = iter(lambda: file.read(BLOCK_BYTES), b"")
    texts = itertools.chain(codecs.iterdecode(blocks, *reading.codec), [""])
    for text, replaced, readable in check_texts(name, file, texts, reading):
        yield Piece(document, name, text, replaced, readable)


def jsonl_pieces(name: str, file: IO[bytes], reading: Reading, numbers: Iterator[int]) -> Iterator[Piece]:
    """Yields a piece for each line that is not blank: every such line is a document."""
    encoding, errors = reading.codec
    if "\n".encode(encoding).removeprefix(codecs.BOM_UTF8) != b"\n":
        raise InputError(f"{name}: lines cannot be told apart in {encoding}; convert it to UTF-8")
    for number, line in enumerate(file, 1):
        place = f"{name}:{number}"
        texts = map(codecs.decode, [line], [encoding], [errors])  # decoded within check_texts
        [(text, replaced, readable)] = check_texts(place, file, texts, reading, begins=number == 1)
        if not readable:
            yield Piece(next(numbers), place, "", readable=False)
        elif text.strip():
            value = json_object(text, reading.field, place, "correct the line, or give --field")[reading.field]
            text, surrogates = without_surrogates(value)
            yield Piece(next(numbers), place, text, surrogates + replaced)


def python_pieces(name: str, file: IO[bytes], reading: Reading, numbers: Iterator[int]) -> Iterator[Piece]:
    """Yields a Python source file as one piece, decoded by its coding line as Python does."""
    document, data = next(numbers), file.read()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        yield Piece(document, name, data.decode(encoding))
    except (SyntaxError, UnicodeDecodeError):
        yield Piece(document, name, "", readable=False)


# ---- bytes to text


def check_texts(
    name: str, file: IO[bytes], texts: Iterable[str], reading: Reading, begins: bool = True
) -> Iterator[tuple[str, int, bool]]:
    """Yields each of `texts`, which are decoded from `file` meanwhile, as (text, number of characters replaced, True).
    `begins`: the first starts the file, so a byte order mark there is dropped. If bad bytes drop the document, the last
    tuple is ("", 0, False); else they raise InputError."""
    try:
        for text in texts:
            yield *without_surrogates(text.removeprefix("\ufeff") if begins else text), True
            begins = False
    except UnicodeError as error:
        if reading.errors == "skip":
            yield "", 0, False
            return
        encoding = "UTF-8" if codecs.lookup(reading.encoding).name == "utf-8" else reading.encoding
        problem = f"invalid {encoding} ({error})"
        if isinstance(error, UnicodeDecodeError):
            place = file.tell() - len(error.object) + error.start
            problem = f"invalid {encoding} at byte {place} (0x{error.object[error.start]:02x})"
        raise InputError(f"{name}: {problem}; use --encoding, or --errors replace|skip") from None


def without_surrogates(text: str) -> tuple[str, int]:
    """Returns `text` with lone surrogates replaced by U+FFFD, and their number. UTF-8 cannot hold lone surrogates. They
    come from JSON, and from bad bytes that `decode` replaces."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return re.subn("[\ud800-\udfff]", "\ufffd", text)
    return text, 0
