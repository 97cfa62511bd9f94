"""The tokenizer against tiktoken, tokenizers and transformers; what it stores, refuses and survives."""

import base64
import json
import random
import shutil

import pytest
import tiktoken

from gpt.errors import InputError, IntegrityError
from gpt.text.huggingface import CL100K_PATTERNS, GPT2_PATTERNS, O200K_PATTERNS, spelled
from gpt.text.tokenizer import PROBES, load_tokenizer, save_tokenizer, train_bpe

ALPHABET = [*"abcXYZ0123456789 \t\n\r'.,!?-/<|>_^é½٣ſDŽ😀", "  ", "\n\n", "\r\n", "'s", "'LL", "你好", "日本", " the"]
ALPHABET += ["👩‍👩‍👧", "\u0301", "\u00a0", "\u2003", "\u3000", "\u2028", "\x85", "\u200b", "<|endoftext|>"]
GPT2_FILES = ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")  # merges, vocab


def random_texts(count, length=200):
    draw = random.Random(7)
    return [*PROBES, *("".join(draw.choices(ALPHABET, k=length)) for _ in range(count))]


@pytest.fixture(scope="module")
def gpt2(bpe_cache):
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def small():
    """A trained tokenizer of 400 ids and the text it was trained on."""
    return train_bpe(random_texts(60), 400)


def write_rank_file(folder, ranks, pattern=GPT2_PATTERNS[0], special_tokens=None):
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items()]
    (folder / "x.tiktoken").write_bytes(b"".join(lines))
    special_tokens = {"<|endoftext|>": max(ranks.values()) + 1} if special_tokens is None else special_tokens
    (folder / "x.json").write_text(json.dumps({"pattern": pattern, "special_tokens": special_tokens}))
    return folder / "x.tiktoken"


def byte_ranks():
    return {bytes([byte]): byte for byte in range(256)}


def same_as_transformers(folder, tokenizer, texts):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    assert [theirs.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    return theirs


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


# ---- identity and storage


def test_identity_is_the_same_by_name_and_from_every_kind_of_folder(gpt2, tmp_path, bpe_cache):
    from transformers import GPT2Tokenizer

    merges = (bpe_cache / GPT2_FILES[0]).read_text(encoding="utf-8")
    vocab = (bpe_cache / GPT2_FILES[1]).read_text(encoding="utf-8")
    old, new, ours = tmp_path / "old", tmp_path / "new", tmp_path / "ours"
    for folder in (old, ours):
        folder.mkdir()
    (old / "vocab.json").write_text(vocab, encoding="utf-8")
    (old / "merges.txt").write_text(merges, encoding="utf-8")
    GPT2Tokenizer.from_pretrained(old).save_pretrained(new)
    assert (new / "tokenizer.json").exists()
    save_tokenizer(gpt2, ours)
    assert {load_tokenizer(folder).identity for folder in (old, new, ours)} == {gpt2.identity}
    stored = json.loads((ours / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert stored == merges.splitlines()[1:]  # the merges recovered from the ranks are those of GPT-2's release


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


def test_transformers_reads_what_we_store_for_gpt2(gpt2, tmp_path):
    save_tokenizer(gpt2, tmp_path, model_max_length=1024)
    theirs = same_as_transformers(tmp_path, gpt2, random_texts(100))
    assert theirs.eos_token_id == theirs.unk_token_id == theirs.pad_token_id == 50256
    assert theirs.model_max_length == 1024


@pytest.mark.parametrize("pattern", [GPT2_PATTERNS[0], CL100K_PATTERNS[0], O200K_PATTERNS[0], r"\p{L}+|\s+|[^\p{L}\s]"])
def test_a_rank_file_with_any_pattern_survives_storing(small, tmp_path, pattern):
    tokenizer = load_tokenizer(write_rank_file(tmp_path, small.encoding._mergeable_ranks, pattern))
    (tmp_path / "stored").mkdir()
    save_tokenizer(tokenizer, tmp_path / "stored")
    assert load_tokenizer(tmp_path / "stored").record == tokenizer.record
    same_as_transformers(tmp_path / "stored", tokenizer, random_texts(100))


def test_ranks_that_are_no_pure_merge_history_survive_storing(tmp_path):
    ranks = byte_ranks() | {b"abc": 256, b"ab": 257, b" abcd": 258, b"cab": 259, b"\xe4\xbd\xa0": 260}
    tokenizer = load_tokenizer(write_rank_file(tmp_path, ranks))
    (tmp_path / "stored").mkdir()
    save_tokenizer(tokenizer, tmp_path / "stored")
    stored = json.loads((tmp_path / "stored/tokenizer.json").read_text(encoding="utf-8"))
    assert stored["model"]["ignore_merges"]
    assert load_tokenizer(tmp_path / "stored").identity == tokenizer.identity
    draw = random.Random(3)
    texts = ["".join(draw.choices("abcd 你", k=12)) for _ in range(300)]
    same_as_transformers(tmp_path / "stored", tokenizer, texts)


def test_byte_tokenizer_and_unused_ids_survive_storing(tmp_path):
    ranks = byte_ranks()
    specials = {"<|endoftext|>": 300, "<|fim_prefix|>": 310}
    for tokenizer in (
        load_tokenizer("byte"),
        load_tokenizer(write_rank_file(tmp_path, ranks, special_tokens=specials)),
    ):
        folder = tmp_path / tokenizer.name
        folder.mkdir()
        save_tokenizer(tokenizer, folder)
        assert load_tokenizer(folder).record == tokenizer.record
        assert same_as_transformers(folder, tokenizer, random_texts(5)).eos_token_id == tokenizer.eot


def test_a_pattern_that_hugging_faces_engine_reads_differently_is_not_stored(tmp_path):
    tokenizer = load_tokenizer(write_rank_file(tmp_path, byte_ranks() | {b"\n\n": 256}, r"\s+$|[\s\S]"))
    with pytest.raises(InputError, match="differently in Hugging Face's engine"):
        save_tokenizer(tokenizer, tmp_path)


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
        ("bpe:400", ["abab"], "yields only 25"),
    ):
        with pytest.raises(InputError, match=message):
            load_tokenizer(source, texts)


# ---- refusals


def edited(folder, source, edit):
    """A copy of the tokenizer.json in `source` with `edit` applied, without our own settings beside it."""
    stored = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    edit(stored)
    (folder / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("component", "edit"),
    [
        ("model WordPiece", lambda t: t["model"].update(type="WordPiece")),
        ("model Unigram", lambda t: t["model"].update(type="Unigram")),
        ("normalizer NFC", lambda t: t.update(normalizer={"type": "NFC"})),
        ("add_prefix_space", lambda t: t["pre_tokenizer"].update(add_prefix_space=True)),
        ("pre_tokenizer Metaspace", lambda t: t.update(pre_tokenizer={"type": "Metaspace"})),
        ("pre_tokenizer None", lambda t: t.update(pre_tokenizer=None)),
        ("pre_tokenizer pattern", lambda t: t["pre_tokenizer"].update(use_regex=False)),
        ("byte_fallback", lambda t: t["model"].update(byte_fallback=True)),
        ("added token", lambda t: t["added_tokens"].append({"id": 401, "content": "foo", "special": False})),
        ("merges in another order", lambda t: t["model"]["merges"].reverse()),
        ("merges in another order", lambda t: t["model"]["merges"].pop()),
        ("vocabulary entry", lambda t: t["model"]["vocab"].update({"a b": 402})),
    ],
)
def test_other_kinds_of_tokenizers_are_refused_naming_the_component(small, tmp_path, component, edit):
    save_tokenizer(small, tmp_path)
    (tmp_path / "foreign").mkdir()
    with pytest.raises(InputError, match=component):
        load_tokenizer(edited(tmp_path / "foreign", tmp_path, edit))


def test_a_foreign_folder_with_a_known_pattern_is_read(small, tmp_path):
    save_tokenizer(small, tmp_path)
    (tmp_path / "foreign").mkdir()
    assert load_tokenizer(edited(tmp_path / "foreign", tmp_path, lambda t: None)).identity == small.identity


def test_malformed_tokenizer_files_are_refused(tmp_path):
    for text in ("{", "[]", "{}", '{"model": 3, "added_tokens": []}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(IntegrityError, match="tokenizer"):
            load_tokenizer(tmp_path)


def test_tokenizer_files_that_cannot_be_read_are_refused_naming_them(tmp_path, monkeypatch):
    rank_file = write_rank_file(tmp_path, byte_ranks())
    folder, cache = tmp_path / "folder", tmp_path / "cache"
    (folder / "merges.txt").mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0}))
    with pytest.raises(InputError, match=r"merges\.txt: Is a directory; make it readable"):
        load_tokenizer(folder)
    (cache / GPT2_FILES[0]).mkdir(parents=True)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with pytest.raises(InputError, match=f"{GPT2_FILES[0]}: Is a directory; make it readable"):
        load_tokenizer("gpt2")

    def refused(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refused)
    with pytest.raises(InputError, match=r"x\.tiktoken: Permission denied; make it readable"):
        load_tokenizer(rank_file)


def test_fault_115_a_vocabulary_lacking_single_bytes_is_refused(tmp_path):
    ranks = byte_ranks()
    del ranks[b"\xff"]
    with pytest.raises(InputError, match="1 of the 256 single bytes are missing"):
        load_tokenizer(write_rank_file(tmp_path, ranks))


def test_rank_files_with_mistakes_are_refused(tmp_path):
    for ranks, changes, message in (
        (byte_ranks() | {b"ab": 5}, {}, "two tokens"),
        (byte_ranks() | {b"ab": 1 << 40}, {}, "whole number"),
        (byte_ranks(), {"pattern": "("}, "pattern"),
        (byte_ranks(), {"special_tokens": {}}, "no special token"),
    ):
        with pytest.raises(InputError, match=message):
            load_tokenizer(write_rank_file(tmp_path, ranks, **changes))
    (tmp_path / "x.tiktoken").write_text("YQ== 1\n???\n")
    with pytest.raises(InputError, match="tiktoken:2"):
        load_tokenizer(tmp_path / "x.tiktoken")
    (tmp_path / "x.json").unlink()
    with pytest.raises(InputError, match=r"x\.json"):
        load_tokenizer(tmp_path / "x.tiktoken")


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(InputError, match="gpt2, r50k_base"):
        load_tokenizer("gtp2")


# ---- run folders


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


def test_the_alphabet_of_bytes_is_hugging_faces():
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(spelled(bytes(range(256)))) == sorted(ByteLevel.alphabet())


def test_storing_leaves_only_two_files(small, tmp_path):
    save_tokenizer(small, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    shutil.copytree(tmp_path, tmp_path / "moved")
    assert load_tokenizer(tmp_path / "moved").record == small.record
