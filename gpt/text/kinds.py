"""Tells the kind of a file by its first bytes and its name. Refuses files that are not text, and says what to do."""

import codecs
import re
from collections.abc import Collection
from pathlib import PurePath
from typing import NamedTuple

from gpt.errors import InputError
from gpt.text.encodings import utf16_without_mark

HEAD_BYTES = 1 << 13  # the part of a file that tells its kind
UTF8 = ("auto", "utf-8")  # values of --encoding: with them, bytes that are no UTF-8 may be no text at all
CONTROL = bytes({*range(1, 32)} - set(b"\t\n\v\f\r\x1b"))  # bytes that text hardly holds; NULs may be UTF-16
CONTROL_SHARE = 0.07  # random bytes have a share of 0.1 of them, Chinese in UTF-16 of 0.05

# Suffix -> kind of source. A folder gives the files with these suffixes. A file with another suffix is read as text if
# the user names the file itself.
KINDS = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex", ".py"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".json": "json",
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    ".docx": "docx",
    ".zip": "zip",
    **dict.fromkeys((".tar", ".tgz", ".tbz2", ".txz", ".tzst"), "tar"),
}
RECORDS = ("jsonl", "json", "csv", "parquet")  # the kinds whose documents are records with fields
ARCHIVES = ("zip", "tar")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
TAR_COMPRESSIONS = {".tgz": "gzip", ".tbz2": "bzip2", ".txz": "xz", ".tzst": "zstd"}
MAGIC = {  # first bytes of compressed files
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}


class Foreign(NamedTuple):
    """A kind of file that is refused."""

    what: str
    advice: str


PDF = Foreign("a PDF document", "convert it: pdftotext FILE.pdf FILE.txt")
EPUB = Foreign("an EPUB book", "convert it: pandoc FILE.epub -t plain -o FILE.txt")
OFFICE = Foreign("an office document of a kind that is not read", "save it as .docx or .txt")
RICH = Foreign("a rich text document", "save it as .docx or .txt")
SHEET = Foreign("a spreadsheet", "save it as .csv")
SLIDES = Foreign("a presentation", "save its text as .txt")
IMAGE = Foreign("an image", "leave it out, or extract its text with an OCR program")
SOUND = Foreign("sound or video", "leave it out")
TWICE = Foreign("compressed twice", "decompress it once")
PACKED = Foreign("an archive of a kind that is not read", "unpack it, or pack it as .zip or .tar.gz")
PROGRAM = Foreign("a program or object file", "leave it out")
DATABASE = Foreign("a database", "export its text as .csv or .jsonl")
WEIGHTS = Foreign("a file of arrays, weights or pickled objects", "leave it out")
FONT = Foreign("a font", "leave it out")
POINTER = Foreign("a git-lfs pointer, not the file itself", "run: git lfs pull")
SHARD = Foreign("a shard of token ids", "give its folder to train.py --data")
BINARY = Foreign("binary data, not text", "leave it out; if it is text, name its encoding with --encoding")

SIGNATURES = {
    rb"%PDF-": PDF,
    rb"\{\\rtf": RICH,
    rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": OFFICE,  # .doc, .xls and encrypted .docx
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|II\*\x00|MM\x00\*|RIFF.{4}WEBP": IMAGE,
    rb"BM.{4}\x00{4}|\x00.{3}ftyp(avif|heic|mif1)": IMAGE,
    rb"RIFF.{4}(WAVE|AVI )|\x00.{3}ftyp|ID3[\x02-\x04]\x00|\xff[\xf2\xf3\xfb]|OggS\x00|fLaC\x00|\x1aE\xdf\xa3": SOUND,
    rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07|LZIP\x01|\x04\x22\x4d\x18|\x1f[\x9d\xa0]|MSCF\x00|xar!\x00": PACKED,
    rb"\x7fELF|!<arch>\n|\x00asm|\xca\xfe\xba\xbe|MZ.\x00|[\xcf\xce]\xfa\xed\xfe": PROGRAM,
    rb"\xfe\xed\xfa[\xcf\xce]|BC\xc0\xde|(L\x01|d\x86).{14}\x00\x00": PROGRAM,  # the last: object files of Windows
    rb"SQLite format 3\x00|ARROW1\x00|Obj\x01|ORC[\x00-\x08]": DATABASE,
    rb"\x93NUMPY|\x89HDF\r\n|GGUF[\x01-\x09]\x00|\x80[\x02-\x05][\x95(\]}c]": WEIGHTS,
    rb"wOF[F2](\x00\x01|OTTO)|OTTO\x00|\x00\x01\x00\x00\x00": FONT,
    rb"version https://git-lfs\.github\.com/spec/": POINTER,
    b"|".join(re.escape(number.to_bytes(4, "little")) for number in (20240520, 20240801)): SHARD,
}
ZIPPED = {  # found in the names of a zip file's members, each followed by a line break, or in its member "mimetype"
    r"(?m)^META-INF/container\.xml$|^application/epub": EPUB,
    r"(?m)^xl/workbook\.|^application/vnd\.oasis\.opendocument\.spreadsheet": SHEET,
    r"(?m)^ppt/presentation\.|^application/vnd\.oasis\.opendocument\.presentation": SLIDES,
    r"(?m)^application/vnd\.oasis\.opendocument": OFFICE,
}


def compression_of(head: bytes) -> str:
    """Returns the compression that the first bytes of a file show (gzip, bzip2, xz or zstd), or ""."""
    return next((name for name, magic in MAGIC.items() if magic.match(head)), "")


def named_compression(name: str) -> str:
    """Returns the compression that a file's name tells, or "": named_compression("a.TGZ") == "gzip"."""
    return (COMPRESSIONS | TAR_COMPRESSIONS).get(PurePath(name.lower()).suffix, "")


def plain_suffix(name: str) -> str:
    """Returns the suffix of a name without that of a compression: plain_suffix("a.jsonl.gz") == ".jsonl"."""
    path = PurePath(name.lower())
    return PurePath(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def kind_of(name: str, head: bytes, encoding: str) -> str:
    """Returns the kind of a source: a value of KINDS. `head` is the first HEAD_BYTES of the file, decompressed;
    `encoding` the value of --encoding. Raises InputError, which says what to do, for a file that holds no text and for
    one that is not what its name says."""
    foreign = next((foreign for magic, foreign in SIGNATURES.items() if re.match(magic, head, re.DOTALL)), None)
    if foreign or compression_of(head):
        raise refusal(name, foreign or TWICE)
    named = KINDS.get(plain_suffix(name), "text")
    if re.match(rb"PK(\x03\x04|\x05\x06)", head):
        return "zip"
    if head[257:262] == b"ustar":
        return "tar"
    if re.match(rb"PAR1.{0,3}[\x00-\x08\x0e-\x1f]", head, re.DOTALL) or (named == "parquet" and head[:4] == b"PAR1"):
        return "parquet"
    if named in ("zip", "docx", "parquet"):
        what = f"not a {named} file, whatever its name says; give it its right name" if head else "empty; leave it out"
        raise InputError(f"{name}: {what}")
    if named == "jsonl" and first_character(head) == b"[":
        return "json"
    if encoding in UTF8 and is_binary(head):
        raise refusal(name, BINARY)
    return named


def kind_of_zip(name: str, members: Collection[str], mimetype: str) -> str:
    """Returns "docx" or "zip" for a zip file with these members, and its `mimetype` member's text if it has one. Raises
    InputError for the formats that are zip files of another use."""
    if any(member.startswith("word/document") for member in members):
        return "docx"
    text = "\n".join([mimetype, *members])
    foreign = next((foreign for pattern, foreign in ZIPPED.items() if re.search(pattern, text)), None)
    if foreign:
        raise refusal(name, foreign)
    if KINDS.get(plain_suffix(name)) == "docx":
        raise InputError(f"{name}: not a docx file, whatever its name says; give it its right name")
    return "zip"


def refusal(name: str, foreign: Foreign) -> InputError:
    return InputError(f"{name}: {foreign.what}; {foreign.advice}")


def first_character(head: bytes) -> bytes:
    """Returns the first character of a text that is no byte order mark and no white space, in UTF-8, 16 or 32."""
    return head.removeprefix(codecs.BOM_UTF8).lstrip(b"\xff\xfe\0 \t\r\n")[:1]


def is_binary(head: bytes) -> bool:
    """Returns whether the first bytes of a file are not text. Bytes are text if they have few control characters, if
    they are UTF-16, or if they are UTF-8 without NULs."""
    if len(head) - len(head.translate(None, CONTROL)) <= 4 + CONTROL_SHARE * len(head):
        return False
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or utf16_without_mark(head):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True
    return b"\0" in head
