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
        ("text", "b", "unknown setting text"),
        ("rows", 4, "unknown setting rows"),
    ],
)
def test_fault_092_a_bad_field_is_named_with_file_line_and_value(tmp_path, field, value, message):
    with pytest.raises(InputError, match=rf"p\.jsonl:2: .*{re.escape(message)}.*; correct the line"):
        read(tmp_path, {"prompt": "fine"}, {"prompt": "a", field: value})


def test_all_that_is_wrong_with_a_line_comes_in_one_message(tmp_path):
    with pytest.raises(InputError, match=r"unknown setting x; .*; top_k 1\.5: .*; top_p 3\.0 .*; min_p 2\.0"):
        read(tmp_path, {"prompt": "a", "min_p": 2, "x": 1, "top_p": 3, "top_k": 1.5})


def test_two_prompts_with_one_id_are_refused_naming_both_lines(tmp_path):
    with pytest.raises(InputError, match=r'p\.jsonl:3: id "x" is that of line 1 too'):
        read(tmp_path, {"id": "x", "prompt": "a"}, "", {"id": "x", "prompt": "b"})
    with pytest.raises(InputError, match=r"p\.jsonl:2: id 2 is that of line 1 too"):
        read(tmp_path, {"id": 2, "prompt": "a"}, {"prompt": "b"})
    assert [prompt.id for prompt in read(tmp_path, {"id": "1", "prompt": "a"}, {"id": 1, "prompt": "b"})] == ["1", 1]
