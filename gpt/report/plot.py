"""Draw the losses of runs, and compare them:  python -m gpt.plot out/demo out/mine

RUN is a folder that train.py has written. The picture shows its training and validation loss. The table shows the last
and the best validation loss, and the training time and tokens at the first evaluation that reached a given loss. Of
several runs it also lists the settings that differ; if their tokenizers differ, it compares bits per byte. The picture
of one run is RUN/loss.png, as during training."""

import contextlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gpt.config import make_config, parse_flags, positional, refuse, toml_value
from gpt.errors import InputError, ResourceError, note, printable, say
from gpt.files import is_folder, write_durably
from gpt.report.metrics import BITS, History, Point, common_loss, comparable, differing, read_histories

PICTURE = "loss.png"
INSTALL = 'pip install -c constraints.txt -e ".[plot]" brings matplotlib'
FORMATS = (".png", ".svg", ".pdf")
AXES = {"step": "training steps", "tokens": "training tokens", "seconds": "seconds of training"}


@dataclass(frozen=True)
class PlotConfig:
    runs: tuple[str, ...] = positional("RUN…", default=())
    """run folders"""
    out: str = ""
    """file for the picture: .png, .svg or .pdf (default: RUN/loss.png of one run, loss.png here of several)"""
    x: Literal["auto", "step", "tokens", "seconds"] = "auto"
    """what the losses are drawn against; seconds are of training alone, without evaluation and saving; auto: step for
    one run, tokens for several"""
    loss: float = 0.0
    """the validation loss to which time and tokens are counted, in the unit of the table; 0 = the lowest that all runs
    have reached"""

    def __post_init__(self) -> None:
        problems = []
        if not self.runs:
            problems.append("no run is given; name the folder of one or more, such as out/demo")
        if self.out and Path(self.out).suffix.lower() not in FORMATS:
            problems.append(f"out {self.out!r} must end in {', '.join(FORMATS)}")
        if self.loss < 0:
            problems.append(f"loss {self.loss} must be 0 or more")
        refuse(problems)


def main() -> None:
    config = make_config(PlotConfig, parse_flags(PlotConfig, sys.argv[1:], __doc__))
    is_one = len(config.runs) == 1
    out = Path(config.out or (Path(config.runs[0]) / PICTURE if is_one else PICTURE))
    axis = config.x if config.x != "auto" else "step" if is_one else "tokens"
    histories = comparable(read_histories(config.runs))
    check_drawable(histories, axis)
    if is_folder(out) or not is_folder(out.parent):
        raise InputError(f"{out}: must be a file in an existing folder; give another --out")
    loss = config.loss or common_loss(histories)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    with contextlib.suppress(BrokenPipeError):  # the picture is drawn whoever reads the table
        say(printable("\n".join(table(histories, loss))))
    content = draw(histories, axis, loss, out.suffix[1:].lower())
    try:
        write_durably(out, content)
    except OSError as error:
        raise ResourceError(f"{out}: {error.strerror}; free some space or give another --out") from None
    note("info", f"drawn: {out}")


class RunPicture:
    """Draws loss.png of a run during training, once per call. Warns of the first drawing that fails. If matplotlib is
    missing, says so once and draws nothing."""

    def __init__(self, folder: Path):
        self.folder, self.has_failed = folder, False
        self.can_draw = importlib.util.find_spec("matplotlib") is not None
        if not self.can_draw:
            note("info", f"no {PICTURE} is drawn: {INSTALL}")

    def __call__(self) -> None:
        if not self.can_draw:
            return
        try:
            histories = read_histories([self.folder])
            check_drawable(histories, "step")
            write_durably(self.folder / PICTURE, draw(histories, "step", None, "png"))
        except Exception as error:  # whatever matplotlib raises, training continues
            if not self.has_failed:
                note("warning", f"{PICTURE} was not drawn: {getattr(error, 'strerror', None) or error}")
            self.has_failed = True


def check_drawable(histories: list[History], axis: str) -> None:
    """Warns of each run that has no losses to draw against `axis`. Raises InputError if no run has losses."""
    empty = [history.name for history in histories if not losses_of(history, axis)]
    if len(empty) == len(histories):
        raise InputError(f"no losses by {axis} yet: {', '.join(empty)}; train for longer or choose another --x")
    for name in empty:
        note("warning", f"{name}: no losses by {axis} yet")


def losses_of(history: History, axis: str) -> list[tuple[float, float]]:
    """Returns (place on `axis`, loss) of all training and validation losses of a run."""
    return history.curve("loss", axis) + history.curve("val_loss", axis)


# ---- the table


def table(histories: list[History], loss: float | None) -> list[str]:
    """Returns tables as lines of text: the results of each run, the seconds and tokens that it needed to reach `loss`
    unless that is None, and, if there are several runs, the settings that differ. Each table is narrow enough for a
    terminal."""
    measure = "val_bpb" if histories[0].unit == BITS else "val_loss"
    heading = ["run", "steps", "tokens", "seconds", measure, "best", "at step"]
    lines = aligned([heading, *map(results, histories)])
    if loss is not None:
        reached = [[run.name, *cells([run.first_at(loss)], seconds=",.1f", tokens=",")] for run in histories]
        lines += ["", *aligned([[f"to {measure} {loss:.4f}", "seconds", "tokens"], *reached])]
    if len(histories) == 1:
        return lines
    differences = [
        [name, *("-" if value is None else toml_value(value) for value in values)]
        for name, values in differing(histories).items()
    ]
    names = [history.name for history in histories]
    return [*lines, "", *(aligned([["setting", *names], *differences]) if differences else ["no setting differs"])]


def results(history: History) -> list[str]:
    """Returns the cells of a run."""
    return [
        history.name,
        *cells(history.points[-1:], step=",", tokens=",", seconds=",.1f"),
        *cells(history.evaluations()[-1:], val_loss=".4f"),
        *cells([history.best()], val_loss=".4f", step=","),
    ]


def cells(point: Sequence[Point | None], **formats: str) -> list[str]:
    """Returns a text for each field of a Point that `formats` names, in its format. `point` holds one Point, or None,
    or nothing; the text is "-" if the Point or the number is missing."""
    values = [getattr(point[0] if point else None, name, None) for name in formats]
    return ["-" if value is None else format(value, form) for value, form in zip(values, formats.values(), strict=True)]


def aligned(rows: list[list[str]]) -> list[str]:
    """Returns rows of cells as lines of text; the first column is aligned to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


# ---- the picture


def draw(histories: list[History], axis: str, loss: float | None, form: str) -> bytes:
    """Returns the picture as a file of format `form`: png, svg or pdf. For several runs, draws a line at `loss`, unless
    that is None. Raises InputError if matplotlib is missing."""
    try:
        import matplotlib.style
        from matplotlib.figure import Figure  # not pyplot, which looks for a screen
        from matplotlib.ticker import EngFormatter
    except ImportError as error:
        raise InputError(f"no picture: {error}; {INSTALL}") from None
    content = io.BytesIO()
    # Without the user's own style. A "$" in a name must not begin a formula.
    with matplotlib.style.context({"text.parse_math": False}, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel=AXES[axis], ylabel=f"loss, {histories[0].unit}")
        axes.grid(alpha=0.3)
        if axis == "tokens":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        draw_runs(axes, histories, axis)
        if loss is not None and len(histories) > 1:
            axes.axhline(loss, color="gray", linestyle=":", label=f"{loss:.4f}")
        axes.legend()
        axes.set_ylim(top=top_of_view(histories, axis))
        figure.savefig(content, format=form, dpi=110)
    return content.getvalue()


def draw_runs(axes: Any, histories: list[History], axis: str) -> None:
    """Draws training and validation loss. Of several runs, each has one colour and its name as label; of a single run,
    each loss has a colour."""
    is_one = len(histories) == 1
    axes.set_title(legible(histories[0].name) if is_one else "validation (marked) and training")
    for place, history in enumerate(histories):
        training, validation = history.curve("loss", axis), history.curve("val_loss", axis)
        label, best = legible(history.name), history.best()
        if is_one:
            label = f"validation, best {best.val_loss:.4f} at step {best.step:,}" if best else "validation"
        draw_training(axes, training, f"C{place}", "training" if is_one else None if validation else label)
        draw_validation(axes, validation, "C1" if is_one else f"C{place}", "os^vD"[place // 10 % 5], label)


def draw_training(axes: Any, curve: list[tuple[float, float]], color: str, label: str | None) -> None:
    """Draws a training loss. If there are many points, draws them in a pale colour and their running mean in front."""
    if not curve:
        return
    places, losses = np.array(curve).T
    width = len(curve) // 40
    if width > 1:
        axes.plot(places, losses, color=color, linewidth=1, alpha=0.25)
        losses = np.convolve(losses, np.full(width, 1 / width), "valid")
        places = places[(width - 1) // 2 :][: len(losses)]
    axes.plot(places, losses, color=color, linewidth=1, alpha=0.7, label=label, marker="." if len(curve) == 1 else "")


def draw_validation(axes: Any, curve: list[tuple[float, float]], color: str, marker: str, label: str) -> None:
    """Draws a validation loss with a mark at each evaluation."""
    if curve:
        size = 4 if len(curve) <= 60 else 2
        axes.plot(*np.array(curve).T, color=color, marker=marker, markersize=size, zorder=3, label=label)


def top_of_view(histories: list[History], axis: str) -> float | None:
    """Returns the upper limit of the loss axis, a little above the losses, or None if all are equal. Ignores the first
    twentieth of each run of 40 points or more: the fall there would leave little height for the rest."""
    losses: list[float] = []
    for history in histories:
        curve = losses_of(history, axis)
        start = max(place for place, _ in curve) / 20 if len(curve) >= 40 else 0
        losses += [loss for place, loss in curve if place >= start]
    margin = 0.05 * (max(losses) - min(losses))
    return max(losses) + margin if margin else None


def legible(name: str) -> str:
    """Returns a name as a label for matplotlib, which leaves out labels that begin with "_", so "./" goes before
    these."""
    return f"./{printable(name)}" if name.startswith("_") else printable(name)
