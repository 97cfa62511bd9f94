"""Reads prompts from a flag, stdin, a text file (a prompt a line), JSONL ({"id"?, "prompt", settings} a line, or
"messages" in place of the prompt) or CSV.

Also checks settings that were read as JSON, from such a file or in the interactive mode."""

import difflib
import json
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt.config import fields, in_type, make_config, unescaped
from gpt.config.names import OTHER_NAMES, suggestion
from gpt.errors import InputError, note
from gpt.files import json_object, parse_object
from gpt.generate.sampling import SamplingParams
from gpt.generate.sequence import GenerationParams
from gpt.text.examples import ASSISTANT, Turns, message_turns
from gpt.text.records import csv_records

MOST_BYTES = 64 << 20
MOST = (1 << 64) - 1  # the largest whole number of a setting
TYPES = {name: field.type for name, field in fields(GenerationParams).items()} | {"seed": int}  # JSON's null is no seed
# The settings that a line of a JSONL file may set for its prompt.
SETTINGS = ("max_new_tokens", *fields(SamplingParams), "stop", "seed", "num_samples", "ignore_eot")
ANSWER = ("text", "tokens", "logprobs", "finish_reason", "top_logprobs")  # fields that an answer has of its own
SIMILAR = 0.85  # a field whose name is so similar to a setting's is a misspelt setting
SWITCHES = {"on": True, "off": False, "true": True, "false": False}


@dataclass(frozen=True)
class Prompt:
    id: int | str  # gives the prompt random numbers of its own; the line's number, from 1, unless JSONL has an id
    text: str
    settings: dict[str, Any] = field(default_factory=dict)  # settings for this prompt alone, by names in SETTINGS
    extra: dict[str, Any] = field(default_factory=dict)  # the other fields of its line, which its answers repeat
    messages: list[Any] = field(default_factory=list)  # of a conversation, in place of a text; as they were read
    turns: Turns = ()  # the same, checked

    @property
    def asked(self) -> dict[str, Any]:
        """What its answers say of it."""
        return {"id": self.id} | ({"messages": self.messages} if self.turns else {"prompt": self.text})


# ---- files


def read_prompts(path: str | Path) -> list[Prompt]:
    """Returns the Prompts of a file, in its order, each with an id of its own. Prints a note about empty lines and
    about fields that are no settings. Raises InputError, with file and line, if the file cannot be read or has no
    prompts, or for a malformed line."""
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path or '--prompts'}: {error.strerror}; give a readable text or .jsonl file") from None
    kind = Path(path).suffix.lower()
    read = {".jsonl": from_jsonl, ".ndjson": from_jsonl, ".csv": from_csv, ".tsv": from_csv}.get(kind, from_lines)
    prompts = read(decoded(data, str(path)), path)
    if not prompts:
        raise InputError(f"{path}: no prompts; write one a line")
    extra = sorted({name for prompt in prompts for name in prompt.extra})
    if extra:
        note("info", f"{path}: fields that are no settings stand in the answers too: {', '.join(extra)}")
    return prompts


def numbered(text: str) -> list[tuple[int, str]]:
    """Returns (number, line) for the lines of a text."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()  # no prompt begins after the last line break
    return [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1)]


def from_lines(text: str, path: str | Path) -> list[Prompt]:
    """Returns a Prompt for each line of a text; prints a note about empty ones."""
    prompts = [Prompt(number, line) for number, line in numbered(text)]
    empty = [prompt.id for prompt in prompts if not prompt.text]
    if empty:
        one, many = f"line {empty[0]} is empty", f"{len(empty)} lines are empty, the first is {empty[0]}"
        note(
            "info",
            f"{path}: {one if len(empty) == 1 else many}: such a line is a prompt without text",
        )
    return prompts


def from_jsonl(text: str, path: str | Path) -> list[Prompt]:
    """Returns the Prompts of the JSONL `text` of the file `path`; skips blank lines. Raises InputError for a malformed
    line or an id that occurs twice."""
    lines = [(number, line) for number, line in numbered(text) if line.strip()]
    prompts = []
    for number, line in lines:
        where = f"{path}:{number}"
        values = parse_object(line) or {}
        if "prompt" in values or "messages" not in values:
            values = json_object(line, "prompt", where)
        prompts.append((number, where, prompt_of(values, where, number)))
    return with_own_ids(prompts)


def from_csv(text: str, path: str | Path) -> list[Prompt]:
    """Returns the Prompts of the rows of a CSV or TSV `text`, whose first line names the columns: `prompt`, and what a
    line of JSONL may have. An empty cell gives no value. Raises InputError for a malformed row, or if an id occurs
    twice."""
    found: list[tuple[int, str, Prompt]] = []
    for line, row, problem in csv_records(str(path), [text], is_tsv=Path(path).suffix.lower() == ".tsv"):
        if problem:
            raise problem
        if "prompt" not in row:
            raise InputError(f"{path}:1: no column is called 'prompt' (the columns: {', '.join(row)}); rename one")
        where = f"{path}:{line}"
        values: dict[str, Any] = {name: cell for name, cell in row.items() if cell or name == "prompt"}
        values |= {name: value_of(name, cell.strip()) for name, cell in values.items() if name in SETTINGS}
        found.append((line, where, prompt_of(values, where, len(found) + 1)))
    return with_own_ids(found)


def with_own_ids(found: list[tuple[int, str, Prompt]]) -> list[Prompt]:
    """Returns the Prompts of (line, place in words, Prompt). Raises InputError if two have the same id."""
    line_of: dict[int | str, int] = {}
    for number, where, prompt in found:
        first = line_of.setdefault(prompt.id, number)
        if first != number:
            known = f'id {json.dumps(prompt.id)} is that of line {first} too (without "id" it is the line\'s number)'
            raise InputError(f"{where}: {known}; give every prompt its own")
    return [prompt for _, _, prompt in found]


def prompt_of(values: dict[str, Any], where: str, number: int) -> Prompt:
    """Returns the Prompt of a line's `values`. If they have no id, `number` becomes the id. Raises InputError, which
    begins with `where`, for a bad value, and for a field that seems to be a misspelt setting."""
    messages = [] if "prompt" in values else values.pop("messages")
    turns = () if "prompt" in values else asked_turns(messages, where)
    text, prompt_id = values.pop("prompt", ""), values.pop("id", number)
    if type(prompt_id) not in (int, str):
        raise InputError(f'{where}: field "id" must be a whole number or a string; correct the line')
    extra = {name: value for name, value in values.items() if name not in SETTINGS}
    settings, problems = checked({name: values[name] for name in values if name in SETTINGS}, SETTINGS)
    problems = [problem for name in extra if (problem := misnamed(name) or not_json(name, extra[name]))] + problems
    if problems:
        raise InputError(f"{where}: {'; '.join(problems)}; correct the line")
    return Prompt(prompt_id, text, settings, extra, messages, turns)


def asked_turns(messages: Any, where: str) -> Turns:
    """Returns the turns of a conversation that the assistant is to answer. Raises InputError, which begins with
    `where`, for anything else."""
    turns = message_turns(messages, where, "correct the line")
    if turns[-1].role == ASSISTANT:
        raise InputError(f"{where}: the conversation ends with the assistant, whom it asks; correct the line")
    return turns


def misnamed(name: str) -> str:
    """Returns why the answers cannot repeat a field of this name, or "" if they can."""
    if name in ANSWER:
        return f"field {name}: the answer has one of this name; choose another"
    if name in TYPES:
        return f"unknown setting {name}; it holds for all prompts: --{name}"
    others = [ours.split(" ")[0] for ours in OTHER_NAMES.get(name, "").split(" | ")]
    if set(others) & set(SETTINGS) or difflib.get_close_matches(name, SETTINGS, cutoff=SIMILAR):
        return f"unknown setting {name}; {suggestion(name, SETTINGS)}"
    return ""


def not_json(name: str, value: Any) -> str:
    """Returns why the answers cannot repeat this value of a field, or "" if they can."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return f"field {name}: NaN and Infinity are not JSON; write null"
    return ""


# ---- settings


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


def value_of(name: str, text: str) -> Any:
    """Returns the value that `text` spells for a setting: JSON, on or off, or a string, which needs no quotation
    marks."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if name == "stop":
            return unescaped(text)
        return SWITCHES.get(text.lower(), text) if TYPES.get(name) is bool else text
    return value if name != "stop" or isinstance(value, (str, list)) else text


# ---- stdin and the command line


def read_stdin() -> str:
    """Returns the text that is piped into stdin, without one line break at its end; "" if stdin is a terminal or
    closed."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        data = sys.stdin.buffer.read(MOST_BYTES + 1)
    except OSError as error:  # such as a folder
        raise InputError(f"stdin: {error.strerror}; redirect a text file, or give --prompt") from None
    text = decoded(data, "stdin")
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
