"""Which documents are validated on."""

import pytest
from prepare_helpers import EOT, documents_of, ids_of, prepare_here, rows, write

from gpt.errors import InputError


def test_the_split_is_by_hash_from_100_similar_documents_on_and_else_the_tail(tmp_path, capsys):
    texts = [f"document number {n}" for n in range(100)]
    for given, rule in ((texts, "hash"), (texts[:99], "tail"), ([*texts, "long " * 300], "tail")):
        manifest = prepare_here(tmp_path / "out", write(tmp_path / "x.jsonl", rows(*given)), val_fraction=0.2)
        assert manifest["source"]["split"]["rule"] == rule
    assert capsys.readouterr().out.count("validation: ") == 3


def test_fault_015_equal_documents_fall_on_one_side_and_the_overlap_is_0(tmp_path):
    texts = [f"document number {n % 150}" for n in range(600)]
    manifest = prepare_here(tmp_path / "out", write(tmp_path / "x.jsonl", rows(*texts)), val_fraction=0.2)
    train, val = documents_of(tmp_path / "out"), documents_of(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(texts)
    assert train and val and not set(train) & set(val)
    assert manifest["source"]["overlap"] == 0


def test_a_long_documents_side_is_that_of_its_whole_text(tmp_path, monkeypatch):
    texts = [f"document number {n} " * 10 for n in range(120)]
    for n, text in enumerate(texts):
        write(tmp_path / f"{n:03d}.txt", text)
    prepare_here(tmp_path / "whole", tmp_path, val_fraction=0.2)
    monkeypatch.setattr("gpt.text.sources.BLOCK_BYTES", 16)
    (tmp_path / "more").mkdir()
    prepare_here(tmp_path / "more" / "pieces", *sorted(tmp_path.glob("*.txt")), val_fraction=0.2)
    for split in ("train", "val"):
        assert documents_of(tmp_path / "whole", split) == documents_of(tmp_path / "more" / "pieces", split)


def test_a_tail_begins_inside_a_document_without_an_end_of_text_of_its_own(tmp_path):
    source = write(tmp_path / "x.jsonl", rows("aaaa", "bbbb", "cccc"))
    for fraction, train, val in (
        (0.5, "|aaaa|bb", "bb|cccc"),
        (1 / 3, "|aaaa|bbbb", "|cccc"),
        (0.25, "|aaaa|bbbb|c", "ccc"),
    ):
        prepare_here(tmp_path / "out", source, val_split="tail", val_fraction=fraction)
        found = ["".join("|" if i == EOT else chr(i) for i in ids_of(tmp_path / "out", s)) for s in ("train", "val")]
        assert found == [train, val]


def test_validation_files_of_their_own_and_their_overlap(tmp_path):
    source = write(tmp_path / "x.jsonl", rows("one", "two", "three"))
    manifest = prepare_here(tmp_path / "out", source, val=(str(write(tmp_path / "v.jsonl", rows("two", "four"))),))
    assert documents_of(tmp_path / "out") == ["one", "two", "three"]
    assert documents_of(tmp_path / "out", "val") == ["two", "four"]
    assert (manifest["source"]["split"]["rule"], manifest["source"]["overlap"]) == ("files", 1)


def test_a_fraction_that_leaves_a_side_empty_is_refused(tmp_path):
    source = write(tmp_path / "x.jsonl", rows("a"))
    for rule, fraction, message in (("tail", 0.001, "leaves a side empty"), ("hash", 0.001, "by hash")):
        with pytest.raises(InputError, match=message):
            prepare_here(tmp_path / "out", source, val_split=rule, val_fraction=fraction)
    assert not (tmp_path / "out").exists()
