"""Documents out of files: what a user names, how bytes become text, what is refused."""

import gzip
import io
import os

import pytest
from prepare_helpers import EOT, documents_of, ids_of, prepare_here, rows, write

from gpt.errors import InputError, ResourceError
from gpt.text import sources

# ---- files, folders, globs, stdin


def test_fault_016_pipes_devices_and_dangling_links_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    for name, message in (
        (tmp_path / "pipe", "not a regular file"),
        ("/dev/null", "use - for stdin"),
        (tmp_path / "dangling.txt", "leads nowhere"),
        (tmp_path / "absent.txt", "no such file"),
        (tmp_path / "*.absent", "no such file"),
        (tmp_path, "no .txt"),
    ):
        with pytest.raises(InputError, match=message):
            prepare_here(tmp_path / "out", name)


def test_folders_and_globs_expand_in_sorted_order(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a.txt", "B.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "in" / name, name)
    prepare_here(tmp_path / "out", tmp_path / "in", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["B.txt", "a.txt", "b/10.txt", "b/2.txt"]
    prepare_here(tmp_path / "out", tmp_path / "in" / "**" / "*.txt", val_fraction=0)
    assert sorted(documents_of(tmp_path / "out")) == ["B.txt", "a.txt", "b/10.txt", "b/2.txt"]


@pytest.mark.parametrize("pattern", ["**", "**/*", "**/**/*", "*", "../in/*"])
def test_a_pattern_reads_no_file_twice(tmp_path, monkeypatch, pattern):
    for name in ("b/c/2.txt", "b/10.txt", "a.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "in" / name, name)
    monkeypatch.chdir(tmp_path / "in")
    prepare_here(tmp_path / "out", pattern, val_fraction=0)
    assert sorted(documents_of(tmp_path / "out")) == ["a.txt", "b/10.txt", "b/c/2.txt"]


def test_a_pattern_of_folders_alone_that_means_files_is_refused(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    with pytest.raises(InputError, match="no such file"):
        prepare_here(tmp_path / "out", tmp_path / "in" / "**")


def test_a_linked_folder_is_counted_as_passed_over(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "in" / "a.txt", "a")
    write(tmp_path / "elsewhere" / "b.txt", "b")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    manifest = prepare_here(tmp_path / "out", tmp_path / "in", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a"]
    assert manifest["source"]["files_passed_over"] == 1


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    (tmp_path / "in" / "locked").mkdir(parents=True)
    write(tmp_path / "in" / "a.txt", "a")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refusing)
    with pytest.raises(InputError, match="locked: Permission denied; make it readable"):
        prepare_here(tmp_path / "out", tmp_path / "in")


def test_a_glob_of_bytes_from_stdin_is_spooled_beside_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a b c " * 50_000)))
    manifest = prepare_here(tmp_path / "deep" / "out", "-", val_split="tail", val_fraction=0.5)
    assert manifest["source"]["bytes"] == 300_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]


def test_a_closed_stdin_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)  # as Python has it then
    with pytest.raises(InputError, match="stdin: closed; pipe the text into it"):
        prepare_here(tmp_path / "out", "-")


def test_a_suffix_that_is_added_to_the_table_is_read_as_its_kind(tmp_path, monkeypatch):
    monkeypatch.setitem(sources.KINDS, ".rows", "jsonl")
    (tmp_path / "in").mkdir()
    file = write(tmp_path / "in" / "a.rows", rows("a", "b"))
    for name in (file, tmp_path / "in"):
        prepare_here(tmp_path / "out", name, val_fraction=0)
        assert documents_of(tmp_path / "out") == ["a", "b"]


@pytest.mark.parametrize(
    ("error", "failure", "message"),
    [
        (PermissionError(13, "Permission denied"), InputError, r"x\.txt: permission denied; make it readable"),
        (OSError(5, "Input/output error"), ResourceError, r"reading failed: .*x\.txt: Input/output error; try again"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, error, failure, message):
    source = write(tmp_path / "x.txt", "text")

    def refuse(*_):
        raise error

    monkeypatch.setattr(sources, "open", refuse, raising=False)
    with pytest.raises(failure, match=message):
        prepare_here(tmp_path / "out", source)


def test_fault_012_a_full_disk_under_the_copy_of_stdin_is_exit_5(tmp_path, monkeypatch, full_disk):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    with pytest.raises(ResourceError, match=r"copying the input failed: .*: No space left on device; free some space"):
        prepare_here(tmp_path / "out", "-")


# ---- bytes to documents


def test_fault_001_invalid_utf8_names_the_byte(tmp_path, monkeypatch):
    data = "é".encode() * 500 + b"\xff" + b" more " + b"\xfe"
    source = write(tmp_path / "x.txt", data)
    expected = r"x\.txt: invalid UTF-8 at byte 1000 \(0xff\); use --encoding, or --errors replace\|skip"
    for size in (1, 333, 1 << 16):
        monkeypatch.setattr("gpt.text.sources.BLOCK_BYTES", size)
        with pytest.raises(InputError, match=expected):
            prepare_here(tmp_path / "out", source)
        assert not (tmp_path / "out").exists()
    manifest = prepare_here(tmp_path / "out", source, errors="replace", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["é" * 500 + "\ufffd more \ufffd"]
    assert manifest["source"]["replaced"] == 2
    manifest = prepare_here(tmp_path / "out", source, write(tmp_path / "y.txt", "kept"), errors="skip", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["kept"]
    assert manifest["source"]["undecodable"] == 1
    prepare_here(tmp_path / "out", source, encoding="latin-1", val_fraction=0)
    assert documents_of(tmp_path / "out") == [data.decode("latin-1")]


def test_fault_001_a_cut_character_at_the_end_and_a_bad_line_of_jsonl_are_named(tmp_path):
    with pytest.raises(InputError, match=r"x\.txt: invalid UTF-8 at byte 2 \(0xe2\)"):
        prepare_here(tmp_path / "out", write(tmp_path / "x.txt", b"ab\xe2\x82"))
    bad = write(tmp_path / "x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "c"}\n')
    with pytest.raises(InputError, match=r"x\.jsonl:2: invalid UTF-8 at byte 24 \(0xff\)"):
        prepare_here(tmp_path / "out", bad)
    prepare_here(tmp_path / "out", bad, errors="skip", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a", "c"]


def test_fault_003_empty_documents_are_counted_and_get_no_end_of_text(tmp_path):
    source = write(tmp_path / "x.jsonl", rows("", "a", " \n", "b"))
    write(tmp_path / "blank.txt", " " * 200_000)
    manifest = prepare_here(tmp_path / "out", source, tmp_path / "blank.txt", val_fraction=0)
    assert manifest["source"]["empty_docs"] == 3
    assert ids_of(tmp_path / "out").tolist() == [EOT, ord("a"), EOT, ord("b")]


@pytest.mark.parametrize(
    "line", ["{", "[]", '"text"', "{}", '{"text": 3}', '{"text": null}', '{"body": "x"}', "[" * 100_000]
)
def test_fault_004_a_line_without_a_string_field_is_named(tmp_path, line):
    source = write(tmp_path / "x.jsonl", rows("a") * 16 + line + "\n")
    with pytest.raises(InputError, match=r'x\.jsonl:17: expected an object with string field "text"'):
        prepare_here(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


def test_another_field_can_be_the_text(tmp_path):
    prepare_here(tmp_path / "out", write(tmp_path / "x.jsonl", '{"body": "b"}\n\n'), field="body", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["b"]


def test_fault_005_marks_line_ends_nul_and_surrogates(tmp_path):
    text = write(tmp_path / "a.txt", b"\xef\xbb\xbfa\r\nb\x00\xef\xbb\xbf")
    lines = write(tmp_path / "b.jsonl", b'\xef\xbb\xbf{"text": "x\\ud800y\\udfff"}\n{"text": "\\ud83d\\ude00"}\n')
    manifest = prepare_here(tmp_path / "out", text, lines, val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a\r\nb\x00\ufeff", "x\ufffdy\ufffd", "😀"]
    assert manifest["source"]["replaced"] == 2
    wide = write(tmp_path / "c.txt", "wide é", encoding="utf-16")
    prepare_here(tmp_path / "out", wide, encoding="utf-16", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["wide é"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "cp037"])
def test_fault_005_jsonl_in_an_encoding_that_hides_its_line_breaks_is_refused(tmp_path, encoding):
    lines = write(tmp_path / "x.jsonl", rows("\u0a0a"), encoding=encoding)
    with pytest.raises(InputError, match=rf"x\.jsonl: lines cannot be told apart in {encoding}; convert it to UTF-8"):
        prepare_here(tmp_path / "out", lines, encoding=encoding)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "latin-1", "shift_jis", "gb18030"])
def test_jsonl_in_an_encoding_that_keeps_line_breaks_is_read(tmp_path, encoding):
    text = "é" if encoding == "latin-1" else "日本"
    lines = write(tmp_path / "x.jsonl", f'{{"text": "{text}"}}\n{{"text": "b"}}\n', encoding=encoding)
    prepare_here(tmp_path / "out", lines, encoding=encoding, val_fraction=0)
    assert documents_of(tmp_path / "out") == [text, "b"]


def test_a_damaged_gzip_file_is_refused(tmp_path):
    data = gzip.compress(b"text " * 1000)
    for bad in (data[:-20], b"no gzip"):
        with pytest.raises(InputError, match="damaged gzip"):
            prepare_here(tmp_path / "out", write(tmp_path / "x.txt.gz", bad))
