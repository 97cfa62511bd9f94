"""Finds checkpoints, verifies them against their manifest, and loads model and tokenizer."""

import contextlib
import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from gpt.checkpoint.adapters import base_name, with_adapter
from gpt.checkpoint.hub import fetch_from_hub, is_hub_name
from gpt.checkpoint.nanogpt import CHECKPOINT, SUFFIXES, open_checkpoint
from gpt.checkpoint.weights import GPT2_VOCABULARIES, StoredModel, has_weights, load_model, open_folder
from gpt.errors import Error, InputError, IntegrityError, ResourceError, note
from gpt.files import STEP_FOLDER, inside, is_folder, read_json, read_pointer, sha256_of, step_folders, step_number
from gpt.model import GPT, ModelConfig, count_parameters
from gpt.text.foreign import ADAPTER_CONFIG, has_tokenizer, kind_of_weights, models_within, tell_model_within
from gpt.text.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 1
MANIFEST = "training/manifest.json"
OPTIMIZER = "training/optimizer.safetensors"
STATE = "training/state.json"
FROZEN = "training/frozen.safetensors"  # with LoRA: the frozen matrices, which are merged with adapters in the root
TRAINER_FILES = (OPTIMIZER, STATE, FROZEN)
ADAPTER_FOLDER = "adapter"  # with LoRA: the adapter in PEFT's format
THREADS_LOCK = threading.Lock()

MOST_READINGS = 10  # of a run's pointers, while the run deletes step folders

T = TypeVar("T")
Loaded = tuple[GPT, Tokenizer, dict[str, Any]]
Precision = torch.dtype | Callable[[ModelConfig, int], torch.dtype]


# ---- verifying


@dataclass(frozen=True)
class Checkpoint:
    """A verified step folder. `state` is the content of training/state.json, {} if the folder holds weights only."""

    path: Path
    step: int
    manifest: dict[str, Any]
    state: dict[str, Any]


def verify_checkpoint(folder: Path, training: bool = True) -> Checkpoint:
    """Checks every file of a step folder against its manifest and returns the Checkpoint. Without `training`, accepts a
    folder of weights only, and checks the trainer's tensors by size alone: hashing them takes longer than the rest.
    Raises IntegrityError if a check fails, ResourceError if a file cannot be read."""
    manifest = read_manifest(folder)
    try:
        for name, entry in manifest["files"].items():
            check_file(folder, name, entry, hash_it=training or name not in (OPTIMIZER, FROZEN))
    except OSError as error:
        raise ResourceError(f"{error.filename}: {error.strerror}; make it readable") from None
    state = read_json(folder / STATE) if {STATE, OPTIMIZER} <= manifest["files"].keys() else None
    if training and not state:
        raise IntegrityError(f"{folder}: holds weights only, no trainer state; start from them with --init {folder}")
    return Checkpoint(folder, manifest["step"], manifest, state or {})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a step folder; does not check the files that it names. Raises IntegrityError if the
    manifest is missing, malformed, changed, or of another format or step."""
    path = folder / MANIFEST
    manifest = read_json(path)
    if manifest is None:
        raise IntegrityError(f"{folder}: no {MANIFEST}; use another checkpoint")
    version, step, files = (manifest.get(name) for name in ("format_version", "step", "files"))
    entries = files.values() if isinstance(files, dict) else [files]
    if (
        not isinstance(version, int)
        or version < 1
        or not isinstance(step, int)
        or not all(isinstance(entry, dict) for entry in entries)
    ):
        raise IntegrityError(f"{path}: not a checkpoint manifest; use another checkpoint")
    if version > FORMAT_VERSION:
        raise IntegrityError(
            f"{folder}: checkpoint format {version}, this program reads up to {FORMAT_VERSION}; update the program"
        )
    if sealed(manifest) != manifest:
        raise IntegrityError(f"{path}: sha256 mismatch; use another checkpoint")
    if STEP_FOLDER.match(folder.name) and step != step_number(folder):
        raise IntegrityError(f"{folder}: its manifest is of step {step}; use another checkpoint")
    return manifest


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns `manifest` with the sha256 of its other entries, so that a change of the manifest itself is noticed."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return content | {"sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def check_file(folder: Path, name: str, entry: dict[str, Any], hash_it: bool) -> None:
    """Raises IntegrityError unless the file `name` exists in `folder` and has the size in `entry` and, if `hash_it`,
    the sha256."""
    path = inside(folder, name)
    if not path.is_file():
        raise IntegrityError(f"{path}: missing; restore it or use another checkpoint")
    size = path.stat().st_size
    if size != entry.get("size"):
        raise IntegrityError(f"{path}: {size} bytes, manifest says {entry.get('size')}; use another checkpoint")
    if hash_it and sha256_of(path) != entry.get("sha256"):
        raise IntegrityError(f"{path}: sha256 mismatch; restore it or use another checkpoint")


# ---- finding


def newest_checkpoint(out: str | Path) -> Checkpoint | None:
    """Returns the newest valid Checkpoint of a run that can be resumed, or None if the run has no step folders. Raises
    IntegrityError if no step folder is valid."""
    return first_valid(lambda: steps_of_run(out), verify_checkpoint) if step_folders(out) else None


def find_model_folder(path: str | Path) -> Path:
    """Returns the folder of the model at `path`, a folder or a hub name: see `candidates`. Verifies the folder if it
    has a manifest, but does not load the model. Raises InputError if there is no such model, IntegrityError if none of
    its checkpoints is valid."""
    return first_valid(lambda: candidates(path), verified)


def candidates(path: str | Path) -> list[Path]:
    """Returns the folders and files to try for `path`, in this order: for a model folder or a file of nanoGPT, itself;
    for a run folder, its best step folder, then the others, newest first; for another folder, see `models_in`; for a
    hub name, the folder in Hugging Face's cache. Raises InputError if there is no such model."""
    folder = Path(path)
    if os.path.exists(folder / "config.json"):  # Path.exists raises for a name that is too long
        is_alias = folder.is_symlink() or folder.name in ("", "..")  # a step folder's name is checked
        return [folder.resolve() if is_alias else folder]
    if is_folder(folder):
        best = read_pointer(folder, "best")
        return sorted(steps_of_run(folder), key=lambda step: step != best) or models_in(folder)
    if os.path.isfile(folder) and folder.suffix in SUFFIXES:
        return [folder]
    if os.path.exists(folder):
        what = kind_of_weights(folder) or "a file, not a folder; give a step folder, a run folder or a GPT-2 folder"
        raise InputError(f"{path}: {what}")
    if not is_hub_name(str(path)):
        raise InputError(f"{path}: no such checkpoint folder; give a step folder, a run folder or a hub name")
    fetched = fetch_from_hub(str(path))
    return [fetched] if (fetched / "config.json").exists() else models_in(fetched)


def models_in(folder: Path) -> list[Path]:
    """Returns the folders and files to try for a folder without a config.json and step folders: itself, if it is an
    adapter; nanoGPT's checkpoint in it; the checkpoints of a Trainer, newest first; the snapshot in the hub's cache.
    Raises InputError if there are none."""
    if (folder / ADAPTER_CONFIG).exists():
        return [folder]
    if (folder / CHECKPOINT).exists():
        return [folder / CHECKPOINT]
    models = models_within(folder)
    if not models:
        raise not_a_model(folder)
    tell_model_within(folder, models[0])
    return models


def not_a_model(folder: Path) -> InputError:
    """Returns the error for a folder without a model."""
    what = kind_of_weights(folder)
    if what is None and is_hub_name(str(folder)):
        what = f"no checkpoint in this folder; if the hub's {folder} is meant, rename the folder or work in another one"
    return InputError(f"{folder}: {what or 'no checkpoint here; give a step folder, a run folder or a GPT-2 folder'}")


def steps_of_run(out: str | Path) -> list[Path]:
    """Returns the step folders of a run, newest first. Warns if latest.txt does not name any of them."""
    folders = step_folders(out)
    if folders and read_pointer(out, "latest") is None:
        note("warning", f"{out}/latest.txt names no checkpoint; looking at all of them")
    return folders


def first_valid(list_folders: Callable[[], list[Path]], use: Callable[[Path], T]) -> T:
    """Returns use(folder) of the first folder for which `use` raises no IntegrityError; warns of each earlier error.
    Raises IntegrityError if all fail. A run in training deletes old step folders: calls `list_folders()` again if a
    folder changed while it was used."""
    for _ in range(MOST_READINGS - 1):
        try:
            return first_of(list_folders(), use)
        except FolderChanged:
            continue
    return first_of(list_folders(), use, watch=False)


class FolderChanged(Exception):
    """Another program changed or deleted a step folder while this program read it."""


def first_of(folders: list[Path], use: Callable[[Path], T], watch: bool = True) -> T:
    """Returns what first_valid returns, for the list `folders`. With `watch`, raises FolderChanged if `use` failed for
    a folder that another program changed during the call."""
    for folder, following in zip_longest(folders, folders[1:]):
        before = version_of(folder)
        try:
            return use(folder)
        except (Error, OSError, SafetensorError) as error:
            if watch and (version_of(folder) != before or not folder.exists()):
                raise FolderChanged from None
            if len(folders) == 1 or not isinstance(error, IntegrityError):
                raise
            problem = str(error).split(";")[0]
            note("warning", f"{problem}; trying {following.name}" if following else problem)
    raise IntegrityError(
        f"{folders[0].parent}: none of {len(folders)} checkpoints can be used; restore one, or start anew with another "
        "--out (--init takes weights alone)"
    )


def version_of(folder: Path) -> tuple[int, int, int] | None:
    """Returns a value that differs after retention has deleted a step folder, or its trainer state; None if the folder
    has no manifest."""
    try:
        status = os.stat(folder / MANIFEST)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def verified(folder: Path) -> Path:
    """Returns `folder`; verifies it first if it has a manifest."""
    if (folder / MANIFEST).exists():
        verify_checkpoint(folder, training=False)
    return folder


# ---- loading


def open_model(path: Path) -> StoredModel:
    """Returns the model at `path`, a result of find_model_folder: a GPT-2 folder, an adapter with its base, or a
    checkpoint of nanoGPT. Raises InputError or IntegrityError as their readers do."""
    if path.is_file():
        return open_checkpoint(path)
    if (path / ADAPTER_CONFIG).exists() and not has_weights(path):  # some programs save config.json beside an adapter
        return with_adapter(path, open_base(path))
    return open_folder(path)


def open_base(adapter: Path) -> StoredModel:
    """Returns the base model of the adapter in a folder. Raises the errors of finding and opening it, which then name
    the adapter."""
    name = base_name(adapter)
    try:
        return open_folder(find_model_folder(name))
    except Error as error:
        raise type(error)(f"{adapter}: an adapter; its base, by {ADAPTER_CONFIG}: {error}") from None


def load_pretrained(
    path: str | Path, dtype: Precision = torch.float32, device: torch.device | str = "cpu", together: bool = False
) -> Loaded:
    """Finds, verifies and loads a model: returns (GPT, Tokenizer, content of generation_config.json). `path` is a
    folder or a hub name, see `candidates`; `dtype` is the type of the weights, or a function that returns it for a
    model's config and vocabulary; the other arguments are those of load_model. Raises InputError if there is no such
    model, IntegrityError if none of its checkpoints can be used."""
    load = functools.partial(load_verified, dtype=dtype, device=device, together=together)
    return first_valid(lambda: candidates(path), load)


def load_verified(folder: Path, dtype: Precision, **options: Any) -> Loaded:
    """Returns load_folder(folder, …). If the folder has a manifest, verifies it at the same time."""
    if callable(dtype):  # before the threads, as it may measure how fast this machine is
        dtype = chosen_dtype(folder, dtype)
    if not (folder / MANIFEST).exists():
        return load_folder(folder, dtype=dtype, **options)
    with ThreadPoolExecutor(1) as pool, one_thread():
        loaded = pool.submit(load_folder, folder, dtype=dtype, **options)
        verify_checkpoint(folder, training=False)  # raises first, and names the damaged file
        return loaded.result()


def chosen_dtype(folder: Path, choose: Callable[[ModelConfig, int], torch.dtype]) -> torch.dtype:
    """Returns the type that `choose` returns for the model of a folder; float32 if the folder is damaged, or describes
    a model larger than its files: load_folder and the manifest say what is wrong."""
    try:
        stored = open_model(folder)
        size = sum(path.stat().st_size for path in stored.files)
    except (Error, OSError):
        return torch.float32
    fits = not stored.config.problems() and count_parameters(stored.config, stored.vocab_size) <= size
    return choose(stored.config, stored.vocab_size) if fits else torch.float32


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Returns a context in which torch uses one thread: more threads would wait for the cores that hash files. The
    setting belongs to the process, so the context admits one caller at a time."""
    with THREADS_LOCK:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def load_folder(folder: Path, **options: Any) -> Loaded:
    """Returns what load_pretrained returns for the model at `folder`, a result of find_model_folder, without verifying
    it. `options` are those of load_model."""
    return load_stored(open_model(folder), **options)


def load_stored(stored: StoredModel, **options: Any) -> Loaded:
    """Returns what load_pretrained returns for a stored model. Raises IntegrityError if model and tokenizer do not
    belong together. `options` are those of load_model."""
    model = load_model(stored, **options)
    tokenizer = tokenizer_of(stored)
    if model.vocab_size < tokenizer.vocab_size:
        raise IntegrityError(
            f"{stored.path}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.vocab_size}; "
            "they do not belong together"
        )
    model.vocab_size = tokenizer.vocab_size
    model.token.weight.detach()[tokenizer.vocab_size :] = 0  # padding of the vocabulary that some checkpoints store
    return model, tokenizer, read_json(stored.path / "generation_config.json") or {}


def tokenizer_of(stored: StoredModel) -> Tokenizer:
    """Returns the Tokenizer of a stored model. If its folder has no tokenizer but the model has the vocabulary size of
    GPT-2, returns GPT-2's tokenizer."""
    folder = stored.tokenizer_folder
    if stored.vocab_size not in GPT2_VOCABULARIES or has_tokenizer(folder):
        return load_tokenizer(folder)
    note("info", f"{stored.path} holds no tokenizer; assuming gpt2's")
    return load_tokenizer("gpt2")
