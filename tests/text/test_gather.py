"""The input as a whole: inputs without documents, and the sample that a tokenizer is trained on."""

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
    monkeypatch.setattr("gpt.text.gather.standard_library", lambda: ([], {}))
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
