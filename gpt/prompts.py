"""Where prompts come from: a flag, stdin, a text file (a prompt a line) or JSONL ({"id"?, "prompt"} a line)."""

import json
import sys
from dataclasses import dataclass

from gpt.errors import InputError

MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Prompt:
    id: int | str
    """tells this prompt's random numbers apart; a line's number, from 1, unless JSONL gives an id"""
    text: str


def read_prompts(path):
    """The Prompts of a file, in its order. Raises InputError naming file and line."""
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
        prompts = [from_json(line, f"{path}:{number}", number) for number, line in numbered if line.strip()]
    else:
        prompts = [Prompt(number, line) for number, line in numbered]
    if not prompts:
        raise InputError(f"{path}: no prompts; write one a line")
    return prompts


def json_object(line, field, where, advice="correct the line"):
    """The object on a line of JSON. Raises InputError unless it is one and has a string `field`."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        raise InputError(f'{where}: expected an object with string field "{field}"; {advice}')
    return value


def from_json(line, where, number):
    value = json_object(line, "prompt", where)
    prompt_id = value.get("id", number)
    if type(prompt_id) not in (int, str):
        raise InputError(f'{where}: field "id" must be a whole number or a string; correct the line')
    return Prompt(prompt_id, value["prompt"])


def read_stdin():
    """What is piped into stdin, less one line break at its end; "" where stdin is a terminal or closed."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    text = decoded(sys.stdin.buffer.read(MOST_BYTES + 1), "stdin")
    return text.removesuffix("\n").removesuffix("\r")


def from_flag(text):
    """A prompt from the command line. What the locale could not decode (LANG=C) is read as UTF-8."""
    undecoded = any("\udc80" <= character <= "\udcff" for character in text)
    return decoded(text.encode("utf-8", "surrogateescape"), "--prompt") if undecoded else text


def decoded(data, where):
    if len(data) > MOST_BYTES:
        raise InputError(f"{where}: more than {MOST_BYTES >> 20} MiB of prompts; split them")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = error.start + len(data) - len(error.object)  # a byte order mark had been taken away
        raise InputError(f"{where}: invalid UTF-8 at byte {place} (0x{data[place]:02x}); convert it to UTF-8") from None
