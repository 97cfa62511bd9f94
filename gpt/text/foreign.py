"""Recognises folders and files that hold something else than a GPT-2 with a tokenizer, and says what helps."""

import fnmatch
import os
import re
from pathlib import Path

from gpt.files import read_json

TRAINER_FOLDER = re.compile(r"^checkpoint-(\d+)$")
HUB_CACHE = re.compile(r"^models--(.+)$")
MODEL = "from transformers import AutoModelForCausalLM as M; M.from_pretrained"
SAFE = "give a folder with config.json and model.safetensors"
# Pattern of a file's name -> what the file holds; what helps, where {folder}, {name} and {new} are put in.
FORMATS = {
    "pytorch_model*.bin": (
        "pickled weights, which are not read",
        f'write them as safetensors: python -c "{MODEL}({{folder}}).save_pretrained({{folder}})"',
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
    "*ckpt*.pt": ("a pickled checkpoint, as nanoGPT writes it, which is not read", SAFE),
    "*.bin": ("pickled weights, which are not read", SAFE),
    "*.p[tk]*": ("pickled weights, which are not read", SAFE),
    "*.ckpt": ("pickled weights, which are not read", SAFE),
}


def kind_of_folder(folder: Path) -> str | None:
    """Returns "what the folder is; what to do", or None for a folder that it does not recognise: a Trainer's output
    folder, an adapter, the hub's cache."""
    steps = [path for path in folder.iterdir() if TRAINER_FOLDER.match(path.name)]
    if steps:
        newest = max(steps, key=lambda path: int(path.name.split("-")[1]))
        return f"a Trainer's output folder; give its newest checkpoint, {newest}"
    if (folder / "adapter_config.json").exists():
        return kind_of_adapter(folder)
    snapshots = sorted((folder / "snapshots").iterdir()) if HUB_CACHE.match(folder.name) else []
    if snapshots:
        name = folder.name.removeprefix("models--").replace("--", "/")
        return f"the hub's cache of {name}; give {name}, or {snapshots[-1]}"
    return None


def kind_of_adapter(folder: Path) -> str:
    """Returns "what the folder is; what to do" for a folder that peft wrote."""
    base = (read_json(folder / "adapter_config.json") or {}).get("base_model_name_or_path")
    new = f"{folder}-merged"
    return (
        f"an adapter for {base}, not a model; merge them and give {new}: "
        'python -c "from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; '
        f"M.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained({new!r}); "
        f'T.from_pretrained({base!r}).save_pretrained({new!r})"'
    )


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
