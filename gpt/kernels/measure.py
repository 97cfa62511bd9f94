"""Which of two ways is faster on this machine: measured for some milliseconds, once, and kept in the cache folder.

`auto` settings rest on these answers, not on lists of instruction sets: a CPU may have an instruction, or a compiler
may use it, and plain torch may still be faster."""

import contextlib
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from gpt.errors import Error
from gpt.files import cache_folder, make_private, read_json, write_durably

ROUNDS = 5  # of which the best counts: other programs can only slow a round down
MARGIN = 1.1  # the other way must be faster by this factor to be preferred over the plain one
TOO_LONG = 0.2  # seconds; a way that takes longer is measured once


Way = Callable[[], object]


def faster(question: str, contest: Callable[[], tuple[Way, Way]]) -> bool:
    """Returns whether the second way of `contest()` runs at least MARGIN times as fast as the first, the plain one.
    `question` names the comparison: its answer is read from the cache folder if this machine has answered it before."""
    answers = read_answers()
    if not isinstance(answers.get(question), bool):
        answers[question] = measured(*contest())
        write_answers(answers)
    return answers[question]


def measured(plain: Way, other: Way) -> bool:
    """Times the two in turns, so that a slow moment of the machine falls on both; each once before, to warm up."""
    best = [seconds(plain), seconds(other)]
    rounds = 1 if max(best) > TOO_LONG else ROUNDS
    for _ in range(rounds):
        best = [min(before, seconds(way)) for before, way in zip(best, (plain, other), strict=True)]
    return best[1] * MARGIN <= best[0]


def seconds(way: Way) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


# ---- the cache


def answers_path() -> Path | None:
    """Returns the file of answers for this CPU, torch and number of cores; None where there is no cache folder."""
    folder = cache_folder()
    if folder is None:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    identity = repr((cpu_identity(), torch_version(), cores))
    return folder / f"measured-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


def read_answers() -> dict:
    """Returns question -> answer; an unreadable or damaged file holds none."""
    path = answers_path()
    try:
        return (path and read_json(path)) or {}
    except Error:
        return {}


def write_answers(answers: dict) -> None:
    """Writes the answers. A cache folder that cannot be written to is no error: the next program measures again."""
    path = answers_path()
    if path is not None:
        with contextlib.suppress(OSError):
            make_private(path.parent)
            write_durably(path, json.dumps(answers, indent=1))


@functools.cache
def cpu_identity() -> tuple[str, list[str]]:
    """Returns the properties of the CPU on which its instruction sets depend."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = ("model", "cpu family", "flags", "features", "cpu part")
    lines = [line for line in text.split("\n\n")[0].splitlines() if line.lower().startswith(names)]
    return platform.machine(), lines


@functools.cache
def torch_version() -> str:
    """Returns torch's version without importing torch."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""
