"""Runs the steps of gpu_run.py, each in a process group of its own under a time limit; prints a table of them."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from apart import Apart
from report import print_columns

SHOWN = 16  # last lines of a step's output
TOO_SHORT = 15  # seconds, in which no step can end


@dataclass(frozen=True)
class Step:
    """A command of the plan."""

    name: str
    limit: float
    """seconds: about twice what the step takes on an H100"""
    command: list


def run_steps(groups: list[list[Step]], minutes: float, out: Path, record: dict, save: Callable[[], None]) -> int:
    """Runs the groups one after the other, adds each step to `record` and saves it. Returns the exit code."""
    deadline = time.monotonic() + 60 * minutes
    for group in groups:
        for line in run_group(group, deadline - time.monotonic(), out):
            record["steps"].append(line)
            save()
    return int(any(state in ("FAIL", "TIME") for _, state, *_ in record["steps"]))


def print_steps(record: dict) -> None:
    """Prints the table of the steps so far."""
    print()
    print_columns([["step", "state", "seconds", "found"], *record["steps"]])


def run_group(group: list[Step], left: float, out: Path) -> Iterator[list[str]]:
    """Runs the steps side by side for at most `left` seconds. Yields a line of the table as soon as a step ends."""
    if left < TOO_SHORT:
        yield from ([step.name, "skip", "0", "not begun: the minutes are over"] for step in group)
        return
    with contextlib.ExitStack() as stack:
        logs = {step.name: out / f"{step.name}.log" for step in group}
        running = {}
        for step in group:
            running[step.name] = stack.enter_context(Apart(step.command, min(step.limit, left), logs[step.name]))
        while running:
            for name, process in list(running.items()):
                if found := process.state(wait=0.1):
                    process.close()
                    del running[name]
                    yield line_of(name, *found, time.monotonic() - process.began, logs[name])


def line_of(name: str, state: str, reason: str, seconds: float, log: Path) -> list[str]:
    """Prints the last lines of a step's output; returns the step's line of the table."""
    output = log.read_text(encoding="utf-8", errors="replace").splitlines()
    print(f"\n=== {name}: {state}, {seconds:.0f} s", *output[-SHOWN:], sep="\n", flush=True)
    last = [words for words in output if words.strip()][-1:]
    found = " ".join("".join(last).replace("|", " ").split())[:100]
    return [name, state, f"{seconds:.0f}", reason or found]
