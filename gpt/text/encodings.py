"""Tells the encoding of a text file by its bytes.

UTF-8 if all of the file is valid UTF-8; UTF-16 or UTF-32 if it begins with their byte order mark; UTF-16 without a mark
if its bytes alternate between two distributions (half of English text in UTF-16 is NULs); else the guess of a detector,
which gets only the lines that are not ASCII: among many English lines it no longer sees Russian ones."""

import codecs
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import IO, Any

BLOCK_BYTES = 1 << 16
EVIDENCE_BYTES = 1 << 16  # of lines that are not ASCII; the detector gets no more
MARKS = {  # the mark of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
PLAIN = "\t\n\f\r\x1b"  # control characters that stand in text
CONTROL = bytes({*range(32)} - set(PLAIN.encode()))  # bytes that 8-bit text hardly holds
# The detector's confidence from which its guess counts: right guesses of a line have 0.015 and more, that of one bad
# byte has 0.005. For a short text 0.1 is needed, or the lines around it, with which right guesses have 0.6.
CONFIDENCE, SHORT_CONFIDENCE, CONTEXT_CONFIDENCE = 0.012, 0.1, 0.3
SHORT_BYTES, LEAST_BYTES = 50, 4
# The share of the best guess's confidence from which the most frequent encoding, cp1252, is taken instead. Western text
# has 0.58 and more, Turkish 0.49, Polish 0.3.
WESTERN_SHARE = 0.55
WESTERN = re.compile(r"cp1252|iso8859-(1|15)|latin", re.IGNORECASE)


def encoding_of(file: IO[bytes]) -> str:
    """Returns the encoding of a text file, by a name that Python knows, and goes back to the start of the file. Returns
    "utf-8" for a file whose encoding is unknown: reading it then names the byte that is wrong."""
    head = file.read(BLOCK_BYTES)
    file.seek(0)
    mark = next((mark for mark in MARKS if head.startswith(mark)), None)
    encoding = MARKS[mark] if mark else utf16_without_mark(head)
    if not encoding:
        evidence = lines_not_ascii(file)
        encoding = guess(evidence, head) if evidence else "utf-8"
        file.seek(0)
    return encoding


# ---- UTF-16 without a mark


def utf16_without_mark(head: bytes) -> str:
    """Returns "utf-16-le" or "utf-16-be" if the first bytes of a file are such text, else "".

    In UTF-16 the high bytes of the characters are few: NUL for Latin letters, 4 for Cyrillic, a third of all bytes for
    Chinese. In other text the bytes at odd places and those at even places are alike."""
    pairs = len(head) // 2
    if len(head) - len(head.translate(None, CONTROL)) < 0.01 * len(head):
        return ""
    even, odd = Counter(head[: 2 * pairs : 2]), Counter(head[1 : 2 * pairs : 2])
    name, high, low = ("utf-16-le", odd, even) if len(odd) <= len(even) else ("utf-16-be", even, odd)
    latin = high[0] > 0.5 * pairs
    common = sum((high & low).values())  # bytes that the two distributions share
    other = pairs >= 128 and common <= 0.5 * pairs
    return name if pairs and (latin or other) and is_text(head, name) else ""


def is_text(head: bytes, encoding: str) -> bool:
    """Returns whether the first bytes of a file decode to characters that are assigned and no controls."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    strange = sum(unicodedata.category(character) in ("Cc", "Cn", "Co") for character in text if character not in PLAIN)
    return strange <= 0.01 * len(text)


# ---- not UTF-8


def lines_not_ascii(file: IO[bytes]) -> bytes:
    """Returns b"" if all of a file is valid UTF-8, else the first lines that are not ASCII, about EVIDENCE_BYTES."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines, valid = b"", True
    while valid or len(lines) < EVIDENCE_BYTES:
        block = file.read(BLOCK_BYTES) + file.readline(BLOCK_BYTES)
        try:
            if valid:
                decoder.decode(block, final=not block)
        except UnicodeDecodeError:
            valid = False
        if not block:
            break
        if len(lines) < EVIDENCE_BYTES and not block.isascii():
            lines += b"".join(line for line in block.splitlines(keepends=True) if not line.isascii())
    return b"" if valid else lines


def guess(evidence: bytes, context: bytes = b"") -> str:
    """Returns the encoding of `evidence`, which is not valid UTF-8: the detector's guess, or "utf-8" if that is UTF-8
    with some bad bytes or a cut end, if the detector is not sure, or if it is not installed. If the evidence alone is
    too little, it also looks at `context`, other lines of the file.

    By accident some characters of Thai, Chinese and other encodings are valid UTF-8: one for each two bytes that are
    not, or fewer. In Western encodings that hardly happens."""
    text = evidence.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    good = sum(character > "\x7f" for character in text) - bad
    if good >= bad or decodes(evidence, "utf-8"):
        return "utf-8"
    name = detect(evidence, SHORT_CONFIDENCE if len(evidence) < SHORT_BYTES else CONFIDENCE)
    name = name or detect(evidence + context, CONTEXT_CONFIDENCE) or detect(evidence, CONFIDENCE)
    return "utf-8" if not name or (WESTERN.match(name) and 10 * good >= bad) else name


def detector() -> Any:
    """Returns the module chardet, or None if it is not installed or older than version 6."""
    try:
        import chardet
    except ImportError:
        return None
    return chardet if hasattr(chardet, "EncodingEra") else None


def detect(data: bytes, confidence: float) -> str:
    """Returns Python's name of the encoding that the detector gives for `data`, or "" if it is less sure than
    `confidence` or not installed. Leaves out the encodings of old Macs, of DOS and of mainframes."""
    chardet = detector()
    if not chardet:
        return ""
    era = chardet.EncodingEra.MODERN_WEB | chardet.EncodingEra.LEGACY_ISO
    guesses = chardet.detect_all(data, encoding_era=era, ignore_threshold=True)
    sure = {each["encoding"]: each["confidence"] for each in guesses if each["encoding"]}
    if not sure or max(sure.values()) < confidence or len(data) < LEAST_BYTES:
        return ""
    best = max(sure, key=sure.__getitem__)
    western = sure.get("Windows-1252", 0) >= WESTERN_SHARE * sure[best] and decodes(data, "cp1252")
    try:
        name = codecs.lookup("cp1252" if western else best).name
    except LookupError:
        return ""
    return name if decodes(data, name) else ""


def decodes(data: bytes, encoding: str) -> bool:
    """Returns whether `data`, whose end may be cut, is valid in an encoding."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(data)
    except UnicodeError:
        return False
    return True


# ---- text that comes in pieces


def with_line_breaks(texts: Iterable[str]) -> Iterator[str]:
    """Yields `texts`, the parts of one text, with "\\r\\n" and "\\r" turned into "\\n", also where parts meet."""
    pending = ""
    for text in texts:
        text = pending + text
        pending = "\r" if text.endswith("\r") else ""
        if "\r" in text:
            text = text.removesuffix("\r").replace("\r\n", "\n").replace("\r", "\n")
        yield text
    if pending:
        yield "\n"


def split_texts(texts: Iterable[str], separator: str) -> Iterator[tuple[int, str]]:
    """Yields the documents in `texts`, the parts of one text, as pairs (number of the document, part of it). A document
    ends at each `separator`, to which a line break after it belongs. Documents that are blank may be left out. With the
    separator "" the text is one document."""
    if not separator:
        yield from zip(itertools.repeat(0), texts, strict=False)
        return
    border = re.compile(re.escape(separator) + ("" if separator == "\n" else r"(\r?\n)?"))
    number, begun, text = 0, False, ""
    for block in itertools.chain[str | None](texts, [None]):
        text += block or ""
        start = 0
        for match in border.finditer(text):
            if block is not None and text[match.end() : match.end() + 2] in ("", "\r"):
                break  # a line break may follow
            part = text[start : match.start()]
            if begun or part.strip():
                yield number, part
                number += 1
            begun, start = False, match.end()
        end = len(text) if block is None else max(start, len(text) - len(separator) - 3)
        rest, text = text[start:end], text[end:]
        if rest and (begun or block is not None or rest.strip()):
            yield number, rest
            begun = True
