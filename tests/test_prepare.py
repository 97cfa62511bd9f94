"""The command that prepares data: what it writes, which folders it takes, and what is left when it is cut short."""

import gzip
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import foreign_helpers
import pytest
import tiktoken
from paths import ROOT
from prepare import PrepareConfig, publish
from prepare_helpers import checksums, documents_of, ids_of, prepare_here, rows, script, write

from gpt.errors import InputError, ResourceError
from gpt.text.encode import encode_batches
from gpt.text.gather import gather_input
from gpt.text.shards import open_dataset
from gpt.text.tokenizer import Tokenizer, load_tokenizer

# ---- what comes out


def test_every_document_comes_back_after_exactly_one_end_of_text(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    write(folder / "b.txt", "second\n\x00 é")
    write(folder / "a.md", "first")
    write(folder / "sub" / "c.jsonl.gz", gzip.compress(rows("third", "fourth\n<|endoftext|>").encode()))
    write(folder / "z.py.gz", gzip.compress(b"fifth"))
    write(folder / "image.png", b"\xff\xd8")
    write(folder / ".hidden.txt", "hidden")
    manifest = prepare_here(tmp_path / "out", folder, val_fraction=0)
    assert documents_of(tmp_path / "out") == ["first", "second\n\x00 é", "third", "fourth\n<|endoftext|>", "fifth"]
    assert manifest["source"]["files_passed_over"] == 2
    assert manifest["source"]["documents"] == manifest["splits"]["train"][0]["documents"] == 5
    assert "val" not in manifest["splits"]


def test_the_folder_opens_as_a_dataset_with_its_tokenizer(tmp_path):
    prepare_here(tmp_path / "out", write(tmp_path / "x.txt", "some text"), val_split="tail", val_fraction=0.4)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.tokenizer["identity"] == load_tokenizer("byte").identity == load_tokenizer(tmp_path / "out").identity
    assert {split: sum(shard.tokens for shard in shards) for split, shards in dataset.splits.items()} == {
        "train": 6,
        "val": 4,
    }


def test_tinyshakespeare_has_nanogpts_split(tmp_path, tinyshakespeare, bpe_cache):
    out = tmp_path / "out"
    prepare_here(out, tinyshakespeare, tokenizer="gpt2", val_split="tail", val_fraction=0.1)
    text = tinyshakespeare.read_text(encoding="utf-8")
    gpt2, cut = tiktoken.get_encoding("gpt2"), int(len(text) * 0.9)
    assert ids_of(out).tolist() == [50256, *gpt2.encode_ordinary(text[:cut])]
    assert ids_of(out, "val").tolist() == gpt2.encode_ordinary(text[cut:])
    assert (len(ids_of(out)), len(ids_of(out, "val"))) == (301_967, 36_059)


def test_ids_go_on_over_shards_of_the_size_asked_for(tmp_path):
    texts = [f"document {n}" for n in range(40)]
    manifest = prepare_here(
        tmp_path / "out", write(tmp_path / "x.jsonl", rows(*texts)), val_fraction=0, shard_tokens=100
    )
    sizes = [entry["tokens"] for entry in manifest["splits"]["train"]]
    assert set(sizes[:-1]) == {100} and 0 < sizes[-1] <= 100
    assert documents_of(tmp_path / "out") == texts
    assert sum(entry["documents"] for entry in manifest["splits"]["train"]) == 40
    assert sum(entry["source_bytes"] for entry in manifest["splits"]["train"]) == sum(map(len, texts))


def test_fault_010_a_large_vocabulary_needs_uint32(tmp_path, monkeypatch):
    byte = load_tokenizer("byte").encoding
    large = tiktoken.Encoding(
        "large", pat_str=byte._pat_str, mergeable_ranks=byte._mergeable_ranks, special_tokens={"<|endoftext|>": 100256}
    )
    monkeypatch.setattr("prepare.load_tokenizer", lambda _: Tokenizer("large", large, 100256))
    source = write(tmp_path / "x.txt", "text")
    assert prepare_here(tmp_path / "out", source, val_fraction=0)["dtype"] == "uint32"
    assert ids_of(tmp_path / "out").tolist() == [100256, *b"text"]
    with pytest.raises(InputError, match="token id 100256 does not fit uint16"):
        prepare_here(tmp_path / "other", source, dtype="uint16")


def test_a_small_vocabulary_can_be_stored_as_uint32(tmp_path):
    source = write(tmp_path / "x.txt", "text")
    assert prepare_here(tmp_path / "out", source, val_fraction=0, dtype="uint32")["dtype"] == "uint32"
    assert (tmp_path / "out" / "train_000000.bin").stat().st_size == 1024 + 4 * len(ids_of(tmp_path / "out"))
    assert ids_of(tmp_path / "out").tolist() == [256, *b"text"]


@pytest.mark.parametrize("text", ["some more words", "some", "some words\n"])
def test_input_that_changes_between_the_two_passes_is_refused(tmp_path, monkeypatch, text):
    source = write(tmp_path / "x.txt", "some words")

    def gather_then_change(*arguments, **settings):
        data = gather_input(*arguments, **settings)
        write(source, text)
        return data

    monkeypatch.setattr("prepare.gather_input", gather_then_change)
    with pytest.raises(InputError, match="the input changed while it was being read; run again"):
        prepare_here(tmp_path / "out", source, val_fraction=0)
    assert not (tmp_path / "out").exists()


# ---- the output folder


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path):
    source = write(tmp_path / "x.txt", "text")
    for names in (["notes.txt"], ["tokenizer.json"], ["train_000000.bin"], ["dataset.json", "model.safetensors"]):
        out = tmp_path / names[-1].replace(".", "_")
        out.mkdir()
        for name in names:
            write(out / name, "precious")
        with pytest.raises(InputError, match="holds other files"):
            prepare_here(out, source)
        assert [path.read_text() for path in out.iterdir()] == ["precious"] * len(names)
    with pytest.raises(InputError, match="a file; give a folder"):
        prepare_here(source, source)


def test_a_folder_in_the_place_of_a_shard_is_refused_before_anything_is_deleted(tmp_path):
    out, source = tmp_path / "out", write(tmp_path / "x.txt", "some words")
    prepare_here(out, source)
    (out / "train_000009.bin").mkdir()
    before = checksums(out, but="train_000009.bin")
    with pytest.raises(InputError, match=r"holds other files \(train_000009.bin\)"):
        prepare_here(out, source)
    assert checksums(out, but="train_000009.bin") == before


def test_a_file_in_the_place_of_the_staging_folder_is_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "prepare.tmp").touch()
    prepare_here(out, write(tmp_path / "x.txt", "some words"))
    assert open_dataset(out) and not (out / "prepare.tmp").exists()


def test_preparing_again_replaces_the_earlier_dataset(tmp_path):
    prepare_here(tmp_path / "out", write(tmp_path / "x.txt", "some words " * 100), shard_tokens=100)
    prepare_here(tmp_path / "out", write(tmp_path / "y.txt", "other"), val_fraction=0)
    names = ["dataset.json", "tokenizer.json", "tokenizer_config.json", "train_000000.bin"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_bad_input_leaves_the_earlier_dataset_alone(tmp_path):
    prepare_here(tmp_path / "out", write(tmp_path / "x.txt", "some words"))
    before = checksums(tmp_path / "out")
    with pytest.raises(InputError):
        prepare_here(tmp_path / "out", write(tmp_path / "y.txt", b"\xff"))
    assert checksums(tmp_path / "out") == before


@pytest.mark.parametrize("failure", [InputError("x"), ResourceError("x"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_earlier_dataset_alone(tmp_path, monkeypatch, failure):
    out = tmp_path / "out"
    prepare_here(out, write(tmp_path / "x.txt", "some words " * 100), shard_tokens=100)
    before = checksums(out)

    def failing(*arguments):
        yield from itertools.islice(encode_batches(*arguments), 1)
        assert checksums(out / "prepare.tmp")  # something had been written
        raise failure

    monkeypatch.setattr("prepare.encode_batches", failing)
    with pytest.raises(type(failure)):
        prepare_here(out, write(tmp_path / "y.txt", "other words " * 30_000), shard_tokens=100)
    assert checksums(out) == before
    assert open_dataset(out)


def test_publishing_that_is_cut_short_leaves_no_manifest_and_a_rerun_repairs(tmp_path, monkeypatch):
    out, source = tmp_path / "out", write(tmp_path / "x.txt", "some words")
    prepare_here(out, source, val_fraction=0)
    before, replace = checksums(out), os.replace

    def cut_short(source, target):
        if str(target) == str(out / "train_000000.bin"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", cut_short)
        with pytest.raises(KeyboardInterrupt):
            prepare_here(out, source, val_fraction=0)
    assert not (out / "dataset.json").exists()
    prepare_here(out, source, val_fraction=0)
    assert checksums(out) == before


def test_a_file_that_came_into_the_folder_meanwhile_is_left_alone(tmp_path, monkeypatch):
    out, source = tmp_path / "out", write(tmp_path / "x.txt", "some words")

    def publish_late(folder, out):
        write(out / "notes.txt", "precious")
        publish(folder, out)

    monkeypatch.setattr("prepare.publish", publish_late)
    prepare_here(out, source)
    assert (out / "notes.txt").read_text() == "precious"
    assert open_dataset(out)


def test_a_failure_leaves_no_new_folders_behind(tmp_path, monkeypatch):
    source = write(tmp_path / "x.txt", "some words")
    monkeypatch.setattr("prepare.encode_batches", lambda *_: (1 / 0 for _ in "x"))
    (tmp_path / "old").mkdir()
    for out in (tmp_path / "new" / "deep" / "out", tmp_path / "old" / "out"):
        with pytest.raises(ZeroDivisionError):
            prepare_here(out, source)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old", "x.txt"]


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


@pytest.mark.parametrize("name", ["plain", "with space", "a$b", "it's"])
def test_the_next_command_can_be_copied_whatever_the_folder_is_called(tmp_path, capsys, name):
    prepare_here(tmp_path / name, write(tmp_path / "x.txt", "word " * 100))
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    assert shlex.split(line.partition("   (")[0])[-2:] == ["--data", str(tmp_path / name)]


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("data/prepare.py", "python train.py"),
        ("prepare.py", "python ../train.py"),
        ("../my clone/data/prepare.py", "python '../my clone/train.py'"),
        ("gpt prepare", "gpt train"),
    ],
)
def test_the_next_command_is_the_one_beside_this_one(tmp_path, capsys, monkeypatch, program, command):
    monkeypatch.setattr(sys, "argv", [program])
    prepare_here(tmp_path / "out", write(tmp_path / "x.txt", "word " * 100))
    assert f"next: {command} PRESET --data {tmp_path / 'out'} " in capsys.readouterr().out


def test_fault_036_the_dataset_is_made_though_nobody_reads_what_the_command_says(tmp_path):
    source = write(tmp_path / "x.txt", "some words")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "data/prepare.py", source, "--out", tmp_path / "out", "--tokenizer", "byte"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert open_dataset(tmp_path / "out")


NARROW = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("environment", [{}, NARROW, {"PYTHONIOENCODING": "cp1252"}], ids=["utf-8", "C", "cp1252"])
def test_fault_123_any_name_is_prepared_whatever_the_streams_are(tmp_path, closed, environment):
    source = write(tmp_path / "é 雨.txt", "some words")
    command = [sys.executable, "data/prepare.py", source, "--out", tmp_path / "雨", "--tokenizer", "byte"]
    shell = ["sh", "-c", f'exec "$0" "$@" {closed}', *map(str, command)]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, timeout=60, env=os.environ | environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (b"next: python train.py" in done.stdout) == (">&-" not in closed.split())
    assert open_dataset(tmp_path / "雨")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_fault_123_a_full_stdout_is_exit_5_before_anything_is_created(tmp_path):
    source = write(tmp_path / "x.txt", "some words")
    command = [sys.executable, "data/prepare.py", source, "--out", tmp_path / "out", "--tokenizer", "byte"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr.split(";")[0]) == (5, "error: stdout: No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_fault_123_a_stdout_that_fills_after_the_dataset_is_made_is_a_warning(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise ResourceError("stdout: No space left on device; free space or redirect it elsewhere")

    monkeypatch.setattr("prepare.summarise", full)
    prepare_here(tmp_path / "out", write(tmp_path / "x.txt", "some words"))
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path}/out: is complete, but its summary is lost: ")
    assert open_dataset(tmp_path / "out")


def test_all_problems_of_the_settings_come_in_one_message(tmp_path):
    process = script(
        "--out", tmp_path / "out", "--val_fraction", "1.5", "--workers", "-1", "--encoding", "nope", "--url", "x"
    )
    error = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 2
    for words in (
        "no input",
        "--corpus stdlib|docstrings|shakespeare",
        "--val_fraction 1.5",
        "--workers -1",
        "--encoding nope",
        "--url",
    ):
        assert words in error


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"inputs": ("-",), "val": ("-",)}, "stdin"),
        ({"inputs": ("-", "-")}, "stdin"),
        ({"inputs": ("a",), "val": ("b",), "val_split": "tail"}, "--val_split has no effect with --val"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, problem):
    with pytest.raises(InputError, match=problem):
        PrepareConfig("out", **settings)


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


@pytest.mark.parametrize("allow_special", [False, True])
def test_a_bases_added_and_special_tokens_are_read_as_transformers_reads_them(allow_special, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    foreign_helpers.added_both(tmp_path / "base")
    text = " ".join([foreign_helpers.MIXED, "<|user|>fox\nthe[PAD]<mask>"] * 3000)  # several chunks
    (tmp_path / "text.txt").write_bytes(text.encode())
    settings = {"tokenizer": str(tmp_path / "base"), "val_fraction": 0.0, "workers": 2, "allow_special": allow_special}
    manifest = prepare_here(tmp_path / "data", tmp_path / "text.txt", **settings)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "base", split_special_tokens=not allow_special)
    ids = ids_of(tmp_path / "data").tolist()
    assert ids == [theirs.eos_token_id, *theirs(text).input_ids]
    assert (ids.count(theirs.eos_token_id) > 3000) == (ids.count(theirs.pad_token_id) > 3000) == allow_special
    assert ("--allow_special" in manifest["source"]["recipe"]) == allow_special
    assert manifest["source"]["options"]["allow_special"] == allow_special
    assert ("times, which is ordinary text" in capsys.readouterr().out) == (not allow_special)
