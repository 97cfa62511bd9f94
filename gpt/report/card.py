"""The model card: what is known of a model, in Markdown. A run's report and the README.md of an exported model share
it.

`facts_of` gathers the facts from the files of a checkpoint, `card_body` writes them; `front_matter` writes the fields
in YAML that the hub reads from the top of a README.md."""

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt import __version__
from gpt.checkpoint.adapters import base_name
from gpt.checkpoint.hub import is_hub_name
from gpt.checkpoint.read import MANIFEST, STATE
from gpt.config import to_toml
from gpt.errors import Error, printable
from gpt.files import read_json
from gpt.model import ModelConfig, count_parameters
from gpt.report.metrics import Point, read_points, read_settings
from gpt.text.foreign import ADAPTER_CONFIG
from gpt.text.shards import MANIFEST as DATASET
from gpt.text.tokenizer import Tokenizer
from gpt.train.metrics_file import METRICS

Json = dict[str, Any]
NOT_SHOWN = {  # settings of the size, which stands above; of the place and the machine; of what a run writes
    *("n_layer", "n_head", "n_embd", "block_size", "data", "out", "init", "resume", "tokenizer", "verify"),
    *("wandb", "profile", "device", "dtype", "compile", "kernels", "threads", "stop_after_minutes"),
    *("log_every", "eval_every", "save_every", "sample_every", "keep_last", "keep_every"),
}
CHAT = '[{"role": "user", "content": "Hello"}]'


@dataclass(frozen=True)
class Facts:
    """What a model card tells of a model. What is unknown is empty, or None."""

    config: ModelConfig
    tokenizer: Tokenizer
    base: str
    """hub name or path of the model that training began with; "" for none"""
    progress: Json
    """step, tokens and train_seconds of training, as state.json holds them"""
    settings: Json
    """of the run, flat name -> value"""
    runtime: Json
    """the machine, as state.json holds it"""
    data: Json
    """the manifest of the data, if they are still where the run read them"""
    shards: Json
    """split -> [name, tokens, sha256] of each shard"""
    points: list[Point]
    """the run's metrics up to this checkpoint"""

    @property
    def parameters(self) -> int:
        matrices = count_parameters(self.config, self.tokenizer.vocab_size)
        return matrices + (13 * self.config.n_layer + 2) * self.config.n_embd  # biases and layer norms


# ---- gathering


def facts_of(path: Path, config: ModelConfig, tokenizer: Tokenizer, source: str = "") -> Facts:
    """Returns the Facts of the model at `path`: a step folder of a run, or anything else that is read, for which
    `source`, the name that the user gave, is the base. Files that are missing or damaged leave facts out."""
    manifest, state = read_part(path / MANIFEST), read_part(path / STATE)
    if not manifest:
        base = base_name(path) if (path / ADAPTER_CONFIG).exists() else source
        return Facts(config, tokenizer, base, {}, {}, {}, {}, {}, [])
    run, step = path.parent, manifest["step"]
    settings = state.get("config") or read_settings(run)
    base = (state.get("base") or {}).get("init") or settings.get("init") or ""
    points = [point for point in points_of(run) if point.step <= step]
    shards = manifest.get("dataset") or {}
    progress = state.get("progress") or progress_at(points, step)
    data = data_of(settings.get("data") or "", shards)
    return Facts(config, tokenizer, base, progress, settings, state.get("runtime") or {}, data, shards, points)


def read_part(path: Path) -> Json:
    """Returns the object in a JSON file, {} if it cannot be read."""
    with contextlib.suppress(Error):
        return read_json(path) or {}
    return {}


def points_of(run: Path) -> list[Point]:
    """Returns the metrics of a run, [] if they cannot be read."""
    with contextlib.suppress(Error):
        return read_points(run / METRICS) if (run / METRICS).exists() else []
    return []


def progress_at(points: list[Point], step: int) -> Json:
    """Returns what the metrics tell of the progress at a step."""
    last = [point for point in points if point.step == step]
    known = {"tokens": last[0].tokens, "train_seconds": last[0].seconds} if last else {}
    return {"step": step} | {name: value for name, value in known.items() if value is not None}


def data_of(folder: str, shards: Json) -> Json:
    """Returns the manifest of the data in `folder`, {} unless their shards are `shards`."""
    manifest = read_part(Path(folder) / DATASET) if folder else {}
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        found = {
            split: [[entry["name"], entry["tokens"], entry["sha256"]] for entry in entries]
            for split, entries in manifest["splits"].items()
        }
        if all(found.get(split) == [entry[:3] for entry in entries] for split, entries in shards.items()):
            return manifest
    return {}


# ---- writing


def front_matter(facts: Facts, license_name: str = "") -> str:
    """Returns the lines that the hub reads from the top of a model card. Names a base model only if it is on the hub;
    an empty `license_name` becomes "unknown"."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation", f"license: {license_name or 'unknown'}"]
    if is_hub_name(facts.base) and not os.path.exists(facts.base):
        lines.append(f"base_model: {facts.base}")
    return "\n".join(["---", *lines, "tags:", "- gpt2", "- gpt-text-generator", "---", ""])


def card_body(facts: Facts, title: str) -> str:
    """Returns the model card without its front matter; `title` is the name of the model."""
    parts = [f"# {plain(title)}", summary(facts), usage(facts), data_section(facts), training(facts), results(facts)]
    return "\n\n".join(filter(None, parts)) + "\n"


def plain(text: str) -> str:
    """Returns a name as one line of Markdown without markup."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in printable(text, keep=""))


def summary(facts: Facts) -> str:
    config, tokenizer = facts.config, facts.tokenizer
    size = (
        f"A GPT-2 language model of {facts.parameters:,} parameters: {config.n_layer} layers, width {config.n_embd}, "
        f"{config.n_head} heads, a context of {config.block_size:,} tokens. Its tokenizer is {plain(tokenizer.name)}, "
        f"with {tokenizer.vocab_size:,} ids."
    )
    if facts.base:
        verb = "Fine-tuned from" if facts.progress else "Written from"
        name = facts.base if is_hub_name(facts.base) else Path(facts.base).name
        return f"{size} {verb} {plain(name)}."
    return size


def usage(facts: Facts) -> str:
    """Returns the section with the lines to paste. NAME stands for the folder, or its name on the hub."""
    asked = CHAT if facts.tokenizer.additions.chat_template else '"Once upon a time"'
    return f"""## Use

```python
from transformers import pipeline

write = pipeline("text-generation", model="NAME")
print(write({asked}, max_new_tokens=100)[0]["generated_text"])
```

NAME is this folder, or its name on the hub. What the model writes is likely, by what it has learned, and made up."""


def data_section(facts: Facts) -> str:
    """Returns the section on the training data, "" if nothing is known of them. Tells the names of files without their
    folders."""
    if not facts.shards:
        return ""
    source = facts.data.get("source") or {}
    names = [plain(Path(name).name) for name in [*source.get("inputs", []), source.get("corpus", "")] if name]
    kinds = {"prompts": "examples of prompts and completions", "messages": "conversations"}
    lines = [f"- text: {', '.join(names[:10])}{' …' if len(names) > 10 else ''}"] if names else []
    lines += [f"- kind: {kinds[source['holds']]}"] if source.get("holds") in kinds else []
    lines += [f"- {label}: {amount(facts, split)}" for split, label in (("train", "training"), ("val", "validation"))]
    return "\n".join(["## Data", "", *lines])


def amount(facts: Facts, split: str) -> str:
    """Returns the size of a split, in words."""
    tokens = sum(entry[1] for entry in facts.shards.get(split) or [])
    entries = (facts.data.get("splits") or {}).get(split) or []
    known = [(sum(entry[name] for entry in entries), name) for name in ("documents", "source_bytes") if entries]
    more = [f"{number:,} {name.replace('source_', '')}" for number, name in known if number]
    return ", ".join([f"{tokens:,} tokens", *more]) if tokens else "none"


def training(facts: Facts) -> str:
    """Returns the section on the training, "" if nothing is known of it. Leaves out settings that are off."""
    progress, runtime = facts.progress, facts.runtime
    if not progress:
        return ""
    words = [f"{progress['step']:,} steps"]
    words += [f"{progress['tokens']:,.0f} tokens"] if "tokens" in progress else []
    words += [f"{progress['train_seconds'] / 60:,.1f} minutes"] if "train_seconds" in progress else []
    if runtime:
        count = runtime.get("world_size", 1)
        words.append(f"on {runtime.get('device')}{f' × {count}' if count > 1 else ''} in {runtime.get('precision')}")
    by = f"gpt-text-generator {__version__}" + (f", torch {runtime['torch']}" if "torch" in runtime else "")
    shown = {name: value for name, value in facts.settings.items() if value and name not in NOT_SHOWN}
    lines = ["## Training", "", f"{', '.join(words)}, with {by}."]
    return "\n".join(lines + (["", "```toml", to_toml(shown).rstrip(), "```"] if shown else []))


def results(facts: Facts) -> str:
    """Returns the table of the losses on the validation data: before the first step, if it was measured, the best, and
    the last. Returns "" without any."""
    evaluations = [point for point in facts.points if point.val_loss is not None]
    if not evaluations:
        return ""
    first = [point for point in evaluations if point.step == 0]
    best = min(evaluations, key=lambda point: point.val_loss or 0.0)
    steps = {point.step: point for point in [*first, best, evaluations[-1]]}
    rows = ["| step | nats per token | perplexity | bits per byte |", "|---|---|---|---|"]
    for step, point in sorted(steps.items()):
        assert point.val_loss is not None
        bits = "" if point.val_bpb is None else f"{point.val_bpb:.4f}"
        perplexity = f"{math.exp(min(point.val_loss, 50)):,.2f}"
        rows.append(f"| {step:,} | {point.val_loss:.4f} | {perplexity} | {bits} |")
    return "\n".join(["## Results", "", "On the validation data:", "", *rows])
