"""Hugging Face's GPT-2 folders: names and layout of the weights, config.json. A GPT, read from any stored model."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gpt.checkpoint.pickles import read_pickle
from gpt.device import empty_together
from gpt.errors import InputError, IntegrityError, ResourceError
from gpt.files import inside, read_json, refuse_lfs_pointer, sha256_of
from gpt.model import GPT, ModelConfig
from gpt.text.foreign import kind_of_weights, tokenizer_home

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
GPT2_VOCABULARIES = range(50257, 50305)  # GPT-2's size, up to its padding to a multiple of 64

PREFIX = "transformer."
NAMES = {  # part of our name -> part of Hugging Face's name
    "token.": "wte.",
    "position.": "wpe.",
    "blocks.": "h.",
    "attn.qkv.": "attn.c_attn.",
    "attn.proj.": "attn.c_proj.",
    "mlp.fc.": "mlp.c_fc.",
    "mlp.proj.": "mlp.c_proj.",
}
TRANSPOSED = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc.weight", "mlp.proj.weight")  # GPT-2 stores (in, out)
HEAD = "lm_head.weight"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OTHER_HEADS = ("score.", "classifier.", "qa_outputs.", "multiple_choice_head.", "v_head.")
HEADER_LIMIT = 1 << 22  # bytes; an optimizer needs 3,500 per layer, and checking 4 MiB takes 15 MB and 0.2 s
MASKS = re.compile(r"^h\.\d+\.attn\.(bias|masked_bias)$")  # buffers in old files: causal masks

# Settings of config.json that change the architecture -> GPT-2's value; other values that are equivalent to it.
GPT2_ONLY = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "layer_norm_epsilon": 1e-5,
}
EQUIVALENT = {"activation_function": "gelu_pytorch_tanh"}

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class StoredModel:
    """A GPT-2 on disk, in any form that is read."""

    path: Path
    """the folder or file"""
    config: ModelConfig
    vocab_size: int
    files: list[Path]
    """the files that hold the weights"""
    tokenizer_folder: Path
    """the folder for its tokenizer's files; it may have none"""
    read: Callable[[], Tensors]
    """returns the tensors by Hugging Face's names without PREFIX, in Hugging Face's layout"""
    deltas: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    """name of a tensor -> function that returns, in fp32, what an adapter adds to it"""

    def sha256(self) -> str:
        """Returns a sha256 over the files: it identifies the base model of a fine-tune."""
        return hashlib.sha256("".join(map(sha256_of, self.files)).encode()).hexdigest()


# ---- from our weights to Hugging Face's


def huggingface_name(name: str) -> str:
    """Returns Hugging Face's name for a parameter: huggingface_name("blocks.3.mlp.fc.bias") == "h.3.mlp.c_fc.bias".
    Files have PREFIX before this name."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def as_stored(model: GPT, name: str, parameter: Tensor) -> Tensor:
    """Returns a view of parameter `name` in Hugging Face's layout: without padding rows, matrices as (in, out)."""
    if name == "token.weight":
        return parameter[: model.vocab_size]
    return parameter.t() if name.endswith(TRANSPOSED) else parameter


def weights_of(model: GPT, dtype: torch.dtype = torch.float32) -> Tensors:
    """Returns the tensors of model.safetensors: name -> contiguous tensor of type `dtype` on the CPU."""
    weights = {}
    for name, parameter in model.named_parameters():
        value = as_stored(model, name, parameter.detach())
        weights[PREFIX + huggingface_name(name)] = value.to("cpu", dtype).contiguous()
    return weights


def all_finite(value: Tensor) -> bool:
    """Returns whether every element is finite. Minimum and maximum propagate NaN, and take a tenth of the time of
    isfinite."""
    return bool(torch.stack(value.aminmax()).isfinite().all())


def config_json(
    config: ModelConfig, vocab_size: int, role_ids: dict[str, int], dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Returns the content of config.json for a model with this ModelConfig, vocabulary size, ids of the roles and type
    of the weights."""
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["GPT2LMHeadModel"],
        **GPT2_ONLY,
        "vocab_size": vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # llama.cpp's converter reads n_ctx
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "initializer_range": 0.02,
        "use_cache": True,
        **role_ids,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }


# ---- the files of a folder


def open_folder(folder: Path) -> StoredModel:
    """Returns the model of a Hugging Face GPT-2 folder. Raises InputError if config.json is missing or describes
    another architecture, or if there are no weights; IntegrityError if config.json or the index of the weights is
    malformed."""
    config, vocab_size = read_config(folder)
    files = weight_files(folder)
    return StoredModel(folder, config, vocab_size, files, tokenizer_home(folder), lambda: stored_weights(files))


def has_weights(folder: Path) -> bool:
    """Returns whether a folder has weights of a model, whether they can be read or not."""
    return any((folder / name).exists() for name in (WEIGHTS, INDEX, PICKLED, PICKLED_INDEX))


def weight_files(folder: Path) -> list[Path]:
    """Returns the paths of a folder's weights: a single file, or the shards that an index lists; safetensors before
    pickled ones. Raises InputError if there are none, IntegrityError if the index is malformed."""
    for name, index_name in ((WEIGHTS, INDEX), (PICKLED, PICKLED_INDEX)):
        if (folder / name).exists():
            return [folder / name]
        index = read_json(folder / index_name)
        if index is not None:
            try:
                return [inside(folder, shard) for shard in sorted(set(index["weight_map"].values()))]
            except (KeyError, AttributeError, TypeError):
                raise IntegrityError(f"{folder / index_name}: not a weight index; restore it") from None
    raise InputError(f"{folder}: {kind_of_weights(folder) or f'no {WEIGHTS}; give a GPT-2 checkpoint folder'}")


def read_tensors(path: Path) -> Tensors:
    """Returns the tensors of a safetensors file, or of a file of torch.save. Raises as their readers do."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return only_tensors(path, read_pickle(path))


def only_tensors(path: Path, values: Any) -> Tensors:
    """Returns `values`, what the file `path` holds. Raises IntegrityError unless they are name -> tensor."""
    if not isinstance(values, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in values.items()
    ):
        raise IntegrityError(f"{path}: holds other things than tensors by name; use another checkpoint")
    return values


def read_safetensors(path: Path) -> Tensors:
    """Returns the tensors of a file. They are mapped into memory, so values are read at their first use.

    Raises IntegrityError if the file is missing or malformed, has a header above HEADER_LIMIT or gives a name twice
    (stricter than the safetensors library), ResourceError if it cannot be read."""
    try:
        refuse_lfs_pointer(path)
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > HEADER_LIMIT:
                raise ValueError("the header is too long")
            json.loads(file.read(size), object_pairs_hook=refuse_repeated_names)
        return load_file(path)
    except (SafetensorError, ValueError, TypeError, RecursionError):
        raise IntegrityError(f"{path}: not a safetensors file; restore it or use another checkpoint") from None
    except FileNotFoundError:
        raise IntegrityError(f"{path}: missing; restore it or use another checkpoint") from None
    except OSError as error:
        raise ResourceError(f"{path}: {error}; make it readable") from None


def refuse_repeated_names(pairs: list[tuple[str, Any]]) -> None:
    """Raises ValueError if a name is given twice in a JSON object. To be the `object_pairs_hook` of json.loads."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is given twice")


def stored_weights(files: list[Path]) -> Tensors:
    """Returns name without PREFIX -> tensor, for the weight files of a folder. Leaves out the buffers of MASKS. Raises
    IntegrityError if a name is stored twice or a file is damaged."""
    tensors: Tensors = {}
    for path in files:
        for stored_name, value in read_tensors(path).items():
            name = stored_name.removeprefix(PREFIX)
            if name in tensors:
                raise IntegrityError(f"{path}: {name} is stored twice; restore the folder")
            if not MASKS.match(name):
                tensors[name] = value
    if HEAD in tensors:  # the tied weight may be stored under either name
        tensors.setdefault("wte.weight", tensors[HEAD])
    return tensors


# ---- from Hugging Face's weights to ours


def read_config(folder: Path) -> tuple[ModelConfig, int]:
    """Returns (ModelConfig, vocabulary size) of config.json. Raises InputError if the file is missing or describes
    another architecture, IntegrityError if it is malformed."""
    values = read_json(folder / "config.json")
    if values is None:
        raise InputError(f"{folder}: no config.json; give a GPT-2 checkpoint folder, a run folder or a hub name")
    for name, wanted in GPT2_ONLY.items():
        if values.get(name, wanted) not in (wanted, EQUIVALENT.get(name, wanted)):
            raise InputError(f"{folder}: {name} is {values[name]!r}, GPT-2 has {wanted!r}; use another model")
    try:
        config = ModelConfig(
            n_layer=int(values["n_layer"]),
            n_head=int(values["n_head"]),
            n_embd=int(values["n_embd"]),
            block_size=int(values["n_positions"] if "n_positions" in values else values["n_ctx"]),
            dropout=float(values.get("resid_pdrop", 0.0)),
        )
        vocab_size = int(values["vocab_size"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise IntegrityError(f"{folder}/config.json: not a GPT-2 configuration ({error!r}); restore it") from None
    if values.get("n_inner") not in (None, 4 * config.n_embd):
        raise InputError(f"{folder}: n_inner is {values['n_inner']}, GPT-2 has 4 * n_embd; use another model")
    return config, vocab_size


@torch.no_grad()
def load_model(
    stored: StoredModel, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", together: bool = False
) -> GPT:
    """Returns the GPT of a stored model, with weights of type `dtype` on `device`. On a CPU, `together` puts the
    weights into one block of memory, which is faster to read and can be freed only as a whole. Does not verify a
    folder, as load_pretrained does. Raises InputError for another architecture, IntegrityError for damaged files."""
    config, vocab_size, tensors = stored.config, stored.vocab_size, stored.read()
    # Even on the meta device 10^9 layers take hours to build, and torch cannot count the bytes of much larger tensors.
    if config.n_layer > len(tensors) or max(config.n_embd, config.block_size, vocab_size) > 1 << 28:
        where = stored.path / "config.json" if stored.path.is_dir() else stored.path
        raise IntegrityError(f"{where}: describes a model larger than the weights; restore it")
    with torch.device("meta"):
        model = GPT(config, vocab_size)
    check_weights(stored.path, model, tensors)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    block = empty_together(shapes.values(), dtype) if together and torch.device(device).type == "cpu" else None
    targets = block or (torch.empty(shape, dtype=dtype, device=device) for shape in shapes.values())
    weights = dict(zip(shapes, targets, strict=True))
    tensors.pop(HEAD, None)
    for name, target in weights.items():
        stored_name = huggingface_name(name)
        value = tensors.pop(stored_name).float()  # what was read into memory is freed here
        if stored_name in stored.deltas:
            value = value + stored.deltas[stored_name]()
        fill(target, name, value, stored.path)
    model.load_state_dict(weights, assign=True)  # not Module.to_empty: it imports sympy, which takes half a second
    return model.eval()


def check_weights(folder: Path, model: GPT, tensors: Tensors) -> None:
    """Raises IntegrityError if tensors are missing, unknown or of another shape or type than in `model`, and names up
    to five of them; InputError if there is a head that differs from the embedding. `model` may be on the meta
    device."""
    shapes = {huggingface_name(n): tuple(as_stored(model, n, p).shape) for n, p in model.named_parameters()}
    problems = [f"{name} is missing" for name in shapes if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in shapes and name != HEAD]
    for name in [name for name in shapes if name in tensors]:
        shape, dtype = tuple(tensors[name].shape), tensors[name].dtype
        if shape != shapes[name]:
            problems.append(f"{name} is {shape}, model wants {shapes[name]}")
        if dtype not in FLOATS:
            problems.append(f"{name} is of type {dtype}; needs one of {', '.join(map(str, FLOATS))}")
    if problems and all(problem.endswith(" is unknown") and problem.startswith(OTHER_HEADS) for problem in problems):
        new = f"{folder}-lm"
        raise InputError(
            f"{folder}: holds {problems[0].split()[0]}, the head of a classifier or reward model; write the language "
            "model below it, and copy the tokenizer's files: "
            'python -c "from transformers import GPT2LMHeadModel as M; '
            f'M.from_pretrained({str(folder)!r}).save_pretrained({new!r})"'
        )
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise IntegrityError(f"weights do not fit: {folder}: {'; '.join(problems[:5])}{more}")
    if HEAD in tensors and not torch.equal(tensors[HEAD].float(), tensors["wte.weight"].float()):
        raise InputError(f"{folder}: untied head (lm_head.weight differs from wte.weight); not a GPT-2")


def fill(target: Tensor, name: str, value: Tensor, folder: Path) -> None:
    """Copies the stored fp32 `value` of our parameter `name` to its uninitialised tensor `target`, and sets padding to
    0. Raises IntegrityError if a value is not finite."""
    if not all_finite(value):
        raise IntegrityError(f"non-finite values in {huggingface_name(name)}: {folder}; use another checkpoint")
    if name.endswith(TRANSPOSED):
        target.copy_(value.to(target.dtype).to(target.device).t())  # torch transposes fast only within one type
    else:
        target[: len(value)] = value
        target[len(value) :] = 0  # padding of the vocabulary
