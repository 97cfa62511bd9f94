"""The kind of a file: by its first bytes and its name; what is refused, and what the user is told to do."""

import bz2
import gzip
import lzma
import random

import numpy as np
import pytest
from prepare_helpers import documents_of, prepare_here, write

from gpt.errors import InputError
from gpt.text.kinds import HEAD_BYTES, SIGNATURES, compression_of, kind_of, named_compression, plain_suffix


@pytest.mark.parametrize(
    ("name", "suffix", "compression"),
    [
        ("a.txt", ".txt", ""),
        ("a.JSONL.GZ", ".jsonl", "gzip"),
        ("dir.zst/a", "", ""),
        ("a.csv.bz2", ".csv", "bzip2"),
        ("a.tar.xz", ".tar", "xz"),
        ("a.tzst", ".tzst", "zstd"),
        ("README", "", ""),
        (".gz", "", ""),
    ],
)
def test_a_name_tells_a_suffix_and_a_compression(name, suffix, compression):
    assert (plain_suffix(name), named_compression(name)) == (suffix, compression)


@pytest.mark.parametrize(
    ("data", "what", "advice"),
    [
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "a PDF document", "pdftotext"),
        (b"{\\rtf1\\ansi Hello}", "a rich text document", "docx"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "an office document", "docx"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "an image", "OCR"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "an image", "OCR"),
        (b"RIFF\x24\x00\x00\x00WEBPVP8 ", "an image", "OCR"),
        (b"ID3\x03\x00" + bytes(20), "sound or video", "leave it out"),
        (b"\x00\x00\x00\x20ftypisom", "sound or video", "leave it out"),
        (b"7z\xbc\xaf\x27\x1c\x00\x04", "an archive", "unpack it"),
        (b"Rar!\x1a\x07\x01\x00", "an archive", "unpack it"),
        (b"\x7fELF\x02\x01\x01", "an object file", "leave it out"),
        (b"MZ\x90\x00\x03\x00", "an object file", "leave it out"),
        (b"\xcf\xfa\xed\xfe\x0c\x00", "an object file", "leave it out"),
        (b"!<arch>\n/  ", "an object file", "leave it out"),
        (b"SQLite format 3\x00\x10", "a database", r"\.csv"),
        (b"\x93NUMPY\x01\x00v\x00", "a file of arrays", "leave it out"),
        (b"\x80\x04\x95\x05\x00", "pickled objects", "leave it out"),
        (b"GGUF\x03\x00\x00\x00", "weights", "leave it out"),
        (np.array([20240520, 1], "<i4").tobytes(), "a shard of token ids", "train.py --data"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer", "git lfs pull"),
        (random.Random(0).randbytes(4000), "binary data", "--encoding"),
        (np.arange(4000, dtype="<u2").tobytes(), "binary data", "--encoding"),
        (
            np.tile(np.arange(60, dtype="<u2"), 99).tobytes(),
            "binary data",
            "--encoding",
        ),  # ids of characters, nanoGPT's
    ],
)
@pytest.mark.parametrize("errors", ["strict", "replace", "skip"])
def test_a_file_that_is_not_text_is_refused_whatever_errors_says(tmp_path, data, what, advice, errors):
    what = what.replace("an object file", "object file")
    for name in ("x", "x.jsonl"):
        source = write(tmp_path / name, data)
        with pytest.raises(InputError, match=rf"{name}: .*{what}.*; .*{advice}"):
            prepare_here(tmp_path / "out", source, write(tmp_path / "y.txt", "y"), errors=errors)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "PAR1 is a word",
        "GGUF is a format",
        "BZhang wrote this",
        "wOFF and wOF2 are fonts",
        "MZ. BM. II* MM* ORC and ID3",
        "RIFF, WAVE and WEBP",
        "PK, as in penalty kick",
        "7z, Rar! and LZIP",
        "\x1b[1mbold\x1b[0m \x0c\x1a",
        "naïve café, 日本語, emoji 😀",
        "\x01\x02" * 9 + "\x7f",
    ],
)
def test_a_text_that_begins_like_a_signature_is_text(tmp_path, text):
    prepare_here(tmp_path / "out", write(tmp_path / "x.txt", text), val_fraction=0)
    assert documents_of(tmp_path / "out") == [text]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("text", ["Привет, мир ", "Γειά σου ", "שלום עולם ", "Hello ", "春眠不觉晓 "])
def test_text_in_utf16_is_not_taken_for_binary_data(encoding, text):
    # The high bytes of Cyrillic, Greek and Hebrew letters in UTF-16 are 4, 3 and 5: control characters.
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    assert kind_of("x.txt", (mark + text * 500).encode(encoding)[:HEAD_BYTES], "utf-8") == "text"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252", "shift_jis", "gb18030", "koi8-r", "cp037"])
def test_text_in_other_encodings_is_not_taken_for_binary_data(encoding):
    text = {"cp1252": "“naïve” — café ", "koi8-r": "привет мир ", "cp037": "Hello "}.get(encoding, "春眠不觉晓 ") * 500
    text = "日本の夏、キンチョーの夏 " * 500 if encoding == "shift_jis" else text
    assert kind_of("x.txt", text.encode(encoding)[:HEAD_BYTES], "utf-8") == "text"


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a.jsonl", b'{"text": 1}', "jsonl"),
        ("a.jsonl", b'\xef\xbb\xbf \n[{"text": 1}]', "json"),
        ("a.ndjson.gz", b"{}", "jsonl"),
        ("a.json", b"{}", "json"),
        ("a.TSV", b"a\tb", "csv"),
        ("a.txt", b"a,b\n1,2", "text"),
        ("a.html", b"<p>", "html"),
        ("a.txt", b"<!DOCTYPE html>", "text"),
        ("a.bin", b"PK\x03\x04", "zip"),
        ("a.unknown", b"text", "text"),
        ("a.dat", b"PAR1\x15\x04\x15", "parquet"),
        ("a", bytes(257) + b"ustar\x0000", "tar"),
        ("a.py", b"", "text"),
    ],
)
def test_the_kind_follows_the_content_and_then_the_name(name, data, kind):
    assert kind_of(name, data, "utf-8") == kind


@pytest.mark.parametrize("name", ["a.zip", "a.docx", "a.parquet"])
def test_a_text_with_the_name_of_another_format_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=rf"{name}: not a {name[2:]} file, whatever its name says"):
        prepare_here(tmp_path / "out", write(tmp_path / name, "text"))
    with pytest.raises(InputError, match=rf"{name}: empty; leave it out"):
        prepare_here(tmp_path / "out", write(tmp_path / name, ""))


@pytest.mark.parametrize("errors", ["strict", "replace", "skip"])
@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_file_that_is_compressed_twice_is_refused_whatever_errors_says(tmp_path, compress, errors):
    source = write(tmp_path / "x.txt.gz", gzip.compress(compress(b"text")))
    with pytest.raises(InputError, match=r"x\.txt\.gz: compressed twice; decompress it once"):
        prepare_here(tmp_path / "out", source, errors=errors)


def test_an_encoding_that_is_named_reads_bytes_that_look_binary(tmp_path):
    data = random.Random(0).randbytes(4000)
    prepare_here(tmp_path / "out", write(tmp_path / "x.txt", data), encoding="latin-1", keep_crlf=True, val_fraction=0)
    [text] = documents_of(tmp_path / "out")
    assert text == data.decode("latin-1")


def test_the_compression_is_seen_in_the_first_bytes():
    assert compression_of(b"BZh91AY&SY") == "bzip2"
    assert compression_of(b"BZhang") == ""
    assert compression_of(b"\x28\xb5\x2f\xfd") == "zstd"
    assert compression_of(b"\x28\xb5\x2f") == ""


def test_each_refusal_says_what_and_what_to_do():
    for foreign in SIGNATURES.values():
        assert foreign.what and foreign.advice
