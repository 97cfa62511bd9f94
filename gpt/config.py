"""Settings: a frozen dataclass gives the options of the command line, `--help` and the keys of TOML presets.

A settings class may hold further frozen dataclasses: they group the options in `--help`. Names are flat everywhere: one
name serves as field, TOML key, flag, log and checkpoint entry, so no name may occur twice in one class. The docstring
below a field explains it in `--help`. A field made by `positional` takes the words that belong to no option.

A settings class checks its values in `problems()`, which returns what is wrong with them, in words. Whoever uses the
values passes this list to `refuse`, so that the user sees all problems in one message."""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import sys
import tomllib
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from gpt.errors import InputError, note, say, tell

Config = TypeVar("Config")

# Names in nanoGPT and transformers, and the name (or names) here. `suggestion` finds similar names without this table.
OTHER_NAMES = {
    "batch_size": "global_batch_size (sequences per optimizer step) or --micro_batch_size (sequences per forward pass)",
    "gradient_accumulation_steps": "global_batch_size (micro-batches follow from --micro_batch_size)",
    "learning_rate": "lr",
    "max_iters": "max_steps",
    "epochs": "max_epochs",
    "warmup_ratio": "warmup_steps (below 1 it is a share of the run)",
    "decay_lr": "schedule",
    "eval_steps": "eval_every",
    "eval_iters": "eval_tokens",
    "log_interval": "log_every",
    "logging_steps": "log_every",
    "save_steps": "save_every",
    "save_total_limit": "keep_last",
    "adam_epsilon": "eps",
    "max_grad_norm": "grad_clip",
    "output_dir": "out",
    "init_from": "init or --resume",
    "model_name_or_path": "init",
    "resume_from_checkpoint": "resume",
    "n_positions": "block_size",
    "n_ctx": "block_size",
    "context_length": "block_size",
    "wandb_project": "wandb",
    "start": "prompt",
    "max_length": "max_new_tokens",
    "max_tokens_to_generate": "max_new_tokens",
    "num_return_sequences": "num_samples",
    "n": "num_samples",
    "do_sample": "temperature (0 is greedy)",
    "stop_sequences": "stop",
}
REMOVED = {"fp8_head"}  # settings of earlier versions, which a run's config.toml may still name


def make_config(cls: type[Config], *layers: dict[str, Any]) -> Config:
    """Returns the instance of `cls` with the values of these layers over its defaults; a later layer wins. Names that
    are no fields of `cls` are ignored. Raises InputError for a field without a value and for what `cls` refuses."""
    values = {name: field.default for name, field in fields(cls).items()}
    for layer in layers:
        values |= layer
    missing = [name for name in fields(cls) if values[name] is dataclasses.MISSING]
    refuse([f"{name} is not given; --help explains it" for name in missing])
    return unflatten(cls, values)


def unflatten(cls: Any, values: dict[str, Any]) -> Any:
    """Returns the instance of a settings class with these values by flat name."""
    arguments = {}
    for field in dataclasses.fields(cls):
        nested = dataclasses.is_dataclass(field.type)
        arguments[field.name] = unflatten(field.type, values) if nested else values[field.name]
    return cls(**arguments)


def refuse(problems: list[str]) -> None:
    """Raises InputError with all `problems` of a configuration in one message, unless there are none."""
    if problems:
        raise InputError("settings: " + "; ".join(problems))


def fields(cls: Any) -> dict[str, dataclasses.Field]:
    """Returns the fields of a settings class and of the dataclasses inside it, by flat name."""
    flat: dict[str, dataclasses.Field] = {}
    for field in dataclasses.fields(cls):
        flat |= fields(field.type) if dataclasses.is_dataclass(field.type) else {field.name: field}
    return flat


def flatten(config: Any) -> dict[str, Any]:
    """Returns the values of a settings object by flat name, in the order of its fields."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat |= flatten(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return flat


# ---- the command line


class Parser(argparse.ArgumentParser):
    """Raises InputError for a mistake; argparse prints the usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"settings: {message}; --help explains every setting")


def positional(metavar: str, **keywords: Any) -> Any:
    """Returns a dataclass field that takes the words which belong to no option. `--help` calls it `metavar`."""
    return dataclasses.field(metadata={"metavar": metavar}, **keywords)


def parse_flags(cls: type, argv: list[str], description: str | None = None) -> dict[str, Any]:
    """Returns the values that the options and positional words in `argv` give, and no others.

    Raises InputError for a missing or mistyped value, else for all unknown options, else for all words that belong to
    no option, else for all repeated options. `--help` prints the options with the defaults of `cls` and exits 0."""
    wants_help = bool({"-h", "--help"} & set(argv))
    texts = explanations(cls) if wants_help else {}  # to read the source takes a third of a second
    parser = make_parser(cls, texts, description)
    if wants_help:
        say(parser.format_help().rstrip())
        parser.exit()
    # Intermixed: positional words may stand between options. Before Python 3.13 that method reads options behind "--".
    parse = parser.parse_known_args if "--" in argv else parser.parse_known_intermixed_args
    namespace, rest = parse(argv)
    given = vars(namespace)  # name -> list with a value for each time that it is given
    unknown = [word[2:].split("=")[0] for word in rest if word.startswith("--") and word != "--"]
    refuse([f"unknown option --{name}; {suggestion(name.replace('-', '_'), fields(cls), '--')}" for name in unknown])
    refuse([f"{word!r} belongs to no option" for word in rest])
    refuse([f"option --{name} is given twice; give it once" for name, values in given.items() if len(values) > 1])
    return {name: tuple(value) if isinstance(value, list) else value for name, [value] in given.items()}


def make_parser(cls: type, texts: dict[str, str], description: str | None) -> Parser:
    """Returns a parser of the options and positional words of `cls`, explained by `texts`. It appends each value to a
    list."""
    metavars = [field.metadata["metavar"] for field in fields(cls).values() if field.metadata]
    parser = Parser(
        prog=sys.argv[0],
        usage=" ".join(["%(prog)s [-h] [OPTIONS]", *metavars]),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,  # an option -h would take the value -h2 for itself
    )
    parser._negative_number_matcher = re.compile("-[^-]")  # -1e-3, -inf and -x are values, not options
    add_arguments(parser, cls, texts)
    return parser


def add_arguments(parser: Parser, cls: Any, texts: dict[str, str], title: str = "") -> None:
    """Adds an argument to `parser` for each field of `cls`, under `title`, and a group for each dataclass inside it."""
    group = parser.add_argument_group(title) if title else parser
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            add_arguments(parser, field.type, texts, f"{field.name} options")
        else:
            add_argument(group, field, help_of(field, texts.get(field.name, "")))


def add_argument(group: Any, field: dataclasses.Field, text: str) -> None:
    """Adds the argument of one field, with its help `text`, to a parser or to a group of it."""
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
    """Returns the keywords of `add_argument` for a value of type `wanted`."""
    if typing.get_origin(wanted) is Literal:
        return {"choices": typing.get_args(wanted)}
    kind = (typing.get_args(wanted) or (wanted,))[0]  # str of tuple[str, ...], int of int | None
    reader = {float: finite_float, int | None: int_or_none}.get(wanted, kind)
    keywords = {"type": reader, "metavar": kind.__name__.upper()}
    return keywords | {"nargs": "*"} if typing.get_origin(wanted) is tuple else keywords


def finite_float(text: str) -> float:
    """Returns the float that `text` spells. Raises ArgumentTypeError for nan, inf and what is no float."""
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a finite float, not {text!r}")


def int_or_none(text: str) -> int | None:
    return None if text == "None" else int(text)


def help_of(field: dataclasses.Field, text: str) -> str:
    """Returns the help of a field: its explanation `text` and its default, unless that is empty."""
    if field.default is dataclasses.MISSING:
        text += " (required)"
    elif field.default not in ("", ()):
        text += f" (default: {field.default})"
    return text.replace("%", "%%")


def explanations(cls: Any) -> dict[str, str]:
    """Returns the docstrings below the fields of a settings class and of the dataclasses inside it."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        texts |= re.findall(r'^    (\w+): [^\n]*\n    """(.+?)"""', inspect.getsource(base), re.M | re.S)
    for field in dataclasses.fields(cls):
        texts |= explanations(field.type) if dataclasses.is_dataclass(field.type) else {}
    return texts


def suggestion(name: str, known: Iterable[str], dashes: str = "") -> str:
    """Returns what to type instead of the unknown `name`."""
    if OTHER_NAMES.get(name, "").split(" ")[0] in known:
        return f"here it is {dashes}{OTHER_NAMES[name]}"
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    if close:
        return "perhaps you meant " + " or ".join(f"{dashes}{c}" for c in close)
    return "--help lists every setting"


# ---- TOML


def read_toml(path: str | Path, cls: type) -> dict[str, Any]:
    """Returns the values of a preset file. Raises InputError for a name or value that does not fit the fields of
    `cls`."""
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
    """Returns a TOML value as a field of type `wanted` has it: an integer as a float where one is wanted, a list as a
    tuple. Raises ValueError or OverflowError, with what is wrong as its text, for a value that does not fit."""
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
    """Returns the path of a preset: a name in `folder`, or a file that the user names; None if `name` is empty. Lists
    the presets and raises InputError for an unknown one."""
    if not name:
        return None
    path = folder / f"{name}.toml"
    if os.path.exists(path):  # Path.exists raises for a name that is too long
        return path
    if not Path(name).suffix:
        tell(list_presets(folder))
        raise InputError(f"no preset {name!r}: the presets are listed above; choose one, or give a .toml file")
    return Path(name)


def list_presets(folder: Path) -> str:
    """Returns a line per preset: its name and the first line of its header, which says size, hardware and time."""
    paths = sorted(folder.glob("*.toml"))
    width = max((len(path.stem) for path in paths), default=0)
    headers = [path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for path in paths]
    return "\n".join(f"  {path.stem:{width}}  {header}" for path, header in zip(paths, headers, strict=True))
