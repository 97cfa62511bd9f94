"""The model card: what is known of a model, in Markdown, with the fields that the hub reads at the top of README.md.

It is a run's report without what belongs to one machine: `facts_of` gathers the facts from the files of a checkpoint,
`card_body` writes them, `front_matter` writes the fields in YAML."""

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt.checkpoint.adapters import base_name
from gpt.checkpoint.hub import is_hub_name
from gpt.checkpoint.read import MANIFEST, STATE
from gpt.errors import Error
from gpt.files import read_json
from gpt.model import ModelConfig, total_parameters
from gpt.report.metrics import History, read_histories
from gpt.report.report import bullets, duration, fenced, heading, settings, whether_it_worked
from gpt.text.foreign import ADAPTER_CONFIG
from gpt.text.shards import MANIFEST as DATASET
from gpt.text.tokenizer import Tokenizer, choices

Json = dict[str, Any]
NOT_SHOWN = {  # settings of the size, which stands above; of the place and the machine; of what a run writes
    *("n_layer", "n_head", "n_embd", "block_size", "data", "out", "init", "resume", "tokenizer", "verify"),
    *("wandb", "profile", "device", "dtype", "compile", "kernels", "threads", "stop_after_minutes"),
    *("log_every", "eval_every", "save_every", "sample_every", "keep_last", "keep_every"),
}
KINDS = {"prompts": "examples of prompts and completions", "messages": "conversations"}
MOST_NAMES = 10  # of files of the data


@dataclass(frozen=True)
class Facts:
    """What a model card tells of a model. What is unknown is empty, or None."""

    config: ModelConfig
    tokenizer: Tokenizer
    base: str
    """hub name or path of the model that training began with; "" for none"""
    manifest: Json
    """of the checkpoint"""
    state: Json
    """the content of its state.json"""
    settings: Json
    """of the run, flat name -> value"""
    data: Json
    """the manifest of the data, if they are still where the run read them"""
    history: History | None
    """the run's metrics up to this checkpoint"""


# ---- gathering


def facts_of(path: Path, config: ModelConfig, tokenizer: Tokenizer, source: str = "") -> Facts:
    """Returns the Facts of the model at `path`. A step folder tells of its run; of any other model only the base is
    known: the one that an adapter names, else `source`, the path or name that the user gave. Leaves out what stands in
    missing or damaged files."""
    manifest, state = read_part(path / MANIFEST), read_part(path / STATE)
    if not manifest:
        base = base_name(path) if (path / ADAPTER_CONFIG).exists() else source
        return Facts(config, tokenizer, base, {}, {}, {}, {}, None)
    history = history_of(path.parent, manifest["step"])
    config_of_run = state.get("config") or (history.settings if history else {})
    base = (state.get("base") or {}).get("init") or config_of_run.get("init") or ""
    data = data_of(config_of_run.get("data") or "", manifest.get("dataset") or {})
    return Facts(config, tokenizer, base, manifest, state, config_of_run, data, history)


def read_part(path: Path) -> Json:
    """Returns the object in a JSON file, {} if it cannot be read."""
    with contextlib.suppress(Error):
        return read_json(path) or {}
    return {}


def history_of(run: Path, step: int) -> History | None:
    """Returns the History of a run up to a step, None if it cannot be read."""
    with contextlib.suppress(Error):
        [history] = read_histories([run])
        return replace(history, points=[point for point in history.points if point.step <= step])
    return None


def data_of(folder: str, shards: Json) -> Json:
    """Returns the manifest of the data in `folder`, {} unless their shards are `shards`."""
    manifest = read_part(Path(folder) / DATASET) if folder else {}
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        found = {entry["sha256"] for entries in manifest["splits"].values() for entry in entries}
        if {entry[2] for entries in shards.values() for entry in entries if is_shard(entry)} == found:
            return manifest
    return {}


def is_shard(entry: list[Any]) -> bool:
    """Returns whether an entry of the manifest's dataset is a shard of tokens, and no mask."""
    return not entry[0].endswith(".mask")


# ---- writing


def front_matter(facts: Facts, license_name: str = "") -> str:
    """Returns the lines that the hub reads from the top of a model card. Names a base model only if it is on the hub;
    an empty `license_name` becomes "unknown"."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation", f"license: {license_name or 'unknown'}"]
    if is_on_hub(facts.base):
        lines.append(f"base_model: {facts.base}")
    return "\n".join(["---", *lines, "tags:", "- gpt2", "- gpt-text-generator", "---", ""])


def card_body(facts: Facts, title: str) -> str:
    """Returns the model card without its front matter; `title` is the name of the model."""
    parts = [f"# {heading(title)}", summary(facts), *usage(facts)]
    if facts.history and facts.history.evaluations():
        last = {"progress": {"step": facts.manifest["step"]}}
        parts += ["## Did it work?", *whether_it_worked(facts.history, last, is_validated=True, has_picture=False)]
    if facts.manifest:
        parts += ["## What went in", bullets(ingredients(facts))]
    shown = {name: value for name, value in facts.settings.items() if value and name not in NOT_SHOWN}
    if shown:
        parts.append(settings(shown, "Settings, without those that are 0 or off"))
    return "\n\n".join(parts) + "\n"


def summary(facts: Facts) -> str:
    """Returns what the model is."""
    config, tokenizer = facts.config, facts.tokenizer
    is_known = tokenizer.name in choices() or tokenizer.name.startswith("bpe:")  # else the name of some folder
    name = f"is {tokenizer.name}, with" if is_known else "has"
    size = (
        f"A GPT-2 language model of {total_parameters(config, tokenizer.vocab_size):,} parameters: "
        f"{config.n_layer} layers of width {config.n_embd}, {config.n_head} heads, a context of {config.block_size:,} "
        f"tokens. Its tokenizer {name} {tokenizer.vocab_size:,} ids."
    )
    verb = "Fine-tuned" if facts.manifest else "Converted"
    return f"{size} {verb} from {public_name(facts.base)}." if facts.base else size


def is_on_hub(base: str) -> bool:
    """Returns whether a base model is on the hub, by its name. A relative path that looks like a hub name is taken for
    one if its folder no longer exists."""
    return is_hub_name(base) and not os.path.exists(base)


def public_name(base: str) -> str:
    """Returns the name of a base model without the folders that lead to it."""
    return heading(base if is_on_hub(base) else Path(base).name)


def usage(facts: Facts) -> list[str]:
    """Returns the part with the lines to paste."""
    asked, written = '"Once upon a time"', ""
    if facts.tokenizer.additions.chat_template:
        asked, written = '[{"role": "user", "content": "Hello"}]', '[-1]["content"]'
    lines = [
        "from transformers import pipeline",
        "",
        'write = pipeline("text-generation", model="NAME")  # this folder, or its name on the hub',
        f'print(write({asked}, max_new_tokens=100)[0]["generated_text"]{written})',
    ]
    about = "The model continues a text with what is likely after its training. What it says may be false."
    return ["## How to use it", fenced("\n".join(lines), "python"), about]


def ingredients(facts: Facts) -> dict[str, str]:
    """Returns what went into the run, name -> text. Tells the names of files without their folders."""
    state, config = facts.state, facts.settings
    known = {"data": described_data(facts)}
    if facts.base:
        known["base"] = public_name(facts.base)
    if state:
        progress, runtime = state["progress"], state["runtime"]
        seconds = duration(progress["train_seconds"])
        known["length"] = f"{progress['step']:,} steps, {progress['tokens']:,} tokens, {seconds} of training"
        known["learning rate"] = f"{config['lr']:g} ({config['optimizer']})"
        known["machine"] = f"{runtime['device']}, {runtime['precision']}, torch {runtime['torch']}"
        known["machine"] += f", {runtime['world_size']} processes" if runtime["world_size"] > 1 else ""
    return known


def described_data(facts: Facts) -> str:
    """Returns the kind, the files and the size of the data."""
    source, dataset = facts.data.get("source") or {}, facts.manifest.get("dataset") or {}
    names = [Path(name).name for name in [*source.get("inputs", []), source.get("corpus", "")] if name]
    shown = ", ".join(map(heading, names[:MOST_NAMES])) + (" …" if len(names) > MOST_NAMES else "")
    what = " of ".join(filter(None, [KINDS.get(source.get("holds", "")), shown]))
    counts = {split: sum(entry[1] for entry in filter(is_shard, entries)) for split, entries in dataset.items()}
    sizes = f"{counts.get('train', 0):,} tokens to learn from"
    sizes += f", {counts['val']:,} to validate on" if counts.get("val") else ""
    return f"{what}: {sizes}" if what else sizes
