"""Splits documents into training and validation. A first pass counts and checks all documents. The result decides
how to split them, and a second pass does so."""

import hashlib
import itertools
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gpt.errors import InputError
from gpt.text.sources import Piece

HASH_DOCUMENTS = 100  # with fewer, or one larger than HASH_SHARE of the text, the tail is the fairer validation set
HASH_SHARE = 0.1
DROPPED, HASHED_TO_TRAIN, HASHED_TO_VAL = range(3)  # the fate of a document after the first pass


@dataclass
class Survey:
    """The result of the first pass. Counts are of kept documents; blank and undecodable documents are dropped."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    largest: int = 0  # bytes of the longest document
    empty_docs: int = 0
    undecodable: int = 0
    replaced: int = 0
    hashed_to_val: int = 0  # number of documents
    repeated: int = 0  # number of documents whose digest is in `others`
    fates: bytearray = field(default_factory=bytearray)  # DROPPED, HASHED_TO_TRAIN or HASHED_TO_VAL of each document
    digests: set[Any] = field(default_factory=set)  # of kept documents, with `keep_digests`


def survey_documents(
    pieces: Iterable[Piece], fraction: float, others: Container[bytes] = (), keep_digests: bool = False
) -> Survey:
    """Returns the Survey of `pieces`. `fraction` is the share of documents that the hash assigns to validation.
    Documents whose digests are in `others` are counted as repeated. With `keep_digests`, the Survey holds the
    digests."""
    survey = Survey()
    for _, group in itertools.groupby(pieces, key=lambda piece: piece.document):
        document = Document(group)
        if document.blank or not document.readable:
            survey.fates.append(DROPPED)
            survey.undecodable += not document.readable
            survey.empty_docs += document.readable
            continue
        to_val = digest_below(document.digest, fraction)
        survey.fates.append(HASHED_TO_VAL if to_val else HASHED_TO_TRAIN)
        survey.documents += 1
        survey.characters += document.characters
        survey.bytes += document.bytes
        survey.replaced += document.replaced
        survey.largest = max(survey.largest, document.bytes)
        survey.hashed_to_val += to_val
        survey.repeated += document.digest in others
        if keep_digests:
            survey.digests.add(document.digest)
    return survey


class Document:
    """The counts and the digest of one document, computed from its pieces."""

    def __init__(self, pieces: Iterable[Piece]):
        self.characters = self.bytes = self.replaced = 0
        self.blank = self.readable = True
        sha256 = hashlib.sha256()
        for piece in pieces:
            data = piece.text.encode("utf-8")
            sha256.update(data)
            self.characters += len(piece.text)
            self.bytes += len(data)
            self.replaced += piece.replaced
            self.blank = self.blank and not piece.text.strip()
            self.readable = self.readable and piece.readable
        self.digest = sha256.digest()[:8]


def chosen_by_hash(text: str, fraction: float, salt: bytes = b"") -> bool:
    """Returns whether the hash of `text` is in the lowest `fraction` of all hashes; for equal texts always the same.
    Choices for different purposes need different salts to be independent."""
    return digest_below(hashlib.sha256(salt + text.encode("utf-8")).digest()[:8], fraction)


def digest_below(digest: bytes, fraction: float) -> bool:
    return int.from_bytes(digest, "big") < fraction * 2**64


# ---- the decision


@dataclass(frozen=True)
class Split:
    """How documents are split. `rule` is "files", "hash", "tail" or "none". With "tail", validation begins at character
    `cut` of the text of all kept documents. `reason` is for the user."""

    rule: str
    fraction: float = 0.0
    cut: int = 0
    reason: str = ""


def choose_split(asked: str, fraction: float, survey: Survey, has_files: bool) -> Split:
    """Returns the Split for `--val_split asked` and the documents surveyed. `has_files`: whether --val gives files.
    Raises InputError if training or validation would be empty."""
    if has_files:
        return Split("files", reason="the files given with --val")
    if fraction == 0:
        return Split("none", reason="no validation split, as --val_fraction 0 asks")
    both_sides = 0 < survey.hashed_to_val < survey.documents
    many = survey.documents >= HASH_DOCUMENTS and survey.largest <= HASH_SHARE * survey.bytes
    if asked == "hash" and not both_sides:
        raise InputError(
            f"validation: {survey.hashed_to_val} of {survey.documents} documents fall in it by hash with "
            f"--val_fraction {fraction:g}; use another fraction or --val_split tail"
        )
    if asked == "hash" or (asked == "auto" and many and both_sides):
        return Split("hash", fraction, reason=f"{fraction:g} of the documents, chosen by hash")
    cut = int(survey.characters * (1 - fraction))
    if not 0 < cut < survey.characters:
        raise InputError(
            f"validation: --val_fraction {fraction:g} of {survey.characters} characters leaves a side empty; "
            "use another fraction, or 0 for no validation"
        )
    return Split("tail", fraction, cut, f"the last {fraction:g} of the text, from character {cut}")


# ---- the second pass


class Part(NamedTuple):
    """A piece of a document in its split, "train" or "val"."""

    split: str
    document: int
    name: str
    text: str


def divide(pieces: Iterable[Piece], split: Split, survey: Survey) -> Iterator[Part]:
    """Yields the kept documents of `pieces`, in order and each part in its split. Only the rule "tail" can divide a
    document."""
    position = 0  # in the text of all kept documents
    for piece in pieces:
        fate = survey.fates[piece.document] if piece.document < len(survey.fates) else DROPPED
        if fate == DROPPED:
            continue
        cut = len(piece.text)  # characters of this piece that are for training
        if split.rule == "tail":
            cut = max(0, split.cut - position)
            position += len(piece.text)
        elif split.rule == "hash" and fate == HASHED_TO_VAL:
            cut = 0
        for side, text in (("train", piece.text[:cut]), ("val", piece.text[cut:])):
            if text:
                yield Part(side, piece.document, piece.name, text)
