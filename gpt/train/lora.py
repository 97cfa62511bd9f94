"""LoRA (Hu et al. 2021, arXiv:2106.09685): the weights of a model are frozen, and small adapters beside its matrices
are trained.

    y = x @ W.T + bias  +  scale * dropout(x) @ A.T @ B.T       scale = lora_alpha / lora_rank

    A     (rank, in)    random at first, as in PEFT: uniform in +-1 / sqrt(in)
    B     (out, rank)   0 at first, so that training begins at the frozen model

A checkpoint is a plain model whose matrices are merged: W + scale * B @ A. Rounding makes it impossible to compute W
from these, so that a checkpoint also holds the frozen matrices, as long as it holds the state of the optimizer."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpt.checkpoint.adapters import ADAPTER, SIZES, delta, peft_name, peft_settings
from gpt.checkpoint.read import ADAPTER_FOLDER, FROZEN
from gpt.checkpoint.weights import huggingface_name, read_safetensors
from gpt.errors import IntegrityError
from gpt.model import GPT, ModelConfig
from gpt.text.foreign import ADAPTER_CONFIG
from gpt.train.state import take_tensor


def module_name(ours: str) -> str:
    """Returns Hugging Face's name of a module: module_name("blocks.0.mlp.fc") == "h.0.mlp.c_fc"."""
    return huggingface_name(f"{ours}.").removesuffix(".")


OURS = {module_name(ours): ours for ours in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")}  # the matrices of a block


@dataclass(frozen=True)
class LoraConfig:
    lora_rank: int = 0
    """LoRA: train adapters of this rank, and leave the weights of the model that --init gives as they are; the default
    lr is ten times that of fine-tuning; 0 = off"""
    lora_alpha: float = 32.0
    """adapters are multiplied by lora_alpha / lora_rank"""
    lora_dropout: float = 0.0
    """share of an adapter's inputs dropped in training"""
    lora_targets: str = "c_attn,c_proj,c_fc"
    """matrices that get adapters, by PEFT's names: c_attn, c_fc, c_proj (both of a block), attn.c_proj, mlp.c_proj"""

    def problems(self) -> list[str]:
        """Returns what is wrong with these values, in words; empty if nothing is."""
        if not self.lora_rank:
            usual = LoraConfig()
            changed = [name for name, value in vars(self).items() if value != getattr(usual, name)]
            return [f"{name} {getattr(self, name)} has no effect without lora_rank" for name in changed]
        problems = [f"lora_rank {self.lora_rank} must be 0 or more"] if self.lora_rank < 0 else []
        if self.lora_alpha <= 0:
            problems.append(f"lora_alpha {self.lora_alpha} must be above 0")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout {self.lora_dropout} must be at least 0 and below 1")
        unknown = [target for target in self.targets if not kinds_of(target)]
        if unknown or not self.targets:
            problems.append(f"lora_targets {self.lora_targets!r}: give one or more of c_attn,c_proj,c_fc")
        return problems

    def conflicts(self, model: ModelConfig, init: str, optimizer: str, freeze: str) -> list[str]:
        """Returns how these values contradict other settings, in words; empty if they do not."""
        if self.lora_rank <= 0:
            return []
        problems = []
        if not init:
            problems.append("lora_rank needs a model whose weights stay: give one with --init")
        if self.lora_rank > model.n_embd:
            problems.append(f"lora_rank {self.lora_rank} is above n_embd {model.n_embd}, the rank of the matrices")
        if optimizer == "muon":
            problems.append("optimizer muon is for whole matrices, not for adapters: use adamw with lora_rank")
        if freeze:
            problems.append("freeze has no effect with lora_rank: all weights but the adapters are frozen")
        return problems

    @property
    def targets(self) -> list[str]:
        return [target.strip() for target in self.lora_targets.split(",") if target.strip()]

    @property
    def kinds(self) -> list[str]:
        """The matrices of a block that get adapters, by Hugging Face's names."""
        if not self.lora_rank:
            return []
        return [kind for kind in SIZES if any(kind in kinds_of(target) for target in self.targets)]

    def count_parameters(self, model: ModelConfig) -> int:
        """Returns the number of parameters of all adapters of a model."""
        return model.n_layer * sum(self.lora_rank * model.n_embd * sum(SIZES[kind]) for kind in self.kinds)


def kinds_of(target: str) -> list[str]:
    """Returns the matrices of a block that PEFT takes `target` for, by Hugging Face's names, which end with it."""
    return [kind for kind in SIZES if f".{kind}".endswith(f".{target}")]


class LoraLinear(nn.Module):
    """A linear layer, frozen, with an adapter. Its weight and bias keep the names that they have in `layer`."""

    def __init__(self, layer: nn.Linear, config: LoraConfig):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = nn.Parameter(torch.empty(config.lora_rank, layer.in_features))
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, config.lora_rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.config, self.scale = config, config.lora_alpha / config.lora_rank

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        y = F.linear(x, self.weight, self.bias)
        low = F.linear(F.dropout(x, self.config.lora_dropout, self.training), self.lora_A)
        # In place: two more tensors of this size for each layer would leave holes in the heap of a CPU.
        y.view(-1, y.shape[-1]).addmm_(low.flatten(0, -2), self.lora_B.to(y.dtype).t(), alpha=self.scale)
        return y

    def merged_weight(self, for_file: bool) -> Tensor:  # (out, in)
        device = "cpu" if for_file else self.weight.device
        weight, a, b = (tensor.to(device) for tensor in (self.weight, self.lora_A, self.lora_B))
        weight = weight + delta(a, b, self.scale).t()
        return weight.t().contiguous().t() if for_file else weight


def add_adapters(model: GPT, config: LoraConfig, seed: int = 0) -> None:
    """Freezes the weights of `model` and adds adapters, whose values depend on `seed`; does nothing if `config` is
    off."""
    if not config.lora_rank:
        return
    torch.manual_seed(seed)
    model.requires_grad_(False)
    for block in model.blocks:
        for kind in config.kinds:
            layer = block.get_submodule(OURS[kind])
            assert isinstance(layer, nn.Linear)
            block.set_submodule(OURS[kind], LoraLinear(layer, config))


def adapted_layers(model: GPT) -> Iterator[tuple[str, LoraLinear]]:
    """Yields name and layer of each layer with an adapter: "blocks.0.attn.qkv", …"""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


@torch.no_grad()
def merged(model: GPT, for_file: bool = False) -> GPT:
    """Returns a plain GPT with the adapters of `model` merged. Shares the memory of all other weights with `model`,
    which is returned itself if it has no adapters. With `for_file`, the merged matrices are on the CPU, transposed in
    memory as in files: saving the model needs no memory of a GPU, and no second copy."""
    layers = dict(adapted_layers(model))
    if not layers:
        return model
    with torch.device("meta"):
        plain = GPT(model.config, model.vocab_size)
    weights = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
    weights |= {f"{name}.weight": layer.merged_weight(for_file) for name, layer in layers.items()}
    plain.load_state_dict(weights, assign=True)
    return plain.train(model.training)


# ---- in checkpoints


def adapter_files(model: GPT, base: dict[str, str] | None) -> dict[str, Any]:
    """Returns name -> content of the files that a checkpoint of a model with adapters has beside those of its merged
    model: the adapter in PEFT's format, and the frozen matrices; {} for a model without adapters. `base` is the record
    of the base model."""
    layers = dict(adapted_layers(model))
    if not layers:
        return {}
    assert base
    config = next(iter(layers.values())).config
    settings = peft_settings(base["model"], config.lora_rank, config.lora_alpha, config.lora_dropout, config.kinds)
    tensors = {name: value.detach().cpu() for name, value in adapter_parameters(model)}
    frozen = {f"{name}.weight": layer.weight.detach().cpu() for name, layer in layers.items()}
    folder = ADAPTER_FOLDER
    return {f"{folder}/{ADAPTER_CONFIG}": settings, f"{folder}/{ADAPTER}": tensors, FROZEN: frozen}


def adapter_parameters(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """Yields PEFT's name and the parameter for each A and B."""
    for name, layer in adapted_layers(model):
        yield peft_name(module_name(name), "A"), layer.lora_A
        yield peft_name(module_name(name), "B"), layer.lora_B


@torch.no_grad()
def restore_adapters(model: GPT, config: LoraConfig, folder: Path) -> None:
    """Makes the merged `model` of the step folder `folder` what it was in training: puts the frozen matrices in the
    place of the merged ones, and adds the adapters. Does nothing if `config` is off. Raises IntegrityError for a tensor
    that is missing, unknown or of another shape."""
    if not config.lora_rank:
        return
    add_adapters(model, config)
    frozen = {f"{name}.weight": layer.weight for name, layer in adapted_layers(model)}
    read_into(frozen, folder / FROZEN)
    read_into(dict(adapter_parameters(model)), folder / ADAPTER_FOLDER / ADAPTER)


def read_into(targets: dict[str, Tensor], path: Path) -> None:
    """Copies the tensors of a file to those of the same names in `targets`. Raises IntegrityError as restore_adapters
    does."""
    tensors = read_safetensors(path)
    for name, target in targets.items():
        target.copy_(take_tensor(tensors, name, tuple(target.shape), path))
    if tensors:
        raise IntegrityError(f"{path}: {min(tensors)} is unknown; use another checkpoint")
