"""Settings: a frozen dataclass gives the options of the command line, `--help` and the keys of TOML presets.

A settings class may hold further frozen dataclasses: they group the options in `--help`. Names are flat everywhere: one
name serves as field, TOML key, flag, log and checkpoint entry, so no name may occur twice in one class. The docstring
below a field explains it in `--help`. One field may be `positional`."""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import sys
import textwrap
import tomllib
import typing
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from gpt.errors import InputError, note, say, tell

Config = TypeVar("Config")
Fields = dict[str, dataclasses.Field]  # by flat name

# What users of nanoGPT and transformers type, and the name (or names) here.
OTHER_NAMES = {
    "batch_size": "global_batch_size (sequences per optimizer step) or --micro_batch_size (sequences per forward pass)",
    "gradient_accumulation_steps": "global_batch_size (micro-batches follow from --micro_batch_size)",
    "per_device_train_batch_size": "micro_batch_size",
    "learning_rate": "lr",
    "max_iters": "max_steps",
    "num_train_epochs": "max_epochs",
    "epochs": "max_epochs",
    "warmup_iters": "warmup_steps",
    "warmup_ratio": "warmup_steps (below 1 it is a share of the run)",
    "lr_decay_iters": "decay_steps",
    "lr_scheduler_type": "schedule",
    "decay_lr": "schedule",
    "eval_interval": "eval_every",
    "eval_steps": "eval_every",
    "eval_iters": "eval_tokens",
    "log_interval": "log_every",
    "logging_steps": "log_every",
    "save_steps": "save_every",
    "save_total_limit": "keep_last",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "eps",
    "max_grad_norm": "grad_clip",
    "out_dir": "out",
    "output_dir": "out",
    "dataset": "data",
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
    """Returns the instance of `cls` with the values of these layers over its defaults; a later layer wins. Raises
    InputError for a field without a value and for what the class itself refuses."""
    values = defaults(cls)
    for layer in layers:
        values |= layer
    refuse([f"{name} is not given; --help explains it" for name in fields(cls) if name not in values])
    return unflatten(cls, values)


def refuse(problems: list[str]) -> None:
    """Raises InputError with all `problems` of a configuration in one message, unless there are none."""
    if problems:
        raise InputError("settings: " + "; ".join(problems))


# ---- fields and values by flat name


def fields(cls: Any) -> Fields:
    """Returns the fields of a settings class and of the dataclasses inside it."""
    flat: Fields = {}
    for field in dataclasses.fields(cls):
        flat |= fields(field.type) if dataclasses.is_dataclass(field.type) else {field.name: field}
    return flat


def defaults(cls: Any) -> dict[str, Any]:
    """Returns the defaults of a settings class; a field without one is left out."""
    return {name: field.default for name, field in fields(cls).items() if field.default is not dataclasses.MISSING}


def flatten(config: Any) -> dict[str, Any]:
    """Returns the values of a settings object, in the order of its fields."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat |= flatten(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return flat


def unflatten(cls: Any, values: dict[str, Any]) -> Any:
    """Returns the instance of a settings class with these values; names that are not its fields are ignored."""
    arguments = {}
    for field in dataclasses.fields(cls):
        nested = dataclasses.is_dataclass(field.type)
        arguments[field.name] = unflatten(field.type, values) if nested else values[field.name]
    return cls(**arguments)


# ---- the command line


class Parser(argparse.ArgumentParser):
    """Raises InputError for a mistake; argparse prints the usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"settings: {message}; --help explains every setting")


class Once(argparse.Action):
    """Stores the value of an option, and refuses a second one; argparse keeps the last."""

    def __call__(self, parser, namespace, values, option_string=None):
        if hasattr(namespace, self.dest):
            parser.error(f"option --{self.dest} is given twice; give it once")
        if option_string and self.nargs == 0:  # --x is true, --no_x and --no-x are false
            values = option_string.removeprefix("--").replace("-", "_") == self.dest
        setattr(namespace, self.dest, tuple(values) if isinstance(values, list) else values)


def positional(metavar: str, **keywords: Any) -> Any:
    """Returns a dataclass field that takes the words which belong to no option. `--help` calls it `metavar`."""
    return dataclasses.field(metadata={"metavar": metavar}, **keywords)


def parse_flags(cls: type, argv: list[str], description: str | None = None, usage: str | None = None) -> dict[str, Any]:
    """Returns the values that the options and positional words in `argv` give, and no others.

    Raises InputError for a missing, mistyped or repeated value, else for all unknown options, else for all words that
    belong to no option. `--help` prints the options with the defaults of `cls` and exits 0; its first line shows
    `usage` (default: the script's name)."""
    wants_help = bool({"-h", "--help"} & set(argv))
    parser = make_parser(cls, wants_help, description, usage)
    if wants_help:
        say(parser.format_help().rstrip())
        parser.exit()
    # Intermixed: positional words may stand between options. Before Python 3.13 that method reads options behind "--".
    parse = parser.parse_known_args if "--" in argv else parser.parse_known_intermixed_args
    values, rest = parse(argv)
    unknown = [word[2:].split("=")[0] for word in rest if word.startswith("--") and word != "--"]
    refuse([f"unknown option --{name}; {suggestion(name.replace('-', '_'), fields(cls), '--')}" for name in unknown])
    refuse([f"{word!r} belongs to no option" for word in rest])
    return vars(values)


def make_parser(cls: type, explain: bool, description: str | None, usage: str | None) -> Parser:
    """Returns a parser of the options of `cls`; `explain` gives it the texts for `--help`."""
    metavars = [field.metadata["metavar"] for field in fields(cls).values() if field.metadata]
    parser = Parser(
        prog=usage or sys.argv[0],
        usage=" ".join(["%(prog)s [-h] [OPTIONS]", *metavars]),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=explain,
    )
    parser._negative_number_matcher = re.compile("-[^-]")  # -1e-3, -inf and -x are values, not options
    add_arguments(parser, cls, explain)
    return parser


def add_arguments(parser: Parser, cls: Any, explain: bool, title: str = "") -> None:
    """Adds an argument to `parser` for each field of `cls`, under `title`, and a group for each dataclass inside it."""
    group = parser.add_argument_group(title) if title else parser
    texts = explanations(cls) if explain else {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            add_arguments(parser, field.type, explain, f"{field.name} options")
        else:
            add_argument(group, field, texts.get(field.name, ""))


def add_argument(group: Any, field: dataclasses.Field, text: str) -> None:
    """Adds an argument for one field to a parser or to a group of it, explained by `text`."""
    keywords = {"action": Once, "help": help_of(field, text)} | keywords_of(field.type)
    if field.metadata:
        group.add_argument(field.name, **{"nargs": "?"} | keywords | dict(field.metadata))
        return
    names = [f"--{field.name}", f"--no_{field.name}"] if field.type is bool else [f"--{field.name}"]
    group.add_argument(*names, dest=field.name, **keywords)
    dashed = [name.replace("_", "-") for name in names if "_" in name]
    if dashed:  # one spelling is enough in the help
        group.add_argument(*dashed, dest=field.name, **keywords | {"help": argparse.SUPPRESS})


def keywords_of(wanted: Any) -> dict[str, Any]:
    """Returns the keywords of `add_argument` for values of type `wanted`."""
    if wanted is bool:
        return {"nargs": 0}
    if typing.get_origin(wanted) is Literal:
        return {"choices": typing.get_args(wanted)}
    several = typing.get_origin(wanted) is tuple
    element = (typing.get_args(wanted) or (wanted,))[0]
    keywords = {"type": READERS[element if several else wanted], "metavar": element.__name__.upper()}
    return keywords | {"nargs": "*"} if several else keywords


def finite_float(text: str) -> float:
    """Returns the float that `text` spells. Raises ArgumentTypeError for nan, inf and what is no float."""
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a finite float, not {text!r}")


def int_or_none(text: str) -> int | None:
    return None if text == "None" else int(text)


# Type of a field -> the function that reads a value from the command line.
READERS: dict[Any, Callable[[str], Any]] = {str: str, int: int, float: finite_float, int | None: int_or_none}


def help_of(field: dataclasses.Field, text: str) -> str:
    """Returns the help of a field: its explanation `text` and its default, unless that is empty."""
    if field.default is dataclasses.MISSING:
        text += " (required)"
    elif field.default not in ("", ()):
        text += f" (default: {field.default})"
    return text.replace("%", "%%")


def explanations(cls: type) -> dict[str, str]:
    """Returns the docstrings below the fields of a dataclass and of its bases, by the field's name."""
    texts = {}
    for base in reversed(cls.__mro__[:-1]):
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for node, below in pairwise(definition.body):
            match node, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = text
    return texts


def suggestion(name: str, known: Iterable[str], dashes: str = "") -> str:
    """Returns what to type instead of the unknown `name`."""
    if name in OTHER_NAMES and OTHER_NAMES[name].split(" ")[0] in known:
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
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}; write lines like max_steps = 100") from None
    for name in REMOVED & values.keys():
        note("info", f"{path}: {name} no longer exists and is ignored")
        del values[name]
    known, problems = fields(cls), []
    for name, value in values.items():
        if name not in known:
            problems.append(f"{path}: unknown setting {name}; {suggestion(name, known)}")
            continue
        values[name] = in_type(value, known[name].type)
        if problem := mismatch(values[name], known[name].type):
            problems.append(f"{path}: {name} = {value!r}: {problem}")
    refuse(problems)
    return values


def in_type(value: Any, wanted: Any) -> Any:
    """Returns a value of TOML as a field's type has it: 1 is a float where one is wanted, a list is a tuple."""
    if wanted is float and type(value) is int:
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def mismatch(value: Any, wanted: Any) -> str:
    """Returns why a field of type `wanted` cannot have this value; "" if it can."""
    kinds = typing.get_args(wanted) or (wanted,)
    if typing.get_origin(wanted) is Literal:
        return "" if value in kinds else f"must be one of {', '.join(kinds)}"
    if float in kinds and not (type(value) is float and math.isfinite(value)):
        return "not a finite float"
    if typing.get_origin(wanted) is not tuple and type(value) not in kinds:
        name = wanted.__name__ if isinstance(wanted, type) else str(wanted)
        return f"must be {name}, not {type(value).__name__}"
    return ""


def to_toml(values: dict[str, Any]) -> str:
    """Returns TOML text that `read_toml` reads back: strings, numbers, booleans and lists of strings."""
    return "".join(f"{name} = {toml_value(value)}\n" for name, value in values.items())


def toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    return repr(value)


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
    lines = []
    for path in paths:
        first = path.read_text(encoding="utf-8").split("\n")[0]
        lines.append(f"  {path.stem:{width}}  {first.removeprefix('# ')}")
    return "\n".join(lines)
