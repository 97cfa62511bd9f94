"""The loss.png of a run under way: drawn beside the training, which neither waits for it nor fails with it."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

from gpt.errors import note

PICTURE = "loss.png"
INSTALL = 'pip install -c constraints.txt -e ".[plot]" brings matplotlib'
SECONDS_BETWEEN = 120  # drawings, each of which takes about a second of one core
SECONDS_TO_WAIT = 10  # for the last one
LOWEST = 19  # priority


class Picture:
    """Keeps `folder`'s loss.png up to date: now and then a process of its own, of the lowest priority, draws what its
    metrics hold. A drawing that fails is a warning, once; without matplotlib there are none, which is said first."""

    def __init__(self, folder):
        self.folder = os.path.abspath(folder)
        self.process, self.is_current, self.has_failed = None, True, False
        self.next = time.monotonic() + SECONDS_BETWEEN
        self.possible = importlib.util.find_spec("matplotlib") is not None
        if not self.possible:
            note("info", f"no {PICTURE} is drawn: {INSTALL}")

    def recorded(self, evaluated, ends):
        """A line of the metrics was written: with an evaluation, with the run's end. Draw if it is time to."""
        self.is_current = False
        if evaluated and (ends or time.monotonic() >= self.next) and self.is_idle():
            self.start()

    def start(self):
        if not self.possible:
            return
        self.next, self.is_current = time.monotonic() + SECONDS_BETWEEN, True
        root = str(Path(__file__).resolve().parents[1])  # `gpt` need not be installed
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gpt.plot", self.folder],
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for training
                creationflags=getattr(subprocess, "IDLE_PRIORITY_CLASS", 0),  # Windows
            )
            if hasattr(os, "setpriority"):
                os.setpriority(os.PRIO_PROCESS, self.process.pid, LOWEST)
        except OSError as error:
            self.warn(error.strerror)

    def is_idle(self):
        """Whether nothing is being drawn. A drawing that has failed is told here, the first one only."""
        if self.process is None:
            return True
        if self.process.poll() is None:
            return False
        with self.process.stderr as stderr:
            said = stderr.read().decode("utf-8", "replace").strip().splitlines()
        if self.process.returncode:
            self.warn(said[-1].removeprefix("error: ") if said else f"exit code {self.process.returncode}")
        self.process = None
        return True

    def warn(self, reason):
        if not self.has_failed:
            note("warning", f"{PICTURE} was not drawn: {reason}")
        self.has_failed = True

    def close(self):
        """Draw the last state of the run, and wait for that a while; what takes longer ends by itself."""
        interrupted = isinstance(sys.exception(), KeyboardInterrupt)
        deadline = time.monotonic() + (0 if interrupted else SECONDS_TO_WAIT)
        with contextlib.suppress(KeyboardInterrupt):  # whoever does not want to wait
            self.wait(deadline)
            if not self.is_current and self.is_idle():
                self.start()
                self.wait(deadline)

    def wait(self, deadline):
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(max(0, deadline - time.monotonic()))
        self.is_idle()
