"""Reads documents. The files, folders, globs or stdin that the user names become TextSources, which become Pieces.

A document is a text file, a page, a record of a file of records, or stdin as a whole. Archives are read as folders are.
A large document comes in several pieces, so that memory does not grow with it."""

import codecs
import contextlib
import dataclasses
import functools
import glob
import io
import itertools
import os
import re
import stat
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import IO, Any, NamedTuple

from gpt.errors import InputError, ResourceError
from gpt.text.containers import Member, archive_kind, damage, members, open_compressed, peek, random_access
from gpt.text.encodings import detector, encoding_of, split_texts, with_line_breaks
from gpt.text.examples import Form, Turns, recognise, turns_of, whole_text
from gpt.text.kinds import ARCHIVES, KINDS, RECORDS, kind_of, plain_suffix
from gpt.text.markup import HTML_LIMIT, text_of_docx, text_of_html
from gpt.text.records import (
    RECORD_LIMIT,
    SAMPLE,
    Record,
    choose_field,
    csv_records,
    json_records,
    line_record,
    lines_of,
    parquet_records,
    parquet_rows,
    parquet_sample,
    text_of,
    too_long,
)

BLOCK_BYTES = 1 << 16
MARK_BAD_BYTES = "gpt.mark_bad_bytes"  # error handler of codecs: bad bytes become a lone surrogate
codecs.register_error(MARK_BAD_BYTES, lambda error: ("\udfff", error.end))  # type: ignore[attr-defined]


class Piece(NamedTuple):
    """Text of a document, all or a part of it. Every document has at least one piece; an example has one."""

    document: int  # number of the document, from 0
    name: str
    text: str
    replaced: int = 0  # characters of `text` that became U+FFFD
    readable: bool = True  # False: the document cannot be decoded, or a record cannot be read, so it is dropped
    file: str = ""  # name of the source, of a piece that lost text
    turns: Turns = ()  # of an example


@dataclass(frozen=True)
class TextSource:
    """A file of documents. `spool` is an open file in place of `path`, for stdin and downloads; `archive` is the source
    that holds this one as its member of number `member`."""

    name: str
    kind: str  # a value of kinds.KINDS, or python
    path: Path = Path()
    spool: IO[bytes] | None = None
    archive: "TextSource | None" = None
    member: int = 0
    field: str = ""  # of a source of records: the field with the text
    form: Form | None = None  # of a source of examples: the fields with their turns

    @property
    def holds(self) -> str:
        """What the source holds: text, or a kind of examples."""
        return self.form.kind if self.form else "text"


@dataclass(frozen=True)
class LeftOut:
    """The files that were left out of a folder or archive that the user named: their number by kind, and the linked
    folders."""

    name: str
    kinds: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.kinds.total() + len(self.links)

    def __str__(self) -> str:
        kinds = [f"{number:,} {kind}" for kind, number in self.kinds.most_common()]
        links = [f"linked folder {link}" for link in self.links[:5]]
        links += [f"{len(self.links) - 5:,} more linked folders"] if len(self.links) > 5 else []
        return ", ".join(kinds + links)


@dataclass(frozen=True)
class Reading:
    """How the bytes of files become documents. The fields have the values of these names in PrepareConfig."""

    encoding: str = "utf-8"  # auto: decided for each file
    errors: str = "strict"  # strict, replace or skip
    field: str = ""  # "": chosen by the names of the fields
    keep_crlf: bool = False
    split_on: str = ""  # what ends a document in a text file, "\n" for lines
    form: Form | None = None  # of a file whose records are examples
    # with auto, for the files read so far: name -> encoding
    decided: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def codec(self) -> tuple[str, str]:
        """Encoding and error handler."""
        return self.encoding, "strict" if self.errors == "strict" else MARK_BAD_BYTES

    @property
    def wanted(self) -> str:
        """What a record must have, for a message."""
        return self.form.wanted if self.form else f'string field "{self.field}"'

    def of(self, name: str, file: IO[bytes]) -> "Reading":
        """Returns the Reading of one file, whose encoding is known. A file is examined once, so every pass over the
        input decodes it alike. Leaves `file` at its start."""
        if self.encoding != "auto":
            return self
        if name not in self.decided:
            self.decided[name] = encoding_of(file)
        return replace(self, encoding=self.decided[name])


# ---- what the user names


def find_sources(inputs: Iterable[str], spool_folder: Path, reading: Reading) -> tuple[list[TextSource], list[LeftOut]]:
    """Returns the sources that `inputs` name, in order, and what was left out of the folders and archives among them.
    Looks into every file for its kind. Copies stdin to a temporary file in `spool_folder`.

    Raises InputError for a name that no file has, a pipe, a device, a link that leads nowhere, an unreadable folder, a
    closed stdin, a file that is not text, and records of which no field or several could be the text."""
    sources: list[TextSource] = []
    left_out: list[LeftOut] = []
    for name in inputs:
        left_out.append(LeftOut(name))
        if name == "-":
            if sys.stdin is None:
                raise InputError("stdin: closed; pipe the text into it")
            stdin = TextSource("stdin", "text", spool=spool(sys.stdin.buffer, spool_folder))
            sources += inspect(stdin, reading, left_out[-1])
            continue
        for path in matches(name):
            paths = folder_files(path, left_out[-1]) if os.path.isdir(path) else [path]
            for each in paths:
                sources += inspect(file_source(each), reading, left_out[-1])
    return sources, [entry for entry in left_out if entry.count]


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
    """Returns an unnamed temporary copy of `stream`, which is stdin, in `folder`: every document is read twice."""

    def read() -> bytes:
        try:
            return stream.read(BLOCK_BYTES)
        except OSError as error:  # such as a folder
            raise InputError(f"stdin: {error.strerror}; pipe the text into it") from None

    try:
        copy = tempfile.TemporaryFile(dir=folder)
        for block in iter(read, b""):
            copy.write(block)
    except OSError as error:
        raise ResourceError(f"copying the input failed: {folder}: {error.strerror}; free some space") from None
    return copy


def file_source(name: str | Path) -> TextSource:
    if not os.path.exists(name):
        raise InputError(f"{name}: a link that leads nowhere; correct it")
    if not stat.S_ISREG(os.stat(name).st_mode):
        raise InputError(f"{name}: not a regular file (a pipe or device?); use - for stdin")
    return TextSource(str(name), "text", Path(name))


def folder_files(folder: str, left_out: LeftOut) -> list[Path]:
    """Returns the files in a folder and its subfolders that may be text, sorted by their path from there. Counts the
    others, and linked folders, in `left_out`. Raises InputError if there are none."""
    paths = []
    for parent, folders, files in os.walk(folder, onerror=refuse_folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links = [os.path.join(parent, name) for name in folders if os.path.islink(os.path.join(parent, name))]
        left_out.links.extend(os.path.relpath(link, folder) for link in links)
        for name in files:
            path = Path(parent, name)
            reason = why_left_out(name) or ("" if path.is_file() else "link or device")
            if reason:
                left_out.kinds[reason] += 1
            else:
                paths.append(path)
    if not paths:
        there = f" ({left_out})" if left_out.count else ""
        raise InputError(
            f"{folder}: no .txt, .md, .csv, .jsonl or similar files in it{there}; give the files themselves"
        )
    paths.sort(key=lambda path: path.relative_to(folder).as_posix())
    return paths


def why_left_out(name: str) -> str:
    """Returns why a folder or archive does not give the file `name` (its suffix, or "hidden"), or "" if it does."""
    parts = PurePath(name).parts
    if any(part.startswith((".", "~$")) or part == "__MACOSX" for part in parts):
        return "hidden"
    suffix = plain_suffix(name)
    return "" if suffix in KINDS else suffix or "without suffix"


def refuse_folder(error: OSError) -> None:
    raise InputError(f"{error.filename}: {error.strerror}; make it readable") from None


def inspect(source: TextSource, reading: Reading, left_out: LeftOut) -> list[TextSource]:
    """Returns the source of a file, with the kind that its first bytes and its name tell; of an archive, those of the
    members that may be text. Counts the other members in `left_out`."""
    with reading_errors(source.name), open_source(source) as file:
        source = examine(source, file, reading)
        return members_of(source, file, reading, left_out) if source.kind in ARCHIVES else [source]


def examine(source: TextSource, file: IO[bytes], reading: Reading) -> TextSource:
    """Returns a source with its kind and, for records, the field that holds the text, or the fields of an example.
    Leaves `file` at its start."""
    name, kind = source.name, kind_of(source.name, peek(file), reading.encoding)
    if kind == "zip":
        kind = archive_kind(name, random_access(file))
        file.seek(0)
    if kind not in RECORDS or reading.field:
        return replace(source, kind=kind, field=reading.field if kind in RECORDS else "")
    sample = sample_of(kind, name, file, reading)
    file.seek(0)
    form = recognise(sample)
    return replace(source, kind=kind, form=form, field="" if form else choose_field(name, sample))


def sample_of(kind: str, name: str, file: IO[bytes], reading: Reading) -> list[Any]:
    """Returns the values of the first records of a file, up to the first malformed one."""
    if kind == "parquet":
        return [parquet_sample(name, random_access(file))]
    sample = []
    with contextlib.suppress(InputError):  # which reading the file raises again
        for record in itertools.islice(text_records(kind, name, file, reading, Counter()), SAMPLE):
            sample.append(record.value)
    return sample


def members_of(archive: TextSource, file: IO[bytes], reading: Reading, left_out: LeftOut) -> list[TextSource]:
    """Returns the members of an archive that may be text, in its order. Counts the others in `left_out`. Raises
    InputError if there are none."""
    sources, others, names = [], LeftOut(archive.name), set[str]()
    for number, member in enumerate(members(archive.name, archive.kind, file)):
        if member.kind == "folder":
            continue
        reason = why_left_out(member.name) or ("" if member.kind == "file" else "link or device")
        if not reason:
            name = f"{archive.name}/{member.name}"
            while name in names:  # a tar file may hold several versions of a file
                name = with_number(name, number + 1)
            names.add(name)
            source = TextSource(name, "text", archive=archive, member=number)
            with open_member(source.name, member) as opened:
                source = examine(source, opened, reading)
            reason = "archive in an archive" if source.kind in ARCHIVES else ""
        if reason:
            others.kinds[reason] += 1
        else:
            sources.append(source)
    if not sources:
        what = others if others.count else "it is empty"
        raise InputError(f"{archive.name}: no text in this archive ({what}); unpack it and give the files themselves")
    left_out.kinds.update(others.kinds)
    return sources


def with_number(name: str, number: int) -> str:
    """Returns `name` with a number before its suffixes: with_number("x/a.csv.gz", 2) == "x/a (2).csv.gz"."""
    parent, slash, last = name.rpartition("/")
    stem, dot, suffixes = last.partition(".")
    return f"{parent}{slash}{stem} ({number}){dot}{suffixes}"


# ---- opening


@contextlib.contextmanager
def reading_errors(name: str) -> Iterator[None]:
    """Turns errors of reading the file `name` into InputError (it is damaged, or may not be read) or ResourceError."""
    try:
        with damage(name):
            yield
    except PermissionError:
        raise InputError(f"{name}: permission denied; make it readable") from None
    except OSError as error:
        raise ResourceError(f"reading failed: {name}: {error.strerror}; try again") from None


@contextlib.contextmanager
def open_source(source: TextSource) -> Iterator[IO[bytes]]:
    """Opens a file that is no member of an archive, and decompresses it."""
    if source.spool is not None:
        source.spool.seek(0)
        yield open_compressed(source.name, source.spool)
    else:
        with open(source.path, "rb") as file:
            yield open_compressed(source.name, file)


@contextlib.contextmanager
def open_member(name: str, member: Member) -> Iterator[IO[bytes]]:
    """Opens a member of an archive, and decompresses it."""
    with damage(name), member.open() as file:
        yield open_compressed(name, file)


def open_sources(sources: list[TextSource]) -> Iterator[tuple[TextSource, IO[bytes]]]:
    """Yields each source with its open file. All are members of one archive, which is read once, or there is one."""
    archive = sources[0].archive
    if archive is None:
        with open_source(sources[0]) as file:
            yield sources[0], file
        return
    wanted = {source.member: source for source in sources}
    with open_source(archive) as file:
        for number, member in enumerate(members(archive.name, archive.kind, file)):
            if number in wanted:
                with open_member(wanted[number].name, member) as opened:
                    yield wanted[number], opened


# ---- reading


def read_pieces(sources: Iterable[TextSource], reading: Reading) -> Iterator[Piece]:
    """Yields the pieces of all documents of `sources`, in order. Raises InputError, naming file and place, for text
    that cannot be decoded or a record that is not as it should be; ResourceError if reading fails."""
    readers: dict[str, Callable[..., Iterator[Piece]]] = {
        "text": text_pieces,
        "python": python_pieces,
        "jsonl": jsonl_pieces,
        "html": html_pieces,
        "docx": docx_pieces,
        **{kind: functools.partial(record_pieces, kind) for kind in ("json", "csv", "parquet")},
    }
    numbers = itertools.count()
    for _, group in itertools.groupby(sources, key=lambda source: id(source.archive or source)):
        files = list(group)
        with reading_errors(files[0].name):
            for source, file in open_sources(files):
                one = replace(reading, field=source.field or reading.field or "text", form=source.form)
                for piece in readers[source.kind](source.name, file, one, numbers):
                    lost = piece.replaced or not piece.readable
                    yield piece._replace(file=source.name) if lost else piece


def text_pieces(name: str, file: IO[bytes], reading: Reading, numbers: Iterator[int]) -> Iterator[Piece]:
    """Yields the pieces of a text file, which is one document, or several with --split_on. `numbers` gives the number
    of the next document."""
    reading = reading.of(name, file)
    texts = decoded_blocks(name, file, reading)
    for _, parts in itertools.groupby(
        split_texts(itertools.chain(texts, [""]), reading.split_on), lambda part: part[0]
    ):
        document = next(numbers)
        for _, text in parts:
            text, bad = without_surrogates(text)
            dropped = bad > 0 and reading.errors == "skip"
            yield Piece(document, name, "", readable=False) if dropped else Piece(document, name, text, bad)


def jsonl_pieces(name: str, file: IO[bytes], reading: Reading, numbers: Iterator[int]) -> Iterator[Piece]:
    """Yields a piece for each line that is not blank: every such line is a document."""
    reading = reading.of(name, file)
    for number, text in enumerate(jsonl_lines(name, file, reading), 1):
        if text.strip():
            yield json_piece(next(numbers), f"{name}:{number}", text, reading)


def jsonl_lines(name: str, file: IO[bytes], reading: Reading) -> Iterator[str]:
    """Yields the lines of a file of JSONL. Where the encoding has the byte 10 for line breaks alone, a bad byte then
    spoils one line, and the message names that line."""
    encoding, errors = reading.codec
    if "\n".encode(encoding).removeprefix(codecs.BOM_UTF8) != b"\n":  # UTF-16, for example
        yield from lines_of(name, decoded_blocks(name, file, reading))
        return
    for number, line in enumerate(iter(lambda: file.readline(RECORD_LIMIT + 1), b""), 1):
        place = f"{name}:{number}"
        if len(line) > RECORD_LIMIT:
            raise too_long(place)
        texts = map(codecs.decode, [line], [encoding], [errors])  # decoded within check_texts
        yield from check_texts(place, file, texts, reading, begins=number == 1)


def json_piece(document: int, place: str, text: str, reading: Reading) -> Piece:
    """Returns the Piece of a line of JSON. A line that is not what it should be is unreadable with --errors skip, else
    raises InputError."""
    skip = reading.errors == "skip"
    try:
        if skip and without_surrogates(text)[1]:
            return Piece(document, place, "", readable=False)
        return record_piece(document, place, line_record(text, place, reading.wanted), reading)
    except InputError:
        if not skip:
            raise
        return Piece(document, place, "", readable=False)


def record_pieces(kind: str, name: str, file: IO[bytes], reading: Reading, numbers: Iterator[int]) -> Iterator[Piece]:
    """Yields a piece for each record of a file of the kind json, csv or parquet. With `--errors skip`, drops records
    with bad bytes or without the text."""
    lost: Counter[str] = Counter()
    if kind == "parquet":
        opened, form = random_access(file), reading.form
        records = parquet_rows(name, opened, [*form.fields]) if form else parquet_records(name, opened, reading.field)
    else:
        records = text_records(kind, name, file, reading, lost)
    for record in records:
        document, place = next(numbers), f"{name}:{record.line}"
        try:
            piece = record_piece(document, place, record, reading)
            readable = not (reading.errors == "skip" and lost["replaced"] and "\ufffd" in piece.text)
        except InputError:
            if reading.errors != "skip":
                raise
            readable = False
        if readable:
            replaced = lost.pop("replaced", 0) if reading.errors == "replace" else 0
            yield piece._replace(replaced=piece.replaced + replaced)
        else:
            yield Piece(document, place, "", readable=False)


def record_piece(document: int, place: str, record: Record, reading: Reading) -> Piece:
    """Returns the Piece of a record: its text, or its example. One that holds nothing to learn has no text. Raises
    InputError for a record that is not what it should be."""
    if reading.form is None:
        text, replaced = without_surrogates(line_breaks(text_of(record, reading.field, place), reading))
        return Piece(document, place, text, replaced)
    turns = turns_of(record, reading.form, place)
    cleaned = [without_surrogates(line_breaks(turn.content, reading)) for turn in turns]
    turns = tuple(turn._replace(content=text) for turn, (text, _) in zip(turns, cleaned, strict=True))
    return Piece(document, place, whole_text(turns), sum(replaced for _, replaced in cleaned), turns=turns)


def text_records(kind: str, name: str, file: IO[bytes], reading: Reading, lost: Counter[str]) -> Iterator[Record]:
    """Returns the records of a file of the kind csv, json or jsonl. Adds the number of characters that decoding has
    replaced to `lost["replaced"]`. With `--errors skip` it replaces too: one bad byte must not drop all records."""
    errors = "replace" if reading.errors == "skip" else reading.errors
    reading = replace(reading, errors=errors, split_on="")

    def texts() -> Iterator[str]:
        for piece in text_pieces(name, file, reading, itertools.count()):
            lost["replaced"] += piece.replaced
            yield piece.text

    if kind == "csv":
        return csv_records(name, texts(), is_tsv=plain_suffix(name) == ".tsv")
    return json_records(name, texts())


def html_pieces(name: str, file: IO[bytes], reading: Reading, numbers: Iterator[int]) -> Iterator[Piece]:
    """Yields the text of an HTML page as one piece."""
    pieces, size = [], 0
    for piece in text_pieces(name, file, replace(reading, split_on=""), numbers):
        pieces.append(piece)
        size += len(piece.text)
        if size > HTML_LIMIT:
            raise InputError(f"{name}: a page of more than {HTML_LIMIT:,} characters; convert it to plain text")
    readable = all(piece.readable for piece in pieces)
    text = text_of_html("".join(piece.text for piece in pieces)) if readable else ""
    yield Piece(pieces[0].document, name, text, sum(piece.replaced for piece in pieces), readable)


def docx_pieces(name: str, file: IO[bytes], reading: Reading, numbers: Iterator[int]) -> Iterator[Piece]:
    """Yields the text of a Word document as one piece."""
    yield Piece(next(numbers), name, *without_surrogates(text_of_docx(name, random_access(file))))


def python_pieces(name: str, file: IO[bytes], reading: Reading, numbers: Iterator[int]) -> Iterator[Piece]:
    """Yields a Python source file as one piece, decoded by its coding line as Python does."""
    document, data = next(numbers), file.read()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        yield Piece(document, name, line_breaks(data.decode(encoding), reading))
    except (SyntaxError, UnicodeDecodeError):
        yield Piece(document, name, "", readable=False)


# ---- bytes to text


def decoded_blocks(name: str, file: IO[bytes], reading: Reading) -> Iterator[str]:
    """Returns the text of a file in pieces, with line breaks as --keep_crlf says. Raises as check_texts does."""
    blocks = iter(lambda: file.read(BLOCK_BYTES), b"")
    texts = check_texts(name, file, codecs.iterdecode(blocks, *reading.codec), reading)
    return texts if reading.keep_crlf else with_line_breaks(texts)


def check_texts(
    name: str, file: IO[bytes], texts: Iterable[str], reading: Reading, begins: bool = True
) -> Iterator[str]:
    """Yields `texts`, which are decoded from `file` meanwhile. `begins`: the first starts the file, so a byte order
    mark there is dropped. Raises InputError, which names the place, for bad bytes; with --errors replace and skip they
    are lone surrogates in the text instead."""
    try:
        for text in texts:
            yield text.removeprefix("\ufeff") if begins else text
            begins = False
    except UnicodeError as error:
        encoding = "UTF-8" if codecs.lookup(reading.encoding).name == "utf-8" else reading.encoding
        problem = f"invalid {encoding} ({error})"
        if isinstance(error, UnicodeDecodeError):
            place = file.tell() - len(error.object) + error.start
            problem = f"invalid {encoding} at byte {place} (0x{error.object[error.start]:02x})"
        raise InputError(f"{name}: {problem}; use --encoding, or --errors replace|skip{no_detector()}") from None


def no_detector() -> str:
    """Returns what a message adds where encodings cannot be guessed, because the extra [data] is not installed."""
    return "" if detector() else ", or pip install 'chardet>=7', which guesses encodings"


def line_breaks(text: str, reading: Reading) -> str:
    """Returns `text`, a whole document, with CRLF and CR turned into line breaks, unless --keep_crlf is given."""
    return text if reading.keep_crlf else "".join(with_line_breaks([text]))


def without_surrogates(text: str) -> tuple[str, int]:
    """Returns `text` with lone surrogates replaced by U+FFFD, and their number. UTF-8 cannot hold lone surrogates. They
    come from JSON, and from bad bytes that `decode` replaces."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return re.subn("[\ud800-\udfff]", "\ufffd", text)
    return text, 0
