"""The length of a run, how often it logs, evaluates, saves and prints samples, and how far it has come."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

LIMITS = ("max_steps", "max_tokens", "max_epochs", "max_minutes", "stop_after_minutes")
SAMPLE_SECONDS = (0, 5, 20, 60)  # when a run prints the first lines of its model's text
BY_THE_CLOCK = -1  # the value of sample_every for these lines
BY_SIZE = -1  # the value of max_epochs that leaves it to the size of the data


@dataclass(frozen=True)
class BatchConfig:
    global_batch_size: int = 12
    """sequences of block_size tokens per optimizer step, over all ranks"""
    micro_batch_size: int = 0
    """sequences per forward pass and rank; must divide global_batch_size / ranks; 0 = the largest that fits
    and gains by it (at most 4,096 tokens on a CPU, of examples 1,024; 32,768 on CUDA), recorded in checkpoints"""

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
    """stop after so many passes over the training data; -1, only with --init: by the size of the data"""
    max_minutes: float = 0.0
    """stop after so many minutes of training, summed over resumes; the schedule follows the clock, not to the bit"""
    stop_after_minutes: float = 0.0
    """save and exit with 75 before so many minutes on the wall clock have passed since the command began, for time
    slots: the same command continues. Sets the length of the schedule only if no other limit is given"""
    patience: int = 0
    """stop after so many evaluations in a row without a new best; 0 = never"""

    def problems(self) -> list[str]:
        """Returns what is wrong with these values, in words; empty if nothing is."""
        limits = {name: getattr(self, name) for name in LIMITS}
        checked = limits | {"patience": self.patience}
        least = dict.fromkeys(checked, 0) | {"max_epochs": BY_SIZE if self.max_epochs == BY_SIZE else 0}
        problems = [f"{name} {value} must be 0 or more" for name, value in checked.items() if value < least[name]]
        if not any(limits.values()):
            problems.append(f"nothing ends the run: give {', '.join(LIMITS[:-1])} or {LIMITS[-1]}")
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
    sample_every: int = BY_THE_CLOCK
    """steps between printed samples of the model's text; 0 = none; -1 = one line at about 0, 5, 20 and 60 seconds, then
    at evaluations"""
    keep_last: int = 2
    """newest checkpoints to keep, beside the best; only the newest two can be resumed"""
    keep_every: int = 0
    """also keep the weights of every checkpoint whose step is a multiple of this; 0 = none"""

    def problems(self) -> list[str]:
        """Returns what is wrong with these values, in words; empty if nothing is."""
        least = dict.fromkeys(asdict(self), 0) | {"sample_every": BY_THE_CLOCK}
        problems = [
            f"{name} {value} must be {least[name]} or more"
            for name, value in asdict(self).items()
            if value < least[name]
        ]
        return problems + [
            f"{name} must be at least 1" for name in ("log_every", "keep_last") if getattr(self, name) == 0
        ]


@dataclass
class Progress:
    """How far a run is: its counts, its training time and its best evaluation, for checkpoints."""

    step: int = 0
    windows_seen: int = 0  # of data with masks: examples
    tokens: int = 0
    train_seconds: float = 0.0  # without the time of evaluation and saving
    best_loss: float | None = None
    best_step: int = 0
    evaluated_step: int | None = None  # the last step that was evaluated
    evals_without_best: int = 0
    micro_batch_size: int = 0
    wandb_id: str = ""

    def advance(self, windows: int, tokens: int) -> None:
        """Adds one optimizer step over `windows` windows or examples, which have `tokens` tokens together."""
        self.step += 1
        self.windows_seen += windows
        self.tokens += tokens

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


@dataclass
class Budget:
    """The limits of a run, and how many steps they allow."""

    length: LengthConfig
    global_batch_size: int
    mean_tokens: float
    """tokens of a window, or the mean number of tokens of an example"""
    windows_per_epoch: int
    slot_seconds: float = math.inf
    """what is left of stop_after_minutes, as rank 0 measured it at this step; inf before the first"""

    def __post_init__(self) -> None:
        assert self.length.max_epochs >= 0, "the number of epochs is not chosen yet"

    def total_steps(self, progress: Progress) -> int:
        """Returns the step at which the first limit ends the run. It changes if the batch size changes on resume. Under
        max_minutes, or stop_after_minutes alone, it is an estimate from the pace so far."""
        return progress.step + min(self.steps_left(progress).values())

    def steps_left(self, progress: Progress) -> dict[str, int]:
        """Returns name of a limit -> steps that it allows from here, for the limits that are set. stop_after_minutes is
        among them only if it is the only one."""
        length, left = self.length, {}
        if length.max_steps:
            left["max_steps"] = length.max_steps - progress.step
        if length.max_tokens:
            tokens = length.max_tokens - progress.windows_seen * self.mean_tokens
            left["max_tokens"] = math.ceil(tokens / (self.global_batch_size * self.mean_tokens) - 1e-9)
        if length.max_epochs:
            windows = length.max_epochs * self.windows_per_epoch - progress.windows_seen
            left["max_epochs"] = math.ceil(windows / self.global_batch_size)
        if length.max_minutes:
            left["max_minutes"] = steps_in(60 * length.max_minutes - progress.train_seconds, progress)
        if not left:
            seconds = min(self.slot_seconds, 60 * length.stop_after_minutes)
            left["stop_after_minutes"] = max(1, steps_in(seconds, progress))  # this slot ends it, but not the run
        return left

    def follows_slot(self) -> bool:
        """Returns whether stop_after_minutes is the only limit, so that the schedule follows it."""
        return not any(getattr(self.length, name) for name in LIMITS if name != "stop_after_minutes")

    def reason(self, progress: Progress) -> str:
        """Returns in words which limit has ended the run: "max_steps 100 reached"."""
        if self.out_of_patience(progress):
            return f"no new best in {progress.evals_without_best} evaluations (patience)"
        left = self.steps_left(progress)
        name = min(left, key=left.__getitem__)
        value = getattr(self.length, name)
        return f"{name} {value:g} reached" if isinstance(value, float) else f"{name} {value} reached"

    def out_of_patience(self, progress: Progress) -> bool:
        """Returns whether `patience` evaluations in a row brought no new best."""
        return 0 < self.length.patience <= progress.evals_without_best

    def spent(self, progress: Progress) -> bool:
        """Returns whether the run has reached a limit or used up its patience."""
        return self.out_of_patience(progress) or progress.step >= self.total_steps(progress)


def steps_in(seconds: float, progress: Progress) -> int:
    """Returns how many steps take `seconds` of training at the pace so far; before the first step, at one a second."""
    pace = progress.train_seconds / progress.step if progress.step else 1.0
    return math.ceil(max(0.0, seconds) / max(pace, 1e-9))


class SampleTimes:
    """When a run prints samples: every `every` steps or, if `every` is BY_THE_CLOCK, at about SAMPLE_SECONDS after the
    first question, and from then on after each evaluation. Ask `due` once per step. `clock()` returns seconds."""

    def __init__(self, every: int, clock: Callable[[], float] = time.monotonic):
        self.every, self.clock, self.first_step = every, clock, -1
        self.start, self.left = math.nan, list(SAMPLE_SECONDS) if every == BY_THE_CLOCK else []

    def due(self, progress: Progress) -> bool:
        """Returns whether a sample is due at this step, before the next one."""
        if self.first_step < 0:
            self.first_step, self.start = progress.step, self.clock()
        if self.every != BY_THE_CLOCK:
            return progress.due(self.every) and progress.step > self.first_step
        if not self.left:
            return progress.evaluated_step == progress.step
        passed = [seconds for seconds in self.left if seconds <= self.seconds()]
        self.left = self.left[len(passed) :]
        return bool(passed)

    def seconds(self) -> float:
        """Returns the seconds since the first question."""
        return self.clock() - self.start
