"""Preparing data: documents in, shards out, against tiktoken on the whole text."""

import gzip
import io
import itertools
import os
import random

import pytest
import tiktoken
from prepare_helpers import ALPHABET, EOT, checksums, documents_of, ids_of, rows, run, write

from gpt.errors import InputError, IntegrityError, ResourceError
from gpt.text.corpora import SHAKESPEARE_BYTES, shakespeare, standard_library
from gpt.text.encode import CUTS, encoded, units
from gpt.text.huggingface import PATTERNS
from gpt.text.shards import open_dataset
from gpt.text.sources import Reading, read
from gpt.text.split import Part
from gpt.text.tokenizer import Tokenizer, load_tokenizer

# ---- what comes out


def test_every_document_comes_back_after_exactly_one_end_of_text(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    write(folder / "b.txt", "second\r\n\x00 é")
    write(folder / "a.md", "first")
    write(folder / "sub" / "c.jsonl.gz", gzip.compress(rows("third", "fourth\n<|endoftext|>").encode()))
    write(folder / "z.py.gz", gzip.compress(b"fifth"))
    write(folder / "image.png", b"\xff\xd8")
    write(folder / ".hidden.txt", "hidden")
    manifest = run(tmp_path / "out", folder, val_fraction=0)
    assert documents_of(tmp_path / "out") == ["first", "second\r\n\x00 é", "third", "fourth\n<|endoftext|>", "fifth"]
    assert manifest["source"]["files_passed_over"] == 2
    assert manifest["source"]["documents"] == manifest["splits"]["train"][0]["documents"] == 5
    assert "val" not in manifest["splits"]


def test_the_folder_opens_as_a_dataset_with_its_tokenizer(tmp_path):
    run(tmp_path / "out", write(tmp_path / "x.txt", "some text"), val_split="tail", val_fraction=0.4)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.tokenizer["identity"] == load_tokenizer("byte").identity == load_tokenizer(tmp_path / "out").identity
    assert {split: sum(shard.tokens for shard in shards) for split, shards in dataset.splits.items()} == {
        "train": 6,
        "val": 4,
    }


def test_tinyshakespeare_has_nanogpts_split(tmp_path, tinyshakespeare, bpe_cache):
    out = tmp_path / "out"
    run(out, tinyshakespeare, tokenizer="gpt2", val_split="tail", val_fraction=0.1)
    text = tinyshakespeare.read_text(encoding="utf-8")
    gpt2, cut = tiktoken.get_encoding("gpt2"), int(len(text) * 0.9)
    assert ids_of(out).tolist() == [50256, *gpt2.encode_ordinary(text[:cut])]
    assert ids_of(out, "val").tolist() == gpt2.encode_ordinary(text[cut:])
    assert (len(ids_of(out)), len(ids_of(out, "val"))) == (301_967, 36_059)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_encoding_in_chunks_gives_the_ids_of_encoding_the_whole(pattern):
    ranks = {bytes([byte]): byte for byte in range(256)}
    draw = random.Random(5)
    pieces = sorted({a + b for a in ALPHABET for b in ALPHABET} | set(ALPHABET))  # so that a wrong cut shows
    tokens = [piece.encode() for piece in pieces if len(piece.encode()) > 1]
    ranks |= {token: 256 + n for n, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(
        "x", pat_str=PATTERNS[pattern][0], mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 9999}
    )
    tokenizer = Tokenizer("x", encoding, 9999)
    chunks = 0
    for _ in range(1500):
        text = "".join(draw.choices(ALPHABET, k=draw.randrange(1, 60)))
        stops = [0, *sorted(draw.choices(range(len(text) + 1), k=3)), len(text)]
        given = [text[a:b] for a, b in itertools.pairwise(stops) if a < b]
        parts = [Part("train", "x", piece, n == 0, n == len(given) - 1) for n, piece in enumerate(given)]
        made = list(units(parts, tokenizer.pattern, size=draw.randrange(1, 9)))
        assert "".join(unit.text for unit in made) == text
        assert [unit.starts for unit in made] == [True] + [False] * (len(made) - 1)
        assert [id for unit in made for id in tokenizer.encode(unit.text)] == tokenizer.encode(text), repr(text)
        chunks += len(made)
    assert chunks > 3000  # it does cut


def test_a_cut_is_never_made_for_an_unknown_pattern():
    parts = [Part("train", "x", "a b c d ", n == 0, n == 9) for n in range(10)]
    assert [unit.text for unit in units(parts, r"\S+\s*", size=1)] == ["a b c d " * 10]
    assert len(list(units(parts, PATTERNS["gpt2"][0], size=1))) == 10
    assert set(CUTS) == set(PATTERNS)


def test_a_document_is_cut_where_it_last_could_be_even_if_that_was_long_ago():
    read = []

    def parts():
        for text in itertools.chain(["a b", " c"], itertools.repeat("x" * 100, 50)):
            read.append(text)
            yield Part("train", "x", text, len(read) == 1, False)

    made = units(parts(), PATTERNS["gpt2"][0], size=1000)
    assert next(made).text == "a b"
    assert len("".join(read)) < 1200


def test_a_long_document_is_the_same_whatever_the_size_of_its_blocks(tmp_path, monkeypatch):
    text = "".join(random.Random(2).choices(ALPHABET, k=3000))
    source = write(tmp_path / "x.txt", text)
    run(tmp_path / "one", source, val_split="tail")
    for size in (1, 7, 1000):
        monkeypatch.setattr("gpt.text.sources.BLOCK_BYTES", size)
        run(tmp_path / "other", source, val_split="tail")
        assert checksums(tmp_path / "other") == checksums(tmp_path / "one")


def test_ids_go_on_over_shards_of_the_size_asked_for(tmp_path):
    texts = [f"document {n}" for n in range(40)]
    manifest = run(tmp_path / "out", write(tmp_path / "x.jsonl", rows(*texts)), val_fraction=0, shard_tokens=100)
    sizes = [entry["tokens"] for entry in manifest["splits"]["train"]]
    assert set(sizes[:-1]) == {100} and 0 < sizes[-1] <= 100
    assert documents_of(tmp_path / "out") == texts
    assert sum(entry["documents"] for entry in manifest["splits"]["train"]) == 40
    assert sum(entry["source_bytes"] for entry in manifest["splits"]["train"]) == sum(map(len, texts))


def test_a_bpe_of_the_size_asked_for_is_trained_on_the_training_part_alone(tmp_path):
    text = "the cat sat on the mat and the dog lay on the log " * 50
    source = write(tmp_path / "x.txt", text + "xyzxyzxyz" * 100)
    manifest = run(tmp_path / "out", source, tokenizer="bpe:270", val_split="tail", val_fraction=0.26)
    tokenizer = load_tokenizer(tmp_path / "out")
    assert manifest["tokenizer"] == tokenizer.record
    assert (tokenizer.name, tokenizer.eot) == ("bpe:270", 270)
    assert b"xyz" not in tokenizer.encoding._mergeable_ranks
    assert (
        tokenizer.decode(ids_of(tmp_path / "out")[1:]) + tokenizer.decode(ids_of(tmp_path / "out", "val"))
        == source.read_text()
    )


def test_a_bpe_sees_a_bounded_sample_of_the_text(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("gpt.text.gather.TRAINING_BYTES", 20_000)
    monkeypatch.setattr(
        "gpt.text.tokenizer.train_bpe", lambda texts, size: seen.extend(texts) or load_tokenizer("byte")
    )
    source = write(tmp_path / "x.jsonl", rows(*(f"{n:09d} " * 10 for n in range(1000))))
    for name in ("a", "b"):
        run(tmp_path / name, source, tokenizer="bpe:300")
    half = len(seen) // 2
    assert 10_000 < sum(map(len, seen[:half])) < 30_000
    assert seen[:half] == seen[half:]


def test_a_bpes_sample_and_the_validation_split_are_chosen_apart(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("gpt.text.gather.TRAINING_BYTES", 3_000)  # a smaller share of the text than is validated on
    monkeypatch.setattr(
        "gpt.text.tokenizer.train_bpe", lambda texts, size: seen.extend(texts) or load_tokenizer("byte")
    )
    source = write(tmp_path / "x.jsonl", rows(*(f"{n:09d} " * 10 for n in range(1000))))
    run(tmp_path / "out", source, tokenizer="bpe:300", val_split="hash", val_fraction=0.2)
    assert 1_000 < sum(map(len, seen)) < 6_000
    assert set(seen) <= set(documents_of(tmp_path / "out"))


# ---- the split


def test_the_split_is_by_hash_from_100_similar_documents_on_and_else_the_tail(tmp_path, capsys):
    texts = [f"document number {n}" for n in range(100)]
    for given, rule in ((texts, "hash"), (texts[:99], "tail"), ([*texts, "long " * 300], "tail")):
        manifest = run(tmp_path / "out", write(tmp_path / "x.jsonl", rows(*given)), val_fraction=0.2)
        assert manifest["source"]["split"]["rule"] == rule
    assert capsys.readouterr().out.count("validation: ") == 3


def test_fault_015_equal_documents_fall_on_one_side_and_the_overlap_is_0(tmp_path):
    texts = [f"document number {n % 150}" for n in range(600)]
    manifest = run(tmp_path / "out", write(tmp_path / "x.jsonl", rows(*texts)), val_fraction=0.2)
    train, val = documents_of(tmp_path / "out"), documents_of(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(texts)
    assert train and val and not set(train) & set(val)
    assert manifest["source"]["overlap"] == 0


def test_a_long_documents_side_is_that_of_its_whole_text(tmp_path, monkeypatch):
    texts = [f"document number {n} " * 10 for n in range(120)]
    for n, text in enumerate(texts):
        write(tmp_path / f"{n:03d}.txt", text)
    run(tmp_path / "whole", tmp_path, val_fraction=0.2)
    monkeypatch.setattr("gpt.text.sources.BLOCK_BYTES", 16)
    (tmp_path / "more").mkdir()
    run(tmp_path / "more" / "pieces", *sorted(tmp_path.glob("*.txt")), val_fraction=0.2)
    for split in ("train", "val"):
        assert documents_of(tmp_path / "whole", split) == documents_of(tmp_path / "more" / "pieces", split)


def test_a_tail_begins_inside_a_document_without_an_end_of_text_of_its_own(tmp_path):
    source = write(tmp_path / "x.jsonl", rows("aaaa", "bbbb", "cccc"))
    for fraction, train, val in (
        (0.5, "|aaaa|bb", "bb|cccc"),
        (1 / 3, "|aaaa|bbbb", "|cccc"),
        (0.25, "|aaaa|bbbb|c", "ccc"),
    ):
        run(tmp_path / "out", source, val_split="tail", val_fraction=fraction)
        found = ["".join("|" if i == EOT else chr(i) for i in ids_of(tmp_path / "out", s)) for s in ("train", "val")]
        assert found == [train, val]


def test_validation_files_of_their_own_and_their_overlap(tmp_path):
    source = write(tmp_path / "x.jsonl", rows("one", "two", "three"))
    manifest = run(tmp_path / "out", source, val=(str(write(tmp_path / "v.jsonl", rows("two", "four"))),))
    assert documents_of(tmp_path / "out") == ["one", "two", "three"]
    assert documents_of(tmp_path / "out", "val") == ["two", "four"]
    assert (manifest["source"]["split"]["rule"], manifest["source"]["overlap"]) == ("files", 1)


def test_a_fraction_that_leaves_a_side_empty_is_refused(tmp_path):
    source = write(tmp_path / "x.jsonl", rows("a"))
    for rule, fraction, message in (("tail", 0.001, "leaves a side empty"), ("hash", 0.001, "by hash")):
        with pytest.raises(InputError, match=message):
            run(tmp_path / "out", source, val_split=rule, val_fraction=fraction)
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
            run(out, source)
        assert [path.read_text() for path in out.iterdir()] == ["precious"] * len(names)
    with pytest.raises(InputError, match="a file; give a folder"):
        run(source, source)


def test_preparing_again_replaces_the_earlier_dataset(tmp_path):
    run(tmp_path / "out", write(tmp_path / "x.txt", "some words " * 100), shard_tokens=100)
    run(tmp_path / "out", write(tmp_path / "y.txt", "other"), val_fraction=0)
    names = ["dataset.json", "tokenizer.json", "tokenizer_config.json", "train_000000.bin"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_bad_input_leaves_the_earlier_dataset_alone(tmp_path):
    run(tmp_path / "out", write(tmp_path / "x.txt", "some words"))
    before = checksums(tmp_path / "out")
    with pytest.raises(InputError):
        run(tmp_path / "out", write(tmp_path / "y.txt", b"\xff"))
    assert checksums(tmp_path / "out") == before


@pytest.mark.parametrize("failure", [InputError("x"), ResourceError("x"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_earlier_dataset_alone(tmp_path, monkeypatch, failure):
    out = tmp_path / "out"
    run(out, write(tmp_path / "x.txt", "some words " * 100), shard_tokens=100)
    before = checksums(out)

    def failing(*arguments):
        yield from itertools.islice(encoded(*arguments), 1)
        assert checksums(out / "prepare.tmp")  # something had been written
        raise failure

    monkeypatch.setattr("prepare.encoded", failing)
    with pytest.raises(type(failure)):
        run(out, write(tmp_path / "y.txt", "other words " * 30_000), shard_tokens=100)
    assert checksums(out) == before
    assert open_dataset(out)


def test_publishing_that_is_cut_short_leaves_no_manifest_and_a_rerun_repairs(tmp_path, monkeypatch):
    out, source = tmp_path / "out", write(tmp_path / "x.txt", "some words")
    run(out, source, val_fraction=0)
    before, replace = checksums(out), os.replace

    def cut_short(source, target):
        if str(target) == str(out / "train_000000.bin"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", cut_short)
        with pytest.raises(KeyboardInterrupt):
            run(out, source, val_fraction=0)
    assert not (out / "dataset.json").exists()
    run(out, source, val_fraction=0)
    assert checksums(out) == before


def test_a_file_that_came_into_the_folder_meanwhile_is_left_alone(tmp_path, monkeypatch):
    out, source = tmp_path / "out", write(tmp_path / "x.txt", "some words")
    monkeypatch.setattr("prepare.check_complete", lambda *_: write(out / "notes.txt", "precious"))
    run(out, source)
    assert (out / "notes.txt").read_text() == "precious"


def test_a_failure_leaves_no_new_folders_behind(tmp_path, monkeypatch):
    source = write(tmp_path / "x.txt", "some words")
    monkeypatch.setattr("prepare.encoded", lambda *_: (1 / 0 for _ in "x"))
    (tmp_path / "old").mkdir()
    for out in (tmp_path / "new" / "deep" / "out", tmp_path / "old" / "out"):
        with pytest.raises(ZeroDivisionError):
            run(out, source)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old", "x.txt"]


# ---- built-in corpora


def test_the_standard_library_is_read_as_python_reads_it_without_tests(tmp_path):
    lib = tmp_path / "lib"
    for name in (
        "a.py",
        "test/t.py",
        "pkg/tests/t.py",
        "site-packages/s.py",
        "pkg/b.py",
        "pkg/__pycache__/c.py",
        "bad.py",
    ):
        (lib / name).parent.mkdir(parents=True, exist_ok=True)
        write(lib / name, f"# {name}\n")
    write(lib / "latin.py", "# -*- coding: latin-1 -*-\n# é\n", encoding="latin-1")
    write(lib / "bad.py", b"# \xff\n")
    sources, said = standard_library(lib)
    pieces = list(read(sources, Reading()))
    assert [piece.text for piece in pieces if piece.readable] == [
        "# a.py\n",
        "# -*- coding: latin-1 -*-\n# é\n",
        "# pkg/b.py\n",
    ]
    assert [piece.name for piece in pieces if not piece.readable] == [str(lib / "bad.py")]
    assert said["files"] == 4 and len(said["sha256_of_names_and_sizes"]) == 64


def test_this_interpreters_standard_library_has_its_modules_and_no_tests():
    sources, said = standard_library()
    names = {source.path.name for source in sources}
    assert {"argparse.py", "dataclasses.py"} <= names and "test_argparse.py" not in names
    assert said["files"] == len(sources) > 400


def test_shakespeare_is_downloaded_checked_and_prepared(tmp_path, server, tinyshakespeare):
    url, files = server
    files["/input.txt"] = tinyshakespeare.read_bytes()
    manifest = run(tmp_path / "out", corpus="shakespeare", url=f"{url}/input.txt", val_fraction=0)
    assert documents_of(tmp_path / "out") == [tinyshakespeare.read_text(encoding="utf-8")]
    assert manifest["source"]["corpus"] == "shakespeare"


def test_a_download_that_is_not_shakespeare_is_refused(tmp_path, server):
    url, files = server
    files["/short.txt"], files["/long.txt"] = b"short", bytes(SHAKESPEARE_BYTES + 1)
    for path, failure, message in (
        ("/short.txt", IntegrityError, "sha256 mismatch"),
        ("/long.txt", IntegrityError, "more than the 1115394 bytes"),
        ("/absent.txt", ResourceError, f"download failed: {url}/absent.txt"),
    ):
        with pytest.raises(failure, match=message):
            run(tmp_path / "out", corpus="shakespeare", url=url + path)
    with pytest.raises(InputError, match="not an https address"):
        shakespeare("http://example.com/input.txt", tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_glob_of_bytes_from_stdin_is_spooled_beside_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a b c " * 50_000)))
    manifest = run(tmp_path / "deep" / "out", "-", val_split="tail", val_fraction=0.5)
    assert manifest["source"]["bytes"] == 300_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]
