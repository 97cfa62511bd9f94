"""Draw the losses of runs, and compare them:  python -m gpt.plot out/demo out/mine

RUN is a folder that train.py has written. The picture has its training and its validation loss, the table the final and
the best validation loss, and the training time and tokens at the first evaluation that reached a given loss; with
several runs there follow the settings in which they differ. Of one run the picture is RUN/loss.png, which training
draws, too."""

import importlib.util
import io
import itertools
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt.config import make_config, parse_flags, positional, refuse, toml_value
from gpt.errors import Error, InputError, ResourceError, note, printable, run_main, say
from gpt.files import is_folder, write_durably
from gpt.report.metrics import differing, loss_of_all, read_histories

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
    """the validation loss to which time and tokens are counted; 0 = the worst of the runs' best ones, which all reach
    """

    def __post_init__(self):
        problems = []
        if not self.runs:
            problems.append("no run is given; name the folder of one or more, such as out/demo")
        if self.out and Path(self.out).suffix.lower() not in FORMATS:
            problems.append(f"out {self.out!r} must end in {', '.join(FORMATS)}")
        if self.loss < 0:
            problems.append(f"loss {self.loss} must be 0 or more")
        refuse(problems)


def main():
    config = make_config(PlotConfig, parse_flags(PlotConfig, sys.argv[1:], __doc__, "python -m gpt.plot"))
    out = Path(config.out or (Path(config.runs[0]) / PICTURE if len(config.runs) == 1 else PICTURE))
    histories = read_histories(config.runs)
    axis = config.x if config.x != "auto" else "step" if len(histories) == 1 else "tokens"
    check_drawable(histories, axis)
    check_destination(out)
    loss = config.loss or loss_of_all(histories)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    say(printable("\n".join(report(histories, loss))))
    content = draw(histories, axis, loss, out.suffix[1:].lower())
    try:
        write_durably(out, content)
    except OSError as error:
        raise ResourceError(f"{out}: {error.strerror}; free some space or give another --out") from None
    note("info", f"drawn: {out}")


class RunPicture:
    """Draws the loss.png of a run under way. A drawing that fails is one warning; without matplotlib nothing is drawn,
    and a note says so at the start."""

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
        except (Error, OSError, ValueError, RuntimeError, ImportError) as error:  # of matplotlib, too
            if not self.has_failed:
                note("warning", f"{PICTURE} was not drawn: {getattr(error, 'strerror', None) or error}")
            self.has_failed = True


def check_drawable(histories, axis):
    """Raise InputError if no run has a loss to be drawn against `axis`; warn of each that has none."""
    empty = [h for h in histories if not any(h.curve(measured, axis)[0] for measured in ("loss", "val_loss"))]
    if len(empty) == len(histories):
        names = ", ".join(history.name for history in histories)
        raise InputError(f"no losses by {axis} yet: {names}; train for longer or choose another --x")
    for history in empty:
        note("warning", f"{history.name}: no losses by {axis} yet")


def check_destination(out):
    if is_folder(out):
        raise InputError(f"{out}: a folder; give a file to --out")
    if not is_folder(out.parent):
        raise InputError(f"{out}: there is no folder {out.parent}; make it or give another --out")


# ---- the table


def report(histories, loss):
    """Lines of text: what the runs reached, and, if they are several, in which settings they differ."""
    lines = aligned(results(histories, loss))
    if len(histories) == 1:
        return lines
    settings = [[name, *map(shown, values)] for name, values in differing(histories).items()]
    if not settings:
        return [*lines, "", "no setting differs"]
    return [*lines, "", *aligned([["setting", *(history.name for history in histories)], *settings])]


def results(histories, loss):
    """Rows of cells, the first with the names of the columns; loss None leaves out what is counted to it."""
    heading = ["run", "steps", "tokens", "seconds", "val_loss", "best", "at step"]
    goal = f"to {loss:.4f}" if loss is not None else ""
    rows = [[*heading, f"seconds {goal}", f"tokens {goal}"] if goal else heading]
    for history in histories:
        last, best, evaluations = history.points[-1:], history.best(), history.evaluations()
        cells = [[f"{p.step:,}", counted(p.tokens), timed(p.seconds)] for p in last] or [["-"] * 3]
        row = [history.name, *cells[0], f"{evaluations[-1].val_loss:.4f}" if evaluations else "-"]
        row += [f"{best.val_loss:.4f}", f"{best.step:,}"] if best else ["-", "-"]
        if goal:
            reached = history.first_at(loss)
            row += [timed(reached.seconds), counted(reached.tokens)] if reached else ["-", "-"]
        rows.append(row)
    return rows


def counted(number):
    return "-" if number is None else f"{number:,}"


def timed(seconds):
    return "-" if seconds is None else f"{seconds:,.1f}"


def shown(value):
    return "-" if value is None else toml_value(value)


def aligned(rows):
    """Rows of cells as lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


# ---- the picture


def draw(histories, axis, loss, form):
    """The bytes of the picture, `form` being "png", "svg" or "pdf". Raises InputError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # not pyplot, which would look for a screen
        from matplotlib.ticker import EngFormatter
    except ImportError as error:
        raise InputError(f"no picture: {error}; {INSTALL}") from None
    content = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel=AXES[axis], ylabel="loss, nats per token")
        axes.grid(alpha=0.3)
        if axis == "tokens":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if len(histories) == 1:
            draw_one(axes, histories[0], axis)
        else:
            draw_several(axes, histories, axis, loss)
        axes.set_ylim(top=top_of_view(histories, axis))
        figure.savefig(content, format=form, dpi=110)
    return content.getvalue()


def draw_one(axes, history, axis):
    """Both losses of a run, in a colour each."""
    best = history.best()
    label = f"validation, best {best.val_loss:.4f} at step {best.step:,}" if best else "validation"
    training, validation = draw_curves(axes, history, axis, "C0", "C1")
    named = [(training, "training"), (validation, label)]
    axes.legend(*zip(*[(line, text) for line, text in named if line], strict=True))
    axes.set_title(label_of(history.name))


def draw_several(axes, histories, axis, loss):
    """Both losses of each run in its colour, and the loss to which time and tokens are counted."""
    named = []
    for place, history in enumerate(histories):
        training, validation = draw_curves(axes, history, axis, f"C{place}", f"C{place}", "os^vD"[place // 10 % 5])
        named += [(validation or training, label_of(history.name))] if validation or training else []
    if loss is not None:
        named.append((axes.axhline(loss, color="gray", linestyle=":"), f"{loss:.4f}"))
    axes.legend(*zip(*named, strict=True))
    axes.set_title("validation (marked) and training")


def draw_curves(axes, history, axis, color, validation_color, marker="o"):
    """Draw a run's training loss, behind its running mean if there are many points, and its validation loss. Returns
    the line to name of each, None for one that the run lacks."""
    lines = [None, None]
    places, losses = history.curve("loss", axis)
    width = len(places) // 40
    if places:
        alone = {"marker": "."} if len(places) == 1 else {}
        [lines[0]] = axes.plot(places, losses, color=color, linewidth=1, alpha=0.25 if width > 1 else 0.6, **alone)
    if width > 1:
        [lines[0]] = axes.plot(*running_mean(places, losses, width), color=color, linewidth=1, alpha=0.7)
    places, losses = history.curve("val_loss", axis)
    if places:
        size = 4 if len(places) <= 60 else 2
        [lines[1]] = axes.plot(places, losses, color=validation_color, marker=marker, markersize=size, zorder=3)
    return lines


def running_mean(places, values, width):
    """The means of `width` neighbours, each at the place of the one in their middle."""
    total = [0.0, *itertools.accumulate(values)]
    means = [(after - before) / width for before, after in zip(total, total[width:], strict=False)]
    return places[(width - 1) // 2 :][: len(means)], means


def top_of_view(histories, axis):
    """Where the picture ends: a little above the losses after the first twentieth of each run of some length, because
    the height from which all runs fall would press the rest flat."""
    seen = []
    for history in histories:
        curves = [zip(*history.curve(measured, axis), strict=True) for measured in ("loss", "val_loss")]
        points = [point for curve in curves for point in curve]
        end = max((place for place, _ in points), default=0) if len(points) >= 40 else 0
        seen += [loss for place, loss in points if place >= end / 20]
    margin = 0.05 * (max(seen) - min(seen))
    return max(seen) + margin if margin else None


def label_of(name):
    """A name as matplotlib is to show it, which takes "$" for a formula and leaves out names that begin with "_"."""
    name = printable(name).replace("$", r"\$")
    return f"./{name}" if name.startswith("_") else name


if __name__ == "__main__":
    run_main(main)
