"""Documents out of files: what a user names (files, folders, globs, stdin) becomes sources, and sources become pieces.

A document is a file for text, a line for JSONL, stdin as a whole. A large one comes in several pieces, so that memory
does not grow with it."""

import codecs
import contextlib
import glob
import gzip
import io
import os
import re
import shutil
import stat
import sys
import tempfile
import tokenize
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gpt.errors import InputError, ResourceError
from gpt.files import json_object

BLOCK_BYTES = 1 << 16
SUFFIXES = (".txt", ".md", ".py", ".jsonl")
COUNTING = "gpt.replace_and_count"  # our error handler's name in the registry of codecs


class Piece(NamedTuple):
    """A part of a document, or all of it. `readable` is False for a document to drop: it could not be decoded."""

    name: str
    text: str
    first: bool
    last: bool
    replaced: int = 0  # characters of `text` that became U+FFFD
    readable: bool = True


@dataclass(frozen=True)
class Source:
    """A file of documents; `spool` is an open file in place of `path` (stdin, a download)."""

    name: str
    kind: str  # text, jsonl or python
    path: Path | None = None
    spool: io.IOBase | None = None


@dataclass(frozen=True)
class Reading:
    """How bytes become documents."""

    encoding: str = "utf-8"
    errors: str = "strict"  # strict, replace or skip
    field: str = "text"


# ---- what the user names


def expand(inputs, spool_folder):
    """The sources that `inputs` name, in order, and the number of files (and linked folders) that were passed over in
    folders.

    Raises InputError for a name without file, a pipe, a device, a link that leads nowhere or an unreadable folder."""
    sources, skipped = [], 0
    for name in inputs:
        if name == "-":
            sources.append(Source("stdin", "text", spool=spool(sys.stdin.buffer, spool_folder)))
            continue
        for found in matches(name):
            more, passed_over = folder_sources(found) if os.path.isdir(found) else ([file_source(found)], 0)
            sources += more
            skipped += passed_over
    return sources, skipped


def matches(name):
    """The files and folders that a name or pattern stands for, sorted. A pattern with ** stands for files alone, since
    it finds what is in folders by itself."""
    if os.path.lexists(name):
        return [name]
    found = sorted(set(glob.glob(name, recursive=True)))
    if "**" in name:
        found = [path for path in found if not os.path.isdir(path)]
    if not found:
        raise InputError(f"{name}: no such file; give files, folders, globs, or - for stdin")
    return found


def spool(stream, folder):
    """An unnamed temporary copy of `stream`, because every document is read twice."""
    try:
        copy = tempfile.TemporaryFile(dir=folder)
        shutil.copyfileobj(stream, copy, BLOCK_BYTES)
    except OSError as error:
        raise ResourceError(f"copying the input failed: {folder}: {error.strerror}; free some space") from None
    return copy


def file_source(name):
    if not os.path.exists(name):
        raise InputError(f"{name}: a link that leads nowhere; correct it")
    if not stat.S_ISREG(os.stat(name).st_mode):
        raise InputError(f"{name}: not a regular file (a pipe or device?); use - for stdin")
    return Source(str(name), "jsonl" if plain_suffix(name) == ".jsonl" else "text", Path(name))


def plain_suffix(name):
    """The suffix under a `.gz`. plain_suffix("a.jsonl.gz") -> ".jsonl" """
    return Path(str(name).lower().removesuffix(".gz")).suffix


def folder_sources(folder):
    """The sources in a folder and below, sorted by their path from there; hidden files and linked folders are passed
    over."""
    found, skipped = [], 0
    for parent, folders, files in os.walk(folder, onerror=refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        skipped += sum(os.path.islink(os.path.join(parent, name)) for name in folders)
        for name in files:
            path = Path(parent, name)
            if name.startswith(".") or plain_suffix(name) not in SUFFIXES or not path.is_file():
                skipped += 1
            else:
                found.append(path)
    found.sort(key=lambda path: path.relative_to(folder).as_posix())
    if not found:
        raise InputError(f"{folder}: no {', '.join(SUFFIXES)} files in it; give the files themselves")
    return [file_source(path) for path in found], skipped


def refuse_folder(error):
    raise InputError(f"{error.filename}: {error.strerror}; make it readable") from None


# ---- reading


def read(sources, reading):
    """The pieces of all documents of `sources`, in order. Raises InputError, naming file and place, for what cannot be
    read as the documents it should hold."""
    readers = {"text": text_pieces, "jsonl": jsonl_pieces, "python": python_pieces}
    for source in sources:
        try:
            with opened(source) as file:
                yield from readers[source.kind](source, file, reading)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{source.name}: damaged gzip file ({error}); restore it") from None
        except PermissionError:
            raise InputError(f"{source.name}: permission denied; make it readable") from None
        except OSError as error:
            raise ResourceError(f"reading failed: {source.name}: {error.strerror}; try again") from None


@contextlib.contextmanager
def opened(source):
    if source.spool is not None:
        source.spool.seek(0)
        yield source.spool
        return
    opener = gzip.open if source.name.lower().endswith(".gz") else open
    with opener(source.path, "rb") as file:
        yield file


def text_pieces(source, file, reading):
    """One document. Pieces are never empty, unless the document is."""
    decoder = Decoder(source.name, reading)
    pending, first, replaced = None, True, 0
    try:
        for text in decoder.texts(iter(lambda: file.read(BLOCK_BYTES), b"")):
            if pending is not None:
                yield Piece(source.name, pending, first, False, replaced)
                first = False
            pending, replaced = text, decoder.take_replaced()
    except UndecodableError:
        yield Piece(source.name, "", first, True, readable=False)
        return
    yield Piece(source.name, pending or "", first, True, replaced)


def jsonl_pieces(source, file, reading):
    if "\n".encode(reading.encoding).removeprefix(codecs.BOM_UTF8) != b"\n":
        raise InputError(f"{source.name}: lines cannot be told apart in {reading.encoding}; convert it to UTF-8")
    start = 0
    for number, line in enumerate(file, 1):
        name = f"{source.name}:{number}"
        decoder = Decoder(name, reading, start, bom=number == 1)
        start += len(line)
        try:
            text = "".join(decoder.texts([line]))
        except UndecodableError:
            yield Piece(name, "", True, True, readable=False)
            continue
        if text.strip():
            line = json_object(text, reading.field, name, "correct the line, or give --field")
            found, surrogates = without_surrogates(line[reading.field])
            yield Piece(name, found, True, True, surrogates + decoder.take_replaced())


def without_surrogates(text):
    """`text` with lone surrogates as U+FFFD, and how many there were. JSON can hold them, UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return re.subn("[\ud800-\udfff]", "\ufffd", text)
    return text, 0


def python_pieces(source, file, reading):
    """A Python source file, decoded as Python does: by its coding line. One that cannot be is not readable."""
    data = file.read()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        yield Piece(source.name, data.decode(encoding), True, True)
    except (SyntaxError, UnicodeDecodeError):
        yield Piece(source.name, "", True, True, readable=False)


class UndecodableError(Exception):
    """The document is to be dropped: `--errors skip`."""


class Decoder:
    """Bytes to text, block by block, that knows the place of a bad byte. `start` is the first byte's place in its file;
    with `bom` a byte order mark at the start is dropped."""

    def __init__(self, name, reading, start=0, bom=True):
        self.name, self.reading, self.fed, self.bom, self.replaced = name, reading, start, bom, 0
        codecs.register_error(COUNTING, self.replace)
        errors = COUNTING if reading.errors == "replace" else "strict"
        self.decoder = codecs.getincrementaldecoder(reading.encoding)(errors)

    def replace(self, error):
        if not isinstance(error, UnicodeDecodeError):
            raise error
        self.replaced += 1
        return "\ufffd", error.end

    def take_replaced(self):
        """How many characters were replaced since the last call."""
        count, self.replaced = self.replaced, 0
        return count

    def texts(self, blocks):
        """The non-empty texts of `blocks`. Raises InputError, or UndecodableError where such documents are dropped."""
        for block in blocks:
            yield from self.decode(block)
        yield from self.decode(b"", final=True)

    def decode(self, block, final=False):
        try:
            text = self.decoder.decode(block, final)
        except UnicodeError as error:
            if self.reading.errors == "skip":
                raise UndecodableError from None
            raise self.refused(block, error) from None
        self.fed += len(block)
        if self.bom and text:
            text, self.bom = text.removeprefix("\ufeff"), False
        return [text] if text else []

    def refused(self, block, error):
        encoding = "UTF-8" if codecs.lookup(self.reading.encoding).name == "utf-8" else self.reading.encoding
        if isinstance(error, UnicodeDecodeError):
            place = self.fed - (len(error.object) - len(block)) + error.start  # the decoder had kept some bytes back
            what = f"invalid {encoding} at byte {place} (0x{error.object[error.start]:02x})"
        else:
            what = f"invalid {encoding} ({error})"
        return InputError(f"{self.name}: {what}; use --encoding, or --errors replace|skip")
