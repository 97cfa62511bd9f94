"""How long a run is and how far it has come: batch size, the four limits, Progress."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchConfig:
    global_batch_size: int = 12
    """sequences of block_size tokens per optimizer step"""
    micro_batch_size: int = 0
    """sequences per forward pass; must divide global_batch_size; 0 = the largest that fits, recorded in checkpoints"""

    def problems(self):
        """What is wrong with these values, in words; empty if nothing."""
        total, micro = self.global_batch_size, self.micro_batch_size
        if total < 1 or micro < 0:
            return [f"global_batch_size {total} must be at least 1, micro_batch_size {micro} at least 0"]
        if micro and total % micro:
            near = sorted((n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(n - micro))[:2]
            return [f"micro_batch_size {micro} must divide global_batch_size {total}; the nearest that do: {near}"]
        return []


@dataclass(frozen=True)
class LengthConfig:
    max_steps: int = 0
    """stop after so many optimizer steps; 0 = no such limit (give one limit or more: the first reached ends the run)"""
    max_tokens: int = 0
    """stop after so many training tokens"""
    max_epochs: float = 0.0
    """stop after so many passes over the training data"""
    max_minutes: float = 0.0
    """stop after so many minutes of training, summed over resumes; the schedule follows the clock, not to the bit"""
    patience: int = 0
    """stop after so many evaluations in a row without a new best; 0 = never"""

    def problems(self):
        """What is wrong with these values, in words; empty if nothing."""
        limits = {name: getattr(self, name) for name in ("max_steps", "max_tokens", "max_epochs", "max_minutes")}
        checked = limits | {"patience": self.patience}
        found = [f"{name} {value} must be 0 or more" for name, value in checked.items() if value < 0]
        if not any(limits.values()):
            found.append("nothing ends the run: give max_steps, max_tokens, max_epochs or max_minutes")
        return found


@dataclass
class Progress:
    """How far a run is: all that a checkpoint must know besides weights and optimizer."""

    step: int = 0
    windows_seen: int = 0
    tokens: int = 0
    train_seconds: float = 0.0  # evaluation and saving not counted
    best_loss: float | None = None
    best_step: int = 0
    evals_without_best: int = 0
    micro_batch_size: int = 0
    wandb_id: str = ""

    def advance(self, windows, block_size):
        """Count one optimizer step over `windows` windows."""
        self.step += 1
        self.windows_seen += windows
        self.tokens += windows * block_size

    def due(self, every):
        """Whether something that happens every so many steps (0 = never) is due."""
        return every > 0 and self.step % every == 0

    def evaluated(self, loss):
        """Note a validation loss; returns whether it is a new best, which one that is not finite never is."""
        best = math.inf if self.best_loss is None else self.best_loss
        if not loss < best:
            self.evals_without_best += 1
            return False
        self.best_loss, self.best_step, self.evals_without_best = loss, self.step, 0
        return True


class Budget:
    """The limits of a run in steps."""

    def __init__(self, length, global_batch_size, block_size, windows_per_epoch):
        self.length = length
        tokens_per_step = global_batch_size * block_size
        limits = (
            length.max_steps,
            math.ceil(length.max_tokens / tokens_per_step),
            math.ceil(length.max_epochs * windows_per_epoch / global_batch_size),
        )
        self.steps = min((limit for limit in limits if limit), default=None)  # None: only the clock ends the run

    def total_steps(self, progress):
        """Length of the run in steps. Under max_minutes it is an estimate from the pace so far."""
        if not self.length.max_minutes:
            return self.steps
        seconds = 60 * self.length.max_minutes
        pace = progress.train_seconds / progress.step if progress.step else 1.0
        left = max(0.0, seconds - progress.train_seconds)
        by_clock = progress.step + math.ceil(left / max(pace, 1e-9))
        return min(by_clock, self.steps or by_clock)

    def spent(self, progress):
        """Whether a limit is reached, or `patience` evaluations brought no new best."""
        tired = 0 < self.length.patience <= progress.evals_without_best
        return tired or progress.step >= self.total_steps(progress)
