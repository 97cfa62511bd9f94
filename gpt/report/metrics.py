"""Reads and compares what runs have recorded: their settings, and their losses by step, tokens and time."""

import contextlib
import os
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from gpt.errors import InputError, IntegrityError, ResourceError, note
from gpt.files import read_json, step_folders
from gpt.train.metrics_file import METRICS, parse_record

NATS, BITS = "nats per token", "bits per byte"


@dataclass(frozen=True)
class Point:
    """One line of a run's metrics; a number that the line lacks is None."""

    step: int
    tokens: float | None
    seconds: float | None
    """of training, without evaluation and saving"""
    loss: float | None
    """nats per token"""
    val_loss: float | None
    """in the unit of the History"""
    val_bpb: float | None = None
    """bits per byte"""


@dataclass(frozen=True)
class History:
    """A run: its name, its points by rising steps, and its settings ({} if they cannot be read)."""

    name: str
    points: list[Point]
    settings: dict[str, Any]
    tokenizer: str = ""
    """identity of the tokenizer in its newest checkpoint, "" if unknown"""
    unit: str = NATS
    """of all losses"""

    def in_bits(self) -> "History":
        """Returns this run with its validation losses in bits per byte, and without training losses: what a training
        batch has in bytes is not recorded."""
        points = [replace(point, loss=None, val_loss=point.val_bpb) for point in self.points]
        return replace(self, points=points, unit=BITS)

    def bits_per_nat(self) -> float | None:
        """Returns bits per byte / nats per token of the last evaluation, or None. It depends on the tokenizer and the
        validation text alone."""
        last = [point for point in self.evaluations() if point.val_loss and point.val_bpb][-1:]
        return last[0].val_bpb / last[0].val_loss if last else None  # type: ignore[operator]

    def curve(self, measured: str, axis: str) -> list[tuple[float, float]]:
        """Returns (place, loss) of the points that have both: `measured` is "loss" or "val_loss", `axis` "step",
        "tokens" or "seconds"."""
        pairs = [(getattr(point, axis), getattr(point, measured)) for point in self.points]
        return [pair for pair in pairs if None not in pair]

    def evaluations(self) -> list[Point]:
        return [point for point in self.points if point.val_loss is not None]

    def best(self) -> Point | None:
        """Returns the first point with the lowest validation loss, or None if there is none. Ignores step 0, as
        training does."""
        return min((p for p in self.evaluations() if p.step > 0), key=attrgetter("val_loss"), default=None)

    def first_at(self, loss: float) -> Point | None:
        """Returns the first point whose validation loss is at most `loss`, or None if there is none."""
        return next((p for p in self.points if p.val_loss is not None and p.val_loss <= loss), None)


def common_loss(histories: list[History]) -> float | None:
    """Returns the lowest validation loss that all runs with evaluations have reached: the highest of their best losses.
    Returns None if no run has evaluations."""
    bests = [best for history in histories if (best := history.best())]
    return max(map(attrgetter("val_loss"), bests), default=None)


def comparable(histories: list[History]) -> list[History]:
    """Returns `histories`, in bits per byte if their tokenizers differ: nats per token would compare unequal tokens.
    For a run without checkpoints, the ratio of both units tells whether its tokenizer differs."""
    tokenizers = {history.tokenizer for history in histories}
    ratios = [ratio for history in histories if (ratio := history.bits_per_nat())]
    differ = len(tokenizers - {""}) > 1 or ("" in tokenizers and ratios and max(ratios) > 1.01 * min(ratios))
    if not differ:
        return histories
    note("info", "these runs have different tokenizers: compared by bits per byte of the validation text")
    return [history.in_bits() for history in histories]


def differing(histories: list[History]) -> dict[str, list[Any]]:
    """Returns setting -> its value in each run (None if the run lacks it), for the settings that differ, except `out`.
    Compares only runs that have settings."""
    known = [history.settings for history in histories if history.settings]
    names = dict.fromkeys(name for settings in known for name in settings if name != "out")
    return {
        name: [history.settings.get(name) for history in histories]
        for name in names
        if any(settings.get(name) != known[0].get(name) for settings in known)
    }


# ---- reading


def read_histories(folders: Iterable[str | Path]) -> list[History]:
    """Returns the History of each run folder. The name of a History is that of its folder, or the whole path if two
    folders have the same name. Raises InputError for a folder without metrics, ResourceError if they cannot be read."""
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if not os.path.isfile(path / METRICS):  # Path.is_file raises for a name that is too long
            raise InputError(f"{path}: no {METRICS} there; give the folder of a run, such as out/demo")
    names = [path.resolve().name for path in paths]
    names = [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]
    return [
        History(name, read_points(path / METRICS), read_settings(path), tokenizer_of(path))
        for path, name in zip(paths, names, strict=True)
    ]


def tokenizer_of(run: Path) -> str:
    """Returns the identity of the tokenizer in the newest checkpoint of a run that has a readable one, or ""."""
    for folder in step_folders(run):
        with contextlib.suppress(IntegrityError, ResourceError):
            entry = (read_json(folder / "training/manifest.json") or {}).get("tokenizer")
            if isinstance(entry, dict) and isinstance(entry.get("identity"), str):
                return entry["identity"]
    return ""


def read_points(path: Path) -> list[Point]:
    """Returns the points of a metrics.jsonl. Warns of damaged lines, except for an unfinished last line. Raises
    ResourceError for a file that cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise ResourceError(f"{path}: {error.strerror}; make it readable") from None
    records = [parse_record(line) for line in lines]
    damaged = [line for line, record in zip(lines[:-1], records, strict=False) if line.strip() and record is None]
    if damaged:
        note("warning", f"{path}: {len(damaged)} damaged lines ignored")
    return [point_of(record) for record in in_order(record for record in records if record is not None)]


def in_order(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns records by rising steps. A record removes the records before it whose step is later, which a crash has
    left in the file, and is merged with a record of the same step."""
    ordered: list[dict[str, Any]] = []
    for record in records:
        while ordered and ordered[-1]["step"] > record["step"]:
            ordered.pop()
        if ordered and ordered[-1]["step"] == record["step"]:
            record = ordered.pop() | record
        ordered.append(record)
    return ordered


def point_of(record: dict[str, Any]) -> Point:
    """Returns the point of a record. Step 0 is at 0 seconds: its evaluation has no time in files of older versions."""
    seconds = 0.0 if record["step"] == 0 else finite(record.get("train_seconds"))
    tokens, *losses = (finite(record.get(name)) for name in ("tokens", "loss", "val_loss", "val_bpb"))
    return Point(record["step"], tokens, seconds, *losses)


def finite(value: Any) -> Any:
    """Returns a value from JSON if it is a finite number, else None. JSON may hold NaN and integers beyond the range of
    floats."""
    return value if type(value) in (int, float) and abs(value) <= sys.float_info.max else None


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns the settings in a run's config.toml; {} if there is no such file, or, with a warning, if it cannot be
    read."""
    path = folder / "config.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:  # errors of TOML and of the encoding are ValueErrors
        note("warning", f"{path}: settings not compared: {error}")
        return {}
