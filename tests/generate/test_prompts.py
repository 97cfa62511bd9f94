"""Files of prompts: ids that tell them apart, and settings of their own."""

import csv
import io
import json
import re

import pytest

from gpt.config import unescaped
from gpt.errors import InputError
from gpt.generate.prompts import Prompt, read_prompts


def read(tmp_path, *lines):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return read_prompts(path)


def test_settings_come_with_the_types_of_the_flags(tmp_path):
    given = {"temperature": 1, "stop": "x", "seed": 2**64 - 1, "ignore_eot": False, "top_k": 0, "top_p": 0.5}
    [prompt] = read(tmp_path, {"id": 5, "prompt": "a", **given})
    assert prompt == Prompt(5, "a", given | {"temperature": 1.0, "stop": ("x",)})
    assert type(prompt.settings["temperature"]) is float


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("max_new_tokens", -1, "max_new_tokens -1 must be 0 or more"),
        ("max_new_tokens", 1.5, "max_new_tokens 1.5: must be int, not float"),
        ("max_new_tokens", True, "max_new_tokens true: must be int, not bool"),
        ("max_new_tokens", "9", 'max_new_tokens "9": must be int, not str'),
        ("temperature", "hot", 'temperature "hot": must be float, not str'),
        ("temperature", float("nan"), "temperature NaN: must be a finite float"),
        ("temperature", 10**400, "too large to convert to float"),
        ("temperature", -0.5, "temperature -0.5 must be finite and 0"),
        ("top_k", 10**30, f"top_k {10**30} must be below 2^64"),
        ("top_p", 0, "top_p 0.0 must be above 0"),
        ("top_p", None, "top_p null: must be float, not NoneType"),
        ("min_p", 2, "min_p 2.0 must be at least 0"),
        ("repetition_penalty", float("inf"), "repetition_penalty Infinity: must be a finite float"),
        ("stop", 5, "stop 5: must be tuple, not int"),
        ("stop", "", "stop must be strings that are not empty"),
        ("stop", ["a", 1], "stop must be strings that are not empty"),
        ("seed", -1, "seed -1 must be from 0 to"),
        ("seed", None, "seed null: must be int"),
        ("num_samples", 0, "num_samples 0 must be at least 1"),
        ("ignore_eot", 1, "ignore_eot 1: must be bool, not int"),
        ("temprature", 1, "unknown setting temprature; perhaps you meant temperature"),
        ("max_length", 1, "unknown setting max_length; here it is max_new_tokens"),
        ("topk", 1, "unknown setting topk; perhaps you meant top_k"),
        ("no_repeat_ngram_size", 2, "unknown setting no_repeat_ngram_size; here it is no_repeat_ngram"),
        ("text", "b", "field text: the answer has one of this name; choose another"),
        ("logprobs", True, "field logprobs: the answer has one of this name"),
        ("rows", 4, "unknown setting rows; it holds for all prompts: --rows"),
        ("frequency_penalty", 3, "frequency_penalty 3.0 must be from -2 to 2"),
        ("no_repeat_ngram", 0.5, "no_repeat_ngram 0.5: must be int, not float"),
    ],
)
def test_fault_092_a_bad_field_is_named_with_file_line_and_value(tmp_path, field, value, message):
    with pytest.raises(InputError, match=rf"p\.jsonl:2: .*{re.escape(message)}.*; correct the line"):
        read(tmp_path, {"prompt": "fine"}, {"prompt": "a", field: value})


def test_all_that_is_wrong_with_a_line_comes_in_one_message(tmp_path):
    said = r"unknown setting temprature; .*; unknown setting rows; .*; top_k 1\.5: .*; top_p 3\.0 .*; min_p 2\.0"
    with pytest.raises(InputError, match=said):
        read(tmp_path, {"prompt": "a", "min_p": 2, "temprature": 1, "rows": 3, "top_p": 3, "top_k": 1.5})


def test_two_prompts_with_one_id_are_refused_naming_both_lines(tmp_path):
    with pytest.raises(InputError, match=r'p\.jsonl:3: id "x" is that of line 1 too'):
        read(tmp_path, {"id": "x", "prompt": "a"}, "", {"id": "x", "prompt": "b"})
    with pytest.raises(InputError, match=r"p\.jsonl:2: id 2 is that of line 1 too"):
        read(tmp_path, {"id": 2, "prompt": "a"}, {"prompt": "b"})
    assert [prompt.id for prompt in read(tmp_path, {"id": "1", "prompt": "a"}, {"id": 1, "prompt": "b"})] == ["1", 1]


# ---- fields that are no settings


def test_other_fields_are_kept_for_the_answers_and_named(tmp_path, capsys):
    extra = {"topic": "sea", "source": {"page": [1, None]}, "score": 0.5, "é": "ü"}
    first, second = read(tmp_path, {"prompt": "a", "top_k": 3, **extra}, {"prompt": "b"})
    assert (first.settings, first.extra, second.extra) == ({"top_k": 3}, extra, {})
    told = f"info: {tmp_path}/p.jsonl: fields that are no settings stand in the answers too: score, source, topic, é\n"
    assert capsys.readouterr().err == told
    read(tmp_path, {"prompt": "a", "id": 3, "seed": 1})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"page": [1, float("-inf")]}])
def test_fault_092_a_field_that_no_line_of_json_can_repeat_is_named(tmp_path, value):
    with pytest.raises(InputError, match=r"p\.jsonl:1: field score: NaN and Infinity are not JSON; write null"):
        read(tmp_path, {"prompt": "a", "score": value})


# ---- CSV


def read_csv(tmp_path, text, name="p.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_prompts(path)


CELLS = [
    ["prompt", "id", "temperature", "stop", "topic"],
    ["Once, upon", "a", "0.5", "\\n\\n", "sea"],
    ['a "quoted"\nline', "b", "", '["x", "y"]', ""],
    ["", "7", "1", "END", "é"],
]
PROMPTS_OF_CELLS = [
    Prompt("a", "Once, upon", {"temperature": 0.5, "stop": ("\n\n",)}, {"topic": "sea"}),
    Prompt("b", 'a "quoted"\nline', {"stop": ("x", "y")}),
    Prompt("7", "", {"temperature": 1.0, "stop": ("END",)}, {"topic": "é"}),
]


@pytest.mark.parametrize(
    "name, delimiter, end",
    [
        ("p.csv", ",", "\r\n"),
        ("p.CSV", ";", "\n"),
        ("p.tsv", "\t", "\n"),
        ("p.csv", "\t", "\r\n"),
        ("p.csv", "|", "\n"),
    ],
)
def test_a_spreadsheet_of_prompts_is_read(tmp_path, name, delimiter, end):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator=end).writerows(CELLS)
    assert read_csv(tmp_path, "\ufeff" + file.getvalue(), name) == PROMPTS_OF_CELLS


@pytest.mark.parametrize(
    "text",
    ["prompt\na, b\n", '\n\nprompt,,\n"a, b",,\n', "sep=;\nid; prompt\n;a, b\n", "prompt\ra, b\r", 'prompt\n"a, b"'],
)
def test_a_csv_file_of_prompts_is_read_as_one_of_documents(tmp_path, text):
    assert read_csv(tmp_path, text) == [Prompt(1, "a, b")]
    long = "word " * 60_000
    assert read_csv(tmp_path, f"prompt,topic\n{long},x\n") == [Prompt(1, long, {}, {"topic": "x"})]


def test_rows_without_an_id_are_numbered_and_empty_lines_count_for_nothing(tmp_path):
    assert read_csv(tmp_path, "prompt,ignore_eot\na,TRUE\n\nb,off") == [
        Prompt(1, "a", {"ignore_eot": True}),
        Prompt(2, "b", {"ignore_eot": False}),
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("text,id\na,b\n", "p.csv:1: no column is called 'prompt' (the columns: text, id); rename one"),
        ("prompt,a,a\n1,2,3\n", "p.csv:1: two columns have one name: prompt, a, a; rename them"),
        ("", "p.csv: no prompts"),
        ("prompt\n", "p.csv: no prompts"),
        ("prompt,id\na\n", "p.csv:2: 1 fields, the first line has 2"),
        ('prompt,id\na,b\nc,"d\n', "p.csv:3: not CSV (unexpected end of data)"),
        ("prompt,id\na,x\nb,x\n", 'p.csv:3: id "x" is that of line 2 too'),
        ("prompt,top_k\na,1.5\n", "p.csv:2: top_k 1.5: must be int, not float"),
        ("prompt,top_k\na,many\n", 'p.csv:2: top_k "many": must be int, not str'),
        ("prompt,max_length\na,5\n", "p.csv:2: unknown setting max_length; here it is max_new_tokens"),
        (b"prompt\na\xff\n", "p.csv: invalid UTF-8 at byte 8"),
        ('prompt,id\n"a" b,1\n', "p.csv:2: not CSV (text behind a closing quote); correct the quotes of this row"),
    ],
)
def test_fault_092_a_bad_spreadsheet_is_named_with_file_and_line(tmp_path, text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read_csv(tmp_path, text)


# ---- lines of text, and escapes


@pytest.mark.parametrize(
    "text, told", [("a\nb\n", ""), ("a\n\nb\n", "line 2 is empty"), ("\na\n\n\n", "3 lines are empty, the first is 1")]
)
def test_empty_lines_of_a_text_file_are_told(tmp_path, capsys, text, told):
    (tmp_path / "p.txt").write_text(text)
    assert len(read_prompts(tmp_path / "p.txt")) == text.count("\n")
    expected = f"info: {tmp_path}/p.txt: {told}: such a line is a prompt without text\n" if told else ""
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    "typed, read",
    [
        (r"a\nb", "a\nb"),
        (r"\t\n", "\t\n"),
        (r"a\\nb", r"a\nb"),
        (r"\\\n", "\\\n"),
        (r"C:\dir\x", r"C:\dir\x"),
        ("\\", "\\"),
        ("é", "é"),
    ],
)
def test_escapes_are_those_three_and_other_backslashes_stay(typed, read):
    assert unescaped(typed) == read


# ---- conversations


def test_messages_in_place_of_a_prompt_are_a_conversation_to_answer(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": " a "}]}]
    [prompt, text] = read(tmp_path, {"messages": messages, "seed": 3}, {"prompt": "p", "messages": "x"})
    assert prompt.turns == (("system", "s"), ("user", " a "))
    assert (prompt.settings, prompt.extra) == ({"seed": 3}, {})
    assert prompt.asked == {"id": 1, "messages": messages}
    assert (text.text, text.turns, text.extra) == ("p", (), {"messages": "x"})


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "expected a list of messages; correct the line"),
        ("a", "expected a list of messages"),
        ([{"role": "user"}], "message 1: its content is null"),
        ([{"role": "tool", "content": "a"}], 'message 1: unknown role "tool"'),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "the conversation ends with the assistant",
        ),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "message 2: a system message must be"),
    ],
)
def test_fault_092_a_bad_conversation_is_named_with_file_and_line(tmp_path, messages, message):
    with pytest.raises(InputError, match=rf"p\.jsonl:2: {re.escape(message)}"):
        read(tmp_path, {"prompt": "a"}, {"messages": messages})
