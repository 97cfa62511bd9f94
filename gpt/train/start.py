"""Where a run begins: its settings, and whether it continues a checkpoint, fine-tunes a base model or starts from
scratch. Settings, data and machine are compared with those of the checkpoint."""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from gpt.checkpoint.read import (
    Checkpoint,
    find_model_folder,
    load_stored,
    newest_checkpoint,
    open_model,
    verify_checkpoint,
)
from gpt.checkpoint.weights import StoredModel, load_model, open_folder
from gpt.config import find_preset, flatten, list_presets, make_config, parse_flags, read_toml, refuse
from gpt.errors import InputError, IntegrityError, ResourceError, ignore_write_errors, note, say, tell
from gpt.files import STEP_FOLDER, is_folder, step_folders
from gpt.model import GPT, ModelConfig, count_parameters
from gpt.text.corpus import Corpus
from gpt.text.example_stream import index_examples
from gpt.text.fit import shrink_to_data, shrink_to_examples, windows_per_epoch
from gpt.text.foreign import has_tokenizer
from gpt.text.reader import read_masks
from gpt.text.shards import SPLITS, Dataset, open_dataset
from gpt.text.tokenizer import Tokenizer, choices, load_tokenizer
from gpt.train.budget import LIMITS, Budget, LengthConfig, Progress, RhythmConfig
from gpt.train.finetune import LEFT_TO_SIZES, Sizes, choose_by_size, warn_of_mistakes
from gpt.train.freeze import freeze
from gpt.train.lora import LoraConfig, add_adapters, restore_adapters
from gpt.train.metrics_file import logged_evaluation
from gpt.train.ranks import Ranks
from gpt.train.runtime import MachineConfig


def names(config: type) -> set[str]:
    return {field.name for field in fields(config)}


ARCHITECTURE = names(ModelConfig) - {"dropout"}
TRAINED = {"lora_rank", "lora_targets", "freeze"}  # they decide which parameters the optimizer's state is of
# Settings that do not change the result; data is compared by its hashes.
NOT_COMPARED = {"data", "out", "resume", "verify", "wandb", "profile", "micro_batch_size"}
MAY_CHANGE = names(LengthConfig) | names(RhythmConfig) | names(MachineConfig) | NOT_COMPARED


# ---- settings


def read_settings(
    command_line: type, config: type, argv: list[str], presets: Path, description: str
) -> tuple[Any, Any, set[str]]:
    """Returns (settings of type `config`, base model or None, names of the flags) of a command line.
    Flags override the preset, the preset the settings of the checkpoint or base model, and these the defaults. Raises
    InputError for bad settings."""
    flags = parse_flags(command_line, argv, description, presets)
    path = flags.get("resume", "auto")
    preset = find_preset(flags.get("preset") or ("finetune" if flags.get("init") else ""), presets)
    values: dict[str, Any] = {}
    if path not in ("", "auto"):
        checkpoint = find_or_newest_of(open_checkpoint, path, flags.get("out"))
        values = checkpoint.state["config"] | {"out": str(run_folder(path))}
    elif preset:
        values = {"out": f"out/{preset.stem}"}
    else:
        tell(list_presets(presets))
        command = f"python {sys.argv[0]}" if sys.argv[0].endswith(".py") else sys.argv[0]
        raise InputError(f"no preset given: they are listed above; choose one, as in {command} demo")
    given = (read_toml(preset, config) if preset else {}) | flags
    if "init" in given and given["init"] != values.get("init", given["init"]):
        raise InputError(f"{path}: this run began with init {values['init']!r}; leave out --init, or use a new --out")
    base, inherited = base_model(given.get("init", ""), (values | given)["out"])
    settings: Any = make_config(config, inherited, values, given)
    if base:
        check_architecture(settings.model, set(given), inherited)
        check_base_is_elsewhere(base, settings.out)
    return settings, base, set(flags)


def base_model(init: str, out: str) -> tuple[StoredModel | None, dict[str, Any]]:
    """Returns the base model `init`, and its architecture, setting -> value; (None, {}) if `init` is
    empty. If the base model is gone, a run in `out` that began with it can continue: then returns None and the
    architecture of that run."""
    if not init:
        return None, {}
    base = find_or_newest_of(lambda source: open_model(find_model_folder(source)), init, out)
    if isinstance(base, Checkpoint):
        return None, {name: base.state["config"][name] for name in ARCHITECTURE}
    return base, asdict(base.config)


def find_or_newest_of(find: Callable[[str], Any], source: str, out: str | None) -> Any:
    """Returns find(source). If that fails, returns the newest checkpoint of the run in `out`, unless there is none or
    `source` is in that run; then raises the error of find(source)."""
    try:
        return find(source)
    except (InputError, IntegrityError, ResourceError):
        if not out or not step_folders(out) or Path(out).resolve() == run_folder(source).resolve():
            raise
        return newest_checkpoint(out)


def check_architecture(model: ModelConfig, given: set[str], base: dict[str, Any]) -> None:
    """Raises InputError if settings of `model` that the user gave (their names: `given`) contradict the architecture of
    the base model, `base`. Allows a shorter context, with a note."""
    problems = [
        f"{name} {value} disagrees with the base model's {base[name]}"
        for name, value in asdict(model).items()
        if name in given and value != base[name] and name not in ("dropout", "block_size")
    ]
    if model.block_size > base["block_size"]:
        problems.append(f"block_size {model.block_size} is above the base model's {base['block_size']}")
    refuse(problems)
    if model.block_size < base["block_size"]:
        note("info", f"context cropped from {base['block_size']} to {model.block_size} tokens")


def check_base_is_elsewhere(base: StoredModel, out: str) -> None:
    """Raises InputError if the run folder `out` is a folder with weights of the base model, or the folder above one."""
    folders = {folder for file in base.files for folder in file.resolve().parents[:2]}
    if Path(out).resolve() in folders | {base.path.resolve(), base.path.resolve().parent}:
        raise InputError(f"{out}: out holds the base checkpoint; give another --out")


# ---- the start


@dataclass
class Start:
    """Where a run starts, the same on all ranks."""

    config: Any
    """the TrainConfig"""
    base: StoredModel | None
    """the base model of a fine-tune, else None"""
    corpus: Corpus
    budget: Budget
    checkpoint: Checkpoint | None
    """the checkpoint that the run continues; None for a new run"""
    progress: Progress
    newest: list[Path]
    """the newest step folder seen before the run folder is locked ([] if none)"""
    asked: dict[str, Any]
    """the settings that differ from those asked for, because the data are small or a fine-tune leaves them to the sizes
    of model and data: name -> the value asked for"""

    def is_finished(self) -> bool:
        """Returns whether nothing is left to do: no step, and no evaluation that a signal cut short."""
        evaluates = self.corpus.has_validation() and self.progress.evaluation_due(0, always=True)
        return self.budget.spent(self.progress) and not (self.checkpoint and evaluates)

    def first_base(self) -> StoredModel | None:
        """Returns the model that the run began with, also if the run continues; None for a run from scratch and, with a
        note, if the model is gone or has changed."""
        origin = self.checkpoint.state["base"] if self.checkpoint else None
        if self.base or not origin:
            return self.base
        try:
            base = open_model(find_model_folder(origin["init"]))
            if base.sha256() == origin["sha256"]:
                return base
            problem = "it has changed since"
        except (InputError, IntegrityError, ResourceError) as error:
            problem = str(error)
        note("info", f"the report lacks the answers of the base model {origin['init']}: {problem}")
        return None

    def say_finished(self) -> None:
        """Prints that nothing is left to do. Removes the exit.json of an earlier failure."""
        why = " (patience)" if self.budget.out_of_patience(self.progress) else ""
        (Path(self.config.out) / "exit.json").unlink(missing_ok=True)
        with ignore_write_errors(sys.stdout):
            say(f"nothing to do: step {self.progress.step} of {self.budget.total_steps(self.progress)}{why}")


def find_start(config: Any, base: StoredModel | None, typed: set[str], ranks: Ranks) -> Start:
    """Returns the Start of a run. `typed` are the settings given as flags. Raises InputError if settings, data or
    tokenizer do not fit together or to the checkpoint, or differ between ranks; IntegrityError if data or checkpoints
    are damaged."""
    refuse(config.batch.problems_on(ranks.size))
    dataset = open_dataset(config.data, config.tokenizer)
    newest = step_folders(config.out)[:1]
    checkpoint = checkpoint_to_resume(config.out, config.resume)
    config, asked = fit_settings(config, base, typed, dataset, checkpoint, ranks)
    size, block_size = config.batch.global_batch_size, config.model.block_size
    verify = config.verify if ranks.leads else "size"
    corpus = Corpus(dataset, config.tokenizer, verify, block_size, size, config.seed)
    budget = Budget(config.length, size, corpus.training.mean_tokens, corpus.training.per_epoch)
    compare_with_checkpoint(config, base, corpus, checkpoint)
    progress = Progress(**checkpoint.state["progress"]) if checkpoint else Progress()
    if base and not checkpoint:
        parameters = count_parameters(config.model, base.vocab_size)
        warn_of_mistakes(config.optim, budget, parameters, adapters=config.lora.lora_rank > 0)
    if checkpoint and progress.evaluated_step != progress.step:  # evaluated after the checkpoint was saved, perhaps
        loss = logged_evaluation(Path(config.out), progress.step)
        if loss is not None:
            progress.evaluated(loss)
    ranks.check_same(settings=flatten(config), data=corpus.shard_list, checkpoint=asdict(progress))
    return Start(config, base, corpus, budget, checkpoint, progress, newest, asked)


def fit_settings(
    config: Any,
    base: StoredModel | None,
    typed: set[str],
    dataset: Dataset,
    checkpoint: Checkpoint | None,
    ranks: Ranks,
) -> tuple[Any, dict[str, Any]]:
    """Returns the settings with a context and a batch that the data can fill and, for a fine-tune, with what is left to
    the sizes of model and data; also the values asked for of those that changed. Settings in `typed` do not shrink. A
    run that continues keeps the values that it began with. The data of rank 0 decide for all ranks."""
    before = flatten(config)
    if checkpoint:
        asked, began = checkpoint.state.get("asked", {}), checkpoint.state["config"]
        kept = {name for name in before.keys() & asked if before[name] == asked[name] and name not in typed}
        kept |= {name for name, value in LEFT_TO_SIZES.items() if before[name] == value}
        fitted = {name: began[name] for name in sorted(kept)}
    else:
        examples = int(ranks.first(count_examples(dataset, config.model.block_size)))
        fitted = shrunk(config, typed, dataset, examples, ranks)
        if base:
            config = make_config(type(config), before, fitted)
            fitted |= sized(config, base, typed, dataset, examples, ranks)
        asked = {name: before[name] for name in fitted}
    tell_fitted(before, fitted, dataset)
    config = make_config(type(config), before, fitted)
    refuse(config.batch.problems_on(ranks.size))
    return config, asked


def shrunk(config: Any, typed: set[str], dataset: Dataset, examples: int, ranks: Ranks) -> dict[str, Any]:
    """Returns the context and the batch that must be smaller for the data, name -> value; `examples`: the number of
    training examples, 0 for plain text."""
    train, val = (int(ranks.first(dataset.tokens(split))) for split in SPLITS)
    unit = ranks.size * max(config.batch.micro_batch_size, 1)
    block_size, batch_size = config.model.block_size, config.batch.global_batch_size
    if examples:
        return shrink_to_examples(batch_size, typed, examples, unit)
    return {} if dataset.has_examples else shrink_to_data(block_size, batch_size, typed, train, val, unit)


def sized(
    config: Any, base: StoredModel, typed: set[str], dataset: Dataset, examples: int, ranks: Ranks
) -> dict[str, Any]:
    """Returns the settings of a fine-tune that follow from the sizes of model and data, name -> value. Settings in
    `typed` stay, except those that are left to the sizes."""
    train, val = (int(ranks.first(dataset.tokens(split))) for split in SPLITS)
    items = examples or windows_per_epoch(train, config.model.block_size)
    adapters = config.lora.lora_rank > 0
    sizes = Sizes(count_parameters(config.model, base.vocab_size), items, train, val, adapters)
    chosen = choose_by_size(config.optim, config.length, config.rhythm, config.batch.global_batch_size, sizes)
    return {name: value for name, value in chosen.items() if name in LEFT_TO_SIZES or name not in typed}


def tell_fitted(before: dict[str, Any], fitted: dict[str, Any], dataset: Dataset) -> None:
    """Prints which settings follow from the sizes of model and data, and which became smaller because there is little
    text."""
    smaller = [name for name in fitted if name in ("block_size", "global_batch_size")]
    by_size = [f"{name} {value:g}" for name, value in fitted.items() if value and name not in smaller]  # 0: no limit
    if by_size:
        note("info", f"by the size of model and data: {', '.join(by_size)}")
    if smaller:
        train, val = map(dataset.tokens, SPLITS)
        size = f"{train:,} training and {val:,} validation tokens" if val else f"{train:,} training tokens"
        texts = [f"{name} {before[name]} -> {fitted[name]}" for name in smaller]
        note("info", f"{dataset.folder}: little text ({size}): {', '.join(texts)}")


def count_examples(dataset: Dataset, block_size: int) -> int:
    """Returns how many training examples a model of this context can learn from; 0 if the data are plain text."""
    if not dataset.has_examples:
        return 0
    return len(index_examples(read_masks(dataset.splits["train"]), block_size).starts)


def compare_with_checkpoint(
    config: Any, base: StoredModel | None, corpus: Corpus, checkpoint: Checkpoint | None
) -> None:
    """Raises InputError if tokenizer or settings of the checkpoint that the run continues differ from those of the run,
    IntegrityError if the data differ. Prints where the run begins."""
    if checkpoint is None:
        if not base:
            note("info", f"starting from scratch in {config.out}")
        return
    run = checkpoint.path.resolve().parent
    accept = config.resume != "auto" and run_folder(config.resume).resolve() == run
    corpus.check_tokenizer(str(checkpoint.path), checkpoint.manifest["tokenizer"], str(checkpoint.path))
    check_settings(flatten(config), checkpoint, accept)
    check_dataset(checkpoint, corpus.shard_list, accept)
    note("info", f"continuing {checkpoint.path} at step {checkpoint.step}")


def checkpoint_to_resume(out: str, resume: str) -> Checkpoint | None:
    """Returns the checkpoint to continue, or None for a new run. `resume` is "auto" (the newest in `out`), "" (never)
    or a path. Raises InputError if `out` holds checkpoints that the run would not continue."""
    own = step_folders(out)
    if resume == "":
        if own:
            raise InputError(f"{out}: holds checkpoints already and --resume is off; give another --out")
        return None
    if resume == "auto":
        return newest_checkpoint(out)
    run = run_folder(resume)
    if run.resolve() != Path(out).resolve() and own:
        return newest_checkpoint(out)  # an earlier run has begun this branch
    checkpoint = open_checkpoint(resume)
    if run.resolve() == Path(out).resolve() and own[0].name != checkpoint.path.name:
        newest = newest_checkpoint(out)
        if newest and newest.step > checkpoint.step:
            raise InputError(
                f"{out}: holds step {newest.step}, newer than {checkpoint.path.name}; give --out NEW to branch off"
            )
    return checkpoint


def run_folder(path: str | Path) -> Path:
    """Returns the run folder of a run or step folder: "out/mine/step-000000100" -> "out/mine"."""
    folder = Path(path)
    return folder.resolve().parent if STEP_FOLDER.match(folder.resolve().name) else folder


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Returns the checkpoint at a path that the user gave; of a run folder, the newest valid one. Raises InputError if
    there is none, IntegrityError if it cannot be resumed."""
    path = Path(source)
    missing = InputError(f"{path}: no valid checkpoint; give a run folder or a step folder")
    if not STEP_FOLDER.match(path.resolve().name):
        checkpoint = newest_checkpoint(path)
        if checkpoint is None:
            raise missing
        return checkpoint
    if not is_folder(path):
        raise missing
    return verify_checkpoint(path.resolve())


def check_settings(values: dict[str, Any], checkpoint: Checkpoint, accept: bool) -> None:
    """Compares `values`, the settings of a run by flat name, with those of its checkpoint. Raises InputError for
    another architecture, optimizer or seed. For another setting raises it too or, if `accept`, prints a note. Settings
    in MAY_CHANGE (length, rhythm, hardware) may change."""
    old = flatten(LoraConfig()) | {"freeze": ""} | checkpoint.state["config"]
    tell_new_length(old, values)
    changed = {
        name: (old[name], value)
        for name, value in values.items()
        if name in old and name not in MAY_CHANGE and old[name] != value
    }
    texts = [f"{name} {was!r} -> {now!r}" for name, (was, now) in changed.items()]
    if "optimizer" in changed:
        was, now = changed["optimizer"]
        raise InputError(f"{checkpoint.path}: made with optimizer {was}, not {now}; use a new --out, and --init")
    if "seed" in changed:
        raise InputError(f"{checkpoint.path}: made with another seed ({texts[0]}); use a new --out")
    for what, fixed in (("another architecture", ARCHITECTURE), ("other parameters to train", TRAINED)):
        found = [text for text, name in zip(texts, changed, strict=True) if name in fixed]
        if found:
            raise InputError(f"{checkpoint.path}: {what} ({', '.join(found)}); use a new --out")
    if texts and not accept:
        raise InputError(
            f"{checkpoint.path}: made with other settings ({', '.join(texts)}); use a new --out, "
            f"or accept them with --resume {checkpoint.path.parent}"
        )
    for text in texts:
        note("info", f"setting changed on resume: {text}")


def tell_new_length(old: dict[str, Any], values: dict[str, Any]) -> None:
    """Prints a note if the settings `values` give the run another length than the settings `old`, because the learning
    rate then jumps to where the schedule of the new length has it. Beside another limit, stop_after_minutes does not
    shape the schedule."""
    slot_shapes = not all(any(settings.get(name) for name in LIMITS[:-1]) for settings in (old, values))
    limits = LIMITS if slot_shapes else LIMITS[:-1]
    changed = [
        f"{name} {old.get(name, 0)!r} -> {values[name]!r}" for name in limits if old.get(name, 0) != values[name]
    ]
    if changed and values["schedule"] != "constant":
        note("info", f"length changed on resume ({', '.join(changed)}): the learning rate begins a new schedule")


def check_dataset(checkpoint: Checkpoint, shard_list: dict[str, Any], accept: bool) -> None:
    """Raises IntegrityError if the data differ from those of the checkpoint; with `accept`, only warns."""
    before, now = shard_hashes(checkpoint.manifest["dataset"]), shard_hashes(shard_list)
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed and not accept:
        raise IntegrityError(
            f"dataset changed since checkpoint: {', '.join(changed[:5])}; restore it, begin a new run from these "
            f"weights with --init {checkpoint.path.parent} and a new --out, or accept it with --resume PATH"
        )
    if changed:
        note("warning", f"dataset changed since checkpoint: {', '.join(changed[:5])}")


def shard_hashes(shard_list: dict[str, Any]) -> dict[str, tuple[int, str]]:
    return {name: (tokens, digest) for shards in shard_list.values() for name, tokens, digest in shards}


# ---- the model


def first_model(start: Start) -> tuple[GPT, dict[str, str] | None]:
    """Returns the model to train, in fp32 on the CPU (from the checkpoint, from the base model, or new), and the record
    of the base model that the run began with, or None. The tokenizer of `start` gets the roles that the checkpoint or
    base model gives to tokens, so that the run saves them too."""
    config, corpus = start.config, start.corpus
    if start.checkpoint:
        model, origin = load_model(open_folder(start.checkpoint.path)), start.checkpoint.state["base"]
        corpus.tokenizer = corpus.tokenizer.with_roles_of(load_tokenizer(start.checkpoint.path))
    elif start.base:
        model, base_tokenizer, origin = load_base(start.base, config.init, config.model.block_size, corpus)
        corpus.tokenizer = corpus.tokenizer.with_roles_of(base_tokenizer)
    else:
        torch.manual_seed(config.seed)
        model, origin = GPT(config.model, corpus.tokenizer.vocab_size), None
    model.set_dropout(config.model.dropout)
    if start.checkpoint:
        restore_adapters(model, config.lora, start.checkpoint.path)
    else:
        add_adapters(model, config.lora, config.seed)
    freeze(model, config.optim.freeze)
    return model, origin


def load_base(base: StoredModel, init: str, block_size: int, corpus: Corpus) -> tuple[GPT, Tokenizer, dict[str, str]]:
    """Returns the model to fine-tune, its context cropped to `block_size`, its tokenizer, and a record of it: the name
    `init` that the user gave, the hub name or path of the model, and the sha256 of its weights. Raises InputError if
    its tokenizer is not that of the data."""
    model, tokenizer, _ = load_stored(base)
    corpus.check_tokenizer(init, tokenizer.manifest_entry, tokenizer_source(init, base, tokenizer))
    model.crop_context(block_size)
    name = str(base.path.resolve()) if os.path.exists(init) else init
    return model, tokenizer, {"init": init, "model": name, "sha256": base.sha256()}


def tokenizer_source(init: str, base: StoredModel, tokenizer: Tokenizer) -> str:
    """Returns what data/prepare.py takes as --tokenizer for `tokenizer`, that of the base model `init`. A hub name is
    not enough, but for gpt2."""
    if not has_tokenizer(base.tokenizer_folder):
        return tokenizer.name
    in_init = Path(init).is_dir() and base.tokenizer_folder == base.path
    return init if in_init or init in choices() else str(base.tokenizer_folder)
