"""Ids against tiktoken, tokenizers and transformers; identity; training; where a tokenizer is loaded from."""

import random

import pytest
import tiktoken
from tokenizer_helpers import byte_ranks, random_texts, same_as_transformers, small_tokenizer, write_rank_file

from gpt.errors import InputError, IntegrityError
from gpt.text.huggingface import CL100K_PATTERNS, GPT2_PATTERNS, O200K_PATTERNS
from gpt.text.tokenizer import load_tokenizer, save_tokenizer, train_bpe


@pytest.fixture(scope="module")
def gpt2(bpe_cache):
    return load_tokenizer("gpt2")


@pytest.fixture
def small():
    return small_tokenizer()


# ---- ids


def mixed_text(size):
    """About `size` characters of words, scripts, emoji, white space, digits, code and contractions, the same always."""
    pools = [
        "αβγдежзيةहिन्दीไทย",
        "漢字かな交じり文",
        "😀👩‍👩‍👧🏳️‍🌈é̂",
        " \t\n\r\u00a0\u3000",
        "0123456789",
        "'s'll'RE don't",
    ]
    pools += ["the quick brown fox jumps over a lazy dog ", "<|endoftext|>", "def f(x):\n    return {}[]();//\n"]
    draw = random.Random(0)
    pieces = ("".join(draw.choices(draw.choice(pools), k=draw.randrange(60))) for _ in range(size // 30))
    return "".join(pieces)


@pytest.mark.parametrize("name", ["gpt2", "byte", "bpe"])
def test_transformers_gives_the_same_ids_on_a_megabyte_of_mixed_text(name, request, tmp_path):
    text = mixed_text(900_000)
    assert len(text.encode()) > 1_000_000
    if name == "gpt2":
        request.getfixturevalue("bpe_cache")
    tokenizer = train_bpe([text[:100_000]], 1000) if name == "bpe" else load_tokenizer(name)
    save_tokenizer(tokenizer, tmp_path)
    same_as_transformers(tmp_path, tokenizer, [text])


def test_gpt2_ids_are_tiktokens_and_end_of_text_in_text_is_ordinary(gpt2):
    theirs = tiktoken.get_encoding("gpt2")
    assert gpt2.encode("hello <|endoftext|>") == theirs.encode("hello <|endoftext|>", disallowed_special=())
    assert gpt2.encode("a<|endoftext|>", allow_special=True) == [64, 50256]
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)


def test_byte_ids_are_the_utf8_bytes():
    byte = load_tokenizer("byte")
    for text in random_texts(20):
        assert byte.encode(text) == list(text.encode())
    assert (byte.vocab_size, byte.eot) == (257, 256)


def test_decoding_gives_the_text_back_and_byte_lengths_add_up(small):
    lengths = small.byte_lengths()
    for text in random_texts(20):
        ids = small.encode(text)
        assert small.decode(ids) == text
        assert lengths[ids].sum() == len(text.encode())
    assert lengths.shape == (401,) and lengths[small.eot] == 0


def test_an_id_outside_the_vocabulary_is_refused(small):
    with pytest.raises(InputError, match="401"):
        small.decode([401])


def test_fault_005_a_lone_surrogate_is_encoded_as_the_replacement_character(small):
    assert small.encode("a\ud800b") == small.encode("a\ufffdb")


def test_fault_007_a_text_that_makes_tiktoken_panic_is_an_input_error(small):
    with pytest.raises(InputError, match="cannot split this text"):
        small.encode(" " * 1_000_000 + "x")


# ---- identity


def test_identity_differs_by_ranks_by_special_tokens_and_by_pattern(small, tmp_path):
    ranks = dict(small.encoding._mergeable_ranks)
    swapped = ranks | dict(zip(list(ranks)[-2:], list(ranks.values())[-2:][::-1], strict=True))
    seen = {small.identity}
    for changes in (
        {"ranks": swapped},
        {"ranks": ranks, "pattern": CL100K_PATTERNS[0]},
        {"ranks": ranks, "special_tokens": {"<|endoftext|>": 500}},
    ):
        seen.add(load_tokenizer(write_rank_file(tmp_path, **changes)).identity)
    assert len(seen) == 4


def test_older_and_newer_spellings_of_a_pattern_have_one_identity(small, tmp_path):
    for spellings in (GPT2_PATTERNS, CL100K_PATTERNS, O200K_PATTERNS):
        ranks = small.encoding._mergeable_ranks
        found = {load_tokenizer(write_rank_file(tmp_path, ranks, pattern)).identity for pattern in spellings}
        assert len(found) == 1


# ---- training


def test_trained_bpe_gives_the_ids_of_the_trainers_own_tokenizer(small):
    import tokenizers

    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator(random_texts(60), trainer)
    for text in random_texts(100):
        assert small.encode(text) == theirs.encode(text).ids
    assert (small.vocab_size, small.eot, small.name) == (401, 400, "bpe:400")


def test_training_twice_gives_the_same_tokenizer(small):
    assert train_bpe(iter(random_texts(60)), 400).identity == small.identity


def test_bpe_sizes_that_cannot_be_are_refused():
    for source, texts, message in (
        ("bpe:100", ["a"], "from 257"),
        ("bpe:x", ["a"], "from 257"),
        ("bpe:400", None, "trained by data/prepare.py"),
    ):
        with pytest.raises(InputError, match=message):
            load_tokenizer(source, texts)


@pytest.mark.parametrize(
    ("text", "merges"), [("a", []), ("abab", [b"ab", b"abab"]), ("abab ab", [b"ab", b"abab", b" ab"])]
)
def test_a_text_that_yields_fewer_ids_gives_as_many_as_it_can(text, merges, capsys):
    tokenizer = load_tokenizer("bpe:400", [text])
    ranks = tokenizer.encoding._mergeable_ranks
    assert {token for token in ranks if len(token) > 1} == set(merges)
    assert sorted(ranks.values()) == list(range(256 + len(merges)))
    assert (tokenizer.name, tokenizer.eot) == (f"bpe:{len(ranks)}", len(ranks))
    assert f"bpe:400: the text yields {len(ranks)} ids" in capsys.readouterr().err


# ---- loading


def test_fault_115_a_vocabulary_lacking_single_bytes_is_refused(tmp_path):
    ranks = byte_ranks()
    del ranks[b"\xff"]
    with pytest.raises(InputError, match="1 of the 256 single bytes are missing"):
        load_tokenizer(write_rank_file(tmp_path, ranks))


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(InputError, match="gpt2, r50k_base"):
        load_tokenizer("gtp2")


def test_a_run_folder_stands_for_its_best_else_its_newest_checkpoint(small, tmp_path):
    for step, tokenizer in ((1, load_tokenizer("byte")), (2, small), (10, load_tokenizer("byte"))):
        (tmp_path / f"step-{step:09d}").mkdir()
        save_tokenizer(tokenizer, tmp_path / f"step-{step:09d}")
    (tmp_path / "step-000000099.tmp").mkdir()
    (tmp_path / "best.txt").write_text("step-000000002\n")
    assert load_tokenizer(tmp_path).identity == small.identity
    for pointer in ("", "step-000000003", "../elsewhere", "step-000000099.tmp"):
        (tmp_path / "best.txt").write_text(pointer)
        assert load_tokenizer(tmp_path).name == "byte"
    (tmp_path / "best.txt").unlink()
    assert load_tokenizer(tmp_path).name == "byte"


def test_a_tokenizer_that_does_not_read_back_is_no_success(small, tmp_path, monkeypatch):
    monkeypatch.setattr("gpt.text.tokenizer.load_tokenizer", lambda _: load_tokenizer("byte"))
    with pytest.raises(IntegrityError, match="tokenizer bpe:400 does not read back as it was written"):
        save_tokenizer(small, tmp_path)
