"""LoRA adapters in PEFT's format (Hu et al. 2021, arXiv:2106.09685): read, and merged into their base model; written.

An adapter changes a matrix W, as `x @ W` uses it, by two small ones:  W + scale * (B @ A).T

    A     lora_A, (r, in)            scale    lora_alpha / r; with rslora lora_alpha / sqrt(r)
    B     lora_B, (out, r)           r        rank, the number of rows of A

It may also hold whole tensors, such as the embedding of new tokens: they take the place of the base's."""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt.checkpoint.weights import HEAD, PREFIX, StoredModel, Tensors, read_tensors
from gpt.errors import InputError, IntegrityError
from gpt.files import read_json
from gpt.text.foreign import ADAPTER_CONFIG, has_tokenizer, tokenizer_home

ADAPTER = "adapter_model.safetensors"
PICKLED_ADAPTER = "adapter_model.bin"
PEFT_PREFIX = "base_model.model."
EMBEDDING = "wte.weight"
LORA_NAME = re.compile(r"(.+)\.lora_([AB])\.weight")
LITERAL = re.compile(r"[\w.]+")  # a name of modules, in patterns that PEFT reads as regular expressions
SIZES = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}  # in, out / n_embd
MODULE = re.compile(rf"h\.(0|[1-9][0-9]{{0,8}})\.({'|'.join(map(re.escape, SIZES))})")
# Settings under which W + scale * (B @ A).T is not the merged matrix, even if the names of the tensors are the usual.
OTHER_SETTINGS = ("use_dora", "use_qalora", "alora_invocation_tokens", "layer_replication", "target_parameters")
USUAL_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # others change the base's weights too


def base_name(folder: Path) -> str:
    """Returns the path or hub name of the base of the adapter in `folder`. Raises InputError if it names none."""
    name = (read_json(folder / ADAPTER_CONFIG) or {}).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(f"{folder}: {ADAPTER_CONFIG} names no base model; write its base_model_name_or_path")
    return name


def with_adapter(folder: Path, base: StoredModel) -> StoredModel:
    """Returns the model `base` with the adapter in `folder`, which is merged into it, tensor by tensor, when the model
    is loaded. Raises InputError for an adapter that is not supported or was made for another base, IntegrityError for
    damaged files."""
    settings = read_json(folder / ADAPTER_CONFIG) or {}
    check_settings(folder, settings)
    file = adapter_file(folder)
    pairs, whole = split_tensors(file, read_tensors(file))
    check_tensors(folder, settings, pairs, whole, base)
    deltas: dict[str, Callable[[], Tensor]] = {}
    for module, (a, b) in pairs.items():
        scale = scale_of(folder, settings, module, rank=len(a))
        deltas[f"{module}.weight"] = functools.partial(delta, a, b, scale)
    home = tokenizer_home(folder)

    def read() -> Tensors:
        tensors = base.read()
        if EMBEDDING in whole:
            tensors.pop(HEAD, None)  # the same tensor as the base's embedding
        return tensors | whole

    return replace(
        base,
        path=folder,
        vocab_size=len(whole[EMBEDDING]) if EMBEDDING in whole else base.vocab_size,
        files=[*base.files, file],
        tokenizer_folder=home if has_tokenizer(home) else base.tokenizer_folder,
        read=read,
        deltas=deltas,
    )


# ---- written


def peft_settings(base: str, rank: int, alpha: float, dropout: float, targets: list[str]) -> dict[str, Any]:
    """Returns the content of adapter_config.json for an adapter of the model `base`, a path or hub name; `targets` are
    the adapted modules of a block."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": targets,
        "fan_in_fan_out": True,  # GPT-2 stores its matrices as (in, out)
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def peft_name(module: str, half: str) -> str:
    """Returns PEFT's name for a tensor of an adapter: for ("h.0.mlp.c_fc", "A")
    "base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight"."""
    return f"{PEFT_PREFIX}{PREFIX}{module}.lora_{half}.weight"


# ---- what is supported


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raises InputError for an adapter of another kind, or with settings that are not supported."""
    kind, task, start = (settings.get(name) for name in ("peft_type", "task_type", "init_lora_weights"))
    if task not in (None, "CAUSAL_LM"):
        raise InputError(f"{folder}: task_type {task}, not a language model; give an adapter of CAUSAL_LM")
    others = [f"peft_type {kind}"] if kind != "LORA" else [name for name in OTHER_SETTINGS if settings.get(name)]
    if start not in USUAL_STARTS:
        others.append(f"init_lora_weights {start}")
    if others:
        raise unsupported(folder, others[0])


def unsupported(folder: Path, what: str) -> InputError:
    """Returns the error for an adapter that PEFT must merge."""
    new, base = f"{folder}-merged", base_name(folder)
    return InputError(
        f"{folder}: an adapter with {what}, which is not supported; merge it and give {new}: "
        'python -c "from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; '
        f"M.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained({new!r}); "
        f'T.from_pretrained({base!r}).save_pretrained({new!r})"'
    )


def check_tensors(
    folder: Path, settings: dict[str, Any], pairs: dict[str, tuple[Tensor, Tensor]], whole: Tensors, base: StoredModel
) -> None:
    """Raises InputError for tensors that are not supported, or that do not fit the model `base`."""
    for name in whole:
        if "lora_" in name or "token_adapter" in name:
            raise unsupported(folder, name)
    if EMBEDDING in whole and HEAD not in whole and not settings.get("ensure_weight_tying"):
        raise unsupported(folder, "an embedding that is not the head's")
    other = f"{folder}: made for another base than {base.path}"
    for module, (a, b) in pairs.items():
        match = MODULE.fullmatch(module)
        if not match:
            raise unsupported(folder, f"lora_A of {module}")
        layer, kind = match.groups()
        if int(layer) >= base.config.n_layer:
            raise InputError(f"{other}, which has {base.config.n_layer} layers and no {module}; give that base")
        wanted = tuple(base.config.n_embd * times for times in SIZES[kind])
        if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or (a.shape[1], len(b)) != wanted:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise InputError(f"{other}: {module} is {wanted} there, the adapter has {shapes}; give that base")


# ---- the tensors


def adapter_file(folder: Path) -> Path:
    """Returns the file with the tensors of an adapter. Raises InputError if there is none."""
    for path in (folder / ADAPTER, folder / PICKLED_ADAPTER):
        if path.exists():
            return path
    raise InputError(f"{folder}: {ADAPTER_CONFIG} without {ADAPTER}; restore it")


def split_tensors(file: Path, tensors: Tensors) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensors]:
    """Returns (module -> its A and B, name -> whole tensor) for the tensors of an adapter. Raises IntegrityError if A
    or B is missing."""
    halves: dict[str, dict[str, Tensor]] = {}
    whole = {}
    for stored_name, value in tensors.items():
        name = stored_name.removeprefix(PEFT_PREFIX).removeprefix(PREFIX).replace(".base_layer.", ".")
        if match := LORA_NAME.fullmatch(name):
            halves.setdefault(match[1], {})[match[2]] = value
        else:
            whole[name] = value
    if single := [module for module, pair in halves.items() if len(pair) == 1]:
        raise IntegrityError(f"{file}: {single[0]} has only one of lora_A and lora_B; restore the file")
    return {module: (pair["A"], pair["B"]) for module, pair in halves.items()}, whole


def delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Returns what an adapter adds to a matrix in Hugging Face's layout, (in, out), fp32. a: (r, in), b: (out, r)."""
    return (scale * (b.float() @ a.float())).t()


def scale_of(folder: Path, settings: dict[str, Any], module: str, rank: int) -> float:
    """Returns the factor of B @ A for a module. Raises InputError for a regular expression among the patterns, which
    could take for ever; IntegrityError for an alpha that is no number."""
    patterns = settings.get("alpha_pattern") or {}
    alpha = settings.get("lora_alpha", rank)
    try:
        for pattern, value in reversed(patterns.items()):
            if not LITERAL.fullmatch(pattern):
                raise unsupported(folder, f"the alpha_pattern {pattern!r}")
            if f".{PREFIX}{module}".endswith(f".{pattern}"):
                alpha = value
        return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError):
        raise IntegrityError(f"{folder / ADAPTER_CONFIG}: no number for lora_alpha; restore it") from None
