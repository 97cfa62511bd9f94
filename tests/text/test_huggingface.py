"""Tokenizers in Hugging Face's files: what we store, transformers reads; what others store, we read or refuse."""

import json
import random
import shutil

import pytest
from tokenizer_helpers import (
    GPT2_FILES,
    byte_ranks,
    random_texts,
    same_as_transformers,
    small_tokenizer,
    write_rank_file,
)

from gpt.errors import InputError, IntegrityError, ResourceError
from gpt.text.huggingface import CL100K_PATTERNS, GPT2_PATTERNS, O200K_PATTERNS, merges_of, spelled
from gpt.text.tokenizer import load_tokenizer, save_tokenizer


@pytest.fixture(scope="module")
def gpt2(bpe_cache):
    return load_tokenizer("gpt2")


@pytest.fixture
def small():
    return small_tokenizer()


# ---- storing


def test_identity_is_the_same_by_name_and_from_every_kind_of_folder(gpt2, tmp_path, bpe_cache):
    from transformers import GPT2TokenizerFast

    merges = (bpe_cache / GPT2_FILES[0]).read_text(encoding="utf-8")
    vocab = (bpe_cache / GPT2_FILES[1]).read_text(encoding="utf-8")
    old, new, ours = tmp_path / "old", tmp_path / "new", tmp_path / "ours"
    for folder in (old, ours):
        folder.mkdir()
    (old / "vocab.json").write_text(vocab, encoding="utf-8")
    (old / "merges.txt").write_text(merges, encoding="utf-8")
    GPT2TokenizerFast.from_pretrained(old).save_pretrained(new)
    assert (new / "tokenizer.json").exists()
    save_tokenizer(gpt2, ours)
    assert {load_tokenizer(folder).identity for folder in (old, new, ours)} == {gpt2.identity}
    stored = json.loads((ours / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert stored == merges.splitlines()[1:]  # the merges recovered from the ranks are those of GPT-2's release


def test_transformers_reads_what_we_store_for_gpt2(gpt2, tmp_path):
    save_tokenizer(gpt2, tmp_path, model_max_length=1024)
    theirs = same_as_transformers(tmp_path, gpt2, random_texts(100))
    assert theirs.eos_token_id == theirs.unk_token_id == theirs.pad_token_id == 50256
    assert theirs.model_max_length == 1024


def test_transformers_gives_a_model_ids_and_mask_alone_and_reads_its_own_end_of_text(small, tmp_path):
    save_tokenizer(small, tmp_path)
    theirs = same_as_transformers(tmp_path, small, [])
    assert theirs("a" + theirs.eos_token).input_ids == [ord("a") - 33, small.eot]
    assert theirs.model_input_names == list(theirs("a")) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("pattern", [GPT2_PATTERNS[0], CL100K_PATTERNS[0], O200K_PATTERNS[0], r"\p{L}+|\s+|[^\p{L}\s]"])
def test_a_rank_file_with_any_pattern_survives_storing(small, tmp_path, pattern):
    tokenizer = load_tokenizer(write_rank_file(tmp_path, small.encoding._mergeable_ranks, pattern))
    (tmp_path / "stored").mkdir()
    save_tokenizer(tokenizer, tmp_path / "stored")
    assert load_tokenizer(tmp_path / "stored").manifest_entry == tokenizer.manifest_entry
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
        assert load_tokenizer(folder).manifest_entry == tokenizer.manifest_entry
        assert same_as_transformers(folder, tokenizer, random_texts(5)).eos_token_id == tokenizer.eot


def test_a_pattern_that_hugging_faces_engine_reads_differently_is_not_stored(tmp_path):
    tokenizer = load_tokenizer(write_rank_file(tmp_path, byte_ranks() | {b"\n\n": 256}, r"\s+$|[\s\S]"))
    with pytest.raises(InputError, match="differently in Hugging Face's engine"):
        save_tokenizer(tokenizer, tmp_path)


def test_the_alphabet_of_bytes_is_hugging_faces():
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(spelled(bytes(range(256)))) == sorted(ByteLevel.alphabet())


def test_storing_leaves_only_two_files(small, tmp_path):
    save_tokenizer(small, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    shutil.copytree(tmp_path, tmp_path / "moved")
    assert load_tokenizer(tmp_path / "moved").manifest_entry == small.manifest_entry


# ---- reading


def edited(folder, source, edit):
    """A copy of the tokenizer.json in `source` with `edit` applied, without our own settings beside it."""
    stored = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    edit(stored)
    (folder / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    return folder


def with_flag(text, flag):
    return {"id": 401, "content": text, "special": True, flag: True}


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
        ("added token 'foo' with lstrip", lambda t: t["added_tokens"].append(with_flag("foo", "lstrip"))),
        ("added token 'foo' with rstrip", lambda t: t["added_tokens"].append(with_flag("foo", "rstrip"))),
        ("added token 'foo' with single_word", lambda t: t["added_tokens"].append(with_flag("foo", "single_word"))),
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


def test_tokenizer_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "merges.txt").mkdir()
    (tmp_path / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0}))
    with pytest.raises(ResourceError, match=r"merges\.txt: Is a directory; make it readable"):
        load_tokenizer(tmp_path)


def test_the_examples_of_merges():
    a, b, c = b"a", b"b", b"c"
    letters = {a: 0, b: 1, c: 2}
    assert merges_of(letters | {b"ab": 3, b"abc": 4}) == ([(a, b), (b"ab", c)], True)
    assert merges_of(letters | {b"abc": 3, b"ab": 4}) == ([(b"ab", c), (a, b)], False)
