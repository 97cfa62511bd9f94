"""Measures loss against wall time on a small text: presets of this project and nanoGPT's own recipe for a CPU, in turn.

    python benchmarks/learning_curve.py --text tinyshakespeare.txt --nanogpt ../nanoGPT --presets shakespeare-cpu
    python benchmarks/learning_curve.py --text tinyshakespeare.txt --presets shakespeare-cpu,mine.toml --seeds 1

The text is read as bytes; its last tenth is for validation. Runs follow each other on the same cores, each in a process
of its own. The time of a run is that of the whole command, with start-up, evaluations and checkpoints, without
preparing the data. On the way, weights are kept. After each run one scorer reads the whole validation split with each
of them, in windows of 64 bytes that do not overlap, or of the model's context if that is shorter. A loss counts as
reached at the first kept weights with this loss or a lower one; nothing is interpolated. The file --json is written,
and the table shown, after every run.

nanoGPT runs from a copy of its files, with the command line of its README and the vocabulary that its own prepare.py
would make of the text. Two things are changed: its seed is increased by the number of the run, and the weights that it
saves at evaluations are kept (all of them, by --always_save_checkpoint)."""

import argparse
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from curves import NANOGPT, ids_of, plot, print_summary, score, summaries
from machine import default_threads, open_record
from project import ROOT
from report import reporting, show_so_far, tell
from workers import in_turn

RECIPE = (  # nanoGPT's README, "I only have a macbook"
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 "
    "--always_save_checkpoint=True --out_dir=out"
)
COPIED = ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py")
DATASET = "data/shakespeare_char"


def main() -> None:
    config = parse(sys.argv[1:])
    config.work = config.work.absolute()
    for name in ("data", "runs", NANOGPT):
        shutil.rmtree(config.work / name, ignore_errors=True)
    text = config.text.read_bytes()
    prepare_ours(config)
    vocabulary = prepare_nanogpt(config, text) if config.nanogpt else None
    record = open_record(config, "cpu", runs=[], summary={})
    programs = [*config.presets, *([NANOGPT] if config.nanogpt else [])]
    with reporting(config, record, print_summary) as save:
        for seed in range(config.seeds):
            for program in in_turn(programs, seed):
                run = run_once(config, program, seed)
                tell("  scoring")
                score(config, run, text[split_at(text) :], vocabulary)
                record["runs"].append(run)
                record["summary"] = summaries(record["runs"], programs, config.target)
                save()
                show_so_far(print_summary, record)
    plot(config, record)


def parse(words: list[str]) -> argparse.Namespace:
    """Returns the settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, required=True, help="file to train on")
    add("--nanogpt", type=Path, metavar="PATH", help="checkout to compare with (default: none, only our presets run)")
    add("--presets", default="shakespeare-cpu", help="presets of train.py, separated by commas (default %(default)s)")
    add("--seeds", type=int, default=3, help="runs of each program (default %(default)s)")
    add("--target", type=float, default=1.886, help="nats per byte to which time is counted (default %(default)s)")
    add("--flags", default="", help="more flags for train.py, as one argument (default none)")
    add("--nanogpt_flags", default="", help="more flags for nanoGPT's train.py, as one argument (default none)")
    add(
        "--spacing",
        type=float,
        default=0.05,
        help="share of its age that a run gains between snapshots (default %(default)s)",
    )
    add("--threads", type=int, default=default_threads(), help="CPU threads (default %(default)s)")
    add("--work", type=Path, default=Path("out/learn"), help="folder for data, runs and logs (default %(default)s)")
    add("--json", help="file for all figures")
    add("--plot", help="PNG file for the curves; needs matplotlib")
    config = parser.parse_args(words)
    config.presets = config.presets.split(",")
    return config


# ---- data


def split_at(text: bytes) -> int:
    """Returns where the validation split begins, by nanoGPT's rule."""
    return int(len(text) * 0.9)


def prepare_ours(config) -> None:
    """Writes token shards of the text to the work folder."""
    words = "--tokenizer byte --val_split tail --val_fraction 0.1 --out"
    command = [sys.executable, ROOT / "data/prepare.py", config.text, *words.split(), config.work / "data"]
    subprocess.run(command, check=True)


def prepare_nanogpt(config, text: bytes) -> bytes:
    """Copies the files that nanoGPT needs, and writes the text as its own prepare.py does. Returns the vocabulary: the
    bytes that occur in the text, sorted."""
    import numpy as np

    folder = config.work / NANOGPT
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(config.nanogpt / name, folder / name)
    vocabulary = bytes(sorted(set(text)))
    ids = np.frombuffer(text.translate(ids_of(vocabulary)), dtype=np.uint8).astype(np.uint16)
    (folder / DATASET).mkdir(parents=True)
    ids[: split_at(text)].tofile(folder / DATASET / "train.bin")
    ids[split_at(text) :].tofile(folder / DATASET / "val.bin")
    characters = {"vocab_size": len(vocabulary), "itos": dict(enumerate(map(chr, vocabulary)))}
    characters["stoi"] = {character: number for number, character in characters["itos"].items()}
    (folder / DATASET / "meta.pkl").write_bytes(pickle.dumps(characters))
    return vocabulary


# ---- runs


def run_once(config, program: str, seed: int) -> dict:
    """Runs a program to its end. Returns {"program", "seed", "wall" and "kept_seconds" in seconds, "points": [{"step",
    "seconds"}], "folder" of the snapshots}."""
    folder = config.work / "runs" / f"{Path(program).stem}-{seed}"
    folder.mkdir(parents=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(config.threads)}
    cwd = config.work / NANOGPT if program == NANOGPT else None
    tell(f"running {program}, seed {seed}")
    with open(folder / "output.txt", "wb") as output:
        start = time.time()
        command = command_of(config, program, seed, folder)
        code = subprocess.run(command, cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
        wall = time.time() - start
    if code:
        sys.exit(f"{program}: exit {code}; see {folder / 'output.txt'}")
    lines = (folder / "snapshots/snapshots.jsonl").read_text(encoding="utf-8").splitlines()
    snapshots = [json.loads(line) for line in lines]
    cost = sum(snapshot["cost"] for snapshot in snapshots)
    tell(f"  {wall:.1f} s, of which {cost:.2f} s for keeping weights {len(snapshots)} times")
    points = [{"step": snapshot["step"], "seconds": snapshot["time"] - start} for snapshot in snapshots]
    figures = {"program": program, "seed": seed, "wall": wall, "kept_seconds": cost}
    return figures | {"points": points, "folder": str(folder / "snapshots")}


def command_of(config, program: str, seed: int, folder: Path) -> list[str]:
    """Returns the command line of one run, whose output goes to `folder`."""
    command = [sys.executable, str(ROOT / "benchmarks/snapshots.py"), str(folder / "snapshots")]
    if program == NANOGPT:
        return [*command, NANOGPT, str(seed), *RECIPE.split(), *shlex.split(config.nanogpt_flags)]
    flags = ["--data", str(config.work / "data"), "--out", str(folder / "run"), "--seed", str(seed)]
    return [*command, "ours", str(config.spacing), program, *flags, *shlex.split(config.flags)]


if __name__ == "__main__":
    main()
