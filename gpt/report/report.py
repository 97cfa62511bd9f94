"""report.md: what went into a run, whether it worked, and how to use the model."""

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt.checkpoint.read import STATE
from gpt.config import to_toml
from gpt.device import is_out_of_memory
from gpt.errors import Error, InputError, note, printable
from gpt.files import read_json, read_pointer, step_folders, write_durably
from gpt.model import ModelConfig, total_parameters
from gpt.report.metrics import History, Point, read_histories
from gpt.report.plot import PICTURE
from gpt.text.corpus import Corpus
from gpt.train.log import pasted, sample_command

REPORT = "report.md"
MOST_ROWS = 12  # of the table of losses
ABOUT_ANSWERS = "Beginnings of texts kept back from this run, each continued greedily: always by the likeliest token."


@contextlib.contextmanager
def report_errors(run: Path) -> Iterator[None]:
    """Turns what ends the writing of a report into a warning: the run is complete, and its checkpoints are saved."""
    note("info", f"report: {run / REPORT} (Ctrl-C skips it)")
    try:
        yield
    except (Error, OSError, RuntimeError, MemoryError, KeyboardInterrupt) as error:
        foreseen = isinstance(error, (Error, OSError, KeyboardInterrupt)) or is_out_of_memory(error)
        if not foreseen:
            raise
        why = str(error).partition("\n")[0] or "interrupted"
        note("warning", f"{run / REPORT} was not written: {why}; the same command writes it")


def write_report(run: Path, answers: dict[str, list[str]], corpus: Corpus) -> None:
    """Writes the report of a run folder into it. `answers` holds the texts of every held-out prompt: name of a column,
    such as "before", -> its texts; {} if there are none. `corpus` are the data. Raises InputError if the run has no
    checkpoint with its trainer state or no metrics, IntegrityError if these are damaged, OSError if writing fails."""
    folders = step_folders(run)
    state = read_json(folders[0] / STATE) if folders else None
    if state is None:
        raise InputError(f"{run}: no checkpoint that can be resumed")
    [history] = read_histories([run])
    sections = {
        "Did it work?": whether_it_worked(history, state, corpus.has_validation(), (run / PICTURE).exists()),
        "The same prompts": [ABOUT_ANSWERS, *prompt_texts(answers)] if answers else [],
        "What went in": [bullets(inputs(state, corpus)), settings(state["config"])],
        "How to use it": [fenced(use_lines(run, answers, corpus), "sh")],
    }
    parts = [f"# {heading(run.resolve().name)}", summary(state, corpus.tokenizer.vocab_size)]
    for title, texts in sections.items():
        parts += [f"## {title}", *texts] if texts else []
    write_durably(run / REPORT, "\n\n".join(parts) + "\n")


def heading(name: str) -> str:
    """Returns a name as the text of a heading: one line, without signs that Markdown takes for its own."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", printable(name, keep=""))


def summary(state: dict[str, Any], vocab_size: int) -> str:
    """Returns what the model is, in one sentence."""
    config, base = state["config"], state["base"]
    model = ModelConfig(**{name: config[name] for name in ("n_layer", "n_head", "n_embd", "block_size")})
    size = f"{total_parameters(model, vocab_size):,} parameters"
    shape = (
        f"{model.n_layer} layers of width {model.n_embd}, {model.n_head} heads, a context of {model.block_size} tokens"
    )
    origin = f"fine-tuned from `{printable(base['init'], keep='')}`" if base else "trained from scratch"
    return f"A GPT-2 with {size} ({shape}), {origin}."


# ---- whether it worked


def whether_it_worked(history: History, state: dict[str, Any], is_validated: bool, has_picture: bool) -> list[str]:
    """Returns the part of the report with the losses: the verdict, before and after, the curve."""
    evaluations, best = history.evaluations(), history.best()
    first = evaluations[0] if evaluations and evaluations[0].step == 0 else None
    parts = [verdict(first, best, is_validated)]
    if best:
        parts.append(before_and_after(first, best, state["progress"]["step"]))
    if has_picture:
        parts.append(f"![training and validation loss]({PICTURE})")
    if len(evaluations) > 2:
        parts.append(curve(history))
    return parts


def verdict(first: Point | None, best: Point | None, is_validated: bool) -> str:
    """Returns in words what the evaluations before the first step, if there was one, and at the best step say."""
    if not is_validated:
        return "Nobody knows: there is no validation set. `data/prepare.py --val_fraction 0.05` keeps some text back."
    if best is None or best.val_loss is None:
        return "No: the validation loss was never a finite number. A lower `--lr` may help."
    now = f"as if among {count(best)} equally likely ones"
    if first is None or first.val_loss is None:
        return f"On text kept back from this run, the model chooses each token {now}."
    if best.val_loss < first.val_loss:
        return (
            f"Yes: on text kept back from this run, the loss fell from {first.val_loss:.4f} to {best.val_loss:.4f} "
            f"nats per token. The model now chooses each token {now}; before, it was among {count(first)}."
        )
    return (
        f"No: on text kept back from this run, the loss did not fall ({first.val_loss:.4f} before, {best.val_loss:.4f} "
        "at its best). A lower `--lr` may help, or more text, or text that is closer to what the base has learned."
    )


def count(point: Point) -> str:
    """Returns the perplexity of an evaluation."""
    assert point.val_loss is not None
    return f"{math.exp(min(point.val_loss, 700)):,.1f}"


def before_and_after(first: Point | None, best: Point, last_step: int) -> str:
    """Returns the table of validation losses before the first step, if there is one, and at the best step."""
    where = (
        f"after {best.step:,} of {last_step:,} steps, the best"
        if best.step < last_step
        else f"after {best.step:,} steps"
    )
    columns = [("before", first)] if first else []
    columns.append((where, best))
    rows = [["on the validation text", *(name for name, _ in columns)]]
    rows += [["nats per token", *(shown(point.val_loss, ".4f") for _, point in columns)]]
    rows += [["perplexity", *(count(point) for _, point in columns)]]
    rows += [["bits per byte", *(shown(point.val_bpb, ".4f") for _, point in columns)]]
    return table(rows)


def curve(history: History) -> str:
    """Returns the table of evaluations, at most MOST_ROWS of them, evenly chosen, with the first and the last."""
    points = history.evaluations()
    if len(points) > MOST_ROWS:
        points = [points[round(i * (len(points) - 1) / (MOST_ROWS - 1))] for i in range(MOST_ROWS)]
    rows = [["step", "tokens", "seconds of training", "validation loss", "bits per byte"]]
    rows += [
        [
            f"{point.step:,}",
            shown(point.tokens, ","),
            shown(point.seconds, ",.0f"),
            shown(point.val_loss, ".4f"),
            shown(point.val_bpb, ".4f"),
        ]
        for point in points
    ]
    return table(rows)


# ---- the prompts


def prompt_texts(answers: dict[str, list[str]]) -> Iterator[str]:
    """Yields each prompt with all that follows it."""
    for texts in zip(*answers.values(), strict=True):
        named = zip(answers, texts, strict=True)
        yield "\n\n".join(f"**{name}**\n\n{fenced(text)}" for name, text in named)


# ---- what went in, and how to use what came out


def inputs(state: dict[str, Any], corpus: Corpus) -> dict[str, str]:
    """Returns what went into a run: name -> text."""
    config, runtime, progress, base = (state[name] for name in ("config", "runtime", "progress", "base"))
    processes = f", {runtime['world_size']} processes" if runtime["world_size"] > 1 else ""
    origin = {"base": f"`{printable(base['init'], keep='')}` (sha256 {base['sha256'][:16]}…)"} if base else {}
    seconds = duration(progress["train_seconds"])
    return {
        "data": f"`{printable(config['data'], keep='')}`: {corpus.description()}",
        "tokenizer": f"{printable(corpus.tokenizer.name, keep='')}, {corpus.tokenizer.vocab_size:,} ids",
        **origin,
        "length": f"{progress['step']:,} steps, {progress['tokens']:,} tokens, {seconds} of training",
        "learning rate": f"{config['lr']:g} ({config['optimizer']}), {config['global_batch_size']} sequences per step",
        "machine": f"{runtime['device']}, {runtime['precision']}, torch {runtime['torch']}{processes}",
    }


def settings(config: dict[str, Any], title: str = "All settings") -> str:
    """Returns settings of a run, folded up under a title."""
    return f"<details><summary>{title}</summary>\n\n{fenced(to_toml(config), 'toml')}\n\n</details>"


def use_lines(run: Path, answers: dict[str, list[str]], corpus: Corpus) -> str:
    """Returns the commands that use the model of a run, for pasting: a prompt of its own kind, and the upload, without
    training/ and adapter/, which name folders of this machine."""
    is_example = corpus.dataset.has_examples and not corpus.has_messages and answers
    prompt = answers["the prompt"][0] if is_example else "Once upon a time"
    sample = ["--chat"] if corpus.has_messages else ["--prompt", prompt]
    folder = read_pointer(run, "best") or step_folders(run)[0]
    export = ["python", "-m", "gpt.export", run, f"my-{run.resolve().name}"]
    upload = ["hf", "upload", f"YOUR_NAME/{run.resolve().name}", folder, "--exclude", "*/*"]
    lines = [sample_command(run, *sample), f"{pasted(export)}  # for other programs, with a model card"]
    return "\n".join([*lines, f"{pasted(upload)}  # to the Hugging Face hub"])


# ---- Markdown


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """Returns a time in words: "4 min 10 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{value:,} {unit}" for value, unit in parts if value) or "0 s"


def bullets(items: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in items.items())


def table(rows: list[list[str]]) -> str:
    """Returns rows of cells as a table; the first row is its heading, and numbers are aligned to the right."""
    heading, *others = rows
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heading, rule, *others])


def fenced(text: str, language: str = "text") -> str:
    """Returns a text as a code block. Its fence is longer than any run of backticks in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(text.rstrip())}\n{fence}"
