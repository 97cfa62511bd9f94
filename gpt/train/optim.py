"""Weight updates: parameter groups, the schedule of the learning rate, clipping, and the gate that keeps non-finite
gradients out."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from gpt.errors import NonFiniteError
from gpt.model import GPT
from gpt.train.adamw import AdamW
from gpt.train.muon import MuonAdamW
from gpt.train.ranks import Ranks

Optimizer = AdamW | MuonAdamW

WSD_DECAY = 0.2  # share of the run over which wsd decays when decay_steps is 0
SCALE_GROWTH_STEPS = 2000  # finite fp16 steps before the loss scale doubles
MOST_OVERFLOWS = 20  # fp16 steps in a row that overflow


@dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalized steps for the matrices between embedding and head, AdamW for the rest"""
    lr: float = 6e-4
    """peak learning rate; 0, only with --init: by the size of the model"""
    min_lr: float = 0.0
    """learning rate at the end of the schedule"""
    warmup_steps: float = 0.0
    """steps of linear warm-up; below 1 it is a share of the run"""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """shape of the decay from lr to min_lr; wsd stays at lr and decays linearly at the end"""
    decay_steps: float = 0.0
    """length of the decay at the end, in steps; below 1 a share of the run; 0 = all after warm-up (wsd: a fifth)"""
    beta1: float = 0.9
    """AdamW: decay of the mean gradient"""
    beta2: float = 0.95
    """AdamW: decay of the mean squared gradient"""
    eps: float = 1e-8
    """AdamW: added to the root of the mean squared gradient"""
    momentum: float = 0.95
    """Muon alone: decay of the mean gradient"""
    weight_decay: float = 0.1
    """decay of matrices per step, times the learning rate; biases and layer norms have none"""
    grad_clip: float = 1.0
    """largest norm of the gradient; 0 = no clipping"""
    freeze: str = ""
    """parameters that stay as they are: names or patterns, with commas between them, such as wte,wpe,h.0.*"""

    def problems(self) -> list[str]:
        """Returns what is wrong with these values, in words; empty if nothing is."""
        problems, usual = [], OptimConfig.momentum
        if self.lr < 0:
            problems.append(f"lr {self.lr} must be above 0")
        if self.min_lr < 0 or (self.lr and self.min_lr > max(self.lr, 0)):
            problems.append(f"min_lr {self.min_lr} must be between 0 and lr {self.lr}")
        for name in ("warmup_steps", "decay_steps"):
            value = getattr(self, name)
            if value < 0 or (value > 1 and value != int(value)):
                problems.append(f"{name} {value} must be a share of the run (below 1) or a whole number of steps")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name} {getattr(self, name)} must be at least 0 and below 1")
        if self.schedule == "constant" and (self.min_lr or self.decay_steps):
            problems.append("min_lr and decay_steps have no effect with schedule constant: set them to 0")
        if self.optimizer == "adamw" and self.momentum != usual:
            problems.append(f"momentum {self.momentum} has no effect with optimizer adamw: set it to {usual}")
        if self.eps <= 0:
            problems.append(f"eps {self.eps} must be above 0")
        for name in ("weight_decay", "grad_clip"):
            if getattr(self, name) < 0:
                problems.append(f"{name} {getattr(self, name)} must be 0 or more")
        return problems


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Returns the learning rate of step number `step` (from 0) in a run of `total_steps`: warm-up, then the decay of
    the schedule. The number is rounded to float32, the type in which a GPU receives it."""
    return float(np.float32(exact_learning_rate(config, step, total_steps)))


def exact_learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    warmup = config.warmup_steps * (total_steps if config.warmup_steps < 1 else 1)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    decay = config.decay_steps * (total_steps if config.decay_steps < 1 else 1)
    if decay == 0:
        decay = WSD_DECAY * total_steps if config.schedule == "wsd" else total_steps - warmup
    decay = min(decay, total_steps - warmup)
    done = min(1.0, max(0.0, step - (total_steps - decay)) / max(decay, 1))
    match config.schedule:
        case "constant":
            left = 1.0
        case "cosine":
            left = 0.5 * (1 + math.cos(math.pi * done))
        case "linear" | "wsd":
            left = 1 - done
    return config.min_lr + (config.lr - config.min_lr) * left


def make_optimizer(
    model: GPT, config: OptimConfig, dtype: torch.dtype = torch.float32, ranks: Ranks | None = None
) -> Optimizer:
    """Returns an AdamW, or a MuonAdamW, with weight decay on matrices and embeddings only. Every parameter that is not
    frozen is in exactly one group. `dtype` is the precision of Muon's products, which `ranks` (None: this process
    alone) share."""
    trained = [p for p in model.parameters() if p.requires_grad]
    in_blocks = set(model.blocks.parameters()) if config.optimizer == "muon" else set()
    hidden = [p for p in trained if p in in_blocks and p.dim() >= 2]
    others = set(trained) - set(hidden)
    matrices = [p for p in trained if p in others and p.dim() >= 2]
    vectors = [p for p in trained if p in others and p.dim() < 2]
    decay = config.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = AdamW(groups, config.beta1, config.beta2, config.eps)
    optimizer: Optimizer = adamw
    if hidden:
        optimizer = MuonAdamW(hidden, adamw, config.momentum, decay, dtype, ranks or Ranks())
    for group in optimizer.param_groups:
        group["lr"] = config.lr
    return optimizer


def state_names(optimizer: Optimizer, parameter: torch.Tensor) -> tuple[str, ...]:
    """Returns the names of the tensors that `optimizer` keeps for a parameter. All but "step" have the parameter's
    shape."""
    if isinstance(optimizer, MuonAdamW) and any(parameter is matrix for matrix in optimizer.param_groups[0]["params"]):
        return ("momentum",)
    return ("step", "exp_avg", "exp_avg_sq")


def clip_gradients(parameters: Iterable[torch.Tensor], grad_clip: float) -> torch.Tensor:
    """Returns the norm of all gradients before clipping, on the device. If `grad_clip` is above 0, scales them in place
    to at most that norm."""
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    return norm


def gated_step(optimizer: Optimizer, finite: torch.Tensor) -> None:
    """Takes a step of the optimizer; where the device scalar `finite` is false, weights and moments stay as they are.
    The host does not wait for the answer, except on MPS, whose fused kernel ignores `found_inf`."""
    if finite.device.type == "mps" and not finite:
        return
    optimizer.step((~finite).float())


class LossScaler:
    """Keeps fp16 gradients in range: the loss is multiplied by `scale`, the gradients are divided by it. The scale
    halves at every overflow and doubles after SCALE_GROWTH_STEPS steps without an overflow; MOST_OVERFLOWS overflows in
    a row are an error. The tensors keep their addresses: a CUDA graph may hold them."""

    def __init__(self, device: torch.device, enabled: bool):
        self.enabled = enabled
        self.scale = torch.tensor(65536.0 if enabled else 1.0, device=device)
        self.finite_steps = torch.zeros((), device=device)
        self.overflows = 0  # in a row, on the host

    def unscale(self, parameters: Iterable[torch.Tensor]) -> None:
        """Divides the gradients by the scale, in place."""
        if self.enabled:
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], self.scale)

    def update(self, finite: torch.Tensor) -> None:
        """Adapts the scale after a step whose gradients were `finite`, a device scalar, or not."""
        if self.enabled:
            grown = torch.where(finite, self.finite_steps + 1, 0.0)
            doubles = grown >= SCALE_GROWTH_STEPS
            self.scale *= torch.where(finite, torch.where(doubles, 2.0, 1.0), 0.5)
            self.finite_steps.copy_(torch.where(doubles, 0.0, grown))

    def check(self, step: int, finite: bool, loss: float, place: str) -> None:
        """Raises NonFiniteError if loss and gradients of step `step` were not `finite`. In fp16, where such a step is
        skipped, raises it only for a non-finite loss or after MOST_OVERFLOWS overflows in a row. `place` says, for the
        message, where the batch lies in the data."""
        self.overflows = 0 if finite else self.overflows + 1
        skipped = self.enabled and math.isfinite(loss) and self.overflows < MOST_OVERFLOWS
        if not finite and not skipped:
            raise NonFiniteError(
                f"non-finite loss or gradient at step {step}: loss {loss:.4g}, batch from {place}, "
                "nothing of it was saved; lower --lr, or look at the data there"
            )

    def state(self) -> dict[str, float]:
        """Returns the state of the scaler as plain data, for a checkpoint."""
        return {"scale": self.scale.item(), "finite_steps": self.finite_steps.item(), "overflows": self.overflows}

    def load(self, state: dict[str, float]) -> None:
        """Restores what `state` returned."""
        self.scale.fill_(state["scale"])
        self.finite_steps.fill_(state["finite_steps"])
        self.overflows = int(state["overflows"])
