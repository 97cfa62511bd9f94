"""Files of prompts: ids that tell them apart, and settings of their own."""

import json
import re

import pytest

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
        ("max_new_tokens", 1.5, "max_new_tokens 1.5 must be a whole number"),
        ("max_new_tokens", True, "max_new_tokens true must be a whole number"),
        ("max_new_tokens", "9", 'max_new_tokens "9" must be a whole number'),
        ("temperature", "hot", 'temperature "hot" must be a finite number'),
        ("temperature", float("nan"), "temperature NaN must be a finite number"),
        ("temperature", 10**400, "must be a finite number"),
        ("temperature", -0.5, "temperature -0.5 must be finite and 0"),
        ("top_k", 10**30, f"top_k {10**30} must be a whole number below 2^64"),
        ("top_p", 0, "top_p 0.0 must be above 0"),
        ("top_p", None, "top_p null must be a finite number"),
        ("min_p", 2, "min_p 2.0 must be at least 0"),
        ("repetition_penalty", float("inf"), "repetition_penalty Infinity must be a finite number"),
        ("stop", 5, "stop 5 must be a string or a list of strings"),
        ("stop", "", 'stop "" must be a string or a list of strings, none of them empty'),
        ("stop", ["a", 1], 'stop ["a", 1] must be a string or a list'),
        ("seed", -1, "seed -1 must be from 0 to"),
        ("seed", None, "seed null must be a whole number"),
        ("num_samples", 0, "num_samples 0 must be at least 1"),
        ("ignore_eot", 1, "ignore_eot 1 must be true or false"),
        ("temprature", 1, 'unknown field "temprature"; perhaps you meant temperature'),
        ("max_length", 1, 'unknown field "max_length"; here it is max_new_tokens'),
        ("text", "b", 'unknown field "text"'),
        ("rows", 4, 'unknown field "rows"'),
    ],
)
def test_fault_092_a_bad_field_is_named_with_file_line_and_value(tmp_path, field, value, message):
    with pytest.raises(InputError, match=rf"p\.jsonl:2: .*{re.escape(message)}.*; correct the line"):
        read(tmp_path, {"prompt": "fine"}, {"prompt": "a", field: value})


def test_all_that_is_wrong_with_a_line_comes_in_one_message(tmp_path):
    with pytest.raises(InputError, match=r"min_p 2\.0.*; top_p 3\.0"):
        read(tmp_path, {"prompt": "a", "top_p": 3, "min_p": 2})


def test_two_prompts_with_one_id_are_refused_naming_both_lines(tmp_path):
    with pytest.raises(InputError, match=r'p\.jsonl:3: id "x" is that of line 1 too'):
        read(tmp_path, {"id": "x", "prompt": "a"}, "", {"id": "x", "prompt": "b"})
    with pytest.raises(InputError, match=r"p\.jsonl:2: id 2 is that of line 1 too"):
        read(tmp_path, {"id": 2, "prompt": "a"}, {"prompt": "b"})
    assert [prompt.id for prompt in read(tmp_path, {"id": "1", "prompt": "a"}, {"id": 1, "prompt": "b"})] == ["1", 1]
