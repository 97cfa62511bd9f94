"""The input as a whole: inputs without documents, the sample that a tokenizer is trained on, and what the size of the
text decides."""

import io
import sys
from types import SimpleNamespace

import pytest
from prepare_helpers import documents_of, ids_of, prepare_here, rows, write

from gpt.errors import InputError
from gpt.text.tokenizer import load_tokenizer


@pytest.mark.parametrize("data", [b"", b" \n\t ", b"\xef\xbb\xbf", b"\n" * 300_000])
def test_fault_002_no_documents(tmp_path, data):
    with pytest.raises(InputError, match=r"x\.txt: no documents"):
        prepare_here(tmp_path / "out", write(tmp_path / "x.txt", data))
    assert not (tmp_path / "out").exists()


def test_fault_002_a_built_in_corpus_without_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt.text.corpora.standard_library", lambda: ([], {}))
    with pytest.raises(InputError, match="--corpus stdlib: no documents"):
        prepare_here(tmp_path / "out", corpus="stdlib", val_fraction=0)
    assert not (tmp_path / "out").exists()


def test_a_bpe_of_the_size_asked_for_is_trained_on_the_training_part_alone(tmp_path):
    text = "the cat sat on the mat and the dog lay on the log " * 50
    source = write(tmp_path / "x.txt", text + "xyzxyzxyz" * 100)
    manifest = prepare_here(tmp_path / "out", source, tokenizer="bpe:270", val_split="tail", val_fraction=0.26)
    tokenizer = load_tokenizer(tmp_path / "out")
    assert manifest["tokenizer"] == tokenizer.manifest_entry
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
        prepare_here(tmp_path / name, source, tokenizer="bpe:300")
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
    prepare_here(tmp_path / "out", source, tokenizer="bpe:300", val_split="hash", val_fraction=0.2)
    assert 1_000 < sum(map(len, seen)) < 6_000
    assert set(seen) <= set(documents_of(tmp_path / "out"))


# ---- by the size of the text


@pytest.mark.parametrize(("size", "name"), [(99_999, "byte"), (100_000, "bpe:1024")])
def test_the_tokenizer_auto_follows_the_size_of_the_input_alone(tmp_path, capsys, monkeypatch, size, name):
    monkeypatch.setattr("gpt.text.tokenizer.named_encoding", lambda _: pytest.fail("a tokenizer may be downloaded"))
    words = "".join(f"{number:x} " for number in range(40_000))
    source, val = write(tmp_path / "x.txt", words[:size]), write(tmp_path / "val.txt", words)
    manifest = prepare_here(tmp_path / "out", source, tokenizer="auto", val=(str(val),))
    assert manifest["tokenizer"]["name"] == name
    assert f"tokenizer: {name}, which suits {size / 1e3:.1f} KB of text" in capsys.readouterr().out
    again = prepare_here(tmp_path / "again", source, tokenizer=name, val=(str(val),))
    assert again["tokenizer"] == manifest["tokenizer"]


@pytest.mark.parametrize(("size", "held"), [(400, 80), (1_000, 129), (2_000, 130), (5_000, 250)])
def test_the_validation_share_grows_to_one_context_or_a_fifth(tmp_path, capsys, size, held):
    manifest = prepare_here(tmp_path / "out", cut(tmp_path, size))
    assert len(ids_of(tmp_path / "out", "val")) == held
    assert ("one context" in capsys.readouterr().out) == (held / size > 0.05)
    assert manifest["source"]["split"]["fraction"] == pytest.approx(held / size, abs=1e-3)


def cut(folder, size):
    return write(folder / "x.txt", ("some words " * 1000)[:size])


@pytest.mark.parametrize("settings", [{"val_fraction": 0.05}, {"val_fraction": 0.1}])
def test_a_validation_share_that_is_typed_stays(tmp_path, settings):
    prepare_here(tmp_path / "out", cut(tmp_path, 1_000), **settings)
    assert len(ids_of(tmp_path / "out", "val")) == 1_000 * settings["val_fraction"]


def test_no_validation_and_files_to_validate_on_stay(tmp_path):
    assert "val" not in prepare_here(tmp_path / "a", cut(tmp_path, 500), val_fraction=0)["splits"]
    prepare_here(tmp_path / "b", cut(tmp_path, 500), val=(str(write(tmp_path / "val.txt", "short")),))
    assert documents_of(tmp_path / "b", "val") == ["short"]


def test_a_share_of_many_short_documents_grows_too(tmp_path):
    source = write(tmp_path / "x.jsonl", rows(*(f"poem {number:03d}" for number in range(100))))
    manifest = prepare_here(tmp_path / "out", source)
    assert manifest["source"]["split"] == {"rule": "hash", "fraction": 0.162, "cut": 0}
    assert 5 < manifest["splits"]["val"][0]["documents"] < 35
    assert manifest["source"]["overlap"] == 0


def test_a_share_of_stdin_grows_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"some words " * 100)))
    prepare_here(tmp_path / "out", "-")
    assert len(ids_of(tmp_path / "out")) + len(ids_of(tmp_path / "out", "val")) == 1_101
    assert len(ids_of(tmp_path / "out", "val")) == 130


def test_a_bpe_takes_the_ids_that_the_text_yields(tmp_path, capsys):
    manifest = prepare_here(tmp_path / "out", write(tmp_path / "x.txt", "abab " * 300), tokenizer="bpe:1024")
    name = manifest["tokenizer"]["name"]
    size = int(name.removeprefix("bpe:"))
    assert 256 < size < 300
    assert manifest["tokenizer"]["vocab_size"] == size + 1 and manifest["tokenizer"]["eot"] == size
    assert f"info: tokenizer bpe:1024: the text yields {size} ids, so it is {name}" in capsys.readouterr().err
    prepare_here(tmp_path / "same", tmp_path / "x.txt", tokenizer=name)
    assert load_tokenizer(tmp_path / "same").identity == load_tokenizer(tmp_path / "out").identity


def test_the_manifest_records_how_to_prepare_the_same_text(tmp_path):
    source, val = write(tmp_path / "a b.txt", "some words"), write(tmp_path / "val.txt", "others")
    manifest = prepare_here(tmp_path / "out", source, val=(str(val),), encoding="latin-1", workers=2, dtype="uint32")
    recipe = [str(source), "--val", str(val), "--encoding", "latin-1"]
    assert manifest["source"]["recipe"] == recipe
    assert prepare_here(tmp_path / "b", source, val_fraction=0.05)["source"]["recipe"] == [
        str(source), "--val_fraction", "0.05"
    ]  # fmt: skip
