"""The length of a run, how often it logs, evaluates and saves, and how far it has come."""

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class BatchConfig:
    global_batch_size: int = 12
    """sequences of block_size tokens per optimizer step, over all ranks"""
    micro_batch_size: int = 0
    """sequences per forward pass and rank; must divide global_batch_size / ranks; 0 = the largest that fits
    and gains by it, recorded in checkpoints"""

    def problems(self) -> list[str]:
        """Returns what is wrong with these values, in words; empty if nothing is."""
        total, micro = self.global_batch_size, self.micro_batch_size
        if total < 1 or micro < 0:
            return [f"global_batch_size {total} must be at least 1, micro_batch_size {micro} at least 0"]
        if micro and total % micro:
            near = sorted((n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(n - micro))[:2]
            return [f"micro_batch_size {micro} must divide global_batch_size {total}; the nearest that do: {near}"]
        return []

    def problems_on(self, ranks: int) -> list[str]:
        """Returns what is wrong with these values on `ranks` ranks, each of which takes an equal share of the batch;
        empty if nothing is."""
        total, micro = self.global_batch_size, self.micro_batch_size
        unit = ranks * max(micro, 1)
        if total % unit == 0:
            return []
        below = total // unit * unit
        each = f" x micro_batch_size {micro}" if micro else ""
        near = [n for n in (below, below + unit) if n > 0]
        return [f"global_batch_size {total} must be a multiple of {ranks} ranks{each}; the nearest that are: {near}"]


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

    def problems(self) -> list[str]:
        """Returns what is wrong with these values, in words; empty if nothing is."""
        limits = {name: getattr(self, name) for name in ("max_steps", "max_tokens", "max_epochs", "max_minutes")}
        checked = limits | {"patience": self.patience}
        problems = [f"{name} {value} must be 0 or more" for name, value in checked.items() if value < 0]
        if not any(limits.values()):
            problems.append("nothing ends the run: give max_steps, max_tokens, max_epochs or max_minutes")
        return problems


@dataclass(frozen=True)
class RhythmConfig:
    log_every: int = 10
    """steps between log lines"""
    eval_every: int = 250
    """steps between evaluations on the validation split; 0 = only at the end; a model that is fine-tuned is
    evaluated before its first step too"""
    eval_tokens: int = 10485760
    """tokens of the validation split to evaluate on; 0 = all"""
    save_every: int = 1000
    """steps between checkpoints; one is saved at the end, on a signal and at a new best anyway; 0 = only then"""
    sample_every: int = 0
    """steps between printed samples of the model's text; 0 = none"""
    keep_last: int = 2
    """newest checkpoints to keep, beside the best; only the newest two can be resumed"""
    keep_every: int = 0
    """also keep the weights of every checkpoint whose step is a multiple of this; 0 = none"""

    def problems(self) -> list[str]:
        """Returns what is wrong with these values, in words; empty if nothing is."""
        problems = [f"{name} {value} must be 0 or more" for name, value in asdict(self).items() if value < 0]
        return problems + [
            f"{name} must be at least 1" for name in ("log_every", "keep_last") if getattr(self, name) == 0
        ]


@dataclass
class Progress:
    """How far a run is: its counts, its training time and its best evaluation, for checkpoints."""

    step: int = 0
    windows_seen: int = 0
    tokens: int = 0
    train_seconds: float = 0.0  # without the time of evaluation and saving
    best_loss: float | None = None
    best_step: int = 0
    evaluated_step: int | None = None  # the last step that was evaluated
    evals_without_best: int = 0
    micro_batch_size: int = 0
    wandb_id: str = ""

    def advance(self, windows: int, block_size: int) -> None:
        """Adds one optimizer step over `windows` windows of `block_size` tokens."""
        self.step += 1
        self.windows_seen += windows
        self.tokens += windows * block_size

    def due(self, every: int) -> bool:
        """Returns whether something that happens every `every` steps (0 = never) is due at this step. At step 0 nothing
        is."""
        return self.step > 0 and every > 0 and self.step % every == 0

    def evaluation_due(self, every: int, always: bool) -> bool:
        """Returns whether to evaluate at this step: it is not evaluated yet, and it is one of every `every` steps, or
        `always` is set."""
        return self.evaluated_step != self.step and (always or self.due(every))

    def evaluated(self, loss: float) -> bool:
        """Stores the validation loss of this step. Returns whether it is a new best; a loss that is not finite, or that
        of step 0, never is."""
        self.evaluated_step = self.step
        if self.step == 0:
            return False
        if not loss < (math.inf if self.best_loss is None else self.best_loss):
            self.evals_without_best += 1
            return False
        self.best_loss, self.best_step, self.evals_without_best = loss, self.step, 0
        return True


@dataclass(frozen=True)
class Budget:
    """The limits of a run, and how many steps they allow."""

    length: LengthConfig
    global_batch_size: int
    block_size: int
    windows_per_epoch: int

    def total_steps(self, progress: Progress) -> int:
        """Returns the step at which the first limit ends the run. It changes if the batch size changes on resume. Under
        max_minutes it is an estimate from the pace so far."""
        length, left = self.length, []
        if length.max_steps:
            left.append(length.max_steps - progress.step)
        if length.max_tokens:
            tokens = length.max_tokens - progress.windows_seen * self.block_size
            left.append(math.ceil(tokens / (self.global_batch_size * self.block_size)))
        if length.max_epochs:
            windows = length.max_epochs * self.windows_per_epoch - progress.windows_seen
            left.append(math.ceil(windows / self.global_batch_size))
        if length.max_minutes:
            pace = progress.train_seconds / progress.step if progress.step else 1.0
            seconds = max(0.0, 60 * length.max_minutes - progress.train_seconds)
            left.append(math.ceil(seconds / max(pace, 1e-9)))
        return progress.step + min(left)

    def out_of_patience(self, progress: Progress) -> bool:
        """Returns whether `patience` evaluations in a row brought no new best."""
        return 0 < self.length.patience <= progress.evals_without_best

    def spent(self, progress: Progress) -> bool:
        """Returns whether the run has reached a limit or used up its patience."""
        return self.out_of_patience(progress) or progress.step >= self.total_steps(progress)
