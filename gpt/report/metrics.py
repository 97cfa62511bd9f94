"""What a run has written about itself, read back: its losses step by step, what it reached when, its settings."""

import bisect
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

from gpt.errors import InputError, ResourceError, note
from gpt.files import is_folder
from gpt.train.metrics_file import METRICS, record_of

CONFIG = "config.toml"


@dataclass(frozen=True)
class Point:
    """One line of a run's metrics: where it stands and what was measured there; None for what it does not have."""

    step: int
    tokens: float | None
    seconds: float | None  # of training: evaluation and saving not counted
    loss: float | None  # nats per token
    val_loss: float | None


@dataclass(frozen=True)
class History:
    """A run: a name to show, its points in the order of the steps, its settings (none if they cannot be read)."""

    name: str
    points: list[Point]
    settings: dict

    def curve(self, measured, axis):
        """(places, values) of the points that have both: `measured` is "loss" or "val_loss", `axis` "step", "tokens"
        or "seconds"."""
        pairs = [(getattr(point, axis), getattr(point, measured)) for point in self.points]
        pairs = [pair for pair in pairs if None not in pair]
        return [place for place, _ in pairs], [value for _, value in pairs]

    def evaluations(self):
        return [point for point in self.points if point.val_loss is not None]

    def best(self):
        """The first point of the lowest validation loss, or None. As in training, the one before the first step is no
        candidate."""
        return min((p for p in self.evaluations() if p.step > 0), key=lambda p: p.val_loss, default=None)

    def first_at(self, loss):
        """The first evaluation whose loss is at most `loss`, or None."""
        return next((point for point in self.evaluations() if point.val_loss <= loss), None)


def loss_of_all(histories):
    """The lowest validation loss that every run with any has reached: the worst of their best ones, or None."""
    bests = [best.val_loss for history in histories if (best := history.best())]
    return max(bests, default=None)


def differing(histories):
    """Setting -> its value in each run, for those in which they differ; None where a run lacks it. The run folder,
    which always does, is left out, and so are runs without settings."""
    known = [history.settings for history in histories if history.settings]
    names = dict.fromkeys(name for settings in known for name in settings)
    return {
        name: [history.settings.get(name) for history in histories]
        for name in names
        if name != "out" and any(settings.get(name) != known[0].get(name) for settings in known)
    }


# ---- reading


def read_histories(folders):
    """The History of each run folder; one that shares its last name with another is shown by its whole path."""
    folders = [Path(folder) for folder in folders]
    for folder in folders:
        if not is_folder(folder):
            raise InputError(f"{folder}: no such folder; give the folder of a run, such as out/demo")
    names = [folder.resolve().name for folder in folders]
    shown = [str(folder) if names.count(name) > 1 else name for folder, name in zip(folders, names, strict=True)]
    return [
        History(name, read_points(folder / METRICS), read_settings(folder / CONFIG))
        for folder, name in zip(folders, shown, strict=True)
    ]


def read_points(path):
    """The points of a metrics.jsonl. Damaged lines are passed over with a warning, an unfinished last one without.
    Raises InputError if there is no such file, ResourceError if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the folder of a run, such as out/demo") from None
    except OSError as error:
        raise ResourceError(f"{path}: {error.strerror}; make it readable") from None
    records = [record_of(line) for line in lines]
    damaged = [line for line, record in zip(lines[:-1], records, strict=False) if record is None and line.strip()]
    if damaged:
        note("warning", f"{path}: damaged lines passed over: {len(damaged)}")
    return points_of(in_order(record for record in records if record is not None))


def in_order(records):
    """The records by rising steps. Where they fall back, as in a file that a crash left uncut, what was written later
    holds; two of one step are one."""
    kept = []
    for record in records:
        while kept and kept[-1]["step"] > record["step"]:
            kept.pop()
        if kept and kept[-1]["step"] == record["step"]:
            record = kept.pop() | record
        kept.append(record)
    return kept


def points_of(records):
    """The points of records in order. One without a time of its own has it from its neighbours, in proportion."""
    times = {0: 0.0} | {r["step"]: r["train_seconds"] for r in records if is_finite(r.get("train_seconds"))}
    steps, seconds = list(times), list(times.values())
    return [
        Point(
            record["step"],
            finite_of(record, "tokens"),
            time_at(record["step"], steps, seconds),
            finite_of(record, "loss"),
            finite_of(record, "val_loss"),
        )
        for record in records
    ]


def time_at(step, steps, seconds):
    """The time of a step, from the rising `steps` that have one, 0 being the first; None if it is the only one."""
    if step > steps[-1]:
        return seconds[-1] * step / steps[-1] if steps[-1] else None
    place = bisect.bisect_left(steps, step)
    if steps[place] == step:
        return seconds[place]
    share = (step - steps[place - 1]) / (steps[place] - steps[place - 1])
    return seconds[place - 1] + share * (seconds[place] - seconds[place - 1])


def finite_of(record, name):
    return record[name] if is_finite(record.get(name)) else None


def is_finite(value):
    """Whether a value from JSON, which may hold NaN and integers beyond all floats, is a finite number."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def read_settings(path):
    """The settings in a run's config.toml; none, with a warning, if it cannot be read, and without one if there is no
    such file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:  # tomllib's own error and that of the encoding are ValueErrors
        note("warning", f"{path}: settings not compared: {error}")
        return {}
