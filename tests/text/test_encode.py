"""Text to ids: chunks against the whole, documents the tokenizer cannot split, and any number of workers."""

import itertools
import json
import random
import threading
from dataclasses import replace

import pytest
import tiktoken
from prepare_helpers import ALPHABET, checksums, ids_of, prepare_here, rows, write

from gpt.errors import InputError
from gpt.text.added_tokens import Additions
from gpt.text.encode import UP_TO_CUT, Unit, encode_batches, units_of
from gpt.text.huggingface import PATTERNS
from gpt.text.split import Part
from gpt.text.tokenizer import Tokenizer, load_tokenizer, save_tokenizer

# ---- chunks


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
        parts = [Part("train", 0, "x", text[a:b]) for a, b in itertools.pairwise(stops) if a < b]
        units = list(units_of(parts, tokenizer.pattern, size=draw.randrange(1, 9)))
        assert "".join(unit.text for unit in units) == text
        assert [unit.starts for unit in units] == [True] + [False] * (len(units) - 1)
        assert [id for unit in units for id in tokenizer.encode(unit.text)] == tokenizer.encode(text), repr(text)
        chunks += len(units)
    assert chunks > 2500  # it does cut


@pytest.mark.parametrize(
    ("added", "cuts"),
    [("b c", False), ("b ", False), ("x\n", False), (" c", True), ("  ", True), ("\n\n", True), ("bc", True)],
)
def test_a_cut_never_divides_an_added_token(added, cuts):
    tokenizer = load_tokenizer("byte")
    tokenizer = replace(tokenizer, additions=Additions(ordinary={added: 300}))
    text = "b c  d\n\nx\nbc e " * 20
    parts = [Part("train", 0, "x", text[at : at + 3]) for at in range(0, len(text), 3)]
    units = list(units_of(parts, tokenizer.pattern, [added], size=4))
    assert [id for unit in units for id in tokenizer.encode(unit.text)] == tokenizer.encode(text)
    assert 300 in tokenizer.encode(text)
    assert (len(units) > 1) == cuts


def test_a_document_with_an_added_token_is_prepared_as_it_is_encoded(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_tokenizer(load_tokenizer("byte"), folder)
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["added_tokens"].append({"id": 257, "content": "b c", "special": False, "normalized": True})
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    text = "x" + "b c " * 50_000  # a block ends between b and c
    prepare_here(tmp_path / "out", write(tmp_path / "x.txt", text), tokenizer=str(folder), val_fraction=0)
    assert ids_of(tmp_path / "out").tolist() == [256, ord("x"), *[257, 32] * 50_000]


def test_a_cut_is_never_made_for_an_unknown_pattern():
    parts = [Part("train", 0, "x", "a b c d ")] * 10
    assert [unit.text for unit in units_of(parts, r"\S+\s*", size=1)] == ["a b c d " * 10]
    assert len(list(units_of(parts, PATTERNS["gpt2"][0], size=1))) == 10
    assert set(UP_TO_CUT) == set(PATTERNS)


def test_the_example_of_sure_places():
    text, places = "to be, or\n  not", []
    while match := UP_TO_CUT["gpt2"].match(text):
        text, place = text[: match.end()], text[match.end() :]
        places.insert(0, place)
    assert [text, *places] == ["to", " be,", " or", "\n  not"]


def test_a_long_document_is_not_read_to_its_end_before_its_first_chunk_comes():
    texts = []

    def parts():
        for text in itertools.repeat("some words ", 500):
            texts.append(text)
            yield Part("train", 0, "x", text)

    assert len(next(units_of(parts(), PATTERNS["gpt2"][0], size=1000)).text) >= 990
    assert len("".join(texts)) < 1100


def test_each_side_of_a_document_that_is_divided_is_encoded_by_itself():
    parts = [
        Part("train", 0, "x", "a b"),
        Part("train", 0, "x", " c"),
        Part("val", 0, "x", "d e"),
        Part("val", 1, "y", "f"),
    ]
    units = list(units_of(parts, PATTERNS["gpt2"][0]))
    assert [(unit.split, unit.text, unit.starts) for unit in units] == [
        ("train", "a b c", True),
        ("val", "d e", False),
        ("val", "f", True),
    ]


def test_a_long_document_is_the_same_whatever_the_size_of_its_blocks(tmp_path, monkeypatch):
    text = "".join(random.Random(2).choices(ALPHABET, k=3000))
    source = write(tmp_path / "x.txt", text)
    prepare_here(tmp_path / "one", source, val_split="tail")
    for size in (1, 7, 1000):
        monkeypatch.setattr("gpt.text.sources.BLOCK_BYTES", size)
        prepare_here(tmp_path / "other", source, val_split="tail")
        assert checksums(tmp_path / "other") == checksums(tmp_path / "one")


# ---- documents


def test_fault_006_end_of_text_in_a_document_is_ordinary(tmp_path):
    text = "a<|endoftext|>b" * 20
    prepare_here(tmp_path / "out", write(tmp_path / "x.jsonl", rows(text, text)), tokenizer="bpe:265", val_fraction=0)
    tokenizer, ids = load_tokenizer(tmp_path / "out"), ids_of(tmp_path / "out").tolist()
    assert ids.count(tokenizer.eot) == 2
    assert ids == 2 * [tokenizer.eot, *tokenizer.encoding.encode_ordinary(text)]


def test_fault_007_a_million_times_one_character(tmp_path, bpe_cache):
    source = write(tmp_path / "x.jsonl", rows("^" * 1_000_000, "a" * 1_000_000))
    manifest = prepare_here(tmp_path / "out", source, tokenizer="gpt2", val_fraction=0)
    assert manifest["splits"]["train"][0]["tokens"] == 2 * 250_001


@pytest.mark.parametrize("workers", [1, 2])
def test_fault_007_a_text_that_makes_tiktoken_panic_names_the_document(tmp_path, workers):
    source = write(tmp_path / "x.jsonl", rows("fine", " " * 1_000_000 + "x"))
    with pytest.raises(InputError, match=r"x\.jsonl:2: the tokenizer cannot split this text"):
        prepare_here(tmp_path / "out", source, workers=workers, val_fraction=0)
    assert not (tmp_path / "out").exists()


# ---- workers


@pytest.mark.parametrize("error", [MemoryError("no memory"), InputError("x")])
def test_fault_013_a_worker_that_fails_ends_the_job(error):
    """Workers are threads, which cannot be killed alone."""
    byte = load_tokenizer("byte")

    class Failing:
        eot = byte.eot

        def encode_to_numpy(self, text, allow_special=False):
            if text.startswith("20 "):
                raise error
            return byte.encode_to_numpy(text)

    endless = ([Unit("train", "x", f"{number} some words", False)] for number in itertools.count())
    results = encode_batches(endless, Failing(), workers=2)
    assert len(list(itertools.islice(results, 20))) == 20
    with pytest.raises(type(error)):
        next(results)


@pytest.mark.parametrize("ending", ["failure", "close"])
def test_after_a_failure_queued_batches_are_not_encoded(ending):
    byte, encoded, released = load_tokenizer("byte"), [], threading.Event()

    class Slow:
        eot = byte.eot

        def encode_to_numpy(self, text, allow_special=False):
            encoded.append(text)
            if text == "1" and ending == "failure":
                raise InputError("x")
            if text == "2":
                released.wait(60)
            return byte.encode_to_numpy(text)

    batches = ([Unit("train", "x", str(number), False)] for number in range(100))
    results = encode_batches(batches, Slow(), workers=1)
    next(results)
    timer = threading.Timer(0.2, released.set)  # batch 2 is under way when the end comes, 3 and 4 wait
    timer.start()
    if ending == "failure":
        with pytest.raises(InputError):
            list(results)
    else:
        results.close()
    timer.join()
    assert encoded in (["0", "1"], ["0", "1", "2"])


def test_fault_014_the_same_bytes_with_any_number_of_workers(tmp_path):
    draw = random.Random(1)
    texts = ["".join(draw.choices(ALPHABET, k=draw.randrange(1, 3000))) for _ in range(300)]
    source = write(tmp_path / "x.jsonl", rows(*texts, "long words " * 30_000))
    found = []
    for name, workers in (("a", 1), ("b", 3), ("c", 1)):
        prepare_here(tmp_path / name, source, workers=workers, shard_tokens=300_000, val_split="hash", val_fraction=0.1)
        found.append(checksums(tmp_path / name))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 5
