"""Examples: which records are some, how they become ids, what is learned, and the same layout in transformers."""

import csv
import io
import itertools
import json
import random

import numpy as np
import pytest
from example_helpers import conversations
from prepare_helpers import EOT, checksums, ids_of, jsonl, prepare_here, write
from tokenizer_helpers import byte_ranks, small_tokenizer, write_rank_file

from gpt.errors import InputError
from gpt.text.examples import Turn, chat_template, encode_chat, encode_example, shown_example
from gpt.text.huggingface import PATTERNS
from gpt.text.shards import open_dataset
from gpt.text.tokenizer import load_tokenizer, save_tokenizer

BYTE = load_tokenizer("byte")


def masks_of(folder, split="train"):
    return np.concatenate([np.fromfile(path, np.uint8) for path in sorted(folder.glob(f"{split}_*.mask"))])


def examples_of(folder, split="train"):
    """Returns the examples of a split made with the byte tokenizer, as texts in which | is end-of-text and learned text
    stands in brackets."""
    ids, mask = ids_of(folder, split), masks_of(folder, split)
    assert len(ids) == len(mask)
    starts = [*np.flatnonzero(mask & 2), len(ids)]
    assert starts[0] == 0 and not (mask[starts[:-1]] & 1).any() and set(mask) <= {0, 1, 2}
    return [bracketed(ids[a:b], mask[a:b]) for a, b in itertools.pairwise(starts)]


def bracketed(ids, mask):
    text = ""
    for learned, run in itertools.groupby(zip(ids, mask & 1, strict=True), key=lambda pair: pair[1]):
        part = b"".join(b"|" if rank == EOT else bytes([rank]) for rank, _ in run).decode()
        text += f"[{part}]" if learned else part
    return text


def chat(*contents, system=None, key="messages"):
    """Returns a record of a conversation in which user and assistant take turns."""
    roles = itertools.cycle(("user", "assistant"))
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {key: ([{"role": "system", "content": system}] if system is not None else []) + turns}


def prepare_records(tmp_path, *records, val_fraction=0, **settings):
    source = write(tmp_path / "x.jsonl", jsonl(*records))
    return prepare_here(tmp_path / "out", source, val_fraction=val_fraction, **settings)


# ---- what an example looks like


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"prompt": "2+2=", "completion": " 4\n"}, "2+2=[ 4\n|]"),
        ({"prompt": "", "completion": "4"}, "|[4|]"),
        ({"prompt": "x ", "completion": "|"}, "x [||]"),
        ({"instruction": " Add. ", "input": "2, 2", "output": "4\n"}, "Add.\n2, 2[\n4|]"),
        ({"instruction": "Add.", "input": "", "output": "4"}, "Add.[\n4|]"),
        ({"instruction": "Add.", "input": None, "output": "4"}, "Add.[\n4|]"),
        ({"instruction": "Add.", "output": "4", "text": "Add. 4"}, "Add.[\n4|]"),
        ({"instruction": "Say.", "context": "c", "response": "r", "category": "x"}, "Say.\nc[\nr|]"),
        ({"Question": "Who?", "Answer": "Me."}, "Who?[\nMe.|]"),
        ({"prompt": "Who?", "response": "Me."}, "Who?[\nMe.|]"),
        (chat("a", "b"), "|user\na|assistant\n[b|]"),
        (chat(" a\n", "\tb \n"), "|user\na|assistant\n[b|]"),
        (
            chat([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], [{"type": "text", "text": "c"}]),
            "|user\na b|assistant\n[c|]",
        ),
        (chat("a", "b", "c", "d"), "|user\na|assistant\n[b|]user\nc|assistant\n[d|]"),
        (chat("a", "b", system="s"), "|system\ns|user\na|assistant\n[b|]"),
        (chat("a", "", "c", "d"), "|user\na|assistant\n|user\nc|assistant\n[d|]"),
        (chat("assistant\nyes", "user\nno"), "|user\nassistant\nyes|assistant\n[user\nno|]"),
        ({"prompt": "p"} | chat("a", "b"), "|user\na|assistant\n[b|]"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "|user\na|assistant\n[b|]",
        ),
    ],
)
def test_only_answers_and_the_end_of_text_behind_them_are_learned(tmp_path, record, expected):
    manifest = prepare_records(tmp_path, record)
    assert examples_of(tmp_path / "out") == [expected]
    assert manifest["splits"]["train"][0]["documents"] == 1
    assert open_dataset(tmp_path / "out").has_examples


def test_fault_080_roles_and_end_of_text_in_content_are_ordinary_text(tmp_path):
    end = "<|endoftext|>"
    prepare_records(tmp_path, chat(f"a{end}assistant\nevil", f"{end}b"))
    assert examples_of(tmp_path / "out") == [f"|user\na{end}assistant\nevil|assistant\n[{end}b|]"]


def test_a_prompt_and_its_completion_are_encoded_apart_as_a_model_continues_a_prompt(tmp_path, bpe_cache):
    gpt2 = load_tokenizer("gpt2")
    prepare_records(tmp_path, {"prompt": "He walked a", "completion": "way"}, tokenizer="gpt2")
    prompt, completion = gpt2.encode_prompt("He walked a"), gpt2.encode("way")
    assert [*prompt, *completion] != gpt2.encode("He walked away")
    assert ids_of(tmp_path / "out").tolist() == [*prompt, *completion, gpt2.eot]
    assert masks_of(tmp_path / "out").tolist() == [2, *[0] * (len(prompt) - 1), *[1] * (len(completion) + 1)]


def test_a_token_that_spans_the_border_before_an_answer_is_not_learned(tmp_path):
    ranks = byte_ranks() | {b"\nY": 256}
    tokenizer = load_tokenizer(write_rank_file(tmp_path, ranks, pattern=r"[\s\S]+"))
    ids, mask = encode_example((Turn("user", "?"), Turn("assistant", "Yes")), tokenizer)
    assert ids.tolist() == [257, *b"user\n?", 257, *b"assistant", 256, *b"es", 257]
    assert mask.tolist() == [2, *[0] * 6, 0, *[0] * 9, 0, 1, 1, 1]


def test_a_tokenizer_that_begins_each_text_with_end_of_text_does_so_before_a_prompt_and_not_twice_in_a_chat(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    save_tokenizer(BYTE, folder)
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    end = {"id": "<|endoftext|>", "ids": [EOT], "tokens": ["<|endoftext|>"]}
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    stored["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single}
    stored["post_processor"]["special_tokens"] = {"<|endoftext|>": end}
    (folder / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    prepare_records(tmp_path, {"prompt": "p", "completion": "c"}, tokenizer=str(folder))
    assert examples_of(tmp_path / "out") == ["|p[c|]"]
    prepare_records(tmp_path, chat("a", "b"), tokenizer=str(folder))
    assert examples_of(tmp_path / "out") == ["|user\na|assistant\n[b|]"]


# ---- every format of records, and what is recognised in it


def in_every_format(tmp_path, records):
    """Yields the same records in files of every format, but conversations in CSV."""
    import pyarrow
    import pyarrow.parquet

    yield write(tmp_path / "a.jsonl", jsonl(*records))
    yield write(tmp_path / "a.json", json.dumps(records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    yield tmp_path / "a.parquet"
    if "messages" not in records[0]:
        table = io.StringIO()
        writer = csv.DictWriter(table, records[0].keys())
        writer.writeheader()
        writer.writerows(records)
        yield write(tmp_path / "a.csv", table.getvalue())


@pytest.mark.parametrize(
    "records, told",
    [
        ([{"id": n, "prompt": f"p{n}", "completion": f" c{n}\nx"} for n in range(3)], "'completion'"),
        ([{"id": n, "instruction": f"p{n}", "input": "i", "output": "o", "text": "t"} for n in range(3)], "'input'"),
        ([chat(f"a{n}", "b", "ü", "d") | {"source": "x"} for n in range(3)], "'messages'"),
    ],
)
def test_every_format_of_records_gives_the_same_examples_and_tells_what_was_recognised(tmp_path, capsys, records, told):
    results = []
    for source in in_every_format(tmp_path, records):
        manifest = prepare_here(tmp_path / "out", source, val_fraction=0)
        results.append(examples_of(tmp_path / "out"))
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("info: ")]
        assert source.name in line and told in line
        assert manifest["source"]["holds"] == ("messages" if "messages" in records[0] else "prompts")
    assert len(results[0]) == 3
    assert all(result == results[0] for result in results)


def test_the_field_that_is_asked_for_is_read_as_plain_text(tmp_path):
    manifest = prepare_records(tmp_path, {"prompt": "a", "completion": "b", "text": "c"}, field="text")
    assert "holds" not in manifest["source"] and "mask_sha256" not in manifest["splits"]["train"][0]
    assert ids_of(tmp_path / "out").tolist() == [EOT, ord("c")]


@pytest.mark.parametrize(
    "value",
    [
        {"text": "t", "prompt": "p"},
        {"text": "t", "messages": ["a"]},
        {"text": "t", "output": "o"},
        {"text": "t", "input": 5, "output": "o"},
    ],
)
def test_half_a_pair_or_a_list_of_strings_is_no_example(tmp_path, value):
    prepare_records(tmp_path, value)
    assert ids_of(tmp_path / "out").tolist() == [EOT, ord("t")]


def test_texts_and_examples_or_two_kinds_of_examples_in_one_input_are_refused(tmp_path):
    pairs = write(tmp_path / "p.jsonl", jsonl({"prompt": "a", "completion": "b"}))
    chats = write(tmp_path / "c.jsonl", jsonl(chat("a", "b")))
    text = write(tmp_path / "t.txt", "text")
    for inputs, settings in (
        ((pairs, text), {}),
        ((chats, pairs), {}),
        ((pairs,), {"val": (str(text),)}),
        ((pairs,), {"corpus": "stdlib"}),
    ):
        with pytest.raises(InputError, match=r"mixes kinds of data: .*one kind at a time"):
            prepare_here(tmp_path / "out", *inputs, **settings)
    assert not (tmp_path / "out").exists()


# ---- bad records


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "a"}, 'there is no "completion", expected a string'),
        ({"prompt": 5, "completion": "b"}, '"prompt" is number, expected a string'),
        ({"prompt": "a", "completion": None}, '"completion" is null, expected a string'),
        ({"prompt": "a", "completion": ["b"]}, '"completion" is list, expected a string'),
        ([], 'expected an object with strings "prompt" and "completion", it is list'),
    ],
)
def test_fault_004_a_pair_without_its_strings_is_named_or_skipped(tmp_path, record, message):
    good = {"prompt": "p", "completion": "c"}
    check_refused(tmp_path, good, record, message, "p[c|]")


@pytest.mark.parametrize("prompt, kind", [(5, "number"), (None, "null"), (["p"], "list"), ({"a": "p"}, "object")])
def test_fault_004_a_single_pair_whose_prompt_is_no_string_is_not_read_as_plain_text(tmp_path, prompt, kind):
    with pytest.raises(InputError, match=f'x.jsonl:1: "prompt" is {kind}, expected a string'):
        prepare_records(tmp_path, {"prompt": prompt, "completion": "b"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "messages, message",
    [
        (None, "expected a list of messages"),
        ("hello", "expected a list of messages"),
        ([], "expected a list of messages"),
        (["hello"], "message 1: expected an object, it is string"),
        ([{"role": "user"}], "message 1: its content is null, expected a string"),
        ([{"role": "user", "content": [{"type": "image", "text": "a"}]}], "message 1: its content is list"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}], "message 1: its content is list"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "message 1: its content is list"),
        ([{"role": "user", "content": []}], "message 1: its content is list"),
        ([{"role": "tool", "content": "a"}], 'message 1: unknown role "tool"; roles are system, user, assistant'),
        ([{"role": ["user"], "content": "a"}], "message 1: unknown role"),
        ([{"content": "a"}], "message 1: unknown role null"),
        (chat("a")["messages"], "the conversation ends with the user"),
        (chat(system="a")["messages"], "the conversation ends with the system"),
        (
            [*chat(system="a")["messages"], *chat("b", "c", system="d")["messages"]],
            "message 2: a system message must be",
        ),
        ([*chat("a", "b")["messages"], {"role": "system", "content": "c"}], "message 3: a system message must be"),
    ],
)
def test_fault_004_a_bad_conversation_is_named_or_skipped(tmp_path, messages, message):
    check_refused(tmp_path, chat("a", "b"), {"messages": messages}, message, "|user\na|assistant\n[b|]")


def check_refused(tmp_path, good, bad, message, expected):
    """Checks that `bad` behind `good` is refused, naming the second line; and with --errors skip dropped and
    counted."""
    with pytest.raises(InputError) as error:
        prepare_records(tmp_path, good, bad)
    assert f"x.jsonl:2: {message}" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    manifest = prepare_records(tmp_path, good, bad, errors="skip")
    assert examples_of(tmp_path / "out") == [expected]
    assert manifest["source"]["undecodable"] == 1


def test_fault_080_examples_with_an_empty_answer_are_dropped_and_counted(tmp_path, capsys):
    for empty, good in (
        ({"prompt": "a", "completion": " \n"}, {"prompt": "p", "completion": "c"}),
        (chat("a", " "), chat("a", "b")),
        ({"instruction": "a", "output": ""}, {"instruction": "a", "output": "b"}),
    ):
        manifest = prepare_records(tmp_path, good, empty, empty)
        assert (manifest["source"]["documents"], manifest["source"]["empty_docs"]) == (1, 2)
        assert "examples: 1 (2 with nothing to learn and 0 unreadable ones skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match="no documents; 1 were empty"):
        prepare_records(tmp_path, {"prompt": "a", "completion": ""})


# ---- both splits, counts, notes


def test_an_example_is_never_cut_few_are_split_at_the_end_and_many_by_their_hash(tmp_path):
    def record(number):
        return {"prompt": f"prompt number {number}", "completion": f" answer {number} " * (number % 7 + 1)}

    prepare_records(tmp_path, *map(record, range(10)), val_fraction=0.15)
    train, val = examples_of(tmp_path / "out"), examples_of(tmp_path / "out", "val")
    assert (len(train), len(val)) == (8, 2)
    assert "prompt number 8" in val[0] and "prompt number 9" in val[1]
    manifest = prepare_records(tmp_path, *map(record, range(300)), val_fraction=0.2)
    again, val = examples_of(tmp_path / "out"), examples_of(tmp_path / "out", "val")
    assert manifest["source"]["split"]["rule"] == "hash"
    assert len(again) + len(val) == 300 and 30 < len(val) < 90
    assert again[:3] == [text for text in train if text in again][:3]
    shuffled = [*map(record, range(300))]
    random.Random(1).shuffle(shuffled)
    prepare_records(tmp_path, *shuffled, val_fraction=0.2)
    assert sorted(examples_of(tmp_path / "out", "val")) == sorted(val)


def test_a_single_example_leaves_nothing_to_validate_on(tmp_path):
    with pytest.raises(InputError, match="1 examples leaves none to train on; give more, or 0 for no validation"):
        prepare_records(tmp_path, chat("a", "b"), val_fraction=0.1)


def test_examples_to_validate_on_may_come_from_a_file_of_their_own(tmp_path):
    val = write(tmp_path / "v.csv", "prompt,completion\na,b\nc,\ne,f\n")
    pairs = {"prompt": "a", "completion": "b"}, {"prompt": "x", "completion": "y"}
    manifest = prepare_records(tmp_path, *pairs, val_fraction=0.05, val=(str(val),))
    assert examples_of(tmp_path / "out") == ["a[b|]", "x[y|]"]
    assert examples_of(tmp_path / "out", "val") == ["a[b|]", "e[f|]"]
    assert (manifest["source"]["overlap"], manifest["source"]["empty_docs"]) == (1, 1)


def test_the_number_of_workers_and_the_size_of_shards_change_no_example(tmp_path):
    records = [chat("question " * (n % 50), f"answer {n} 😀") for n in range(400)]
    one = prepare_records(tmp_path, *records, workers=1)
    files = checksums(tmp_path / "out")
    assert prepare_records(tmp_path, *records, workers=4) == one
    assert checksums(tmp_path / "out") == files
    whole = examples_of(tmp_path / "out")
    assert len(prepare_records(tmp_path, *records, shard_tokens=1000)["splits"]["train"]) > 10
    assert examples_of(tmp_path / "out") == whole


def test_equal_examples_and_prompts_that_end_in_a_space_are_told(tmp_path, capsys):
    pair = {"prompt": "a ", "completion": "b"}
    manifest = prepare_records(tmp_path, pair, pair, pair, {"prompt": "c\n", "completion": "d"})
    out = capsys.readouterr().out
    assert "note: 3 prompts end in a space" in out
    assert "note: 2 examples equal an earlier one" in out
    assert manifest["source"]["duplicates"] == 2
    prepare_records(tmp_path, chat("a ", "b<|endoftext|>"))
    out = capsys.readouterr().out
    assert out.count("note: ") == 1
    assert "spell <|endoftext|> 1 times, which is ordinary text here" in out


def test_lone_surrogates_and_line_breaks_of_an_example_are_those_of_texts(tmp_path):
    manifest = prepare_records(tmp_path, {"prompt": "a\r\nb", "completion": "c\ud800\rd"})
    assert examples_of(tmp_path / "out") == ["a\nb[c\ufffd\nd|]"]
    assert manifest["source"]["replaced"] == 1
    prepare_records(tmp_path, {"prompt": "a\r\nb", "completion": "c\r\rd"}, keep_crlf=True)
    assert examples_of(tmp_path / "out") == ["a\r\nb[c\r\rd|]"]


# ---- what the user sees


def test_a_preview_shows_the_first_training_examples_in_words_or_two_colours(tmp_path, capsys, monkeypatch):
    records = [chat(f"question {n}\n", "an\x1bswer") for n in range(3)]
    prepare_records(tmp_path, *records, preview=2)
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("example 1"))
    assert lines[at].endswith("x.jsonl:1: 35 tokens, 8 of them learned")
    assert lines[at + 1] == r'  given: <|endoftext|> "user\nquestion 0" <|endoftext|> "assistant\n"'
    assert lines[at + 2] == r'  learned: "an\u001bswer" <|endoftext|>'
    assert lines[at + 3].startswith("example 2") and not any(line.startswith("example 3") for line in lines)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    prepare_records(tmp_path, *records, preview=1)
    out = capsys.readouterr().out
    end = "\x1b[7m<|endoftext|>\x1b[27m"
    assert f"\x1b[90m{end}user\nquestion 0{end}assistant\n\x1b[0m" in out
    assert f"\x1b[32man\\x1bswer{end}\x1b[0m" in out


def test_a_preview_of_plain_text_is_refused(tmp_path):
    with pytest.raises(InputError, match="--preview 2: the input is plain text"):
        prepare_records(tmp_path, {"text": "a"}, preview=2)
    assert not (tmp_path / "out").exists()


def test_the_preview_tells_an_end_of_text_from_text_that_spells_it():
    ids, mask = encode_example((Turn("prompt", "<|endoftext|>"), Turn("completion", "a")), BYTE)
    assert shown_example(ids, mask, BYTE, in_colour=False) == '  given: "<|endoftext|>"\n  learned: "a" <|endoftext|>'
    assert "\x1b[90m<|endoftext|>\x1b[0m" in shown_example(ids, mask, BYTE, in_colour=True)


def test_a_text_in_the_preview_that_is_cut_within_a_character_is_shown():
    ids = np.array([*"é".encode()])
    assert shown_example(ids, np.array([2, 1]), BYTE, in_colour=False) == '  given: "\ufffd"\n  learned: "\ufffd"'


# ---- the same layout in transformers


def turns(messages):
    return tuple(Turn(**message) for message in messages)


@pytest.fixture(params=["byte", "bpe", "gpt2", "cl100k", "o200k"])
def tokenizer(request, bpe_cache, tmp_path):
    """Tokenizers with each known pattern."""
    if request.param in PATTERNS and request.param != "gpt2":
        ranks = small_tokenizer().encoding._mergeable_ranks
        return load_tokenizer(write_rank_file(tmp_path, ranks, pattern=PATTERNS[request.param][0]))
    return small_tokenizer() if request.param == "bpe" else load_tokenizer(request.param)


def test_apply_chat_template_gives_our_ids_for_hostile_conversations(tmp_path, tokenizer):
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    pytest.importorskip("jinja2")
    save_tokenizer(tokenizer.with_chat_template(chat_template(tokenizer)), tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for messages in conversations(200):
        ids, _ = encode_example(turns(messages), tokenizer)
        assert theirs.apply_chat_template(messages, return_dict=False) == ids.tolist()
        asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert asked == encode_chat(turns(messages[:-1]), tokenizer)


def test_the_template_raises_where_transformers_would_read_a_token_or_the_roles_are_wrong(tmp_path):
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    jinja2 = pytest.importorskip("jinja2")
    save_tokenizer(BYTE.with_chat_template(chat_template(BYTE)), tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for messages, message in (
        (chat("a<|endoftext|>b", "c"), "holds the special token <|endoftext|>"),
        (chat("a", "<|endoftext|>"), "holds the special token"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "roles are system"),
        ({"messages": [*chat("a")["messages"], *chat("a", system="b")["messages"]]}, "roles are system"),
        (chat(["a"]), "must be a string"),
    ):
        with pytest.raises(jinja2.exceptions.TemplateError, match=message):
            theirs.apply_chat_template(messages["messages"])


def test_the_template_names_every_special_token_of_the_tokenizer(tmp_path):
    special = {"<|endoftext|>": 256, '<"\\😀">': 257}
    tokenizer = load_tokenizer(write_rank_file(tmp_path, byte_ranks(), special_tokens=special))
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    jinja2 = pytest.importorskip("jinja2")
    save_tokenizer(tokenizer.with_chat_template(chat_template(tokenizer)), tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(jinja2.exceptions.TemplateError, match="special token"):
        theirs.apply_chat_template(chat('x <"\\😀">')["messages"])


# ---- the template travels with the tokenizer


def test_the_data_folder_has_the_chat_template_only_where_the_data_are_messages(tmp_path):
    out, template = tmp_path / "out", chat_template(BYTE)
    prepare_records(tmp_path, chat("a", "b"))
    assert load_tokenizer(out).additions.chat_template == template
    assert load_tokenizer(out).identity == BYTE.identity
    (tmp_path / "chat").mkdir()
    save_tokenizer(load_tokenizer(out), tmp_path / "chat")
    for record in ({"prompt": "a", "completion": "b"}, {"text": "a"}):
        prepare_records(tmp_path, record, tokenizer=str(tmp_path / "chat"))
        assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())


def test_a_base_with_another_template_is_told_and_ours_is_kept_for_messages(tmp_path, capsys):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    save_tokenizer(BYTE, base)
    (base / "chat_template.jinja").write_text("{{ messages }}")  # where transformers 5 stores it
    assert load_tokenizer(base).additions.chat_template == "{{ messages }}"
    prepare_records(tmp_path, chat("a", "b"), tokenizer=str(base))
    assert "has another chat template" in capsys.readouterr().err
    data = load_tokenizer(out)
    assert data.with_roles_of(load_tokenizer(base)).additions.chat_template == chat_template(BYTE)
    assert BYTE.with_roles_of(load_tokenizer(base)).additions.chat_template == "{{ messages }}"
