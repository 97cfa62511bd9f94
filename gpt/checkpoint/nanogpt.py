"""Checkpoints of nanoGPT (ckpt.pt), read as Hugging Face's GPT-2: the same tensors, with another layout of matrices.

    {"model": name -> tensor, "model_args": {"n_layer": 6, …, "bias": False, "vocab_size": 50304}, "optimizer": …, …}

nanoGPT's GELU is the exact one, GPT-2's its tanh form: logits of a trained model differ in the fourth digit."""

from pathlib import Path

import torch

from gpt.checkpoint.pickles import read_pickle
from gpt.checkpoint.weights import (
    GPT2_VOCABULARIES,
    HEAD,
    MASKS,
    PREFIX,
    TRANSPOSED,
    StoredModel,
    Tensors,
    huggingface_name,
    only_tensors,
)
from gpt.errors import InputError, IntegrityError
from gpt.model import ModelConfig
from gpt.text.foreign import has_tokenizer

CHECKPOINT = "ckpt.pt"
SUFFIXES = (".pt", ".pth", ".ckpt")
CHARACTERS = "meta.pkl"
COMPILED = "_orig_mod."  # before the names that torch.compile left
MATRICES = tuple(map(huggingface_name, TRANSPOSED))  # (out, in) here, (in, out) in Hugging Face's layout


def open_checkpoint(path: Path) -> StoredModel:
    """Returns the model of a checkpoint of nanoGPT. Raises InputError if it holds something else, or a model without
    a tokenizer that is read; IntegrityError for a damaged file."""
    values = read_pickle(path)
    if not isinstance(values, dict) or not {"model", "model_args"} <= values.keys():
        raise InputError(f"{path}: not a checkpoint of nanoGPT, which has model and model_args; give a GPT-2 folder")
    settings = values["model_args"]
    try:
        sizes = {name: int(settings[name]) for name in ("n_layer", "n_head", "n_embd", "block_size")}
        config = ModelConfig(**sizes, dropout=float(settings.get("dropout", 0.0)))
        vocab_size = int(settings["vocab_size"])
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise IntegrityError(f"{path}: no model_args of nanoGPT ({error!r}); use another checkpoint") from None
    check_tokenizer(path, vocab_size)
    only_tensors(path, values["model"])
    has_biases = bool(settings.get("bias", True))

    def read() -> Tensors:  # opens the file anew: `values` would keep it open for as long as the result lives
        return in_huggingface_layout(read_pickle(path)["model"], has_biases)

    return StoredModel(path, config, vocab_size, [path], path.parent, read)


def check_tokenizer(path: Path, vocab_size: int) -> None:
    """Raises InputError if the model has another tokenizer than GPT-2's or one whose files are beside it."""
    characters = path.with_name(CHARACTERS)
    if characters.exists():
        what = f"its tokens are characters ({characters}, a pickle)"
    elif has_tokenizer(path.parent) or vocab_size in GPT2_VOCABULARIES:
        return
    else:
        what = f"{vocab_size} ids, no tokenizer beside it (of characters, where {CHARACTERS} is beside the data)"
    raise InputError(f"{path}: {what}, which is not read; train a model of such text with --tokenizer byte")


def in_huggingface_layout(stored: Tensors, has_biases: bool) -> Tensors:
    """Returns the tensors of nanoGPT's state dict as Hugging Face stores them, views where possible. A model without
    biases gets biases of 0."""
    tensors = {}
    for stored_name, value in stored.items():
        name = stored_name.removeprefix(COMPILED).removeprefix(PREFIX)
        if MASKS.match(name):
            continue
        tensors[name] = value.t() if name.endswith(MATRICES) and value.dim() == 2 else value
        if not has_biases and name not in (HEAD, "wte.weight", "wpe.weight"):
            tensors[name.removesuffix("weight") + "bias"] = torch.zeros(len(value))
    return tensors
