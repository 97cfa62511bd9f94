"""Runs commands in process groups of their own, under a time limit, and ends all that they have started."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path


class Apart:
    """A command in a process group of its own. `close`, or the end of the `with` block, ends all that it has started.
    Its output goes to the file `log`, if one is given."""

    def __init__(self, command: list, limit: float, log: Path | None = None):
        self.began, self.limit, self.closed = time.monotonic(), limit, False
        output = open(log, "w") if log else None
        errors = subprocess.STDOUT if log else None
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=output, stderr=errors, start_new_session=True
        )
        if output:
            output.close()

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def state(self, wait: float) -> tuple[str, str] | None:
        """Waits at most `wait` seconds for the command. Returns its state (pass, FAIL or TIME) and the reason; None
        while it runs and has time left."""
        left = self.began + self.limit - time.monotonic()
        try:
            code = self.process.wait(max(0.0, min(wait, left)))
        except subprocess.TimeoutExpired:
            return ("TIME", f"not done after {self.limit:.0f} s") if left <= wait else None
        return ("FAIL", f"exit code {code}, see above") if code else ("pass", "")

    def close(self) -> None:
        """Kills the process group. A second call is a no-op."""
        if self.closed:
            return
        self.closed = True
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()


def run_apart(command: list, result: Path, limit: float) -> tuple[str, str]:
    """Runs `command` for at most `limit` seconds; returns the state and the message that it has written to `result` as
    JSON, or TIME or FAIL with a reason. No process that it has started outlives this call."""
    result.unlink(missing_ok=True)
    with Apart(command, limit) as process:
        state, reason = process.state(limit)
    if state != "TIME" and result.exists():
        return tuple(json.loads(result.read_text()))
    return (state, reason) if state != "pass" else ("FAIL", "exit code 0, but no result")


def end_with_parent() -> None:
    """Makes a command that `Apart` runs end, with all that it has started, as soon as its parent is gone: the parent
    holds the other end of stdin."""

    def wait():
        os.read(sys.stdin.fileno(), 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
