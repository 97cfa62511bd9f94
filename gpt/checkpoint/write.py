"""Writes checkpoints: step folders that are Hugging Face GPT-2 folders, with training/ for an exact continuation.

A folder has a temporary name until all of it is on the disk. training/manifest.json, written last, names every other
file with its size and sha256."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gpt.checkpoint.read import FORMAT_VERSION, MANIFEST, sealed
from gpt.checkpoint.weights import WEIGHTS, all_finite, config_json, weights_of
from gpt.errors import NonFiniteError, ResourceError
from gpt.files import remove_tree, set_mode, sha256_of, sync_folder, write_durably
from gpt.model import GPT
from gpt.text.tokenizer import Tokenizer, save_tokenizer

Json = dict[str, Any]
Tensors = dict[str, Tensor]


def save_checkpoint(
    out: Path, step: int, model: GPT, tokenizer: Tokenizer, files: dict[str, Any], sampling: Json, about: Json
) -> Path:
    """Writes `out/step-<step>`, whole or not at all, and returns its path. `files` are the files of the trainer: see
    write_files. `sampling` are the defaults for generation_config.json, `about` further entries of the manifest. Raises
    NonFiniteError for weights that are not finite, ResourceError if writing fails."""
    weights = weights_of(model)
    damaged = [name for name, value in weights.items() if not all_finite(value)]
    if damaged:
        raise NonFiniteError(f"non-finite values in {damaged[0]} at step {step}: not saved; see earlier checkpoints")
    target = out / f"step-{step:09d}"
    temporary = target.with_name(target.name + ".tmp")
    try:
        remove_tree(temporary)
        (temporary / "training").mkdir(parents=True)
        write_model(temporary, weights, model, tokenizer, sampling)
        write_files(temporary, files)
        manifest = {"format_version": FORMAT_VERSION, "step": step, "tokenizer": tokenizer.manifest_entry, **about}
        write_json(temporary / MANIFEST, sealed(manifest | {"files": make_durable(temporary)}))
        remove_tree(target)  # a damaged save of the same step
        os.rename(temporary, target)
        sync_folder(out)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk by its own error
        shutil.rmtree(temporary, ignore_errors=True)
        raise writing_failed(target, error, needs=3 * sum(value.nbytes for value in weights.values())) from None
    return target


def write_model(folder: Path, weights: Tensors, model: GPT, tokenizer: Tokenizer, sampling: Json) -> None:
    """Writes the files of a checkpoint that Hugging Face reads: weights, settings and tokenizer. All of `weights` have
    the same type."""
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    ids = tokenizer.role_ids
    first, *others = ids["eos_token_id"]
    one_eos = ids | {"eos_token_id": first}  # some programs read only one id from config.json
    dtype = next(iter(weights.values())).dtype
    write_json(folder / "config.json", config_json(model.config, model.vocab_size, one_eos, dtype))
    write_json(folder / "generation_config.json", {"do_sample": True, **sampling, **(ids if others else one_eos)})
    save_tokenizer(tokenizer, folder, model_max_length=model.config.block_size)


def write_files(folder: Path, files: dict[str, Any]) -> None:
    """Writes `files`, name -> content, into `folder`: tensors by name as safetensors, plain data as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".json":
            write_json(path, content)
        else:
            save_file(content, path)


def write_json(path: Path, values: Json) -> None:
    """Writes or replaces a JSON file durably. The file ends without a newline, so that a missing last byte is always
    noticed."""
    write_durably(path, json.dumps(values, indent=2, ensure_ascii=False))


def make_durable(folder: Path) -> dict[str, Json]:
    """Flushes the files and folders below `folder` to the disk, gives files the permissions of new files, and returns
    relative name -> entry of the manifest."""
    mode = (folder / "config.json").stat().st_mode  # safetensors makes files that only the owner can read
    entries = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        set_mode(path, mode)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        entries[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    for path in sorted({(folder / name).parent for name in entries}, reverse=True):  # a folder after those in it
        sync_folder(path)
    return entries


def writing_failed(target: Path, error: Exception, needs: int) -> ResourceError:
    """Returns the error for a checkpoint of about `needs` bytes that could not be written."""
    free = shutil.disk_usage(target.parent).free if target.parent.is_dir() else 0
    reason = getattr(error, "strerror", None) or error
    return ResourceError(
        f"{target}: writing failed: {reason} (needs {needs / 1e9:.3f} GB, {free / 1e9:.3f} GB free); "
        "free some space or make it writable"
    )
