"""Checkpoints: atomic save, verified load, pointers, retention. A checkpoint is a Hugging Face GPT-2 folder
`step-000001000` plus `training/` with what an exact continuation needs. `training/manifest.json`, written last, names
every file with size and sha256; the folder gets its name only when all of it is on the disk."""

import contextlib
import hashlib
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from gpt.checkpoint import weights as interop
from gpt.errors import InputError, IntegrityError, NonFiniteError, ResourceError, note
from gpt.files import (
    STEP_FOLDER,
    inside,
    is_folder,
    read_json,
    read_pointer,
    remove_tree,
    sha256_of,
    step_folders,
    step_number,
    sync_folder,
)
from gpt.text.tokenizer import load_tokenizer, save_tokenizer

FORMAT_VERSION = 1
MANIFEST = "training/manifest.json"
OPTIMIZER = "training/optimizer.safetensors"
STATE = "training/state.json"
ONE_AT_A_TIME = threading.Lock()  # for one_thread
HASHERS = 2  # threads: the two large files of a checkpoint are hashed side by side
GPT2_VOCABULARIES = range(50257, 50305)  # as released, up to padded to a multiple of 64


@dataclass(frozen=True)
class Checkpoint:
    """A verified step folder: its path, step number, manifest and trainer state (None where only weights were kept)."""

    path: Path
    step: int
    manifest: dict
    state: dict | None


# ---- saving


def save_checkpoint(out, step, model, tokenizer, optimizer, state, sampling, manifest):
    """Writes `out/step-<step>`, whole or not at all, and returns its path. `optimizer` holds the trainer's tensors and
    `state` its plain data; `sampling` are the defaults that generation_config.json names; `manifest` is what the
    manifest says beside step, tokenizer and files. Raises NonFiniteError for weights that are not finite, ResourceError
    if writing fails."""
    weights = finite_weights(model, step)
    target = Path(out) / f"step-{step:09d}"
    temporary = target.with_name(target.name + ".tmp")
    try:
        remove_tree(temporary)
        (temporary / "training").mkdir(parents=True)
        write_model(temporary, weights, model, tokenizer, sampling)
        save_file(optimizer, temporary / OPTIMIZER)
        write_json(temporary / STATE, state)
        files = {name: describe(temporary / name) for name in files_below(temporary)}
        manifest = {"format_version": FORMAT_VERSION, "step": step, "tokenizer": tokenizer.record, **manifest}
        write_json(temporary / MANIFEST, sealed(manifest | {"files": files}))
        make_durable(temporary)
        remove_tree(target)  # left by an earlier, damaged save of the same step
        os.rename(temporary, target)
        sync_folder(target.parent)
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise writing_failed(target, error, needs=3 * sum(value.nbytes for value in weights.values())) from None
    return target


def finite_weights(model, step):
    weights = interop.weights_of(model)
    for name, value in weights.items():
        if not interop.all_finite(value):
            raise NonFiniteError(
                f"non-finite values in {name} at step {step}: nothing was saved; see earlier checkpoints"
            )
    return weights


def write_model(folder, weights, model, tokenizer, sampling):
    """Writes the Hugging Face part of a checkpoint."""
    save_file(weights, folder / interop.WEIGHTS, metadata={"format": "pt"})
    write_json(folder / "config.json", interop.config_json(model.config, model.vocab_size, tokenizer.eot))
    write_json(folder / "generation_config.json", interop.generation_json(tokenizer.eot, sampling))
    save_tokenizer(tokenizer, folder, model_max_length=model.config.block_size)


def writing_failed(target, error, needs):
    """The ResourceError for a checkpoint of about `needs` bytes that could not be written."""
    free = shutil.disk_usage(target.parent).free if target.parent.is_dir() else 0
    reason = getattr(error, "strerror", None) or str(error)
    return ResourceError(
        f"{target}: writing failed: {reason} (needs {needs / 1e9:.3f} GB, {free / 1e9:.3f} GB free); "
        "free some space or make it writable"
    )


def sealed(manifest):
    """The manifest with the sha256 of its own content, so that a change in it does not go unnoticed either."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    text = json.dumps(content, sort_keys=True)
    return content | {"sha256": hashlib.sha256(text.encode("utf-8")).hexdigest()}


def describe(path):
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def json_text(values):  # ends without a newline: no byte may be cut off unnoticed
    return json.dumps(values, indent=2, ensure_ascii=False)


def write_json(path, values):
    path.write_text(json_text(values), encoding="utf-8", newline="\n")


def make_durable(folder):
    """Flush every file and folder below `folder` to the disk, and give files the modes that new files have here."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_folder(path)
        else:
            path.chmod(0o666 & ~(mask | 0o022))  # safetensors makes files that only the owner can read
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


# ---- finding and verifying


def verify_checkpoint(folder, training=True):
    """The Checkpoint in a step folder, every file of its manifest checked. Raises IntegrityError naming what is wrong.
    Without `training`, the optimizer's state is checked by its size alone: hashing it takes longer than all else."""
    manifest = read_manifest(folder)
    try:
        with ThreadPoolExecutor(HASHERS) as pool:
            checks = pool.map(lambda entry: check_file(folder, *entry, training), manifest["files"].items())
            list(checks)  # raises what was found first, in the manifest's order
    except OSError as error:
        raise ResourceError(f"{error.filename}: {error.strerror}; make it readable") from None
    resumable = {STATE, OPTIMIZER} <= manifest["files"].keys()
    return Checkpoint(folder, manifest["step"], manifest, read_json(folder / STATE) if resumable else None)


def read_manifest(folder):
    """The manifest of a step folder, itself checked, but not yet the files it names. Raises IntegrityError."""
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        raise IntegrityError(f"{folder}: no {MANIFEST}; use another checkpoint")
    version = manifest.get("format_version")
    if not isinstance(version, int):
        raise IntegrityError(f"{folder / MANIFEST}: not a checkpoint manifest; use another checkpoint")
    if version > FORMAT_VERSION:
        raise IntegrityError(
            f"{folder}: checkpoint format {version}, this program reads up to {FORMAT_VERSION}; update the program"
        )
    files, step = manifest.get("files"), manifest.get("step")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise IntegrityError(f"{folder / MANIFEST}: not a checkpoint manifest; use another checkpoint")
    for name in files:
        inside(folder, name)
    if sealed(manifest) != manifest:
        raise IntegrityError(f"{folder / MANIFEST}: sha256 mismatch; use another checkpoint")
    if STEP_FOLDER.match(folder.name) and step != step_number(folder):
        raise IntegrityError(f"{folder}: its manifest is of step {step}; use another checkpoint")
    return manifest


def check_file(folder, name, entry, training):
    path, size, digest = inside(folder, name), entry.get("size"), entry.get("sha256")
    if not path.is_file():
        raise IntegrityError(f"{path}: missing; restore it or use another checkpoint")
    if path.stat().st_size != size:
        raise IntegrityError(f"{path}: {path.stat().st_size} bytes, manifest says {size}; use another checkpoint")
    if (training or name != OPTIMIZER) and sha256_of(path) != digest:
        raise IntegrityError(f"{path}: sha256 mismatch; restore it or use another checkpoint")


def newest_checkpoint(out, resumable=False, training=True):
    """The newest valid Checkpoint of a run, or None if the run has no step folders. A damaged one is passed over with a
    warning. Raises IntegrityError if there are step folders and none is valid."""
    folders = step_folders(out)
    for place, folder in enumerate(folders):
        try:
            checkpoint = verify_checkpoint(folder, training)
            if resumable and checkpoint.state is None:
                raise IntegrityError(f"{folder}: holds weights only")
        except IntegrityError as error:
            following = f"; trying {folders[place + 1].name}" if place + 1 < len(folders) else ""
            note("warning", f"{str(error).split(';')[0]}{following}")
            continue
        if read_pointer(out, "latest") is None:
            note("warning", f"{out}/latest.txt names no checkpoint; found {folder.name} by looking at all")
        return checkpoint
    if folders:
        what = "can be resumed" if resumable else "is valid"
        raise IntegrityError(
            f"{out}: none of {len(folders)} checkpoints {what}; restore one, or start anew with another --out "
            "(--init takes weights alone)"
        )
    return None


# ---- loading


def find_model(path):
    """The folder to load for what a user typed: a model folder, a run folder (its best, else its newest), or a hub
    name. A folder with a manifest of ours has been verified."""
    folder = Path(path)
    if os.path.exists(folder / "config.json"):
        return verify_checkpoint(folder.resolve(), training=False).path if (folder / MANIFEST).exists() else folder
    if is_folder(folder):
        return best_or_newest(folder)
    if os.path.exists(folder) or not interop.HUB_NAME.match(str(path)) or str(path).startswith("out/"):
        raise InputError(f"{path}: no such checkpoint folder; give a step folder, a run folder or a hub name")
    return interop.fetch_from_hub(str(path))


def best_or_newest(out):
    best = read_pointer(out, "best")
    if best is not None:
        try:
            return verify_checkpoint(best, training=False).path
        except IntegrityError as error:
            note("warning", f"{str(error).split(';')[0]}; trying the newest checkpoint")
    checkpoint = newest_checkpoint(out, training=False)
    if checkpoint is None:
        raise InputError(f"{out}: no checkpoint here; give a step folder, a run folder or a GPT-2 folder")
    return checkpoint.path


def load_pretrained(path, dtype=torch.float32, device="cpu", together=False):
    """(GPT, Tokenizer, generation defaults) of a checkpoint folder, run folder or hub name; the weights are of type
    `dtype` on `device`, `together` as in interop.load_model. A folder with a manifest of ours is read
    while it is verified, and returned when it has passed."""
    likely = likely_folder(path)
    if likely is None:
        return load_folder(find_model(path), dtype, device, together)
    with ThreadPoolExecutor(1) as pool, one_thread():
        ahead = pool.submit(load_folder, likely, dtype, device, together)
        folder = find_model(path)  # what is wrong with the folder is said before what reading it ran into
        if folder == likely:
            return ahead.result()
        del ahead  # the damaged folder's model
    return load_folder(folder, dtype, device, together)


@contextlib.contextmanager
def one_thread():
    """Meanwhile torch computes with one thread: a second would wait for the core that hashes files. The number is the
    process's, so that two loads at once take turns."""
    with ONE_AT_A_TIME:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def likely_folder(path):
    """The folder that find_model gives if nothing is damaged; None where it has nothing to verify."""
    folder = Path(path)
    if not is_folder(folder):
        return None
    if (folder / "config.json").exists():
        found = folder.resolve()
    else:
        found = read_pointer(folder, "best") or next(iter(step_folders(folder)), None)
    return found if found and (found / MANIFEST).exists() else None


def load_folder(folder, dtype=torch.float32, device="cpu", together=False):
    """The same of a folder that find_model gave."""
    model = interop.load_model(folder, dtype, device, together)
    tokenizer = tokenizer_of(folder, model.vocab_size)
    if model.vocab_size < tokenizer.vocab_size:
        raise IntegrityError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.vocab_size}; "
            "they do not belong together"
        )
    crop_vocabulary(model, tokenizer.vocab_size)
    return model, tokenizer, read_json(folder / "generation_config.json") or {}


def tokenizer_of(folder, vocab_size):
    """The Tokenizer in a model folder; GPT-2's if the folder has none and the vocabulary is of GPT-2's size."""
    if vocab_size not in GPT2_VOCABULARIES or any((folder / name).exists() for name in interop.TOKENIZER_FILES):
        return load_tokenizer(folder)
    note("info", f"{folder} holds no tokenizer; assuming gpt2's")
    return load_tokenizer("gpt2")


def crop_vocabulary(model, vocab_size):
    """Treat embedding rows that the tokenizer does not know, which some checkpoints were padded with, as padding."""
    with torch.no_grad():
        model.token.weight[vocab_size:] = 0
    model.vocab_size = vocab_size
