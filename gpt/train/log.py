"""Writes what a run reports: metrics.jsonl, a progress bar or plain lines, wandb if it is set, and exit.json."""

import collections
import contextlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gpt.config import flatten
from gpt.errors import ResourceError, code_and_reason, ignore_write_errors, note, tell
from gpt.files import write_durably
from gpt.model import flops_per_token
from gpt.text.example_stream import ExampleStream
from gpt.text.windows import Windows
from gpt.train.budget import Budget, Progress
from gpt.train.cost import peak_flops
from gpt.train.metrics_file import METRICS, MetricsFile
from gpt.train.ranks import Ranks
from gpt.train.runtime import Runtime
from gpt.train.state import State

WANDB_PATIENCE = 8  # seconds that each stage of a missing wandb service may cost
SECONDS_BETWEEN_DRAWINGS = 120


class Log:
    """Writes one record per logged step to metrics.jsonl, the terminal and wandb, and calls `draw()` now and then to
    draw the losses. No failure of these ends the run. Removes the records of steps after `step`; -1 removes all. Raises
    ResourceError if metrics.jsonl cannot be opened."""

    def __init__(self, out: Path, step: int, total_steps: int, draw: Callable[[], None], wandb_run: Any = None):
        self.metrics, self.wandb_run = MetricsFile(out / METRICS, step), wandb_run
        self.draw, self.next_drawing, self.is_drawn = draw, time.monotonic() + SECONDS_BETWEEN_DRAWINGS, True
        hidden = None if sys.stderr else True  # None: hidden unless stderr is a terminal
        self.bar = tqdm(total=total_steps, initial=max(step, 0), unit="step", dynamic_ncols=True, disable=hidden)

    def advance(self, total_steps: int) -> None:
        """Moves the bar on by one step; `total_steps` is the present estimate of the run's length."""
        self.bar.total = total_steps
        with ignore_write_errors(sys.stderr):
            self.bar.update()

    def write(self, record: dict, total_steps: int) -> None:
        """Writes the numbers of one step to all outputs. `record` is name -> number, with "step" first."""
        self.metrics.write(record)
        if self.bar.disable or "val_loss" in record:
            tell(plain_line(record, total_steps))
        if not self.bar.disable and "loss" in record:
            with ignore_write_errors(sys.stderr):
                self.bar.set_postfix_str(short(record))
        self.send(record)
        self.is_drawn = False
        if "val_loss" in record and time.monotonic() >= self.next_drawing and self.metrics.in_place():
            self.draw_losses()

    def send(self, record: dict) -> None:
        """Sends a record to wandb, until that fails."""
        if self.wandb_run is None:
            return
        try:
            self.wandb_run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
        except Exception as error:  # whatever wandb raises, training continues
            note("warning", f"wandb stopped taking metrics: {error}")
            self.wandb_run = None

    def sync(self) -> None:
        """Flushes all metrics to the disk. Call it before a checkpoint is saved, so that they never lag behind one.
        Raises ResourceError if writing fails."""
        self.metrics.sync()

    def draw_losses(self) -> None:
        self.draw()
        self.next_drawing, self.is_drawn = time.monotonic() + SECONDS_BETWEEN_DRAWINGS, True

    def close(self) -> None:
        """Closes the bar, the file and wandb. Draws the losses if there are new ones, except after Ctrl-C and in
        a folder that is no longer that of this run."""
        with ignore_write_errors(sys.stderr):
            self.bar.close()
        may_draw = self.metrics.in_place() and not isinstance(sys.exception(), KeyboardInterrupt)
        self.metrics.close()
        if may_draw and not self.is_drawn:
            with contextlib.suppress(KeyboardInterrupt):  # the last checkpoint is saved already
                self.draw_losses()
        if self.wandb_run is not None:
            with contextlib.suppress(Exception):  # as in send
                self.wandb_run.finish()


class Recorder:
    """Turns the numbers of steps into records for `log` (None on ranks that do not write). The host reads the numbers
    of a step when the next step is launched, so that it does not wait for the device. There a step that was not finite
    ends the run, before anything is saved.

    `waited` holds the seconds that reading waited for the device, until the run adds them to its train_seconds."""

    def __init__(
        self,
        log: Log | None,
        log_every: int,
        state: State,
        budget: Budget,
        training: Windows | ExampleStream,
        machine: Runtime,
    ):
        self.log, self.log_every, self.progress, self.budget = log, log_every, state.progress, budget
        self.scaler, self.training, self.fetch = state.scaler, training, machine.fetch
        self.peak = peak_flops(machine.device, machine.dtype) * machine.ranks.size
        share = state.model.num_parameters(trained=True) / state.model.num_parameters()
        self.flops_per_token = flops_per_token(state.model.config, state.model.vocab_size, share)
        self.pending: tuple[int, int, float, Callable[[], list], int] | None = None
        self.record: dict | None = None
        self.next_window = state.progress.windows_seen
        self.recent: collections.deque[float] = collections.deque(maxlen=100)  # the last finite losses
        self.logged_tokens, self.logged_seconds = state.progress.tokens, state.progress.train_seconds
        self.is_async, self.waited, self.done_seconds = machine.device.type != "cpu", 0.0, self.logged_seconds

    def step(self, lr: float, numbers: torch.Tensor, seconds: float = 0.0) -> None:
        """Takes the numbers of the step that was just launched: `lr`, and `numbers` (3,), on the device: loss, gradient
        norm and whether both are finite. The host spent `seconds` on it, which are not in train_seconds yet. First
        calls `read` for the step before, on which a GPU was at work during these seconds."""
        self.read(seconds=seconds if self.is_async else 0.0)
        self.pending = (self.progress.step, self.progress.tokens, lr, self.fetch(numbers), self.next_window)
        self.next_window = self.progress.windows_seen
        if self.log:
            self.log.advance(self.budget.total_steps(self.progress))

    def read(self, hold: bool = False, seconds: float = 0.0) -> None:
        """Reads the numbers of the last step, and logs them every `log_every` steps and at the end of the run. With
        `hold` the record waits for the evaluation of this step; the next `read` logs it in any case. The device worked
        on that step for `seconds` beyond train_seconds. Raises NonFiniteError as LossScaler.check does."""
        if self.pending is not None:
            started = time.perf_counter()
            record = self.record_of(*self.pending)
            self.waited += time.perf_counter() - started if self.is_async else 0.0
            self.done_seconds = self.progress.train_seconds + self.waited + seconds
            self.pending = None
            is_last = record["step"] == self.progress.step and self.budget.spent(self.progress)
            self.record = record if hold or is_last or record["step"] % self.log_every == 0 else None
        if self.record is not None and not hold:
            self.write(self.record)
            self.record = None

    def evaluated(self, losses: tuple[float, float] | None) -> bool:
        """Logs an evaluation, (nats per token, bits per byte), together with the numbers of its step. Returns whether
        it is a new best. `losses` is None if the evaluation was cut short."""
        self.read(hold=True)
        if losses is None:
            return False
        val_loss, val_bpb = losses
        record = self.record or {"step": self.progress.step, "tokens": self.progress.tokens}
        self.record = None
        self.write(record | {"val_loss": val_loss, "val_bpb": val_bpb})
        return self.progress.evaluated(val_loss)

    def record_of(self, step: int, tokens: int, lr: float, fetch: Callable[[], list], first_window: int) -> dict:
        """Returns the record of a step whose numbers `fetch()` returns. Raises NonFiniteError as LossScaler.check
        does."""
        loss, norm, finite = fetch()
        self.scaler.check(step, bool(finite), loss, "" if finite else self.training.place(first_window))
        self.watch(step, loss)
        return {"step": step, "tokens": tokens, "loss": loss, "lr": lr, "grad_norm": norm}

    def watch(self, step: int, loss: float) -> None:
        """Warns if a loss is above twice the mean of the recent losses and more than 1 nat above the mean."""
        mean = sum(self.recent) / len(self.recent) if len(self.recent) >= 10 else math.inf
        if loss > max(2 * mean, mean + 1):
            note("warning", f"loss spike at step {step}: {loss:.1f}, mean {mean:.1f}")
        if math.isfinite(loss):
            self.recent.append(loss)

    def write(self, record: dict) -> None:
        """Adds the training time to a record, and the speed if the record has a loss, and logs it."""
        if "loss" in record:
            seconds = self.done_seconds - self.logged_seconds
            speed = (record["tokens"] - self.logged_tokens) / seconds if seconds else 0.0
            mfu = speed * self.flops_per_token / self.peak if self.peak else 0.0
            self.logged_tokens, self.logged_seconds = record["tokens"], self.done_seconds
            record["tok_per_s"], record["mfu"] = round(speed, 1), round(mfu, 4)
        record["train_seconds"] = round(self.done_seconds, 3)
        if self.log:
            self.log.write(record, self.budget.total_steps(self.progress))


def plain_line(record: dict, total_steps: int) -> str:
    """Returns the text of a record: "step 20/100 loss 3.214 lr 6.0e-04 …"."""
    parts = [f"step {record['step']}/{total_steps}"]
    if "loss" in record:
        parts += [f"loss {record['loss']:.4f}", f"lr {record['lr']:.2e}", f"grad_norm {record['grad_norm']:.2f}"]
        parts += [f"{record['tok_per_s']:,.0f} tok/s"]
        parts += [f"mfu {100 * record['mfu']:.1f}%"] if record["mfu"] else []
        left = (total_steps - record["step"]) * record["train_seconds"] / max(record["step"], 1)
        parts += [f"eta {tqdm.format_interval(left)}"]
    if "val_loss" in record:
        parts += [f"val_loss {record['val_loss']:.4f}", f"val_bpb {record['val_bpb']:.4f}"]
    return "  ".join(parts)


def short(record: dict) -> str:
    """Returns the short text of a record, for the end of the progress bar."""
    mfu = f" mfu {100 * record['mfu']:.0f}%" if record["mfu"] else ""
    return f"loss {record['loss']:.3f} {record['tok_per_s']:,.0f} tok/s{mfu}"


def tell_end(reason: str, progress: Progress, out: Path, chat: bool) -> None:
    """Prints the last lines of a run that a limit has ended: which one, the best loss and where it is, and the command
    that uses the model. `chat`: the model has learned from messages."""
    note("info", f"ended: {reason} at step {progress.step}")
    tell_best(progress, out)
    note("info", f"next: {sample_command(out, *(['--chat'] if chat else []))}")


def sample_command(*words: object) -> str:
    """Returns the command that runs sample.py, beside the program that runs, with these words, for pasting."""
    program = Path(sys.argv[0])
    command = ["python", program.with_name("sample.py")] if program.suffix == ".py" else ["gpt", "sample"]
    return pasted([*command, *words])


def pasted(words: Iterable[object]) -> str:
    """Returns the words of a command as a line for the shell of this system."""
    return subprocess.list2cmdline(map(str, words)) if os.name == "nt" else shlex.join(map(str, words))


def tell_best(progress: Progress, out: Path) -> None:
    """Prints the best validation loss of a run so far and its step folder, if there was an evaluation."""
    if progress.best_loss is not None:
        folder = out / f"step-{progress.best_step:09d}"
        note("info", f"best: val_loss {progress.best_loss:.4f} at step {progress.best_step}, in {folder}")


def start_log(config: Any, progress: Progress, budget: Budget, draw: Callable) -> Log:
    """Returns the Log of a run in `config.out`. If `config.wandb` names a project, the Log writes to wandb too, and
    `progress.wandb_id` is set. `draw(folder)` returns a function that draws the loss curves of the run in `folder`."""
    wandb_run, out = None, Path(config.out)
    if config.wandb:
        wandb_run = start_wandb(config.wandb, progress.wandb_id or None, out, flatten(config))
        progress.wandb_id = wandb_run.id if wandb_run else progress.wandb_id
    begins = progress.step == 0 and progress.evaluated_step is None
    return Log(out, -1 if begins else progress.step, budget.total_steps(progress), draw(out), wandb_run)


def start_wandb(project: str, run_id: str | None, out: Path, config: dict) -> Any:
    """Returns a new wandb run, or the run `run_id` continued. If that fails, warns and returns None."""
    try:
        import wandb

        names = ("init_timeout", "login_timeout", "finish_timeout")  # older versions lack some
        limits: Any = {name: WANDB_PATIENCE for name in names if hasattr(wandb.Settings(), name)}
        settings = wandb.Settings(quiet=True, x_disable_stats=True, **limits)
        run = wandb.init(
            project=project, id=run_id, name=out.name, dir=out, config=config, resume="allow", settings=settings
        )
    except Exception as error:  # whatever wandb raises, training continues
        note("warning", f"wandb is off: {' '.join(str(error).split())}")
        return None
    if run.url:
        note("info", f"metrics go to {run.url}")
    return run


@contextlib.contextmanager
def exit_record(out: Path, ranks: Ranks, check_in_place: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Returns a context that writes to `out/exit.json` why the run failed, on any rank, or was stopped: torchrun's exit
    code does not tell. Removes an older exit.json. Only rank 0 does this. Writes nothing if `check_in_place()` raises
    ResourceError, because `out` is no longer the folder of this run."""
    if not ranks.leads:
        yield
        return
    path = out / "exit.json"
    path.unlink(missing_ok=True)

    def write(error: BaseException) -> None:
        code, reason = code_and_reason(error)
        with contextlib.suppress(OSError, ResourceError):  # the first error is the one to report
            check_in_place()
            write_durably(path, json.dumps({"code": code, "reason": reason}) + "\n")

    ranks.on_failure = write
    try:
        yield
    except BaseException as error:
        write(ranks.cause(error))
        raise
