"""Compressed files and archives: what is read, what is left out, what is damaged."""

import bz2
import gzip
import importlib
import io
import lzma
import sys
import tarfile
import zipfile

import pytest
from prepare_helpers import documents_of, jsonl, prepare_here, rows, write

from gpt.errors import InputError
from gpt.text import containers

zstd = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


def zstd_compress(data):
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})  # as the program zstd does


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd_compress}


def tar_of(members, mode="w"):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return data.getvalue()


def zip_of(members, **options):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content, **options)
    return data.getvalue()


ARCHIVES = {
    ".zip": zip_of,
    ".tar": tar_of,
    ".tar.gz": lambda members: tar_of(members, "w:gz"),
    ".tgz": lambda members: tar_of(members, "w:gz"),
    ".tar.bz2": lambda members: tar_of(members, "w:bz2"),
    ".tar.xz": lambda members: tar_of(members, "w:xz"),
    ".tar.zst": lambda members: zstd.compress(tar_of(members)),
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt", "a", "a.txt{}", "A.TXT{}"])
def test_a_compressed_file_is_read_whatever_its_name(tmp_path, suffix, name):
    text = "Grüße, " * 30_000
    source = write(tmp_path / name.format(suffix), COMPRESS[suffix](text.encode()))
    prepare_here(tmp_path / "out", source, val_fraction=0)
    assert documents_of(tmp_path / "out") == [text]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_records_are_records(tmp_path, suffix):
    source = write(tmp_path / f"a.jsonl{suffix}", COMPRESS[suffix](rows("a", "b").encode()))
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / f"b.csv{suffix}", COMPRESS[suffix](b"text\nc\nd\n"))
    prepare_here(tmp_path / "out", source, tmp_path / "in", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a", "b", "c", "d"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_damaged_compressed_file_is_refused_by_name(tmp_path, suffix):
    data = COMPRESS[suffix](bytes(range(32, 127)) * 5000)
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]
    for bad in (data[:-5], data[: len(data) // 2], flipped, b"plain text"):
        with pytest.raises(InputError, match=rf"x\.txt\{suffix}: damaged \w+ file \(.+\); restore it"):
            prepare_here(tmp_path / "out", write(tmp_path / f"x.txt{suffix}", bad), encoding="latin-1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_the_members_of_an_archive_are_read_as_files_are(tmp_path, suffix, capsys):
    members = [
        ("b.txt", "bé".encode()),
        ("sub/a.csv", b"n,joke\n1,ha\n2,ho\n"),
        ("c.jsonl.gz", gzip.compress(rows("c", "d").encode())),
        ("a.json", b'[{"text": "e"}, {"text": "f"}]'),
        ("page.html", b"<p>g</p>"),
        ("photo.png", b"\x89PNG\r\n\x1a\n"),
        ("inner.zip", zip_of([("x.txt", b"x")])),
        ("__MACOSX/._b.txt", b"\x00\x05\x16\x07"),
        (".hidden.txt", b"no"),
    ]
    source = write(tmp_path / f"x{suffix}", ARCHIVES[suffix](members))
    manifest = prepare_here(tmp_path / "out", source, val_fraction=0)
    assert documents_of(tmp_path / "out") == ["bé", "ha", "ho", "c", "d", "e", "f", "g"]
    assert manifest["source"]["files_passed_over"] == 4
    told = capsys.readouterr().err
    assert f"x{suffix}: left out 2 hidden, 1 .png, 1 archive in an archive" in told
    assert f"x{suffix}/sub/a.csv: the text is the field 'joke'" in told


def test_an_archive_given_twice_between_files_keeps_the_order(tmp_path):
    a = write(tmp_path / "a.tar", tar_of([("1.txt", b"1"), ("1.txt", b"2")]))
    b = write(tmp_path / "b.txt", "b")
    prepare_here(tmp_path / "out", a, a, b, a, val_fraction=0)
    assert documents_of(tmp_path / "out") == ["1", "2", "1", "2", "b", "1", "2"]


def test_members_of_one_name_have_encodings_and_losses_of_their_own(tmp_path):
    pytest.importorskip("chardet")
    texts = ["naïve café\n" * 20, "Съешь ещё этих мягких булок\n" * 20, "déjà vu"]
    encodings = ["cp1252", "cp1251", "utf-8"]
    contents = [text.encode(encoding) for text, encoding in zip(texts, encodings, strict=True)]
    members = [("a/b.v1.txt", data) for data in contents] + [("a/b (2).v1.txt", b"other")]
    source = write(tmp_path / "x.tar", tar_of(members))
    manifest = prepare_here(tmp_path / "out", source, val_fraction=0)
    assert documents_of(tmp_path / "out") == [*texts, "other"]
    assert {
        name.removeprefix(f"{source}/"): code.lower() for name, code in manifest["source"]["encodings"].items()
    } == {
        "a/b.v1.txt": "cp1252",
        "a/b (2).v1.txt": "cp1251",
    }
    manifest = prepare_here(tmp_path / "out", source, val_fraction=0, encoding="utf-8", errors="skip")
    assert [name.removeprefix(f"{source}/") for name in manifest["source"]["lost"]] == ["a/b.v1.txt", "a/b (2).v1.txt"]
    assert documents_of(tmp_path / "out") == ["déjà vu", "other"]


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_a_damaged_archive_is_refused_by_name(tmp_path, suffix):
    data = ARCHIVES[suffix]([("a.txt", b"".join(b"%d " % n for n in range(20_000))), ("b.txt", b"b")])
    for bad in (data[: len(data) // 2], data[:600]):
        with pytest.raises(InputError, match=rf"x{suffix}.*: damaged .*file"):
            prepare_here(tmp_path / "out", write(tmp_path / f"x{suffix}", bad))
    assert not (tmp_path / "out").exists()


def test_an_archive_without_text_says_what_is_in_it(tmp_path):
    source = write(tmp_path / "x.zip", zip_of([("a.png", b"x"), ("b.png", b"x"), ("README", b"x")]))
    with pytest.raises(InputError, match=r"x\.zip: no text in this archive \(2 \.png, 1 without suffix\)"):
        prepare_here(tmp_path / "out", source)
    with pytest.raises(InputError, match=r"x\.zip: no text in this archive \(it is empty\); unpack it"):
        prepare_here(tmp_path / "out", write(tmp_path / "x.zip", zip_of([])))


def test_a_member_that_is_not_text_is_named(tmp_path):
    source = write(tmp_path / "x.zip", zip_of([("a.txt", b"a"), ("b.txt", b"%PDF-1.4")]))
    with pytest.raises(InputError, match=r"x\.zip/b\.txt: a PDF document"):
        prepare_here(tmp_path / "out", source)


def test_an_encrypted_member_is_refused(tmp_path):
    data = bytearray(zip_of([("a.txt", b"a")]))
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag in the list of members
    with pytest.raises(InputError, match=r"x\.zip: encrypted; unpack it"):
        prepare_here(tmp_path / "out", write(tmp_path / "x.zip", bytes(data)))


def test_a_compression_that_python_lacks_is_named(tmp_path):
    data = bytearray(zip_of([("a.txt", b"a" * 100)]))
    for mark, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        data[data.index(mark) + offset] = 9  # deflate64
    with pytest.raises(InputError, match=r"not read .*; unpack it"):
        prepare_here(tmp_path / "out", write(tmp_path / "x.zip", bytes(data)))


def test_links_in_an_archive_are_left_out(tmp_path):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, kind in (
            ("link.txt", tarfile.SYMTYPE),
            ("device.txt", tarfile.CHRTYPE),
            ("folder.txt", tarfile.DIRTYPE),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        entry = tarfile.TarInfo("a.txt")
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"a"))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        link = zipfile.ZipInfo("link.txt")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("b.txt", "b")
    files = write(tmp_path / "x.tar", data.getvalue()), write(tmp_path / "x.zip", packed.getvalue())
    manifest = prepare_here(tmp_path / "out", *files, val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a", "b"]
    assert manifest["source"]["files_passed_over"] == 3


@pytest.mark.parametrize(
    ("member", "content", "what"),
    [
        ("xl/workbook.xml", b"x", "a spreadsheet; save it as .csv"),
        ("ppt/presentation.xml", b"x", "a presentation"),
        ("META-INF/container.xml", b"x", "an EPUB book; convert it: pandoc"),
        ("mimetype", b"application/epub+zip", "an EPUB book"),
        ("mimetype", b"application/vnd.oasis.opendocument.text", "an office document"),
        ("mimetype", b"application/vnd.oasis.opendocument.spreadsheet", "a spreadsheet"),
    ],
)
def test_formats_that_are_zip_files_are_refused_by_name(tmp_path, member, content, what):
    for name in ("x.docx", "x.zip", "x"):
        data = zip_of([("content.txt", b"text"), (member, content)])
        with pytest.raises(InputError, match=f"{name}: {what}"):
            prepare_here(tmp_path / "out", write(tmp_path / name, data))


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "MEMBERS", 2)
    source = write(tmp_path / "x.tar", tar_of([(f"{n}.txt", b"x") for n in range(3)]))
    with pytest.raises(InputError, match=r"x\.tar: more than 2 members; unpack it"):
        prepare_here(tmp_path / "out", source)


@pytest.mark.parametrize(
    ("name", "data", "module"),
    [
        ("x.txt.zst", zstd.compress(b"text"), zstd.__name__),
        ("x.parquet", b"PAR1\x15\x00PAR1", "pyarrow"),
        ("x.docx", zip_of([("word/document.xml", b"<x/>")]), "mammoth"),
    ],
)
def test_a_missing_extra_is_one_line_with_the_command(tmp_path, monkeypatch, name, data, module):
    for loaded in [*sys.modules]:
        if loaded == module or loaded.startswith(f"{module}."):
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(InputError, match=rf"x\..*needs {module}; run: pip install .*\[data\]"):
        prepare_here(tmp_path / "out", write(tmp_path / name, data))


def test_records_in_an_archive_are_read_again_for_the_tokenizer(tmp_path, capsys):
    source = write(tmp_path / "x.tar.gz", tar_of([("a.jsonl", jsonl({"body": "the cat sat " * 500}).encode())], "w:gz"))
    manifest = prepare_here(tmp_path / "out", source, tokenizer="bpe:260", val_fraction=0.1)
    assert manifest["source"]["characters"] == 6000
    assert capsys.readouterr().err.count("the text is the field 'body'") == 1
