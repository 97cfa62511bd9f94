"""Where prompts come from: a flag, stdin, a text file (a prompt a line) or JSONL ({"id"?, "prompt", settings} a line).

Also how a setting that was read as JSON, there or at the prompt of the interactive mode, is checked."""

import json
import sys
import typing
from dataclasses import dataclass, field

from gpt.config import fields, make_config, suggestion
from gpt.errors import InputError
from gpt.files import json_object
from gpt.generate.generator import GenerationParams

MOST_BYTES = 64 << 20
MOST = (1 << 64) - 1  # the largest whole number of a setting
# The settings that a prompt of a JSONL file may have of its own.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
SETTINGS = ("max_new_tokens", *SAMPLING, "stop", "seed", "num_samples", "ignore_eot")


@dataclass(frozen=True)
class Prompt:
    id: int | str
    """tells this prompt's random numbers apart; a line's number, from 1, unless JSONL gives an id"""
    text: str
    settings: dict = field(default_factory=dict)
    """of SETTINGS, what holds for this prompt alone"""


def read_prompts(path):
    """The Prompts of a file, in its order, each with an id of its own. Raises InputError naming file and line."""
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path or '--prompts'}: {error.strerror}; give a readable text or .jsonl file") from None
    lines = decoded(data, path).split("\n")
    if not lines[-1]:
        lines.pop()  # the file's last line break begins no further prompt
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1)]
    if str(path).endswith(".jsonl"):
        prompts = from_jsonl(numbered, path)
    else:
        prompts = [Prompt(number, line) for number, line in numbered]
    if not prompts:
        raise InputError(f"{path}: no prompts; write one a line")
    return prompts


def from_jsonl(numbered, path):
    """The Prompts of (number, line) pairs; empty lines hold none."""
    prompts, found_at = [], {}
    for number, line in numbered:
        if not line.strip():
            continue
        prompt = from_json(line, f"{path}:{number}", number)
        first = found_at.setdefault(prompt.id, number)
        if first != number:
            known = f'id {json.dumps(prompt.id)} is that of line {first} too (without "id" it is the line\'s number)'
            raise InputError(f"{path}:{number}: {known}; give every prompt its own")
        prompts.append(prompt)
    return prompts


def from_json(line, where, number):
    value = json_object(line, "prompt", where)
    prompt_id = value.get("id", number)
    if type(prompt_id) not in (int, str):
        raise InputError(f'{where}: field "id" must be a whole number or a string; correct the line')
    settings, problems = {}, []
    for name in value.keys() - {"id", "prompt"}:
        if name in SETTINGS:
            settings[name], found = checked(name, value[name])
            problems += found
        else:
            problems.append(f"unknown field {json.dumps(name)}; {suggestion(name, ('id', 'prompt', *SETTINGS))}")
    if problems:
        raise InputError(f"{where}: {'; '.join(sorted(problems))}; correct the line")
    return Prompt(prompt_id, value["prompt"], settings)


def checked(name, value):
    """(value, problems) of a setting of GenerationParams: the value as its field has it, and what is wrong with it, in
    words."""
    value, wanted = as_wanted(value, fields(GenerationParams)[name].type)
    if wanted:
        return value, [f"{name} {json.dumps(value)} must be {wanted}"]
    return value, make_config(GenerationParams, {name: value}).problems()


def as_wanted(value, wanted):
    """(value, "") for a value of JSON as a field of type `wanted` has it, (value, what it must be) if it cannot."""
    kinds = typing.get_args(wanted) or (wanted,)
    if tuple in (wanted, typing.get_origin(wanted)):
        items = [value] if isinstance(value, str) else value
        fine = isinstance(items, list) and all(isinstance(item, str) and item for item in items)
        return (tuple(items), "") if fine else (value, "a string or a list of strings, none of them empty")
    if bool in kinds:
        return value, "" if isinstance(value, bool) else "true or false"
    if float in kinds:
        fine = type(value) in (int, float) and abs(value) <= sys.float_info.max
        return (float(value), "") if fine else (value, "a finite number")
    fine = type(value) is int and abs(value) <= MOST
    return value, "" if fine else "a whole number below 2^64"


def read_stdin():
    """What is piped into stdin, less one line break at its end; "" where stdin is a terminal or closed."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    text = decoded(sys.stdin.buffer.read(MOST_BYTES + 1), "stdin")
    return text.removesuffix("\n").removesuffix("\r")


def from_flag(text, where="--prompt"):
    """A prompt from the command line. What the locale could not decode (LANG=C) is read as UTF-8."""
    undecoded = any("\udc80" <= character <= "\udcff" for character in text)
    return decoded(text.encode("utf-8", "surrogateescape"), where) if undecoded else text


def decoded(data, where):
    if len(data) > MOST_BYTES:
        raise InputError(f"{where}: more than {MOST_BYTES >> 20} MiB of prompts; split them")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = error.start + len(data) - len(error.object)  # a byte order mark had been taken away
        raise InputError(f"{where}: invalid UTF-8 at byte {place} (0x{data[place]:02x}); convert it to UTF-8") from None
