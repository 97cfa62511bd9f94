"""Settings: a frozen dataclass becomes flags (by tyro), TOML presets become its defaults, and mistakes get a
suggestion.

A settings class may hold further frozen dataclasses: they group the flags in `--help`. Names are flat everywhere: one
name serves as field, TOML key, flag, log and checkpoint entry, so no name may occur twice in one class."""

import contextlib
import dataclasses
import difflib
import io
import json
import math
import os
import sys
import tomllib
import typing
from pathlib import Path

import tyro

from gpt.errors import InputError, stdout_errors, tell

GROUP = {"help": ""}  # metadata of a field that is a dataclass: else tyro reads its source file, in search of a text
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


def from_cli(cls, argv=None, base=None, preset=None, description=None, usage=None):
    """Settings of class `cls` and the set of names that the preset or a flag gave: (config, given).

    The class's defaults lie under `base` (flat name -> value), that under the TOML file `preset`, that under `argv`.
    Raises InputError for an unknown, repeated or mistyped name, for nan and inf, and for what the class itself refuses.
    `--help` prints and exits 0; its first line is `usage` (or the script's name) and the options."""
    argv = sys.argv[1:] if argv is None else list(argv)
    values = defaults(cls) | (base or {})
    given = set()
    if preset is not None:
        from_preset = read_toml(preset, cls)
        values |= from_preset
        given |= from_preset.keys()
    given |= check_flags(cls, argv)
    default = unflatten(cls, values, checked=False)
    return run_tyro(cls, argv, default, description, usage), frozenset(given)


def run_tyro(cls, argv, default, description, usage):
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), stdout_errors():
            return tyro.cli(
                cls,
                args=argv,
                prog=usage,
                default=default,
                description=description,
                use_underscores=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        text = stderr.getvalue()
        tell(text.rstrip())
        raise InputError(f"settings: {first_sentence(text)}; --help explains every setting") from None


def first_sentence(box):
    """What tyro's error box says above its first rule, as one line."""
    lines = []
    for line in box.splitlines()[1:]:
        line = line.strip("│ ")
        if line.startswith("─"):
            break
        lines.append(line)
    return " ".join(lines) or "not understood"


def fields(cls):
    """Flat name -> dataclass field of `cls` and of the dataclasses inside it."""
    found = {}
    for field in dataclasses.fields(cls):
        found |= fields(field.type) if dataclasses.is_dataclass(field.type) else {field.name: field}
    return found


def defaults(cls):
    """Flat name -> default; names without one are left out."""
    found = {}
    for name, field in fields(cls).items():
        if field.default is not dataclasses.MISSING:
            found[name] = field.default
    return found


def flatten(config):
    """Flat name -> value, in the order of the fields."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= flatten(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return found


def unflatten(cls, values, checked=True):
    """The instance of `cls` with these flat values. `checked=False` leaves out `__post_init__`: a default that only the
    flags complete. A name without value is tyro's to ask for."""
    made = {}
    for field in dataclasses.fields(cls):
        nested = dataclasses.is_dataclass(field.type)
        made[field.name] = unflatten(field.type, values, checked) if nested else values.get(field.name, tyro.MISSING)
    if checked:
        return cls(**made)
    instance = object.__new__(cls)
    for name, value in made.items():
        object.__setattr__(instance, name, value)
    return instance


def check_flags(cls, argv):
    """The flat names of the flags in `argv`. Raises InputError naming every flag that is unknown (with a suggestion),
    repeated, or whose value is not the number it must be."""
    known = fields(cls)
    seen, problems = set(), []
    for name, value in flags_in(argv, known):
        if name not in known:
            problems.append(f"unknown option --{name}; {suggestion(name, known, '--')}")
        elif name in seen:
            problems.append(f"option --{name} is given twice; give it once")
        elif value is not None and not is_number(value, known[name].type):
            problems.append(f"--{name} {value!r}: not a finite {known[name].type.__name__}")
        seen.add(name)
    refuse(problems)
    return seen


def flags_in(argv, known):
    """(name, value or None) of each flag in `argv`; `--no_x` is one of x where x is a known switch."""
    for place, word in enumerate(argv):
        if word == "--":
            return
        if not word.startswith("--") or word == "--help":
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith("no_") and name[3:] in known and known[name[3:]].type is bool:
            name = name[3:]
        following = argv[place + 1] if place + 1 < len(argv) and not argv[place + 1].startswith("--") else None
        yield name, value if equals else following


def check_preset_comes_first(cls, flags):
    """Raise InputError for a word among `flags` that is neither a flag of `cls`, which has no lists, nor its value."""
    switches = {no + name for name, field in fields(cls).items() if field.type is bool for no in ("", "no_")}
    takes_word = False
    for word in flags:
        if word.startswith("--"):
            name, equals, _ = word[2:].replace("-", "_").partition("=")
            takes_word = not equals and name not in switches
        elif takes_word or word == "-h":
            takes_word = False
        else:
            raise InputError(f"settings: {word!r} belongs to no option; if it is the preset, give it first")


def is_number(text, wanted):
    """Whether `text` reads as a `wanted`, int or finite float; any text does where neither is wanted."""
    if wanted not in (int, float):
        return True
    try:
        return math.isfinite(wanted(text))
    except (ValueError, OverflowError):
        return False


def suggestion(name, known, dashes=""):
    """What to type instead of the unknown `name`."""
    if name in OTHER_NAMES and OTHER_NAMES[name].split(" ")[0] in known:
        return f"here it is {dashes}{OTHER_NAMES[name]}"
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    if close:
        return "perhaps you meant " + " or ".join(f"{dashes}{c}" for c in close)
    return "--help lists every setting"


def read_toml(path, cls):
    """The flat values of a preset file, checked against the fields of `cls`."""
    if Path(path).suffix != ".toml":
        raise InputError(f"{path}: settings files are TOML data (name = value), not programs; write a .toml file")
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a preset's name or a readable .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}; write lines like max_steps = 100") from None
    known = fields(cls)
    refuse([f"{path}: {p}" for name, value in values.items() if (p := problem_of(name, value, known))])
    return {name: converted(value, known[name].type) for name, value in values.items()}


def problem_of(name, value, known):
    """What is wrong with a line of a settings file, in words; "" if nothing."""
    if name not in known:
        return f"unknown setting {name}; {suggestion(name, known)}"
    wanted = known[name].type
    if type(value) is float and not math.isfinite(value):
        return f"{name} = {value}: not a finite float"
    if typing.get_origin(wanted) is typing.Literal and value not in typing.get_args(wanted):
        return f"{name} = {value!r}: must be one of {', '.join(map(str, typing.get_args(wanted)))}"
    if wanted in (int, float, str, bool) and type(converted(value, wanted)) is not wanted:
        return f"{name} = {value!r}: must be {wanted.__name__}, not {type(value).__name__}"
    return ""


def converted(value, wanted):
    """A value of TOML as a field's type has it: 1 is a float where one is wanted, a list a tuple."""
    if wanted is float and type(value) is int:
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def refuse(problems):
    """Raise InputError with all `problems` of a configuration in one message, unless there are none."""
    if problems:
        raise InputError("settings: " + "; ".join(problems))


def to_toml(values):
    """Flat settings as TOML text that `read_toml` reads back: strings, numbers, booleans and lists of strings."""
    return "".join(f"{name} = {toml_value(value)}\n" for name, value in values.items())


def toml_value(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    return repr(value)


# ---- presets


def find_preset(name, folder):
    """The path of a preset: a name in `folder`, or a file that the user names; None for no preset. Raises InputError,
    and lists what there is, for an unknown one."""
    if not name:
        return None
    path = folder / f"{name}.toml"
    if os.path.exists(path):  # Path.exists raises for a name that is too long
        return path
    if not Path(name).suffix:
        tell(list_presets(folder))
        raise InputError(f"no preset {name!r}: the presets are listed above; choose one, or give a .toml file")
    return Path(name)


def list_presets(folder):
    """A line per preset: its name and the first line of its header, which says size, hardware and time."""
    paths = sorted(folder.glob("*.toml"))
    width = max((len(path.stem) for path in paths), default=0)
    lines = []
    for path in paths:
        first = path.read_text(encoding="utf-8").split("\n")[0]
        lines.append(f"  {path.stem:{width}}  {first.removeprefix('# ')}")
    return "\n".join(lines)


def peek(flags, name):
    """The value of `--name` among flags that are not parsed yet, or ""."""
    for place, flag in enumerate(flags):
        if flag.startswith(f"--{name}="):
            return flag.split("=", 1)[1]
        if flag == f"--{name}" and place + 1 < len(flags):
            return flags[place + 1]
    return ""
