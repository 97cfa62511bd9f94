"""Runs a training program unchanged in this process, and keeps its weights on the way; learning_curve.py starts it.

    python snapshots.py FOLDER ours SPACING FLAGS…
        runs train.py of this project; keeps weights whenever the process is older by the share SPACING than at the
        last snapshot, and at the end
    python snapshots.py FOLDER nanogpt SEED FLAGS…
        runs train.py of nanoGPT in the current folder; keeps weights whenever it saves a checkpoint; adds SEED to the
        seed that nanoGPT sets

FOLDER gets the snapshots and snapshots.jsonl, with a line for each: the step, the time of the system's clock after that
step, and the seconds that keeping the weights took."""

import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

START = time.time()


class Snapshots:
    """The snapshots of a run, in a new folder."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True)
        self.file = open(self.folder / "snapshots.jsonl", "w", encoding="utf-8")

    def keep(self, step: int, moment: float, save: Callable[[Path], None]) -> None:
        """Calls `save(path)` to write the weights after `step` steps, which were done at `moment`."""
        start = time.time()
        save(self.folder / f"{step:06d}")
        print(json.dumps({"step": step, "time": moment, "cost": time.time() - start}), file=self.file, flush=True)


def run_ours(folder: str, spacing: float, words: list[str]) -> None:
    """Runs this project's train.py with the command line `words`."""
    import project  # noqa: F401  makes `train` importable

    import train
    from gpt.train import setup

    stepper = KeepingStepper(setup.stepper, Snapshots(folder), spacing)
    setup.stepper = stepper
    sys.argv = ["train.py", *words]
    try:
        train.run_main(train.main, quiet_pipe=False)
    finally:
        stepper.keep()


class KeepingStepper:
    """Replaces train.py's `stepper`, and keeps the weights after some of the steps."""

    def __init__(self, stepper, snapshots, spacing):
        self.stepper, self.snapshots, self.spacing = stepper, snapshots, spacing
        self.state, self.step, self.kept_step, self.done, self.next = None, 0, 0, START, START

    def __call__(self, config, state, *rest):
        self.state, self.take_step = state, self.stepper(config, state, *rest)
        return self.take_step_and_keep

    def take_step_and_keep(self, batch, lr):
        numbers = self.take_step(batch, lr)
        self.step, self.done = self.state.progress.step + 1, time.time()
        if self.done >= self.next:
            self.keep()
        return numbers

    def keep(self):
        """Keeps the weights after the last step, unless they are kept already."""
        if self.step == self.kept_step:
            return
        from weights import write_weights

        self.snapshots.keep(self.step, self.done, lambda folder: write_weights(folder, self.state.model))
        self.kept_step, self.next = self.step, START + (self.done - START) * (1 + self.spacing)


def run_nanogpt(folder: str, seed: int, words: list[str]) -> None:
    """Runs the train.py in the current folder with the command line `words`."""
    import torch

    snapshots, save, manual_seed = Snapshots(folder), torch.save, torch.manual_seed

    def save_and_keep(checkpoint, path):
        moment = time.time()
        save(checkpoint, path)
        weights = {name: checkpoint[name] for name in ("model", "model_args")}
        snapshots.keep(checkpoint["iter_num"], moment, lambda path: save(weights, path.with_suffix(".pt")))

    torch.save, torch.manual_seed = save_and_keep, lambda number: manual_seed(number + seed)
    sys.argv = ["train.py", *words]
    sys.path.insert(0, str(Path.cwd()))
    runpy.run_path("train.py", run_name="__main__")


if __name__ == "__main__":
    if sys.argv[2] == "ours":
        run_ours(sys.argv[1], float(sys.argv[3]), sys.argv[4:])
    else:
        run_nanogpt(sys.argv[1], int(sys.argv[3]), sys.argv[4:])
