"""Reads prompts from a flag, stdin, a text file (a prompt a line) or JSONL ({"id"?, "prompt", settings} a line).

Also checks settings that were read as JSON, from such a file or in the interactive mode."""

import json
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt.config import fields, in_type, make_config, suggestion
from gpt.errors import InputError
from gpt.files import json_object
from gpt.generate.sampling import SamplingParams
from gpt.generate.sequence import GenerationParams

MOST_BYTES = 64 << 20
MOST = (1 << 64) - 1  # the largest whole number of a setting
TYPES = {name: field.type for name, field in fields(GenerationParams).items()} | {"seed": int}  # JSON's null is no seed
# The settings that a line of a JSONL file may set for its prompt.
SETTINGS = ("max_new_tokens", *fields(SamplingParams), "stop", "seed", "num_samples", "ignore_eot")


@dataclass(frozen=True)
class Prompt:
    id: int | str  # gives the prompt random numbers of its own; the line's number, from 1, unless JSONL has an id
    text: str
    settings: dict[str, Any] = field(default_factory=dict)  # settings for this prompt alone, by names in SETTINGS


def read_prompts(path: str | Path) -> list[Prompt]:
    """Returns the Prompts of a file, in its order, each with an id of its own. Raises InputError, with file and line,
    if the file cannot be read or has no prompts, or for a malformed line."""
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path or '--prompts'}: {error.strerror}; give a readable text or .jsonl file") from None
    lines = decoded(data, str(path)).split("\n")
    if not lines[-1]:
        lines.pop()  # no prompt begins after the last line break
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1)]
    if str(path).endswith(".jsonl"):
        prompts = from_jsonl(numbered, path)
    else:
        prompts = [Prompt(number, line) for number, line in numbered]
    if not prompts:
        raise InputError(f"{path}: no prompts; write one a line")
    return prompts


def from_jsonl(numbered: list[tuple[int, str]], path: str | Path) -> list[Prompt]:
    """Returns the Prompts of (number, line) pairs from the JSONL file `path`; skips blank lines. Raises InputError for
    a malformed line or an id that occurs twice."""
    prompts: list[Prompt] = []
    line_of: dict[int | str, int] = {}
    for number, line in numbered:
        if not line.strip():
            continue
        prompt = from_json(line, f"{path}:{number}", number)
        first = line_of.setdefault(prompt.id, number)
        if first != number:
            known = f'id {json.dumps(prompt.id)} is that of line {first} too (without "id" it is the line\'s number)'
            raise InputError(f"{path}:{number}: {known}; give every prompt its own")
        prompts.append(prompt)
    return prompts


def from_json(line: str, where: str, number: int) -> Prompt:
    """Returns the Prompt of a line of JSON. If the line has no id, `number` becomes the id. Raises InputError, which
    begins with `where`, for a malformed line."""
    values = json_object(line, "prompt", where)
    text, prompt_id = values.pop("prompt"), values.pop("id", number)
    if type(prompt_id) not in (int, str):
        raise InputError(f'{where}: field "id" must be a whole number or a string; correct the line')
    settings, problems = checked(values, SETTINGS)
    if problems:
        raise InputError(f"{where}: {'; '.join(problems)}; correct the line")
    return Prompt(prompt_id, text, settings)


def checked(values: dict[str, Any], known: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Returns `values`, settings that were read as JSON, in the types of their fields in GenerationParams, and a list
    of their problems in words. Names outside `known` are a problem. `stop` may be a string instead of a list."""
    settings: dict[str, Any] = {}
    problems = []
    for name, value in values.items():
        if name not in known:
            problems.append(f"unknown setting {name}; {suggestion(name, known)}")
            continue
        try:
            settings[name] = in_type([value] if name == "stop" and isinstance(value, str) else value, TYPES[name])
        except (ValueError, OverflowError) as error:
            problems.append(f"{name} {json.dumps(value)}: {error}")
    large = [name for name, value in settings.items() if type(value) is int and value > MOST]
    problems += [f"{name} {settings[name]} must be below 2^64" for name in large]
    return settings, problems + make_config(GenerationParams, settings).problems()


def read_stdin() -> str:
    """Returns the text that is piped into stdin, without one line break at its end; "" if stdin is a terminal or
    closed."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    text = decoded(sys.stdin.buffer.read(MOST_BYTES + 1), "stdin")
    return text.removesuffix("\n").removesuffix("\r")


def from_flag(text: str, where: str = "--prompt") -> str:
    """Returns a prompt from the command line. Bytes that the locale could not decode (LANG=C) are read as UTF-8."""
    undecoded = any("\udc80" <= character <= "\udcff" for character in text)
    return decoded(text.encode("utf-8", "surrogateescape"), where) if undecoded else text


def decoded(data: bytes, where: str) -> str:
    if len(data) > MOST_BYTES:
        raise InputError(f"{where}: more than {MOST_BYTES >> 20} MiB of prompts; split them")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + len(data) - len(error.object)  # in `data`, which may begin with a byte order mark
        raise InputError(
            f"{where}: invalid UTF-8 at byte {offset} (0x{data[offset]:02x}); convert it to UTF-8"
        ) from None
