"""Runs a command in a process group of its own, under a time limit, and ends all that it has started."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path


def run_apart(command: list, result: Path, limit: float) -> tuple[str, str]:
    """Runs `command` for at most `limit` seconds; returns the state and the message that it has written to `result` as
    JSON, or TIME or FAIL with a reason. No process that it has started outlives this call."""
    result.unlink(missing_ok=True)
    process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return "TIME", f"not done after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
    if result.exists():
        return tuple(json.loads(result.read_text()))
    return "FAIL", f"exit code {code}, see above"


def end_with_parent() -> None:
    """Makes a command that `run_apart` runs end, with all that it has started, as soon as its parent is gone: the
    parent holds the other end of stdin."""

    def wait():
        os.read(sys.stdin.fileno(), 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
