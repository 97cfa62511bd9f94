"""Runs a training program unchanged in this process, and keeps its weights on the way; learning_curve.py starts it.

    python snapshots.py FOLDER ours SPACING FLAGS…
        train.py of this project: a snapshot each time that the process has grown older by the share SPACING, and one
        at the end
    python snapshots.py FOLDER nanogpt SEED FLAGS…
        train.py of nanoGPT, in the present folder: a snapshot whenever it saves a checkpoint; SEED is added to the
        seed that it sets

FOLDER gets the snapshots and snapshots.jsonl, a line for each: step, time (of the system's clock, when the step was
done) and the seconds that keeping it took."""

import json
import runpy
import sys
import time
from pathlib import Path

START = time.time()


class Snapshots:
    """What is kept of a run in `folder`."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True)
        self.file = open(self.folder / "snapshots.jsonl", "w", encoding="utf-8")

    def keep(self, step, moment, save):
        """Let `save(folder)` write the weights after `step` steps, which was the case at `moment`."""
        start = time.time()
        save(self.folder / f"{step:06d}")
        print(json.dumps({"step": step, "time": moment, "cost": time.time() - start}), file=self.file, flush=True)


def run_ours(folder, spacing, words):
    import project  # noqa: F401  makes `train` importable

    import train

    snapshots = Snapshots(folder)
    taken = Taken(train.stepper, snapshots, spacing)
    train.stepper = taken
    sys.argv = ["train.py", *words]
    try:
        train.run_main(train.main, quiet_pipe=False)
    finally:
        taken.keep()


class Taken:
    """Stands in for train.py's `stepper`, and keeps the weights after some of the steps."""

    def __init__(self, stepper, snapshots, spacing):
        self.stepper, self.snapshots, self.spacing = stepper, snapshots, spacing
        self.state, self.step, self.kept, self.done, self.next = None, 0, 0, START, START

    def __call__(self, config, state, *rest):
        self.state, self.take = state, self.stepper(config, state, *rest)
        return self.taken

    def taken(self, batch, lr):
        numbers = self.take(batch, lr)
        self.step, self.done = self.state.progress.step + 1, time.time()
        if self.done >= self.next:
            self.keep()
        return numbers

    def keep(self):
        """Keep the weights that the last step has left, unless that is done."""
        if self.step == self.kept:
            return
        from weights import write_weights

        self.snapshots.keep(self.step, self.done, lambda folder: write_weights(folder, self.state.model))
        self.kept, self.next = self.step, START + (self.done - START) * (1 + self.spacing)


def run_nanogpt(folder, seed, words):
    import torch

    snapshots, save, manual_seed = Snapshots(folder), torch.save, torch.manual_seed

    def save_and_keep(checkpoint, path):
        moment = time.time()
        save(checkpoint, path)
        kept = {name: checkpoint[name] for name in ("model", "model_args")}
        snapshots.keep(checkpoint["iter_num"], moment, lambda folder: save(kept, folder.with_suffix(".pt")))

    torch.save, torch.manual_seed = save_and_keep, lambda number: manual_seed(number + seed)
    sys.argv = ["train.py", *words]
    sys.path.insert(0, str(Path.cwd()))
    runpy.run_path("train.py", run_name="__main__")


if __name__ == "__main__":
    if sys.argv[2] == "ours":
        run_ours(sys.argv[1], float(sys.argv[3]), sys.argv[4:])
    else:
        run_nanogpt(sys.argv[1], int(sys.argv[3]), sys.argv[4:])
