"""Tokens beside the BPE's own: the ids and the text are those of transformers, or the folder is refused by name."""

import json

import pytest
from foreign_helpers import (
    CASES,
    EOT,
    MIXED,
    PROMPT,
    REFUSED,
    check_answer,
    edit,
    save_model,
    template,
    trained,
    wrapped,
    write_all,
)

from gpt.errors import InputError
from gpt.generate.generator import TextGenerator
from gpt.text.added_tokens import matcher
from gpt.text.tokenizer import load_tokenizer, save_tokenizer

NAMES = [case.__name__ for case in CASES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of foreign_helpers, made and answered by the installed transformers."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("foreign")
    write_all(root)
    return root, json.loads((root / "answers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_greedy_text_of_a_foreign_folder_are_those_of_transformers(name, folders):
    root, answers = folders
    check_answer(root / name, answers[name])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_a_foreign_tokenizer_survives_storing_in_both_directions(name, folders, tmp_path):
    from transformers import AutoTokenizer

    root, answers = folders
    theirs = load_tokenizer(root / name)
    save_tokenizer(theirs, tmp_path)
    ours = load_tokenizer(tmp_path)
    text = answers[name]["text"]
    assert ours.manifest_entry["identity"] == theirs.identity
    assert (ours.role_ids, ours.stops, ours.additions.begins) == (
        theirs.role_ids,
        theirs.stops,
        theirs.additions.begins,
    )
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == answers[name]["ids"]


def test_tokens_that_no_file_gives_an_id_get_the_next_ones_in_transformers_order(tmp_path):
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    wrapped(trained((EOT,)), eos_token=EOT).save_pretrained(tmp_path)
    new = {"pad_token": "[PAD]", "mask_token": "[MASK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    edit(tmp_path, "tokenizer_config.json", lambda settings: settings.update(new))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert {text: ours.special_tokens[text] for text in new.values()} == {
        text: theirs.convert_tokens_to_ids(text) for text in new.values()
    }
    assert sorted(ours.special_tokens.values()) == [0, 300, 301, 302, 303]


def test_special_tokens_in_a_text_are_ordinary_text_and_ordinary_tokens_are_not(folders):
    tokenizer = load_tokenizer(folders[0] / "added_both")
    ids = tokenizer.encode(MIXED)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert ids.count(tokenizer.additions.ordinary["<|user|>"]) == 1
    assert tokenizer.decode(ids) == MIXED


def test_byte_lengths_count_ordinary_tokens_and_not_special_ones(folders):
    tokenizer = load_tokenizer(folders[0] / "added_both")
    ids = tokenizer.encode(MIXED)
    assert tokenizer.byte_lengths()[ids].sum() == len(MIXED.encode())
    assert not tokenizer.byte_lengths()[list(tokenizer.special_tokens.values())].any()


def test_a_token_without_a_row_is_dropped_with_a_note(folders, capsys):
    tokenizer = load_tokenizer(folders[0] / "pad_not_resized")
    assert "the model has no row for [PAD] (id 300)" in capsys.readouterr().err
    assert (tokenizer.vocab_size, tokenizer.role_ids["pad_token_id"]) == (300, 0)


def test_roles_and_every_eos_are_read(folders):
    root, _ = folders
    assert load_tokenizer(root / "all_roles").role_ids == {"bos_token_id": 0, "eos_token_id": [1], "pad_token_id": 300}
    assert load_tokenizer(root / "second_of_two_eos").stops == (0, 1)
    assert load_tokenizer(root / "eos_in_config_alone").stops == (0, 1)
    assert load_tokenizer(root / "other_eos").role_ids["eos_token_id"] == [300, 0]


def test_no_stop_id_is_chosen_where_the_full_length_is_asked_for(folders):
    generator = TextGenerator.load(folders[0] / "second_of_two_eos", device="cpu", dtype="fp32")
    generator.backend = "eager"
    [[full]] = generator.generate(PROMPT, max_new_tokens=9, temperature=0, ignore_eot=True)
    assert len(full.ids) == 9
    assert not {0, 1} & set(full.ids)
    [[short]] = generator.generate(PROMPT, max_new_tokens=9, temperature=0)
    assert (short.ids, short.finish_reason) == ([], "stop")


def test_the_longest_of_tokens_that_begin_alike_is_found():
    assert matcher(["a", "ab", "b "]).split("xabab b a") == ["x", "ab", "", "ab", " ", "b ", "", "a", ""]
    assert matcher([]) is None


@pytest.mark.parametrize(
    ("single", "begins"),
    [("$A", False), (f"{EOT} $A", True), (f"$A {EOT}", None), (f"{EOT} {EOT} $A", None), (f"{EOT} $A {EOT}", None)],
)
def test_a_post_processor_may_put_end_of_text_before_a_text_and_nothing_else(single, begins, tmp_path):
    tokenizer = trained()
    tokenizer.post_processor = template(single, **{EOT: 0})
    wrapped(tokenizer).save_pretrained(tmp_path)
    if begins is None:
        with pytest.raises(InputError, match=r"post_processor TemplateProcessing .* save the tokenizer without it"):
            load_tokenizer(tmp_path)
    else:
        assert load_tokenizer(tmp_path).additions.begins == begins
        assert load_tokenizer(tmp_path).encode_prompt("") == [0]


def test_a_sequence_of_post_processors_is_read(tmp_path):
    wrapped().save_pretrained(tmp_path)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    both = {"type": "Sequence", "processors": [byte_level]}
    edit(tmp_path, "tokenizer.json", lambda t: t.update(post_processor=both))
    assert not load_tokenizer(tmp_path).additions.begins
    roberta = {"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 2]}
    edit(tmp_path, "tokenizer.json", lambda t: t["post_processor"]["processors"].append(roberta))
    with pytest.raises(InputError, match="post_processor RobertaProcessing"):
        load_tokenizer(tmp_path)


def test_an_eos_beyond_the_rows_or_of_another_type_ends_nothing(tmp_path):
    wrapped().save_pretrained(tmp_path)
    save_model(tmp_path, 300)
    for value in (50256, None, "7", [True, 7, 50256, 7]):
        edit(tmp_path, "generation_config.json", lambda settings, value=value: settings.update(eos_token_id=value))
        assert load_tokenizer(tmp_path).stops == ((0, 7) if isinstance(value, list) else (0,))
