"""Proves the paths that only a GPU runs, the most important ones first.

    python benchmarks/prove_cuda.py
    python benchmarks/prove_cuda.py --out out/proof --only greedy,graph
    python benchmarks/prove_cuda.py --thorough

Each check runs in a process of its own under a time limit, so that an error of the device or a process that hangs
leaves the other checks alone. By default all of them take less than 10 minutes on an H100; --thorough, with every
precision and back end, takes about an hour. The last lines are a table of all checks. The exit code is 1 unless all
of them passed.

The checks train a small model on the Python library's sources; with the same --out a later proof uses it again. The
check `speed` needs GPT-2's tokenizer: see TIKTOKEN_CACHE_DIR in the README."""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import text_checks
import training_checks
from apart import end_with_parent, run_apart
from machine import default_device, describe_machine, headline
from proof import CheckFailed, Proof
from report import print_columns

MINUTES = 10  # of the whole proof, unless it is thorough
TOO_SHORT = 15  # seconds, in which no check can end


@dataclass(frozen=True)
class Check:
    run: Callable[[Proof], str]
    limit: int
    """seconds that the check may take: about twice what it takes on an H100"""
    thorough_limit: int
    on_cpu: bool = True
    """whether the check means anything without a GPU"""


CHECKS = {  # the most important ones first
    "precisions": Check(training_checks.check_precisions, 180, 500),
    "greedy": Check(text_checks.check_greedy, 180, 900),
    "graph": Check(training_checks.check_graph, 120, 400, on_cpu=False),
    "resume": Check(training_checks.check_resume, 90, 400),
    "neighbours": Check(text_checks.check_neighbours, 60, 600),
    "same_texts": Check(text_checks.check_same_texts, 60, 300),
    "undecided": Check(text_checks.check_undecided, 45, 45, on_cpu=False),
    "attention": Check(training_checks.check_attention, 45, 45, on_cpu=False),
    "memory": Check(text_checks.check_memory, 60, 60, on_cpu=False),
    "speed": Check(text_checks.check_speed, 150, 2400),
}


def main() -> int:
    config = parse(sys.argv[1:])
    if config.here:
        return run_here(Proof(config.out, config.here, config.device, config.thorough))
    deadline = time.monotonic() + 60 * config.minutes if config.minutes else math.inf
    print(headline(describe_machine(config.device)), flush=True)
    lines = []
    for name in config.only:
        started = time.monotonic()
        state, message = prove(Proof(config.out, name, config.device, config.thorough), deadline)
        seconds = time.monotonic() - started
        print(f"{state:5} {name}, {seconds:.0f} s: {message}", flush=True)
        lines.append([name, state, f"{seconds:.0f}", message])
    print()
    print_columns([["check", "state", "seconds", "found"], *lines])
    return int(any(state not in ("pass", "skip") for _, state, *_ in lines))


def parse(words: list[str]) -> argparse.Namespace:
    """Returns the settings. --here NAME, which --help does not show, runs one check in this very process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, help="folder for data, runs, logs and results (default: a new temporary one)")
    add("--only", default=",".join(CHECKS), help="checks, with commas (default %(default)s)")
    add("--minutes", type=float, help=f"time for the whole proof, 0 = no limit (default {MINUTES}; 0 with --thorough)")
    add("--thorough", action="store_true", help="check every precision and back end")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the program out (default cuda)")
    add("--here", choices=CHECKS, help=argparse.SUPPRESS)
    config = parser.parse_args(words)
    config.only = config.only.split(",")
    for name in config.only:
        if name not in CHECKS:
            parser.error(f"--only {name}: no such check; choose from {', '.join(CHECKS)}")
    if config.device == "cuda" and default_device() != "cuda":
        parser.error("torch finds no GPU; --device cpu tries the program out")
    if config.minutes is None:
        config.minutes = 0 if config.thorough else MINUTES
    config.out = (config.out or Path(tempfile.mkdtemp(prefix="gpt-proof-"))).absolute()
    config.out.mkdir(parents=True, exist_ok=True)
    return config


# ---- one check


def prove(proof: Proof, deadline: float) -> tuple[str, str]:
    """Runs a check in a process of its own; returns its state (pass, FAIL, TIME or skip) and what it found."""
    check, left = CHECKS[proof.check], deadline - time.monotonic()
    if proof.device == "cpu" and not check.on_cpu:
        return "skip", "needs a GPU"
    if left < TOO_SHORT:
        return "TIME", "not begun: the minutes are over"
    command = [sys.executable, __file__, "--out", proof.folder, "--device", proof.device, "--here", proof.check]
    limit = check.thorough_limit if proof.thorough else check.limit
    return run_apart([*command, *["--thorough"] * proof.thorough], proof.result, min(left, limit))


def run_here(proof: Proof) -> int:
    """Runs a check in this process, writes its state and message to a file, and returns the exit code."""
    end_with_parent()
    shutil.rmtree(proof.runs, ignore_errors=True)  # an earlier proof's runs would be continued
    proof.runs.mkdir()
    try:
        state, message = "pass", CHECKS[proof.check].run(proof)
    except CheckFailed as error:  # any other error shows its traceback
        state, message = "FAIL", str(error)
    proof.result.write_text(json.dumps([state, message]))
    return int(state != "pass")


if __name__ == "__main__":
    sys.exit(main())
