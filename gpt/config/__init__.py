"""Settings: a frozen dataclass defines the options of the command line, `--help` and the keys of TOML presets.

A settings class may hold further frozen dataclasses: they group the options in `--help`. Names are flat everywhere: one
name serves as field, TOML key, flag, log and checkpoint entry, so no name may occur twice in one class. The docstring
below a field explains it in `--help`. A field made by `positional` takes the words that belong to no option.

A settings class checks its values in `problems()`, which returns what is wrong with them, in words. The code that uses
the values passes this list to `refuse`, so that the user sees all problems in one message."""

import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import shutil
import sys
import textwrap
import tomllib
import typing
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from gpt import __version__
from gpt.config.names import OTHER_NAMES, suggestion
from gpt.errors import InputError, note, say, tell

ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
Config = TypeVar("Config")

OPTION = re.compile(r"--[^\W\d][\w-]*(=.*)?", re.DOTALL)
MARK = "\0\0"  # before words of the command line that argparse must take for values; no such word holds it
REMOVED = {"fp8_head"}  # settings of earlier versions, which a run's config.toml may still name


def make_config(cls: type[Config], *layers: dict[str, Any]) -> Config:
    """Returns an instance of `cls`: its defaults, overridden by each of `layers` (flat name -> value) in turn. Ignores
    names that are no fields of `cls`. Raises InputError for a field without a value, and if `cls` finds a value
    wrong."""
    values = {name: field.default for name, field in fields(cls).items()}
    for layer in layers:
        values |= layer
    missing = [name for name in fields(cls) if values[name] is dataclasses.MISSING]
    refuse([f"{name} is not given; --help explains it" for name in missing])
    return unflatten(cls, values)


def unflatten(cls: Any, values: dict[str, Any]) -> Any:
    """Returns an instance of the settings class `cls` with `values` (flat name -> value)."""
    arguments = {}
    for field in dataclasses.fields(cls):
        nested = dataclasses.is_dataclass(field.type)
        arguments[field.name] = unflatten(field.type, values) if nested else values[field.name]
    return cls(**arguments)


def refuse(problems: list[str]) -> None:
    """Raises InputError with all `problems` in one message, unless the list is empty."""
    if problems:
        raise InputError("settings: " + "; ".join(problems))


def fields(cls: Any) -> dict[str, dataclasses.Field]:
    """Returns flat name -> field, for a settings class and the dataclasses inside it."""
    flat: dict[str, dataclasses.Field] = {}
    for field in dataclasses.fields(cls):
        flat |= fields(field.type) if dataclasses.is_dataclass(field.type) else {field.name: field}
    return flat


def flatten(config: Any) -> dict[str, Any]:
    """Returns flat name -> value for a settings object, in the order of its fields."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat |= flatten(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return flat


# ---- the command line


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError for a mistake, instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"settings: {message}; --help explains every setting")


def positional(metavar: str, **keywords: Any) -> Any:
    """Returns a dataclass field that takes the words which belong to no option. `--help` calls it `metavar`."""
    return dataclasses.field(metadata={"metavar": metavar}, **keywords)


def parse_flags(
    cls: type, argv: list[str], description: str | None = None, presets: Path | None = None
) -> dict[str, Any]:
    """Returns name -> value for the options and positional words in `argv`; names that are not given are absent.

    Raises InputError for a missing value or a value of the wrong type, else for all unknown options, else for all words
    that belong to no option, else for all repeated options. `--help` prints the options with the defaults of `cls`, and
    with the values of a preset (a .toml file, or one in the folder `presets`) if `argv` names one, and exits 0;
    `--version` prints the version and exits 0."""
    argv = mark_values(argv, cls)
    wants_help = bool({"-h", "--help"} & set(argv))
    if "--version" in argv and not wants_help:
        end_with(f"gpt-text-generator {__version__}")
    if wants_help:
        texts = help_texts(cls, named_preset(argv, presets))
        end_with(make_parser(cls, texts, description).format_help().rstrip())
    parser = make_parser(cls, {}, description)
    # Intermixed: positional words may stand between options. Before Python 3.13 that method reads options behind "--".
    parse = parser.parse_known_args if "--" in argv else parser.parse_known_intermixed_args
    namespace, rest = parse(argv)
    given = vars(namespace)  # name -> list with a value for each time that it is given
    unknown = [word[2:].split("=")[0] for word in rest if word.startswith("--") and word != "--"]
    refuse([f"unknown option --{name}; {suggestion(name.replace('-', '_'), fields(cls), '--')}" for name in unknown])
    refuse([f"{unmarked(word)!r} belongs to no option{short_name(word, cls)}" for word in rest])
    refuse([f"option --{name} is given twice; give it once" for name, values in given.items() if len(values) > 1])
    return {name: tuple(value) if isinstance(value, list) else value for name, [value] in given.items()}


def end_with(text: str) -> NoReturn:
    """Prints `text` and exits 0, also if the reader of stdout has closed the pipe."""
    with contextlib.suppress(BrokenPipeError):
        say(text)
    raise SystemExit(0)


def mark_values(argv: list[str], cls: type) -> list[str]:
    """Returns `argv` with MARK before each value of an option for text that begins with "--": a word that does not look
    like an option, as in --prompt "--- x", and a "--" that follows such an option or ends `argv`."""
    options = [(name, field.type) for name, field in fields(cls).items() if not field.metadata]
    of_text = {name for name, wanted in options if wanted in (str, tuple[str, ...])}
    marked, option = [], ""  # the last option
    for place, word in enumerate(argv):
        is_first, is_last = place > 0 and argv[place - 1] == option, place == len(argv) - 1
        is_value = word.startswith("--") and (is_first or is_last if word == "--" else not OPTION.fullmatch(word))
        if is_value and option[2:].replace("-", "_") in of_text:
            word = MARK + word
        elif word.startswith("--"):
            option, _, value = word.partition("=")
            if value == "--" and option[2:].replace("-", "_") in of_text:
                word = f"{option}={MARK}--"  # argparse would drop the dashes
        marked.append(word)
    return marked


def short_name(word: str, cls: type) -> str:
    """Returns what the short option `word` of another program is called here, after "; ", or ""."""
    return f"; {suggestion(word, fields(cls), '--')}" if word in OTHER_NAMES and word.startswith("-") else ""


def make_parser(cls: type, texts: dict[str, str], description: str | None) -> Parser:
    """Returns a parser of the options and positional words of `cls`, with the help `texts` (field -> text). The parser
    appends the values of a name to a list, so that a repeated option can be reported."""
    paragraphs = (description or "").split("\n\n")  # those that begin with a space are commands
    metavars = [field.metadata["metavar"] for field in fields(cls).values() if field.metadata]
    parser = Parser(
        prog=sys.argv[0],
        usage=" ".join(["%(prog)s [-h] [--version] [OPTIONS]", *metavars]),
        description="\n\n".join(part if part.startswith(" ") else filled(part) for part in paragraphs),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,  # an option -h would take the value -h2 for itself
    )
    parser._negative_number_matcher = re.compile("-[^-]")  # -1e-3, -inf and -x are values, not options
    add_arguments(parser, cls, texts)
    return parser


def filled(text: str, indent: int = 0) -> str:
    """Returns `text` in lines that fit the terminal; all but the first are indented."""
    width = shutil.get_terminal_size().columns - 2  # as argparse
    return textwrap.fill(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def add_arguments(parser: Parser, cls: Any, texts: dict[str, str], title: str = "") -> None:
    """Adds an argument for each field of `cls` to `parser`, in a group called `title` if that is not empty. The fields
    of a dataclass inside `cls` get a group of their own."""
    group = parser.add_argument_group(title) if title else parser
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            add_arguments(parser, field.type, texts, f"{field.name} options")
        else:
            add_argument(group, field, texts.get(field.name, ""))


def add_argument(group: Any, field: dataclasses.Field, text: str) -> None:
    """Adds the argument for `field` to `group`, a parser or an argument group. `text` is its help."""
    if field.metadata:
        keywords = {"nargs": "?"} | keywords_of(field.type) | dict(field.metadata)
        group.add_argument(field.name, action="append", help=text, **keywords)
    elif field.type is bool:
        add_option(group, field.name, field.name, text, action="append_const", const=True)
        add_option(group, f"no_{field.name}", field.name, f"not --{field.name}", action="append_const", const=False)
    else:
        add_option(group, field.name, field.name, text, action="append", **keywords_of(field.type))


def add_option(group: Any, option: str, name: str, text: str, **keywords: Any) -> None:
    """Adds an option for the field `name`: --x_y, and the spelling --x-y, which the help leaves out."""
    group.add_argument(f"--{option}", dest=name, help=text, **keywords)
    if "_" in option:
        group.add_argument(f"--{option.replace('_', '-')}", dest=name, help=argparse.SUPPRESS, **keywords)


def keywords_of(wanted: Any) -> dict[str, Any]:
    """Returns the keyword arguments of argparse's add_argument for a value of type `wanted`."""
    if typing.get_origin(wanted) is Literal:
        return {"choices": typing.get_args(wanted)}
    kind = (typing.get_args(wanted) or (wanted,))[0]  # str for tuple[str, ...], int for int | None
    reader = {float: finite_float, int | None: int_or_none}.get(wanted, unmarked if kind is str else kind)
    keywords = {"type": reader, "metavar": kind.__name__.upper()}
    return keywords | {"nargs": "*"} if typing.get_origin(wanted) is tuple else keywords


def finite_float(text: str) -> float:
    """Returns the float that `text` spells. Raises ArgumentTypeError for nan, inf and text that is no float."""
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a finite float, not {text!r}")


def unmarked(word: str) -> str:
    return word.removeprefix(MARK)


def int_or_none(text: str) -> int | None:
    return None if text == "None" else int(text)


def help_texts(cls: Any, preset: Path | None) -> dict[str, str]:
    """Returns field -> its help: the explanation, the default unless that is empty, and the value in `preset`, if any.
    Doubles "%", which argparse would replace."""
    texts = explanations(cls)  # reading the source takes a third of a second
    values = read_toml(preset, cls) if preset else {}
    for name, field in fields(cls).items():
        remarks = [] if field.default in ("", ()) else [f"default: {field.default}"]
        if field.default is dataclasses.MISSING:
            remarks = ["required"]
        if preset and name in values:
            remarks.append(f"{preset.stem}: {values[name]}")
        texts[name] = (texts[name] + (f" ({'; '.join(remarks)})" if remarks else "")).replace("%", "%%")
    return texts


def explanations(cls: Any) -> dict[str, str]:
    """Returns field -> the docstring below it, for a settings class and the dataclasses inside it."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        texts |= re.findall(r'^    (\w+): [^\n]*\n    """(.+?)"""', inspect.getsource(base), re.M | re.S)
    for field in dataclasses.fields(cls):
        texts |= explanations(field.type) if dataclasses.is_dataclass(field.type) else {}
    return texts


def unescaped(text: str) -> str:
    """Returns `text` with \\n, \\t and \\\\ replaced by a line break, a tab and a backslash; other backslashes stay."""
    return re.sub(r"\\([nt\\])", lambda match: ESCAPES[match[1]], text)


# ---- TOML


def read_toml(path: str | Path, cls: type) -> dict[str, Any]:
    """Returns name -> value from a preset file. Raises InputError if the file cannot be read or is not TOML, and for a
    name or value that does not fit the fields of `cls`."""
    if Path(path).suffix != ".toml":
        raise InputError(f"{path}: settings files are TOML data (name = value), not programs; write a .toml file")
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a preset's name or a readable .toml file") from None
    except (ValueError, RecursionError) as error:  # invalid TOML or UTF-8, an endless number, endless brackets
        raise InputError(f"{path}: not valid TOML: {error}; write lines like max_steps = 100") from None
    known, settings, problems = fields(cls), {}, []
    for name, value in values.items():
        if name in REMOVED:
            note("info", f"{path}: {name} no longer exists and is ignored")
        elif name not in known:
            problems.append(f"{path}: unknown setting {name}; {suggestion(name, known)}")
        else:
            try:
                settings[name] = in_type(value, known[name].type)
            except (ValueError, OverflowError) as error:
                problems.append(f"{path}: {name} = {value!r}: {error}")
    refuse(problems)
    return settings


def in_type(value: Any, wanted: Any) -> Any:
    """Returns `value`, from TOML or JSON, as the field type `wanted`: converts an integer to a float and a list to a
    tuple if needed. Raises ValueError or OverflowError, whose text says what is wrong, for a value that does not
    fit."""
    if typing.get_origin(wanted) is Literal:
        if value not in typing.get_args(wanted):
            raise ValueError(f"must be one of {', '.join(typing.get_args(wanted))}")
        return value
    kind = typing.get_origin(wanted) or wanted  # tuple for tuple[str, ...]
    if (type(value), kind) in ((int, float), (list, tuple)):
        value = kind(value)
    if type(value) is not kind:
        raise ValueError(f"must be {kind.__name__}, not {type(value).__name__}")
    if kind is float and not math.isfinite(value):
        raise ValueError("must be a finite float")
    return value


def to_toml(values: dict[str, Any]) -> str:
    """Returns `values` (strings, numbers, booleans, lists of strings) as TOML text, which `read_toml` reads back."""
    return "".join(f"{name} = {toml_value(value)}\n" for name, value in values.items())


def toml_value(value: Any) -> str:
    """Returns `value` as TOML: its JSON text, with U+007F escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# ---- presets


def find_preset(name: str, folder: Path) -> Path | None:
    """Returns the path of a preset: `name`.toml in `folder`, or the file `name`; None if `name` is empty. If there is
    no such preset, lists the presets and raises InputError."""
    if not name:
        return None
    path = folder / f"{name}.toml"
    if os.path.exists(path):  # Path.exists raises for a name that is too long
        return path
    if not Path(name).suffix:
        tell(list_presets(folder))
        raise InputError(f"no preset {name!r}: the presets are listed above; choose one, or give a .toml file")
    return Path(name)


def named_preset(words: list[str], folder: Path | None) -> Path | None:
    """Returns the path of the preset that one of `words` names: of a .toml file, or of a preset in `folder`; None if
    none does, or if `folder` is None."""
    for word in words:
        if folder and (word.endswith(".toml") or os.path.exists(folder / f"{word}.toml")):
            return find_preset(word, folder)
    return None


def list_presets(folder: Path) -> str:
    """Returns a list of the presets: each name and the first line of its header, which says size, hardware and time."""
    paths = sorted(folder.glob("*.toml"))
    width = max((len(path.stem) for path in paths), default=0)
    headers = [path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for path in paths]
    lines = [f"  {path.stem:{width}}  {header}" for path, header in zip(paths, headers, strict=True)]
    return "\n".join(filled(line, indent=width + 4) for line in lines)
