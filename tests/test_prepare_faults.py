"""Preparing data: what goes wrong on the way, by the numbers of the fault list; and the command itself."""

import gzip
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
from conftest import ROOT
from prepare import worker_count
from prepare_helpers import ALPHABET, EOT, checksums, documents_of, ids_of, rows, run, script, write

from gpt.errors import InputError, ResourceError
from gpt.text.encode import Unit, encoded
from gpt.text.split import Survey
from gpt.text.tokenizer import Tokenizer, load_tokenizer, save_tokenizer

# ---- faults


def test_fault_001_invalid_utf8_names_the_byte(tmp_path, monkeypatch):
    data = "é".encode() * 500 + b"\xff" + b" more " + b"\xfe"
    source = write(tmp_path / "x.txt", data)
    expected = r"x\.txt: invalid UTF-8 at byte 1000 \(0xff\); use --encoding, or --errors replace\|skip"
    for size in (1, 333, 1 << 16):
        monkeypatch.setattr("gpt.text.sources.BLOCK_BYTES", size)
        with pytest.raises(InputError, match=expected):
            run(tmp_path / "out", source)
        assert not (tmp_path / "out").exists()
    manifest = run(tmp_path / "out", source, errors="replace", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["é" * 500 + "\ufffd more \ufffd"]
    assert manifest["source"]["replaced"] == 2
    manifest = run(tmp_path / "out", source, write(tmp_path / "y.txt", "kept"), errors="skip", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["kept"]
    assert manifest["source"]["undecodable"] == 1
    run(tmp_path / "out", source, encoding="latin-1", val_fraction=0)
    assert documents_of(tmp_path / "out") == [data.decode("latin-1")]


def test_fault_001_a_cut_character_at_the_end_and_a_bad_line_of_jsonl_are_named(tmp_path):
    with pytest.raises(InputError, match=r"x\.txt: invalid UTF-8 at byte 2 \(0xe2\)"):
        run(tmp_path / "out", write(tmp_path / "x.txt", b"ab\xe2\x82"))
    bad = write(tmp_path / "x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "c"}\n')
    with pytest.raises(InputError, match=r"x\.jsonl:2: invalid UTF-8 at byte 24 \(0xff\)"):
        run(tmp_path / "out", bad)
    run(tmp_path / "out", bad, errors="skip", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a", "c"]


@pytest.mark.parametrize("data", [b"", b" \n\t ", b"\xef\xbb\xbf", b"\n" * 300_000])
def test_fault_002_no_documents(tmp_path, data):
    with pytest.raises(InputError, match=r"x\.txt: no documents"):
        run(tmp_path / "out", write(tmp_path / "x.txt", data))
    assert not (tmp_path / "out").exists()


def test_fault_002_a_built_in_corpus_without_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt.text.corpora.standard_library", lambda: ([], {}))
    with pytest.raises(InputError, match="--corpus stdlib: no documents"):
        run(tmp_path / "out", corpus="stdlib", val_fraction=0)
    assert not (tmp_path / "out").exists()


def test_fault_003_empty_documents_are_counted_and_get_no_end_of_text(tmp_path):
    source = write(tmp_path / "x.jsonl", rows("", "a", " \n", "b"))
    write(tmp_path / "blank.txt", " " * 200_000)
    manifest = run(tmp_path / "out", source, tmp_path / "blank.txt", val_fraction=0)
    assert manifest["source"]["empty_docs"] == 3
    assert ids_of(tmp_path / "out").tolist() == [EOT, ord("a"), EOT, ord("b")]


@pytest.mark.parametrize(
    "line", ["{", "[]", '"text"', "{}", '{"text": 3}', '{"text": null}', '{"body": "x"}', "[" * 100_000]
)
def test_fault_004_a_line_without_a_string_field_is_named(tmp_path, line):
    source = write(tmp_path / "x.jsonl", rows("a") * 16 + line + "\n")
    with pytest.raises(InputError, match=r'x\.jsonl:17: expected an object with string field "text"'):
        run(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


def test_another_field_can_be_the_text(tmp_path):
    run(tmp_path / "out", write(tmp_path / "x.jsonl", '{"body": "b"}\n\n'), field="body", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["b"]


def test_fault_005_marks_line_ends_nul_and_surrogates(tmp_path):
    text = write(tmp_path / "a.txt", b"\xef\xbb\xbfa\r\nb\x00\xef\xbb\xbf")
    lines = write(tmp_path / "b.jsonl", b'\xef\xbb\xbf{"text": "x\\ud800y\\udfff"}\n{"text": "\\ud83d\\ude00"}\n')
    manifest = run(tmp_path / "out", text, lines, val_fraction=0)
    assert documents_of(tmp_path / "out") == ["a\r\nb\x00\ufeff", "x\ufffdy\ufffd", "😀"]
    assert manifest["source"]["replaced"] == 2
    wide = write(tmp_path / "c.txt", "wide é", encoding="utf-16")
    run(tmp_path / "out", wide, encoding="utf-16", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["wide é"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "cp037"])
def test_fault_005_jsonl_in_an_encoding_that_hides_its_line_breaks_is_refused(tmp_path, encoding):
    lines = write(tmp_path / "x.jsonl", rows("\u0a0a"), encoding=encoding)
    with pytest.raises(InputError, match=rf"x\.jsonl: lines cannot be told apart in {encoding}; convert it to UTF-8"):
        run(tmp_path / "out", lines, encoding=encoding)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "latin-1", "shift_jis", "gb18030"])
def test_jsonl_in_an_encoding_that_keeps_line_breaks_is_read(tmp_path, encoding):
    text = "é" if encoding == "latin-1" else "日本"
    lines = write(tmp_path / "x.jsonl", f'{{"text": "{text}"}}\n{{"text": "b"}}\n', encoding=encoding)
    run(tmp_path / "out", lines, encoding=encoding, val_fraction=0)
    assert documents_of(tmp_path / "out") == [text, "b"]


def test_fault_006_end_of_text_in_a_document_is_ordinary(tmp_path):
    text = "a<|endoftext|>b" * 20
    run(tmp_path / "out", write(tmp_path / "x.jsonl", rows(text, text)), tokenizer="bpe:265", val_fraction=0)
    tokenizer, ids = load_tokenizer(tmp_path / "out"), ids_of(tmp_path / "out").tolist()
    assert ids.count(tokenizer.eot) == 2
    assert ids == 2 * [tokenizer.eot, *tokenizer.encoding.encode_ordinary(text)]


def test_fault_007_a_million_times_one_character(tmp_path, bpe_cache):
    source = write(tmp_path / "x.jsonl", rows("^" * 1_000_000, "a" * 1_000_000))
    manifest = run(tmp_path / "out", source, tokenizer="gpt2", val_fraction=0)
    assert manifest["splits"]["train"][0]["tokens"] == 2 * 250_001


@pytest.mark.parametrize("workers", [1, 2])
def test_fault_007_a_text_that_makes_tiktoken_panic_names_the_document(tmp_path, workers):
    source = write(tmp_path / "x.jsonl", rows("fine", " " * 1_000_000 + "x"))
    with pytest.raises(InputError, match=r"x\.jsonl:2: the tokenizer cannot split this text"):
        run(tmp_path / "out", source, workers=workers, val_fraction=0)
    assert not (tmp_path / "out").exists()


def test_fault_010_a_large_vocabulary_needs_uint32(tmp_path, monkeypatch):
    byte = load_tokenizer("byte").encoding
    large = tiktoken.Encoding(
        "large", pat_str=byte._pat_str, mergeable_ranks=byte._mergeable_ranks, special_tokens={"<|endoftext|>": 100256}
    )
    monkeypatch.setattr("prepare.load_tokenizer", lambda _: Tokenizer("large", large, 100256))
    source = write(tmp_path / "x.txt", "text")
    assert run(tmp_path / "out", source, val_fraction=0)["dtype"] == "uint32"
    assert ids_of(tmp_path / "out").tolist() == [100256, *b"text"]
    with pytest.raises(InputError, match="token id 100256 does not fit uint16"):
        run(tmp_path / "other", source, dtype="uint16")


def test_fault_011_killed_at_any_time_leaves_a_whole_dataset_or_no_manifest_and_a_rerun_repairs(tmp_path):
    source = write(tmp_path / "x.txt", "some words and more of them " * 60_000)
    arguments = (source, "--out", tmp_path / "out", "--tokenizer", "byte", "--shard_tokens", "50000", "--workers", "2")
    wanted = None
    for delay in (None, 0.3, 0.45, 0.6, 0.8, None):
        process = script(*arguments, start_new_session=True)
        if delay is not None:
            time.sleep(delay)
            process.kill()
        process.communicate(timeout=60)
        if (tmp_path / "out" / "dataset.json").exists():
            found = checksums(tmp_path / "out", but="" if process.returncode == 0 else "prepare.tmp")
            wanted = wanted or found
            assert found == wanted
        else:
            names = {path.name for path in (tmp_path / "out").glob("*")}
            assert not names or "prepare.tmp" in names
    assert process.returncode == 0


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on file sizes")
def test_fault_012_no_space_left_ends_with_code_5_and_nothing_left(tmp_path):
    import resource

    source = write(tmp_path / "x.txt", "some words " * 20_000)
    process = script(
        source, "--out", tmp_path / "out", "--tokenizer", "byte", "--shard_tokens", "50000", "--workers", "1",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, 80_000)),
    )  # fmt: skip
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 5
    assert error.splitlines()[-1].startswith("error: no space left writing train_000000.bin")
    assert not (tmp_path / "out").exists()


def test_fault_013_a_worker_that_is_killed_ends_the_job(tmp_path):
    save_tokenizer(load_tokenizer("byte"), tmp_path)

    under_way = threading.Event()

    def endless():
        for number in itertools.count():
            yield [Unit("train", "x", "some words " * 1000, False)]
            if number == 20:  # the first results are back
                under_way.set()

    def kill_one():
        under_way.wait(60)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    threading.Thread(target=kill_one, daemon=True).start()
    with pytest.raises(ResourceError, match="a tokenizer worker died"):
        list(encoded(endless(), None, tmp_path, workers=2))


def test_windows_gets_no_more_workers_than_it_can_wait_for(monkeypatch):
    corpus = SimpleNamespace(survey=Survey(bytes=1 << 40), val_survey=Survey())
    monkeypatch.setattr("prepare.cores", lambda: 128)
    found = {}
    for platform in ("linux", "win32"):
        monkeypatch.setattr("sys.platform", platform)
        found[platform] = [worker_count(asked, corpus) for asked in (0, 1, 61, 100)]
    assert found == {"linux": [128, 1, 61, 100], "win32": [61, 1, 61, 61]}


def test_fault_014_the_same_bytes_with_any_number_of_workers(tmp_path):
    draw = random.Random(1)
    texts = ["".join(draw.choices(ALPHABET, k=draw.randrange(1, 3000))) for _ in range(300)]
    source = write(tmp_path / "x.jsonl", rows(*texts, "long words " * 30_000))
    found = []
    for name, workers in (("a", 1), ("b", 3), ("c", 1)):
        run(tmp_path / name, source, workers=workers, shard_tokens=300_000, val_split="hash", val_fraction=0.1)
        found.append(checksums(tmp_path / name))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 5


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
            run(tmp_path / "out", name)


def test_folders_and_globs_expand_in_sorted_order(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a.txt", "B.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "in" / name, name)
    run(tmp_path / "out", tmp_path / "in", val_fraction=0)
    assert documents_of(tmp_path / "out") == ["B.txt", "a.txt", "b/10.txt", "b/2.txt"]
    run(tmp_path / "out", tmp_path / "in" / "**" / "*.txt", val_fraction=0)
    assert sorted(documents_of(tmp_path / "out")) == ["B.txt", "a.txt", "b/10.txt", "b/2.txt"]


@pytest.mark.parametrize("pattern", ["**", "**/*", "**/**/*", "*", "../in/*"])
def test_a_pattern_reads_no_file_twice(tmp_path, monkeypatch, pattern):
    for name in ("b/c/2.txt", "b/10.txt", "a.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "in" / name, name)
    monkeypatch.chdir(tmp_path / "in")
    run(tmp_path / "out", pattern, val_fraction=0)
    assert sorted(documents_of(tmp_path / "out")) == ["a.txt", "b/10.txt", "b/c/2.txt"]


def test_a_pattern_of_folders_alone_that_means_files_is_refused(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    with pytest.raises(InputError, match="no such file"):
        run(tmp_path / "out", tmp_path / "in" / "**")


def test_a_linked_folder_is_counted_as_passed_over(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "in" / "a.txt", "a")
    write(tmp_path / "elsewhere" / "b.txt", "b")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    manifest = run(tmp_path / "out", tmp_path / "in", val_fraction=0)
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
        run(tmp_path / "out", tmp_path / "in")


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names that are any bytes")
def test_fault_100_file_names_that_are_not_utf8_are_read_and_recorded_escaped(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \x1b.txt")
    write(Path(name), "text")
    process = script(name, "--val", name, "--out", name + ".out", "--tokenizer", "byte")
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    source = json.loads((Path(name + ".out") / "dataset.json").read_text(encoding="utf-8"))["source"]
    assert source["inputs"] == source["val"] == [f"{tmp_path}/caf\\udce9 \\x1b.txt"]
    assert "caf\\udce9 \\x1b.txt.out" in out


def test_a_damaged_gzip_file_is_refused(tmp_path):
    data = gzip.compress(b"text " * 1000)
    for bad in (data[:-20], b"no gzip"):
        with pytest.raises(InputError, match="damaged gzip"):
            run(tmp_path / "out", write(tmp_path / "x.txt.gz", bad))


# ---- the command


def test_stdin_is_one_document_and_the_command_needs_no_torch(tmp_path):
    command = [
        sys.executable,
        "-X",
        "importtime",
        "data/prepare.py",
        "-",
        "--out",
        tmp_path / "out",
        "--tokenizer",
        "byte",
    ]
    done = subprocess.run([*command, "--val_fraction", "0"], input=b"from stdin\n", capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()
    assert documents_of(tmp_path / "out") == ["from stdin\n"]
    assert b"next: python train.py" in done.stdout
    imported = {line.rsplit(b"|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert b"tiktoken" in imported and b"torch" not in imported
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # the copy of stdin is gone


def test_all_problems_of_the_settings_come_in_one_message(tmp_path):
    process = script(
        "--out", tmp_path / "out", "--val_fraction", "1.5", "--workers", "-1", "--encoding", "nope", "--url", "x"
    )
    error = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 2
    for words in (
        "no input",
        "--corpus stdlib|shakespeare",
        "--val_fraction 1.5",
        "--workers -1",
        "--encoding nope",
        "--url",
    ):
        assert words in error


def test_ctrl_c_leaves_no_manifest_and_no_traceback(tmp_path):
    source = write(tmp_path / "x.txt", "some words and more of them " * 800_000)
    process = script(source, "--out", tmp_path / "out", "--tokenizer", "byte", "--workers", "2", start_new_session=True)
    while not (tmp_path / "out" / "prepare.tmp").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in error and error.splitlines()[-1] == "stopped: interrupted"
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs the peak memory of a process")
def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for megabytes in (1, 15):
        source = write(tmp_path / "x.txt", "some words and more of them\n" * (megabytes * 36_000))
        process = script(source, "--out", tmp_path / "out", "--tokenizer", "byte", "--workers", "1")
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, process.communicate()[1]
        peaks.append(usage.ru_maxrss)
    assert peaks[1] < 1.2 * peaks[0]
