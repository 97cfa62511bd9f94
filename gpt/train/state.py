"""What training changes and a checkpoint holds: State, and its tensors by name."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt.checkpoint.read import OPTIMIZER, Checkpoint
from gpt.checkpoint.weights import read_safetensors
from gpt.errors import IntegrityError
from gpt.model import GPT, REFERENCE, Ops
from gpt.train.budget import Progress
from gpt.train.optim import LossScaler, Optimizer, state_names


@dataclass
class State:
    """The model in training, with all that an exact continuation needs."""

    model: GPT
    optimizer: Optimizer
    scaler: LossScaler
    progress: Progress
    ops: Ops = REFERENCE


def optimizer_tensors(model: GPT, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Returns an optimizer's state as name -> CPU tensor, such as "exp_avg.blocks.0.ln_1.bias", without the padding of
    the vocabulary."""
    tensors = {}
    for name, parameter in trained_parameters(model):
        for key, value in optimizer.state[parameter].items():
            if name == "token.weight" and value.dim():
                value = value[: model.vocab_size]
            tensors[f"{key}.{name}"] = value.detach().cpu().contiguous()
    return tensors


def load_optimizer(optimizer: Optimizer, model: GPT, checkpoint: Checkpoint) -> None:
    """Fills an optimizer's state from a checkpoint. Raises IntegrityError for a tensor that is missing, unknown or of
    another shape."""
    path = checkpoint.path / OPTIMIZER
    tensors = read_safetensors(path)
    for name, parameter in trained_parameters(model):
        rows = model.vocab_size if name == "token.weight" else len(parameter)
        state = {}
        for key in state_names(optimizer, parameter):
            shape: tuple[int, ...] = () if key == "step" else (rows, *parameter.shape[1:])
            value = take_tensor(tensors, f"{key}.{name}", shape, path)
            state[key] = value.to(parameter.device) if key == "step" else padded(value, parameter)
        optimizer.state[parameter] = state
    if tensors:
        raise IntegrityError(f"{path}: {min(tensors)} is unknown; use another checkpoint")


def trained_parameters(model: GPT) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields name and parameter of all that are not frozen."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def take_tensor(tensors: dict[str, torch.Tensor], name: str, shape: tuple, path: Path) -> torch.Tensor:
    """Removes a tensor from `tensors` and returns it. Raises IntegrityError if it is missing or has another shape."""
    value = tensors.pop(name, None)
    if value is None:
        raise IntegrityError(f"{path}: {name} is missing; use another checkpoint")
    if tuple(value.shape) != shape:
        raise IntegrityError(f"{path}: {name} is {tuple(value.shape)}, model wants {shape}")
    return value


def padded(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Returns `value` on the parameter's device, with zero rows added for the padding of the vocabulary."""
    full = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    full[: len(value)] = value.to(parameter.device)
    return full.detach()
