"""Documents out of files: what a user names, how bytes become text, what is refused."""

import gzip
import io
import json
import os
import sys
import types

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


def test_a_folder_tells_how_many_files_of_which_kinds_and_which_linked_folders_it_left_out(tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.txt", "b.rst", "x.pdf", "sub/y.PDF", "sub/z.pdf.gz", "z.svg", "Makefile", ".hidden", "~$a.docx"):
        write(folder / name, "text")
    (folder / "sub" / "link").symlink_to(tmp_path)
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    manifest = prepare_here(tmp_path / "out", folder, val_fraction=0)
    assert documents_of(tmp_path / "out") == ["text", "text"]
    assert manifest["source"]["files_passed_over"] == 9
    [line] = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    kinds = "3 .pdf, 2 hidden, 1 .svg, 1 link or device, 1 without suffix, linked folder sub/link;"
    assert sorted(line.split("left out ")[1].split(";")[0].split(", ")) == sorted(kinds.rstrip(";").split(", "))
    assert f"{folder}: left out" in line and "if they hold text, name them" in line


def test_a_folder_that_leaves_nothing_out_says_nothing(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.txt", "a")
    prepare_here(tmp_path / "out", tmp_path / "in", val_fraction=0)
    assert "left out" not in capsys.readouterr().err


def test_a_folder_without_text_says_what_is_in_it(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.pdf", "b.pdf", "c.epub"):
        write(tmp_path / "in" / name, "x")
    with pytest.raises(
        InputError, match=r"in: no \.txt.* files in it \(2 \.pdf, 1 \.epub\); give the files themselves"
    ):
        prepare_here(tmp_path / "out", tmp_path / "in")


def test_a_file_in_a_folder_that_is_not_what_its_name_says_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.txt", "a")
    write(tmp_path / "in" / "b.txt", b"%PDF-1.4 ")
    with pytest.raises(InputError, match=r"in/b\.txt: a PDF document; convert it"):
        prepare_here(tmp_path / "out", tmp_path / "in")


def test_stdin_is_told_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(gzip.compress("é".encode()))))
    prepare_here(tmp_path / "out", "-", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["é"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"%PDF-1.4")))
    with pytest.raises(InputError, match="stdin: a PDF document"):
        prepare_here(tmp_path / "out", "-")


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


def test_a_stdin_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    with open(os.open(tmp_path / "x", os.O_WRONLY | os.O_CREAT), encoding="utf-8") as only_for_writing:
        monkeypatch.setattr("sys.stdin", only_for_writing)
        with pytest.raises(InputError, match=r"^stdin: Bad file descriptor; pipe the text into it$"):
            prepare_here(tmp_path / "out", "-")
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize(
    "files, given, field",
    [
        ({"a.jsonl": '{"body": "a"}', "b.txt": "b"}, "", "body"),
        ({"a.jsonl": '{"body": "a"}', "b.json": '[{"text": "b"}]', "c.jsonl": '{"body": "c"}'}, "", "body, text"),
        ({"a.jsonl": '{"body": "a", "more": {"x": "b"}}'}, "more.x", "more.x"),
        ({"b.txt": "b"}, "", ""),
    ],
)
def test_the_manifest_has_the_field_that_was_chosen(tmp_path, files, given, field):
    inputs = [write(tmp_path / name, text) for name, text in files.items()]
    manifest = prepare_here(tmp_path / "out", *inputs, val_fraction=0, **({"field": given} if given else {}))
    assert manifest["source"]["options"]["field"] == field
    assert ("--field" in manifest["source"]["recipe"]) == bool(given)


def test_fault_005_marks_line_ends_nul_and_surrogates(tmp_path):
    text = write(tmp_path / "a.txt", b"\xef\xbb\xbfa\r\nb\x00\xef\xbb\xbf")
    lines = write(tmp_path / "b.jsonl", b'\xef\xbb\xbf{"text": "x\\ud800y\\udfff"}\n{"text": "\\ud83d\\ude00"}\n')
    manifest = prepare_here(tmp_path / "out", text, lines, val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a\nb\x00\ufeff", "x\ufffdy\ufffd", "😀"]
    assert manifest["source"]["replaced"] == 2
    wide = write(tmp_path / "c.txt", "wide é", encoding="utf-16")
    prepare_here(tmp_path / "out", wide, encoding="utf-16", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["wide é"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp037"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("errors", ["strict", "skip", "replace"])
def test_fault_005_jsonl_in_an_encoding_whose_characters_hold_bytes_of_line_breaks_is_read(
    tmp_path, encoding, ending, errors
):
    texts = ["ab" * 40_000, "c", "d"] if encoding == "cp037" else ["\u0a0a\u0d0d\u2028" * 40_000, "日本", "d\ud800"]
    data = ending.join(json.dumps({"text": text}, ensure_ascii="\ud800" in text) for text in texts)
    lines = write(tmp_path / "x.jsonl", data + ending * 3, encoding=encoding)
    manifest = prepare_here(tmp_path / "out", lines, encoding=encoding, errors=errors, val_fraction=0)
    assert documents_of(tmp_path / "out") == [text.replace("\ud800", "\ufffd") for text in texts]
    assert manifest["source"]["undecodable"] == 0


def test_fault_004_a_bad_line_of_jsonl_in_utf16_is_named_or_skipped(tmp_path):
    good = [json.dumps({"text": text}).encode("utf-16-le") for text in ("a", "b")]
    bad = {"no JSON": "{".encode("utf-16-le"), "half a pair": '{"text": "\ud83d"}'.encode("utf-16-le", "surrogatepass")}
    for line in bad.values():
        data = b"\n\0".join([b"\xff\xfe" + good[0], line, good[1]])
        source = write(tmp_path / "x.jsonl", data)
        with pytest.raises(InputError, match=r"x\.jsonl(:2: expected an object|: invalid utf-16 at byte \d+)"):
            prepare_here(tmp_path / "out", source)
        manifest = prepare_here(tmp_path / "out", source, errors="skip", val_fraction=0)
        assert documents_of(tmp_path / "out") == ["a", "b"]
        assert manifest["source"]["undecodable"] == 1


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


# ---- encodings, file by file


FRENCH = "Le café était fermé; à côté, l’hôtel « Étoile » reçoit les élèves dès l’été.\n"
RUSSIAN = "Все люди рождаются свободными и равными в своём достоинстве и правах.\n"


def test_each_file_is_read_in_its_own_encoding_which_is_told_and_recorded(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    files = {"a": (FRENCH, "utf-8"), "b": (FRENCH, "cp1252"), "c": (RUSSIAN * 3, "utf-16-le"), "d": (RUSSIAN, "utf-16")}
    for name, (text, encoding) in files.items():
        write(tmp_path / "in" / f"{name}.txt", text, encoding=encoding)
    manifest = prepare_here(tmp_path / "out", tmp_path / "in", val_fraction=0)
    assert documents_of(tmp_path / "out") == [text for text, _ in files.values()]
    encodings = {str(tmp_path / "in" / f"{name}.txt"): encoding for name, (_, encoding) in files.items() if name > "a"}
    assert manifest["source"]["encodings"] == encodings
    assert manifest["source"]["options"]["encoding"] == "auto"
    out = capsys.readouterr().out
    for name, encoding in encodings.items():
        assert f"note: {name}: not UTF-8, read as {encoding}" in out
    assert "a.txt" not in out


def test_many_files_in_other_encodings_are_all_recorded_and_five_are_told(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for number in range(9):
        write(tmp_path / "in" / f"{number}.txt", FRENCH, encoding="cp1252")
    manifest = prepare_here(tmp_path / "out", tmp_path / "in", val_fraction=0)
    assert set(manifest["source"]["encodings"].values()) == {"cp1252"} and len(manifest["source"]["encodings"]) == 9
    out = capsys.readouterr().out
    assert out.count("read as cp1252") == 5 and "(and 4 more files); --encoding names another one" in out


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("how", ["stdin", "gz", "val"])
def test_both_passes_decode_alike_whatever_the_text_comes_from(tmp_path, monkeypatch, encoding, how):
    text = FRENCH * 3000
    data, options, name = text.encode(encoding), {"val_fraction": 0}, tmp_path / "x.txt"
    if how == "stdin":
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        name = "-"
    elif how == "gz":
        name = write(tmp_path / "x.txt.gz", gzip.compress(data))
    else:
        options = {"val": (str(write(tmp_path / "v.txt", data)),)}
        write(name, "training")
    manifest = prepare_here(tmp_path / "out", name, **options)
    assert documents_of(tmp_path / "out", "val" if how == "val" else "train") == [text]
    assert list(manifest["source"]["encodings"].values()) == [encoding]


def test_an_encoding_that_is_named_holds_for_all_files_and_nothing_is_guessed(tmp_path, capsys):
    texts = [write(tmp_path / "a.txt", FRENCH), write(tmp_path / "b.txt", FRENCH, encoding="cp1252")]
    manifest = prepare_here(tmp_path / "out", *texts, encoding="cp1252", val_fraction=0)
    assert documents_of(tmp_path / "out") == [FRENCH.encode().decode("cp1252", "replace"), FRENCH]
    assert manifest["source"]["encodings"] == {}
    with pytest.raises(InputError, match=r"b\.txt: invalid UTF-8 at byte 6 \(0xe9\)"):
        prepare_here(tmp_path / "out", *texts, encoding="utf-8")


def test_a_file_that_the_guess_does_not_fit_is_refused_with_the_guess(tmp_path):
    data = RUSSIAN.encode("cp1251") * 2000 + b"\x98"  # the only byte that cp1251 does not have
    with pytest.raises(InputError, match=rf"x\.txt: invalid cp1251 at byte {len(data) - 1} \(0x98\); use --encoding"):
        prepare_here(tmp_path / "out", write(tmp_path / "x.txt", data))


def test_jsonl_in_another_encoding_is_read_too(tmp_path):
    line = json.dumps({"text": FRENCH}, ensure_ascii=False) + "\n"
    prepare_here(tmp_path / "out", write(tmp_path / "x.jsonl", line * 3, encoding="cp1252"), val_fraction=0)
    assert documents_of(tmp_path / "out") == [FRENCH] * 3
    for encoding in ("utf-16", "utf-16-le"):
        prepare_here(tmp_path / "out", write(tmp_path / "x.jsonl", line * 3, encoding=encoding), val_fraction=0)
        assert documents_of(tmp_path / "out") == [FRENCH] * 3


@pytest.mark.parametrize("installed", [None, types.ModuleType("chardet")])
def test_without_the_detector_or_with_an_old_one_a_message_says_how_to_get_it(tmp_path, monkeypatch, installed):
    monkeypatch.setitem(sys.modules, "chardet", installed)
    message = r"invalid UTF-8 at byte 6 \(0xe9\); use --encoding.*or pip install 'chardet>=7'"
    with pytest.raises(InputError, match=message):
        prepare_here(tmp_path / "out", write(tmp_path / "x.txt", FRENCH, encoding="cp1252"))


@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize("data", [b"\0" * 5000, b"some text\n" * 99 + b"\0" * 100, "Word ".encode("utf-32-le") * 20])
def test_fault_005_a_text_full_of_nuls_is_refused_by_name(tmp_path, data, errors):
    source, fine = write(tmp_path / "x.txt", data), write(tmp_path / "y.txt", "fine")
    with pytest.raises(
        InputError, match=r"x\.txt: \d+% of its characters are NUL; leave it out, or name its --encoding"
    ):
        prepare_here(tmp_path / "out", source, fine, errors=errors)
    assert not (tmp_path / "out").exists()
    manifest = prepare_here(tmp_path / "out", source, fine, errors="skip", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["fine"]
    assert list(manifest["source"]["lost"]) == [str(source)]


def test_fault_005_utf16_that_is_named_as_utf8_is_refused(tmp_path):
    source = write(tmp_path / "x.txt", "Hello there, world\n", encoding="utf-16-le")
    with pytest.raises(InputError, match=r"50% of its characters are NUL; .* \(utf-16-le\?\)"):
        prepare_here(tmp_path / "out", source, encoding="utf-8")
    prepare_here(tmp_path / "out", source, val_fraction=0)
    assert documents_of(tmp_path / "out") == ["Hello there, world\n"]


def test_fault_005_a_few_nuls_stay(tmp_path):
    text = "\0".join(f"/usr/share/doc/{n}/README" for n in range(100))
    prepare_here(tmp_path / "out", write(tmp_path / "x.txt", text), val_fraction=0)
    assert documents_of(tmp_path / "out") == [text]


# ---- line breaks


@pytest.mark.parametrize("size", [1, 2, 3, 1 << 16])
def test_fault_005_crlf_and_cr_become_line_breaks_also_where_blocks_meet(tmp_path, monkeypatch, size):
    monkeypatch.setattr("gpt.text.sources.BLOCK_BYTES", size)
    text = "a\r\nb\rc\nd\r\r\n\r\n\n\re\r"
    source = write(tmp_path / "x.txt", text)
    lines = write(tmp_path / "y.jsonl", rows(text).replace("\n", "\r\n"))
    prepare_here(tmp_path / "out", source, lines, val_fraction=0)
    expected = text.replace("\r\n", "\n").replace("\r", "\n")
    assert documents_of(tmp_path / "out") == [expected, expected]
    manifest = prepare_here(tmp_path / "out", source, lines, val_fraction=0, keep_crlf=True)
    assert documents_of(tmp_path / "out") == [text, text]
    assert manifest["source"]["options"]["keep_crlf"] is True


def test_fault_005_line_breaks_of_utf16_and_of_a_file_beside_its_copy(tmp_path):
    text = "one\r\ntwo\rthree\n"
    wide = write(tmp_path / "x.txt", text, encoding="utf-16")
    manifest = prepare_here(tmp_path / "out", wide, val=(str(write(tmp_path / "v.txt", "one\ntwo\nthree\n")),))
    assert documents_of(tmp_path / "out") == ["one\ntwo\nthree\n"]
    assert manifest["source"]["overlap"] == 1


# ---- what --errors takes


def test_fault_001_errors_names_the_files_that_lost_text(tmp_path, capsys):
    bad = write(tmp_path / "a.txt", "é\n".encode() * 9 + b"\xff\xfe")
    lines = write(tmp_path / "b.jsonl", rows("é", "é").encode() + b'{"text": "\xff"}\n' + rows("c").encode())
    fine = write(tmp_path / "c.txt", "fine")
    manifest = prepare_here(tmp_path / "out", bad, lines, fine, errors="replace", encoding="utf-8", val_fraction=0)
    assert manifest["source"]["lost"] == {
        str(bad): {"documents": 0, "characters": 2},
        str(lines): {"documents": 0, "characters": 1},
    }
    expected = f"note: text was lost in {bad} (2 characters replaced), {lines} (1 characters replaced)\n"
    assert expected in capsys.readouterr().out
    manifest = prepare_here(tmp_path / "out", bad, lines, fine, errors="skip", encoding="utf-8", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["é", "é", "c", "fine"]
    assert manifest["source"]["undecodable"] == 2
    assert f"lost in {bad} (1 skipped), {lines} (1 skipped, the first {lines}:3)\n" in capsys.readouterr().out


def test_without_errors_no_text_is_lost(tmp_path, capsys):
    manifest = prepare_here(tmp_path / "out", write(tmp_path / "x.jsonl", rows("a", "\ufffd")), val_fraction=0)
    assert manifest["source"]["lost"] == {}
    assert "lost" not in capsys.readouterr().out


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"text": 3}', '{"text": null}', "[" * 100_000, '{"text": "a"} x'])
def test_fault_004_errors_skip_skips_a_bad_record_and_counts_it(tmp_path, capsys, line):
    source = write(tmp_path / "x.jsonl", rows("a", "b") + line + "\n\n" + rows("c") + line)
    manifest = prepare_here(tmp_path / "out", source, errors="skip", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a", "b", "c"]
    assert manifest["source"]["undecodable"] == 2
    assert manifest["source"]["lost"] == {str(source): {"documents": 2, "characters": 0}}
    assert f"{source} (2 skipped, the first {source}:3)" in capsys.readouterr().out
    for errors in ("strict", "replace"):
        with pytest.raises(InputError, match=r"x\.jsonl:3: "):
            prepare_here(tmp_path / "out", source, errors=errors)


# ---- documents in one text file


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
def test_split_on_lines_makes_every_line_that_is_not_blank_a_document(tmp_path, monkeypatch, size):
    monkeypatch.setattr("gpt.text.sources.BLOCK_BYTES", size)
    source = write(tmp_path / "x.txt", "\n\none\n two\r\n\nthree\rfour")
    manifest = prepare_here(
        tmp_path / "out", source, write(tmp_path / "y.txt", "five\n"), split_on="lines", val_fraction=0
    )
    assert documents_of(tmp_path / "out") == ["one", " two", "three", "four", "five"]
    assert manifest["source"]["documents"] == 5
    assert manifest["source"]["options"]["split_on"] == "lines"


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
def test_split_on_a_string_takes_the_line_break_after_it(tmp_path, monkeypatch, size):
    monkeypatch.setattr("gpt.text.sources.BLOCK_BYTES", size)
    source = write(tmp_path / "x.txt", "one\ntwo<|endoftext|>\nthree\n<|endoftext|>four\r\n<|endoftext|>\r\n")
    prepare_here(tmp_path / "out", source, split_on="<|endoftext|>", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["one\ntwo", "three\n", "four\n"]
    prepare_here(tmp_path / "out", source, split_on="<|endoftext|>", val_fraction=0, keep_crlf=True)
    assert documents_of(tmp_path / "out") == ["one\ntwo", "three\n", "four\r\n"]


@pytest.mark.parametrize(
    ("given", "expected"), [(r"\n\n", ["a\nb", "c"]), (r"\t", ["a\nb\n\nc"]), (r"b\\", ["a\nb\n\nc"])]
)
def test_split_on_reads_escapes_which_shells_do_not(tmp_path, given, expected):
    prepare_here(tmp_path / "out", write(tmp_path / "x.txt", "a\nb\n\nc"), split_on=given, val_fraction=0)
    assert documents_of(tmp_path / "out") == expected


def test_split_on_leaves_jsonl_alone_and_is_refused_where_it_has_no_effect(tmp_path):
    lines, text = write(tmp_path / "x.jsonl", rows("a\nb")), write(tmp_path / "x.txt", "c\nd\n")
    prepare_here(tmp_path / "out", lines, text, split_on="lines", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a\nb", "c", "d"]
    with pytest.raises(InputError, match="--split_on: there is no text file in the input to split"):
        prepare_here(tmp_path / "out", lines, split_on="lines")
    with pytest.raises(InputError, match="--keep_crlf has no effect with --split_on lines"):
        prepare_here(tmp_path / "out", text, split_on="lines", keep_crlf=True)


@pytest.mark.parametrize("errors", ["skip", "replace"])
def test_errors_holds_for_the_documents_that_split_on_makes(tmp_path, errors):
    source = write(tmp_path / "x.txt", "é\né\n".encode() * 5 + b"b\xffd\nlast\n")
    manifest = prepare_here(tmp_path / "out", source, split_on="lines", errors=errors, encoding="utf-8", val_fraction=0)
    middle = [] if errors == "skip" else ["b\ufffdd"]
    assert documents_of(tmp_path / "out") == ["é"] * 10 + middle + ["last"]
    assert (manifest["source"]["undecodable"], manifest["source"]["replaced"]) == ((1, 0) if not middle else (0, 1))


def test_documents_of_one_file_are_split_by_hash_and_the_overlap_is_counted(tmp_path):
    texts = [f"document number {n}" for n in range(200)]
    source = write(tmp_path / "x.txt", "\n".join(texts))
    manifest = prepare_here(tmp_path / "out", source, split_on="lines", val_fraction=0.2)
    assert manifest["source"]["split"]["rule"] == "hash"
    val = documents_of(tmp_path / "out", "val")
    assert sorted(documents_of(tmp_path / "out") + val) == sorted(texts) and len(val) > 10


# ---- what a note says of the documents


@pytest.mark.parametrize(("times", "told"), [(9, False), (10, True), (2000, True)])
def test_a_note_tells_of_many_typed_ends_of_text(tmp_path, capsys, times, told):
    source = write(tmp_path / "x.txt", "A joke.\n<|endoftext|>\n" * times)
    prepare_here(tmp_path / "out", source, val_fraction=0)
    assert (f'spells <|endoftext|> {times:,} times, which is ordinary text; --split_on "<|endoftext|>"' in
            capsys.readouterr().out) == told  # fmt: skip
    prepare_here(tmp_path / "out", source, split_on="<|endoftext|>", val_fraction=0)
    assert "spells" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("A short joke.\n" * 1000, True),
        ("A short joke.\r\n" * 1000, True),
        ("A short joke.\n" * 999, False),
        (("A line of verse.\n" * 8 + "\n") * 200, False),  # stanzas
        ("A long paragraph. " * 20 + "\n", False),
        (("A long paragraph. " * 20 + "\n") * 1000, False),
    ],
)
def test_a_note_tells_of_many_short_lines_without_a_border(tmp_path, capsys, text, told):
    source = write(tmp_path / "x.txt", text)
    prepare_here(tmp_path / "out", source, val_fraction=0)
    out = capsys.readouterr().out
    assert ("1,000 short lines in one document; if each is a text, use --split_on lines" in out) == told
    assert ("short lines" in out) == told
    prepare_here(tmp_path / "out", source, split_on="lines", val_fraction=0)
    assert "short lines" not in capsys.readouterr().out
