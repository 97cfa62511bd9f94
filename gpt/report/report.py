"""report.md: what went into a run, whether it worked, and how to use the model."""

import math
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt.checkpoint.read import STATE, read_manifest
from gpt.config import to_toml
from gpt.errors import Error, InputError, note, printable
from gpt.files import read_json, step_folders, write_durably
from gpt.model import ModelConfig, count_parameters
from gpt.report.metrics import History, Point, read_histories
from gpt.report.plot import PICTURE

REPORT = "report.md"
MOST_ROWS = 12  # of the table of losses


@dataclass(frozen=True)
class Answer:
    """A held-out prompt, what the data say after it, and what models write there."""

    prompt: str
    expected: str
    texts: dict[str, str]
    """name of a model, such as "before" and "after" -> its text"""


def write_report(run: Path, ask: Callable[[], list[Answer]], chat: bool) -> None:
    """Writes the report of a run folder into it, with the answers that `ask()` returns. If that fails, warns: the
    checkpoints are saved already."""
    try:
        write_durably(run / REPORT, report(run, ask(), chat))
    except (Error, OSError, torch.OutOfMemoryError) as error:
        note("warning", f"{run / REPORT} was not written: {error}")
    else:
        note("info", f"report: {run / REPORT}")


def report(run: Path, answers: list[Answer], chat: bool = False) -> str:
    """Returns the report of a run folder, in Markdown. `chat`: the model has learned from messages. Raises InputError
    if the run has no checkpoint with its trainer state or no metrics, IntegrityError if these are damaged."""
    folders = step_folders(run)
    state = read_json(folders[0] / STATE) if folders else None
    if state is None:
        raise InputError(f"{run}: no checkpoint that can be resumed; train first")
    [history] = read_histories([run])
    parts = [
        f"# {heading(run.resolve().name)}",
        summary(state, read_manifest(folders[0])["tokenizer"]),
        *whether_it_worked(history, state, (run / PICTURE).exists()),
        *(["## The same prompts", ABOUT_ANSWERS, *map(answer_text, answers)] if answers else []),
        "## What went in",
        bullets(inputs(state, read_manifest(folders[0]))),
        f"<details><summary>All settings</summary>\n\n{fenced(to_toml(state['config']), 'toml')}\n\n</details>",
        "## How to use it",
        fenced(use_lines(run, chat), "sh"),
    ]
    return "\n\n".join(parts) + "\n"


def heading(name: str) -> str:
    """Returns a name as the text of a heading: one line, without signs that Markdown takes for its own."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", printable(name, keep=""))


def summary(state: dict[str, Any], tokenizer: dict[str, Any]) -> str:
    """Returns what the model is, in one sentence."""
    config, base = state["config"], state["base"]
    model = ModelConfig(**{name: config[name] for name in ("n_layer", "n_head", "n_embd", "block_size")})
    size = f"{count_parameters(model, tokenizer['vocab_size']):,} parameters"
    shape = (
        f"{model.n_layer} layers of width {model.n_embd}, {model.n_head} heads, a context of {model.block_size} tokens"
    )
    origin = f"fine-tuned from `{printable(base['init'], keep='')}`" if base else "trained from scratch"
    return f"A GPT-2 with {size} ({shape}), {origin}."


# ---- whether it worked


def whether_it_worked(history: History, state: dict[str, Any], has_picture: bool) -> list[str]:
    """Returns the part of the report with the losses: the verdict, before and after, the curve."""
    evaluations, best = history.evaluations(), history.best()
    first = evaluations[0] if evaluations and evaluations[0].step == 0 else None
    parts = ["## Did it work?", verdict(first, best)]
    if best:
        parts.append(before_and_after(first, best, state["progress"]["step"]))
    if has_picture:
        parts.append(f"![training and validation loss]({PICTURE})")
    if len(evaluations) > 2:
        parts.append(curve(history))
    return parts


def verdict(first: Point | None, best: Point | None) -> str:
    """Returns in words what the evaluations before the first step, if there was one, and at the best step say."""
    if best is None or best.val_loss is None:
        return "Nobody knows: there is no validation set. `data/prepare.py --val_fraction 0.05` keeps some text back."
    now = f"as if among {count(best)} equally likely ones"
    if first is None or first.val_loss is None:
        return f"On text that it never learned from, the model chooses each token {now}."
    if best.val_loss < first.val_loss:
        return (
            f"Yes: on text that it never learned from, the loss fell from {first.val_loss:.4f} to {best.val_loss:.4f} "
            f"nats per token. The model now chooses each token {now}; before, it was among {count(first)}."
        )
    return (
        f"No: on text that it never learned from, the loss did not fall ({first.val_loss:.4f} before, "
        f"{best.val_loss:.4f} at its best). A lower `--lr` may help, or more text, or text that is closer to what the "
        "base has learned."
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


ABOUT_ANSWERS = (
    "Beginnings of validation texts, from which nothing was learned, each continued greedily: always by the likeliest "
    "token."
)


def answer_text(answer: Answer) -> str:
    """Returns a prompt with all that follows it."""
    texts = {"the prompt": answer.prompt, **answer.texts, "in the data": answer.expected}
    return "\n\n".join(f"**{name}**\n\n{fenced(text)}" for name, text in texts.items())


# ---- what went in, and how to use what came out


def inputs(state: dict[str, Any], manifest: dict[str, Any]) -> dict[str, str]:
    """Returns what went into a run: name -> text."""
    config, runtime, progress, base = (state[name] for name in ("config", "runtime", "progress", "base"))
    tokens = {split: sum(entry[1] for entry in entries) for split, entries in shards_of(manifest["dataset"]).items()}
    sizes = [f"{tokens['train']:,} tokens to learn from"]
    sizes += [f"{tokens['val']:,} to validate on"] if tokens.get("val") else []
    seconds = progress["train_seconds"]
    machines = f", {runtime['world_size']} processes" if runtime["world_size"] > 1 else ""
    return {
        "data": f"`{printable(config['data'], keep='')}`: {', '.join(sizes)}",
        "tokenizer": "{name}, {vocab_size:,} ids".format_map(manifest["tokenizer"]),
        **({"base": f"`{printable(base['init'], keep='')}` (sha256 {base['sha256'][:16]}…)"} if base else {}),
        "length": f"{progress['step']:,} steps, {progress['tokens']:,} tokens, {duration(seconds)} of training",
        "learning rate": f"{config['lr']:g} ({config['optimizer']}), {config['global_batch_size']} sequences per step",
        "machine": f"{runtime['device']}, {runtime['precision']}, torch {runtime['torch']}{machines}",
    }


def shards_of(dataset: dict[str, list[list[Any]]]) -> dict[str, list[list[Any]]]:
    """Returns split -> its shards, without the masks that lie beside them."""
    return {split: [entry for entry in entries if not entry[0].endswith(".mask")] for split, entries in dataset.items()}


def use_lines(run: Path, chat: bool) -> str:
    """Returns the commands that use the model of a run, for pasting."""
    folder, best = (shlex.quote(os.path.normpath(path)) for path in (run, run / "best"))
    name = shlex.quote(f"YOUR_NAME/{run.resolve().name}")
    lines = [f'python sample.py {folder} --prompt "Once upon a time"']
    lines += [f"python sample.py {folder} --chat"] if chat else []
    return "\n".join([*lines, f"hf upload {name} {best} --exclude 'training/*'  # to the Hugging Face hub"])


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
