"""What every check of prove_cuda.py uses: where it works, its data, its trained model and its expectations."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from project import ROOT

from gpt.text.shards import MANIFEST

SHAPES = {  # flags of train.py; on a CPU the preset `tiny` as it is
    "cuda": "--n_layer 4 --n_head 4 --n_embd 256 --block_size 256 --global_batch_size 16 --micro_batch_size 8",
    "cpu": "",
}
STEPS = 200  # of a run whose loss is compared


class CheckFailed(Exception):
    """An expectation of a check does not hold."""


def expect(holds: bool, message: str) -> None:
    """Raises CheckFailed with `message` unless `holds`."""
    if not holds:
        raise CheckFailed(message)


@dataclass(frozen=True)
class Proof:
    """What one check is given."""

    folder: Path
    """for the data, the model, results, and the runs of each check"""
    check: str
    """name of the check, and of the folder for its runs"""
    device: str = "cuda"
    """cuda, or cpu to try the program out"""
    thorough: bool = False
    """whether to check every precision and back end, not only the most used ones"""

    @property
    def result(self) -> Path:
        """Returns the path of the file that holds the check's state and message."""
        return self.folder / f"{self.check}.json"

    @property
    def runs(self) -> Path:
        """Returns the folder for the runs of this check."""
        return self.folder / self.check

    def data(self) -> Path:
        """Returns the folder of token shards. The first call prepares them from the Python library's sources."""
        data = self.folder / "data"
        if not (data / MANIFEST).exists():
            words = "--corpus stdlib --tokenizer byte --out"
            subprocess.run([sys.executable, ROOT / "data/prepare.py", *words.split(), data], check=True)
        return data

    def model(self) -> Path:
        """Returns the run folder of the model trained in fp32. The first call trains it."""
        out = self.folder / "fp32"
        if not (out / f"step-{STEPS:09d}").exists():
            self.train(out, f"--dtype fp32 --compile off --max_steps {STEPS}")
        return out

    def train_command(self, out: Path, words: str) -> list[str]:
        """Returns the command line that trains into the folder `out` with the flags `words`."""
        flags = f"--device {self.device} --dropout 0.1 {SHAPES[self.device]} {words}"
        command = [sys.executable, ROOT / "train.py", "tiny", "--data", self.data(), "--out", out, *flags.split()]
        return list(map(str, command))

    def train(self, out: Path, words: str) -> list[dict]:
        """Trains into the folder `out`; returns the records of its metrics. Raises CheckFailed if train.py fails."""
        command, log = self.train_command(out, words), out.with_suffix(".log")
        with open(log, "w") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        lines = log.read_text(errors="replace").splitlines()
        expect(code == 0, f"train.py exited with {code}, see {log}: {''.join(lines[-1:])}")
        expect("no CUDA graph" not in "\n".join(lines), f"a step was not captured, see {log}")
        return metrics(out)


def metrics(out: Path) -> list[dict]:
    """Returns the records that the run in the folder `out` has logged."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
