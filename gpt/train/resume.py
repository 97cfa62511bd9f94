"""What a run starts from: which checkpoint is continued, and whether settings, data and machine agree with it."""

from dataclasses import asdict, fields
from pathlib import Path

from gpt.checkpoint import weights as interop
from gpt.checkpoint.folder import load_folder, newest_checkpoint, verify_checkpoint
from gpt.config import refuse
from gpt.errors import InputError, IntegrityError, ResourceError, note
from gpt.files import STEP_FOLDER, is_folder, step_folders
from gpt.model import ModelConfig
from gpt.text.corpus import check_tokenizer
from gpt.train.budget import LengthConfig, RhythmConfig
from gpt.train.runtime import MachineConfig


def names(config):
    return {field.name for field in fields(config)}


ARCHITECTURE = names(ModelConfig) - {"dropout"}
ELSEWHERE = {"data", "out", "resume", "verify", "wandb", "profile", "micro_batch_size"}  # data: compared by content
FREE = names(LengthConfig) | names(RhythmConfig) | names(MachineConfig) | ELSEWHERE


def find_checkpoint(out, resume):
    """The Checkpoint to continue, or None for a new run. `resume` is "auto" (out's own newest), "" (never) or a
    path."""
    own = step_folders(out)
    if resume == "":
        if own:
            raise InputError(f"{out}: holds checkpoints already and --resume is off; give another --out")
        return None
    if resume == "auto":
        return newest_checkpoint(out, resumable=True)
    run = run_folder(resume)
    if run.resolve() != Path(out).resolve() and own:
        return newest_checkpoint(out, resumable=True)  # this branch was begun before
    checkpoint = open_checkpoint(Path(resume))
    if run.resolve() == Path(out).resolve() and own[0].name != checkpoint.path.name:
        newer = newest_checkpoint(out)
        if newer.step > checkpoint.step:
            raise InputError(
                f"{out}: holds step {newer.step}, newer than {checkpoint.path.name}; give --out NEW to branch off"
            )
    return checkpoint


def found_or_own(find, source, out):
    """What `find` finds at `source`; where that is gone, the newest Checkpoint of the run in `out`, begun with it."""
    try:
        return find(Path(source) if find is open_checkpoint else source)
    except (InputError, IntegrityError, ResourceError):
        if not out or not step_folders(out) or Path(out).resolve() == run_folder(source).resolve():
            raise
        return newest_checkpoint(out, resumable=True)


def run_folder(path):
    """The run folder of a run or step folder: "out/mine/step-000000100" -> "out/mine"."""
    folder = Path(path)
    return folder.resolve().parent if STEP_FOLDER.match(folder.resolve().name) else folder


def open_checkpoint(path):
    """The Checkpoint at a path that the user gave."""
    if not STEP_FOLDER.match(path.resolve().name):
        checkpoint = newest_checkpoint(path, resumable=True)
        if checkpoint is None:
            raise InputError(f"{path}: no valid checkpoint; give a run folder or a step folder")
        return checkpoint
    if not is_folder(path):
        raise InputError(f"{path}: no valid checkpoint; give a run folder or a step folder")
    checkpoint = verify_checkpoint(path.resolve())
    if checkpoint.state is None:
        raise IntegrityError(f"{path}: holds weights only, no trainer state; start from them with --init {path}")
    return checkpoint


def check_settings(values, checkpoint, accept):
    """Compare a run's settings (flat name -> value) with its checkpoint's. Another architecture or seed is refused,
    another setting too unless `accept`: then it is told. Length, rhythm and hardware may change."""
    old = checkpoint.state["config"]
    changed = {
        name: (old[name], value)
        for name, value in values.items()
        if name in old and name not in FREE and old[name] != value
    }
    texts = [f"{name} {was!r} -> {now!r}" for name, (was, now) in changed.items()]
    if "optimizer" in changed:
        was, now = changed["optimizer"]
        raise InputError(f"{checkpoint.path}: made with optimizer {was}, not {now}; use a new --out, and --init")
    if "seed" in changed:
        raise InputError(f"{checkpoint.path}: made with another seed ({texts[0]}); use a new --out")
    fixed = [text for text, name in zip(texts, changed, strict=True) if name in ARCHITECTURE]
    if fixed:
        raise InputError(f"{checkpoint.path}: another architecture ({', '.join(fixed)}); use a new --out")
    if texts and not accept:
        raise InputError(
            f"{checkpoint.path}: made with other settings ({', '.join(texts)}); use a new --out, "
            f"or accept them with --resume {checkpoint.path.parent}"
        )
    for text in texts:
        note("info", f"setting changed on resume: {text}")


def check_architecture(model, given, base):
    """Refuse given settings that contradict the base model of a fine-tune; a shorter context is allowed. `base` maps
    ModelConfig's names to the base model's values."""
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


def check_base_is_elsewhere(base, out):
    """Raise InputError if the run folder `out` is where the base model, in folder `base`, lives."""
    if Path(out).resolve() in (base.resolve(), base.resolve().parent):
        raise InputError(f"{out}: out holds the base checkpoint; give another --out")


def load_base(folder, init, block_size, tokenizer):
    """The model to fine-tune, its context cropped to block_size, and a record of which it is: `init` is what the user
    calls it."""
    model, its_tokenizer, _ = load_folder(folder)
    check_tokenizer(init, its_tokenizer.record, tokenizer)
    model.crop_context(block_size)
    return model, {"init": init, "sha256": interop.weights_hash(folder)}


def check_dataset(checkpoint, record, accept):
    """Raise IntegrityError if the data is not what the checkpoint was trained on; a warning if that is accepted."""
    before, now = shard_hashes(checkpoint.manifest["dataset"]), shard_hashes(record)
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed and not accept:
        raise IntegrityError(
            f"dataset changed since checkpoint: {', '.join(changed[:5])}; restore it, use a new --out, "
            "or accept it with --resume PATH"
        )
    if changed:
        note("warning", f"dataset changed since checkpoint: {', '.join(changed[:5])}")


def shard_hashes(record):
    return {name: (tokens, digest) for shards in record.values() for name, tokens, digest in shards}


def check_runtime(before, now):
    """One warning if something differs on which bitwise repetition depends: `before` and `now` are records of machines,
    name -> value."""
    changed = [f"{name} {before[name]} -> {value}" for name, value in now.items() if before.get(name, value) != value]
    if changed:
        note("warning", f"not bitwise the same run any more: {', '.join(changed)}")
