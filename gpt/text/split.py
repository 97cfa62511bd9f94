"""Splits documents into training and validation. A first pass counts and checks all documents. The result decides
how to split them, and a second pass does so."""

import hashlib
import itertools
import math
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gpt.errors import InputError, printable
from gpt.text.examples import PROMPT, Turns
from gpt.text.sources import Piece

HASH_DOCUMENTS = 100  # with fewer, or one larger than HASH_SHARE of the text, the tail is the fairer validation set
HASH_SHARE = 0.1
MOST_NULS = 10  # a longer document with a share of NULs above NUL_SHARE is no text, or in another encoding
NUL_SHARE = 0.05
END_OF_TEXT = "<|endoftext|>"
SHORT_LINES, SHORT_LINE = 1000, 300  # lines of a document, and their mean length, from which it may be a list of texts
DROPPED, HASHED_TO_TRAIN, HASHED_TO_VAL = range(3)  # the fate of a document after the first pass


@dataclass
class Lost:
    """What --errors replace or skip took from a file."""

    documents: int = 0
    characters: int = 0
    first: str = ""  # name of the first document that was skipped, where the file has several

    @property
    def counts(self) -> dict[str, int]:
        return {"documents": self.documents, "characters": self.characters}

    def __str__(self) -> str:
        skipped = f"{self.documents:,} skipped" if self.documents else ""
        skipped += f", the first {printable(self.first)}" if self.first else ""
        replaced = f"{self.characters:,} characters replaced" if self.characters else ""
        return ", ".join(filter(None, [skipped, replaced]))


@dataclass
class Survey:
    """The result of the first pass. Counts are of kept documents; blank and unreadable documents are dropped."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    largest: int = 0  # bytes of the longest document
    empty_docs: int = 0
    undecodable: int = 0  # bytes that cannot be decoded, or a record that cannot be read
    replaced: int = 0
    hashed_to_val: int = 0  # number of documents
    repeated: int = 0  # number of documents whose digest is in `others`
    examples: int = 0  # number of documents that are examples: all or none
    duplicates: int = 0  # number of examples that equal an earlier one
    space_ends: int = 0  # number of prompts that end in a space
    typed_ends: int = 0  # how often the text spells END_OF_TEXT
    list_like: tuple[str, int] = ("", 0)  # the first document that may be a list of short texts, and its lines
    fates: bytearray = field(default_factory=bytearray)  # DROPPED, HASHED_TO_TRAIN or HASHED_TO_VAL of each document
    digests: set[Any] = field(default_factory=set)  # of kept documents, with `keep_digests`, and of examples
    lost: dict[str, Lost] = field(default_factory=dict)  # by name of the file

    def drop(self, document: "Document") -> None:
        self.fates.append(DROPPED)
        self.undecodable += not document.readable
        self.empty_docs += document.readable

    def keep(self, document: "Document", to_val: bool) -> None:
        self.fates.append(HASHED_TO_VAL if to_val else HASHED_TO_TRAIN)
        self.documents += 1
        self.characters += document.characters
        self.bytes += document.bytes
        self.replaced += document.replaced
        self.largest = max(self.largest, document.bytes)
        self.hashed_to_val += to_val
        self.typed_ends += document.ends
        if document.turns:
            first = document.turns[0]
            self.examples += 1
            self.duplicates += document.digest in self.digests
            self.space_ends += first.role == PROMPT and first.content.endswith(" ")
        elif not self.list_like[1] and document.is_list_like():
            self.list_like = document.name, document.lines

    def note_loss(self, document: "Document") -> None:
        lost = self.lost.setdefault(document.file, Lost())
        if document.readable:
            lost.characters += document.replaced
        else:
            lost.documents += 1
            lost.first = lost.first or (document.name if document.name != document.file else "")


def survey_documents(
    pieces: Iterable[Piece],
    fraction: float,
    others: Container[bytes] = (),
    keep_digests: bool = False,
    skip_nuls: bool = False,
) -> Survey:
    """Returns the Survey of `pieces`. `fraction` is the share of documents that the hash assigns to validation.
    Documents whose digests are in `others` are counted as repeated. With `keep_digests`, the Survey holds the digests.
    Raises InputError for a document full of NULs; with `skip_nuls` such documents count as unreadable."""
    survey = Survey()
    for _, group in itertools.groupby(pieces, key=lambda piece: piece.document):
        document = Document(group)
        document.check_nuls(skip_nuls)
        if document.replaced or not document.readable:
            survey.note_loss(document)
        if document.blank or not document.readable:
            survey.drop(document)
            continue
        survey.keep(document, digest_below(document.digest, fraction))
        survey.repeated += document.digest in others
        if keep_digests or document.turns:
            survey.digests.add(document.digest)
    return survey


class Document:
    """The counts and the digest of one document, computed from its pieces."""

    def __init__(self, pieces: Iterable[Piece]):
        self.characters = self.bytes = self.replaced = self.nuls = self.lines = self.blank_lines = self.ends = 0
        self.blank = self.readable = True
        self.name = self.file = ""
        self.turns: Turns = ()
        sha256 = hashlib.sha256()
        for piece in pieces:
            text = piece.text
            data = text.encode("utf-8")
            sha256.update(data)
            self.characters += len(text)
            self.bytes += len(data)
            self.replaced += piece.replaced
            self.nuls += text.count("\0")
            self.lines += text.count("\n")
            self.blank_lines += text.count("\n\n")
            self.ends += text.count(END_OF_TEXT)
            self.blank = self.blank and not text.strip()
            self.readable = self.readable and piece.readable
            self.name, self.file = piece.name, piece.file or self.file or piece.name
            self.turns = piece.turns
        self.digest = sha256.digest()[:8]

    def check_nuls(self, skip: bool) -> None:
        """Raises InputError if the document is full of NULs; with `skip`, marks it as unreadable instead."""
        if self.nuls <= MOST_NULS or self.nuls <= NUL_SHARE * self.characters:
            return
        if not skip:
            share = self.nuls / self.characters
            raise InputError(
                f"{self.name}: {share:.0%} of its characters are NUL; leave it out, or name its --encoding (utf-16-le?)"
            )
        self.readable = False

    def is_list_like(self) -> bool:
        """Returns whether the document has many short lines and hardly a blank one between them."""
        short = self.characters <= SHORT_LINE * self.lines
        return self.lines >= SHORT_LINES and short and self.blank_lines <= 0.01 * self.lines


def chosen_by_hash(text: str, fraction: float, salt: bytes = b"") -> bool:
    """Returns whether the hash of `text` is in the lowest `fraction` of all hashes; for equal texts always the same.
    Choices for different purposes need different salts to be independent."""
    return digest_below(hashlib.sha256(salt + text.encode("utf-8")).digest()[:8], fraction)


def digest_below(digest: bytes, fraction: float) -> bool:
    return int.from_bytes(digest, "big") < fraction * 2**64


# ---- the decision


@dataclass(frozen=True)
class Split:
    """How documents are split. `rule` is "files", "hash", "tail", "last" or "none". With "tail", validation begins at
    character `cut` of the text of all kept documents; with "last", which is for examples, at document `cut` of them.
    `reason` is for the user."""

    rule: str
    fraction: float = 0.0
    cut: int = 0
    reason: str = ""


def choose_split(asked: str, fraction: float, survey: Survey, has_files: bool) -> Split:
    """Returns the Split for `--val_split asked` and the documents surveyed. `has_files`: whether --val gives files. An
    example is never cut: instead of the tail of the text, the last examples are for validation. Raises InputError if
    training or validation would be empty."""
    if has_files:
        return Split("files", reason="the files given with --val")
    if fraction == 0:
        return Split("none", reason="no validation split, as --val_fraction 0 asks")
    both_sides = 0 < survey.hashed_to_val < survey.documents
    many = survey.documents >= HASH_DOCUMENTS and survey.largest <= HASH_SHARE * survey.bytes
    what = "examples" if survey.examples else "documents"
    if asked == "hash" and not both_sides:
        raise InputError(
            f"validation: {survey.hashed_to_val} of {survey.documents} {what} fall in it by hash with "
            f"--val_fraction {fraction:g}; use another fraction or --val_split tail"
        )
    if asked == "hash" or (asked == "auto" and many and both_sides):
        return Split("hash", fraction, reason=f"{fraction:g} of the {what}, chosen by hash")
    return last_examples(fraction, survey) if survey.examples else tail(fraction, survey)


def last_examples(fraction: float, survey: Survey) -> Split:
    """Returns the Split that validates on the last `fraction` of the examples, at least on one. Raises InputError if
    none would be left to train on."""
    count = math.ceil(survey.documents * fraction)
    if count == survey.documents:
        raise InputError(
            f"validation: --val_fraction {fraction:g} of {survey.documents} examples leaves none to train on; "
            "give more, or 0 for no validation"
        )
    return Split("last", fraction, survey.documents - count, f"the last {count} of {survey.documents} examples")


def tail(fraction: float, survey: Survey) -> Split:
    """Returns the Split that validates on the last `fraction` of the text. Raises InputError if a side would be
    empty."""
    cut = int(survey.characters * (1 - fraction))
    if not 0 < cut < survey.characters:
        raise InputError(
            f"validation: --val_fraction {fraction:g} of {survey.characters} characters leaves a side empty; "
            "use another fraction, or 0 for no validation"
        )
    return Split("tail", fraction, cut, f"the last {fraction:g} of the text, from character {cut}")


# ---- the second pass


class Part(NamedTuple):
    """A piece of a document, or an example, in its split, "train" or "val"."""

    split: str
    document: int
    name: str
    text: str
    turns: Turns = ()


def divide(pieces: Iterable[Piece], split: Split, survey: Survey) -> Iterator[Part]:
    """Yields the kept documents of `pieces`, in order and each part in its split. Only the rule "tail" can divide a
    document."""
    position = kept = 0  # in the text of all kept documents, and among them
    for piece in pieces:
        fate = survey.fates[piece.document] if piece.document < len(survey.fates) else DROPPED
        if fate == DROPPED:
            continue
        cut = len(piece.text)  # characters of this piece that are for training
        if split.rule == "tail":
            cut = max(0, split.cut - position)
            position += len(piece.text)
        elif (split.rule == "hash" and fate == HASHED_TO_VAL) or (split.rule == "last" and kept >= split.cut):
            cut = 0
        kept += 1
        for side, text in (("train", piece.text[:cut]), ("val", piece.text[cut:])):
            if text:
                yield Part(side, piece.document, piece.name, text, piece.turns)
