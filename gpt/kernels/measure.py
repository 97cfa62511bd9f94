"""Measures which of two functions is faster on this machine, and keeps the answer in the cache folder for a day. No
round begins after a fifth of a second; making the two functions is not included.

`auto` settings use these answers, not lists of instruction sets: a CPU may have an instruction, or a compiler
may use it, and plain torch may still be faster. Another program that takes a core meanwhile can falsify a measurement,
so an answer holds for a day only."""

import contextlib
import functools
import hashlib
import json
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from gpt.errors import Error
from gpt.files import cache_folder, make_private, read_json, write_durably

ROUNDS = 5  # the best one is used: other programs can only slow a round down
BUDGET = 0.2  # seconds, after which no round begins
MARGIN = 1.1  # the factor by which a function must be faster to replace the other one
VALID_SECONDS = 24 * 3600

Way = Callable[[], object]


def faster(question: str, contest: Callable[[], tuple[Way, Way]]) -> bool:
    """Returns whether the second function of `contest()` is faster than the first, the plain one. `question` names the
    comparison. If the cache folder holds an answer of this machine that is less than a day old, returns it without a
    measurement.

    Without an earlier answer, the second function must be MARGIN times as fast to win. A measurement turns an earlier
    answer around only if the loser is now MARGIN times as fast, so between two functions of about equal speed the
    answer stays the same."""
    answers, now = read_answers(), int(time.time())
    match answers.get(question):
        case {"faster": bool(before), "time": int(then)}:
            if abs(now - then) < VALID_SECONDS:
                return before
        case _:
            before = False
    ratio = speed_ratio(*contest())
    answer = ratio >= (1 / MARGIN if before else MARGIN)
    write_answers(answers | {question: {"faster": answer, "ratio": round(ratio, 3), "time": now}})
    return answer


def speed_ratio(plain: Way, other: Way) -> float:
    """Returns how many times as fast as `plain` the function `other` is, by the best time of each. Runs the two in
    turns, so that a slow moment of the machine affects both."""
    end = time.perf_counter() + BUDGET
    best = [seconds(plain), seconds(other)]
    for _ in range(ROUNDS):
        if time.perf_counter() < end:
            best = [min(best[0], seconds(plain)), min(best[1], seconds(other))]
    return best[0] / best[1]


def seconds(way: Way) -> float:
    start = time.perf_counter()
    way()
    return max(time.perf_counter() - start, 1e-9)


# ---- the cache


def answers_path() -> Path | None:
    """Returns the file of answers for this CPU and torch, or None if there is no cache folder."""
    folder, identity = cache_folder(), repr((cpu_identity(), torch_version()))
    return folder and folder / f"measured-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


def read_answers() -> dict[str, Any]:
    """Returns question -> answer; {} if the file is missing or damaged."""
    path = answers_path()
    try:
        return (path and read_json(path)) or {}
    except Error:
        return {}


def write_answers(answers: dict[str, Any]) -> None:
    """Writes the answers. Ignores errors: if there is no file, the next program measures again."""
    path = answers_path()
    if path:
        with contextlib.suppress(OSError):
            make_private(path.parent)
            write_durably(path, json.dumps(answers, indent=1))


@functools.cache
def cpu_identity() -> tuple[str, list[str]]:
    """Returns the type of the machine and the lines of /proc/cpuinfo on which its instruction sets depend."""
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
