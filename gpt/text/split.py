"""Training or validation? A first pass over all documents counts and checks them; from that the split is decided, and
the second pass follows it."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from gpt.errors import InputError

HASH_DOCUMENTS = 100  # fewer documents, or one over a tenth of the text: the tail is the fairer validation set
HASH_SHARE = 0.1


@dataclass
class Survey:
    """What the first pass found. Counts are of kept documents; blank and undecodable ones are dropped."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    largest: int = 0  # bytes of the longest document
    empty_docs: int = 0
    undecodable: int = 0
    replaced: int = 0
    hashed_to_val: int = 0  # documents
    repeated: int = 0  # documents whose text is in `others`
    fates: dict = field(default_factory=dict)  # number of a document of several pieces -> its Fate
    digests: set = field(default_factory=set)  # of kept documents, if asked for


class Fate(NamedTuple):
    """What the first pass knows of a document of several pieces before the second pass has read it."""

    kept: bool
    hashed_to_val: bool


class Document:
    """Counts of the document being read."""

    def __init__(self):
        self.characters = self.bytes = self.replaced = self.pieces = 0
        self.blank, self.hash = True, hashlib.sha256()

    def add(self, piece):
        data = piece.text.encode("utf-8")
        self.hash.update(data)
        self.characters += len(piece.text)
        self.bytes += len(data)
        self.replaced += piece.replaced
        self.pieces += 1
        self.blank = self.blank and not piece.text.strip()


def survey(pieces, fraction, others=(), keep_digests=False):
    """The Survey of `pieces`. `others` are digests of documents that had better not come again."""
    found, number = Survey(), -1
    for piece in pieces:
        if piece.first:
            document = Document()
            number += 1
        document.add(piece)
        if piece.last:
            count(found, number, document, piece.readable, fraction, others, keep_digests)
    return found


def count(found, number, document, readable, fraction, others, keep_digests):
    kept = readable and not document.blank
    digest = document.hash.digest()[:8]
    to_val = digest_below(digest, fraction)
    if document.pieces > 1:
        found.fates[number] = Fate(kept, to_val)
    if not kept:
        found.undecodable += not readable
        found.empty_docs += readable
        return
    found.documents += 1
    found.characters += document.characters
    found.bytes += document.bytes
    found.replaced += document.replaced
    found.largest = max(found.largest, document.bytes)
    found.hashed_to_val += to_val
    found.repeated += digest in others
    if keep_digests:
        found.digests.add(digest)


def chosen_by_hash(text, fraction, salt=b""):
    """Whether `text` is among the `fraction` of all texts that its hash chooses: equal texts always agree. Choices for
    different purposes need different salts to be independent."""
    return digest_below(hashlib.sha256(salt + text.encode("utf-8")).digest()[:8], fraction)


def digest_below(digest, fraction):
    return int.from_bytes(digest, "big") < fraction * 2**64


# ---- the decision


@dataclass(frozen=True)
class Split:
    """`rule` is files, hash, tail or none; a tail begins at character `cut` of all documents' text."""

    rule: str
    fraction: float = 0.0
    cut: int = 0
    reason: str = ""


def choose_split(asked, fraction, survey, has_files):
    """The Split for `--val_split asked` and the documents surveyed. Raises InputError where a side would be empty."""
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
    """A stretch of one document in one split. `starts`: the document begins here; `ends`: what follows is encoded
    by itself."""

    split: str
    name: str
    text: str
    starts: bool
    ends: bool


def parts(pieces, split, survey) -> Iterable[Part]:
    """The kept documents of `pieces`, each part in its split, in order."""
    kept = kept_pieces(pieces, survey, split.fraction)
    if split.rule == "tail":
        yield from cut_tail(kept, split.cut)
        return
    for piece, hashed_to_val in kept:
        side = "val" if split.rule == "hash" and hashed_to_val else "train"
        yield Part(side, piece.name, piece.text, piece.first, piece.last)


def kept_pieces(pieces, survey, fraction):
    """Pairs (piece, whether its document falls in validation by hash), without the dropped documents."""
    number = -1
    for piece in pieces:
        number += piece.first
        if piece.first and piece.last:
            fate = Fate(piece.readable and bool(piece.text.strip()), chosen_by_hash(piece.text, fraction))
        else:
            fate = survey.fates.get(number, Fate(False, False))
        if fate.kept:
            yield piece, fate.hashed_to_val


def cut_tail(kept, cut):
    """Parts in training up to character `cut` of the text, in validation from there. The document that is cut gets no
    start of its own in validation."""
    position = 0
    for piece, _ in kept:
        head, rest = piece.text[: max(0, cut - position)], piece.text[max(0, cut - position) :]
        position += len(piece.text)
        if head:
            yield Part("train", piece.name, head, piece.first, piece.last or position >= cut)
        if rest:
            yield Part("val", piece.name, rest, piece.first and not head, piece.last)
