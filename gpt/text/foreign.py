"""Folders that lead to a model, and files that are not a GPT-2 with a tokenizer: the line that says what helps."""

import fnmatch
import os
import re
from pathlib import Path

from gpt.errors import note
from gpt.files import read_limited

TRAINER_FOLDER = re.compile(r"^checkpoint-(\d+)$")
HUB_CACHE = re.compile(r"^models--(.+)$")
ADAPTER_CONFIG = "adapter_config.json"
FOREIGN_TOKENIZERS = {
    "vocab.txt": "WordPiece",
    "spiece.model": "sentencepiece",
    "sentencepiece.bpe.model": "sentencepiece",
    "spm.model": "sentencepiece",
    "tokenizer.model": "sentencepiece",
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    *FOREIGN_TOKENIZERS,
)
MODEL = "from transformers import AutoModelForCausalLM as M; M.from_pretrained"
SAFE = "give a folder with config.json and model.safetensors"
# Pattern of a file's name -> what the file holds; what helps, where {folder}, {name} and {new} are put in.
FORMATS = {
    "pytorch_model*.bin": (
        "pickled weights without the files beside them",
        "give a folder with config.json and, for several files, pytorch_model.bin.index.json",
    ),
    "*.h5": (
        "weights of TensorFlow",
        f'with transformers 4: python -c "{MODEL}({{folder}}, from_tf=True).save_pretrained({{folder}})"',
    ),
    "*.msgpack": (
        "weights of Flax",
        f'with transformers 4: python -c "{MODEL}({{folder}}, from_flax=True).save_pretrained({{folder}})"',
    ),
    "*.gguf": (
        "a model of llama.cpp",
        f'write it as safetensors: python -c "{MODEL}({{folder}}, gguf_file={{name}}).save_pretrained({{new}})"',
    ),
    "*.onnx": ("an exported graph", "give the folder that it was exported from"),
    "*.ckpt*.index": ("weights in OpenAI's own format", f"give the hub's gpt2, or {SAFE}"),
    "*.bin": ("pickled weights", SAFE),
    "*.p[tk]*": ("pickled weights", f"give the file itself if nanoGPT wrote it, else {SAFE}"),
    "*.ckpt": ("pickled weights", SAFE),
}


def has_tokenizer(folder: Path) -> bool:
    """Returns whether a folder has any file of a tokenizer."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def tokenizer_home(folder: Path) -> Path:
    """Returns the folder with the tokenizer of the model in `folder`: the folder itself; for a checkpoint of a Trainer
    without one, the folder above it, where some scripts save it."""
    above = TRAINER_FOLDER.match(folder.name) and not has_tokenizer(folder) and has_tokenizer(folder.parent)
    return folder.parent if above else folder


def models_within(folder: Path) -> list[Path]:
    """Returns the model folders that a folder leads to, the one to take first: the checkpoints in a Trainer's output
    folder, newest first; the snapshot of a model in the hub's cache; none for any other folder, as one with a model."""
    if (folder / "config.json").exists() or (folder / ADAPTER_CONFIG).exists():
        return []
    if HUB_CACHE.match(folder.name) and (folder / "snapshots").is_dir():
        return snapshots(folder)
    steps = [path for path in folder.iterdir() if TRAINER_FOLDER.match(path.name) and path.is_dir()]
    return sorted(steps, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def snapshots(folder: Path) -> list[Path]:
    """Returns the snapshot of a model in the hub's cache that its refs/main names, else the newest; none if there is
    none."""
    named = (read_limited(folder / "refs/main") or b"").decode("utf-8", "replace").strip()
    known = {path.name: path for path in (folder / "snapshots").iterdir() if path.is_dir()}
    newest = sorted(known.values(), key=lambda path: path.stat().st_mtime)[-1:]
    return [known[named]] if named in known else newest


def tell_model_within(folder: Path, model: Path) -> None:
    """Prints which model is taken of those that `folder` leads to."""
    what = "the hub's cache" if HUB_CACHE.match(folder.name) else "a Trainer's output folder"
    note("info", f"{folder}: {what}; taking {model.relative_to(folder)}")


def kind_of_weights(path: Path) -> str | None:
    """Returns "what it holds; what to do" for a file with weights in a format that is not read; for a folder, "name: "
    and the same of its first such file; None if there is none."""
    is_file = path.is_file()
    names = [path.name] if is_file else sorted(entry.name for entry in path.iterdir())
    folder = path.parent if is_file else path
    for pattern, (kind, advice) in FORMATS.items():
        for name in fnmatch.filter(names, pattern):
            places = {"folder": repr(str(folder)), "name": repr(name), "new": repr(f"{os.path.splitext(path)[0]}-gpt2")}
            return f"{'' if is_file else f'{name}: '}{kind}; {advice.format(**places)}"
    return None
