"""What a run tells: metrics.jsonl, a progress bar or plain lines, wandb when asked, and exit.json."""

import collections
import contextlib
import json
import math
import os
import sys

from tqdm import tqdm

from gpt.errors import Error, printable

METRICS = "metrics.jsonl"
WANDB_PATIENCE = 8  # seconds that each stage of a missing wandb service may cost


class Log:
    """Writes one record per logged step to metrics.jsonl, the terminal and wandb."""

    def __init__(self, out, step, total_steps, wandb_run=None):
        self.path, self.wandb_run = out / METRICS, wandb_run
        cut_metrics(self.path, step or -1)  # what stands before the first step is measured anew
        self.file = open(self.path, "a", encoding="utf-8")
        self.is_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total_steps, initial=step, unit="step", dynamic_ncols=True, disable=not self.is_terminal, leave=True
        )

    def advance(self, total_steps):
        """One more step is done; `total_steps` is the present estimate of the run's length."""
        self.bar.total = total_steps
        self.bar.update()

    def write(self, record, total_steps):
        """Record the numbers of one step: a dict with "step" first."""
        self.file.write(json.dumps({name: finite_or_none(value) for name, value in record.items()}) + "\n")
        self.file.flush()
        text = describe(record, total_steps)
        if not self.is_terminal:
            print(text, file=sys.stderr, flush=True)
        elif "val_loss" in record:
            self.say(text)
        if "loss" in record and self.is_terminal:
            self.bar.set_postfix_str(short(record))
        self.send(record)

    def send(self, record):
        if self.wandb_run is None:
            return
        try:
            self.wandb_run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
        except Exception as error:  # whatever wandb raises, training goes on
            self.say(f"warning: wandb stopped taking metrics: {error}")
            self.wandb_run = None

    def say(self, text):
        """Print a line or more beside the progress bar, on stderr."""
        with self.bar.external_write_mode(file=sys.stderr):
            print(printable(text), file=sys.stderr, flush=True)

    def sync(self):
        """Put all metrics on the disk: before a checkpoint, so that they never lag behind one."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self):
        self.bar.close()
        self.file.close()
        if self.wandb_run is not None:
            with contextlib.suppress(Exception):  # as in send
                self.wandb_run.finish()


class Recorder:
    """Turns the numbers of steps into records for a Log. The host reads them one step late, so that it never waits
    for the device; a step that was not finite ends the run there, before anything is saved."""

    def __init__(self, log, log_every, progress, budget, scaler, windows, flops_per_token, peak):
        self.log, self.log_every, self.progress, self.budget, self.scaler = log, log_every, progress, budget, scaler
        self.windows, self.flops_per_token, self.peak = windows, flops_per_token, peak
        self.pending, self.next_window = None, progress.windows_seen
        self.recent = collections.deque(maxlen=100)  # finite losses
        self.logged_tokens, self.logged_seconds = progress.tokens, progress.train_seconds

    def step(self, lr, numbers):
        """Note the step just made: its learning rate, and its loss, gradient norm and whether both are finite as a
        tensor (3,) on the device."""
        self.read()
        self.pending = (self.progress.step, self.progress.tokens, lr, numbers, self.next_window)
        self.next_window = self.progress.windows_seen
        self.log.advance(self.budget.total_steps(self.progress))

    def read(self):
        """Read the numbers of the last step; log them if it is time. Raises NonFiniteError."""
        if self.pending is not None:
            record = self.take()
            if record["step"] % self.log_every == 0:
                self.write(record)

    def evaluated(self, val_loss, val_bpb):
        """Log an evaluation together with the numbers of the last step."""
        record = {"step": self.progress.step, "tokens": self.progress.tokens} if self.pending is None else self.take()
        self.write(record | {"val_loss": val_loss, "val_bpb": val_bpb})

    def take(self):
        (step, tokens, lr, numbers, first_window), self.pending = self.pending, None
        loss, norm, finite = numbers.tolist()
        self.scaler.check(step, bool(finite), loss, "" if finite else self.windows.place(first_window))
        self.watch(step, loss)
        return {"step": step, "tokens": tokens, "loss": loss, "lr": lr, "grad_norm": norm}

    def watch(self, step, loss):
        """Warn of a loss far above the recent ones: twice their mean, and by a nat at least."""
        mean = sum(self.recent) / len(self.recent) if len(self.recent) >= 10 else math.inf
        if loss > max(2 * mean, mean + 1):
            self.log.say(f"warning: loss spike at step {step}: {loss:.1f}, mean {mean:.1f}")
        if math.isfinite(loss):
            self.recent.append(loss)

    def write(self, record):
        if "loss" in record:
            seconds = self.progress.train_seconds - self.logged_seconds
            speed = (record["tokens"] - self.logged_tokens) / seconds if seconds else 0.0
            mfu = speed * self.flops_per_token / self.peak if self.peak else 0.0
            self.logged_tokens, self.logged_seconds = record["tokens"], self.progress.train_seconds
            record["tok_per_s"], record["mfu"] = round(speed, 1), round(mfu, 4)
            record["train_seconds"] = round(self.logged_seconds, 3)
        self.log.write(record, self.budget.total_steps(self.progress))


def cut_metrics(path, step):
    """Drop the lines beyond `step`, and an unfinished last one: an interrupted run may have got further than its last
    checkpoint."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def finite_or_none(value):
    """JSON has no nan and no infinity, which an fp16 step that was skipped may show."""
    return value if math.isfinite(value) else None


def describe(record, total_steps):
    """A record as a plain line: "step 20/100  loss 3.214  lr 6.0e-04  …"."""
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


def short(record):
    mfu = f" mfu {100 * record['mfu']:.0f}%" if record["mfu"] else ""
    return f"loss {record['loss']:.3f} {record['tok_per_s']:,.0f} tok/s{mfu}"


def start_wandb(project, run_id, name, out, config):
    """A wandb run, continued if `run_id` is known to wandb; None with a warning if that fails."""
    try:
        import wandb

        names = ("init_timeout", "login_timeout", "finish_timeout")  # older versions lack some
        limits = {name: WANDB_PATIENCE for name in names if hasattr(wandb.Settings(), name)}
        settings = wandb.Settings(quiet=True, x_disable_stats=True, **limits)
        run = wandb.init(
            project=project, id=run_id, name=name, dir=out, config=config, resume="allow", settings=settings
        )
    except Exception as error:  # whatever wandb raises, training goes on
        print(f"warning: wandb is off: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return None
    if run.url:
        print(f"info: metrics go to {run.url}", file=sys.stderr)
    return run


@contextlib.contextmanager
def exit_record(out):
    """Leave the reason of a failure in `out/exit.json`: under torchrun the exit code alone says nothing."""
    path = out / "exit.json"
    path.unlink(missing_ok=True)
    try:
        yield
    except Error as error:
        write_exit(path, error.code, str(error))
        raise
    except KeyboardInterrupt:
        write_exit(path, 130, "interrupted")
        raise


def write_exit(path, code, reason):
    with contextlib.suppress(OSError):  # the first error is the one to report
        path.write_text(json.dumps({"code": code, "reason": reason}) + "\n", encoding="utf-8")
