"""Runs each compared program in a process of its own; all but one of the processes are stopped.

Idle threads of a library may spin, and threads of one library slow down another's. So each program gets a fresh
process, and a stopped process uses no processor."""

import importlib
import math
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 900  # seconds that a program may take to load or to answer


class Absent(Exception):
    """A program is not installed, does not load or has crashed; the text gives the reason."""


class Worker:
    """A program of `module` in a process of its own, which is stopped unless the program answers a call.

    An answer that has not arrived by the monotonic time `until` counts as never. A Worker that is still open at exit is
    closed there: Python waits for its process, and a stopped process never ends."""

    def __init__(self, name, spec, folder, threads, device, *more, module="programs", until=math.inf):
        self.name, self.until = name, until
        self.log = Path(folder).parent / f"{name.replace('/', '-').replace(':', '-')}.log"
        context = multiprocessing.get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        arguments = (child_pipe, self.log, module, spec, folder, threads, device, *more)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        multiprocessing.util.Finalize(None, self.close, exitpriority=1)
        child_pipe.close()

    def wait_loaded(self) -> None:
        """Waits until the program is loaded. Raises Absent."""
        self.load_seconds, self.version = self.answer()
        self.signal("SIGSTOP")

    def ask(self, method: str, *arguments) -> tuple[float, Any]:
        """Calls a method of the program; returns the seconds that it took and its result. Raises Absent."""
        self.signal("SIGCONT")
        self.pipe.send((method, arguments))
        answer = self.answer()
        self.signal("SIGSTOP")
        return answer

    def answer(self):
        try:
            limit = max(0.0, min(LIMIT, self.until - time.monotonic()))
            if self.pipe.poll(limit):
                return self.pipe.recv()
            reason = f"no answer in {limit:.0f} s"
        except (EOFError, ConnectionError):
            self.process.join(5)  # for its exit code
            reason = self.last_words()
        self.close()
        raise Absent(reason)

    def last_words(self):
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        code = self.process.exitcode
        return (lines[-1][:200] if lines else "") + (f" (exit {code})" if code != 1 else "")

    def signal(self, name):
        if hasattr(signal, name) and self.process.is_alive():  # Windows has no such signals
            os.kill(self.process.pid, getattr(signal, name))

    def close(self) -> None:
        """Ends the process: it exits by itself when the pipe is closed, otherwise it is killed after 5 seconds."""
        self.signal("SIGCONT")
        self.pipe.close()
        self.process.join(5)
        self.process.kill()
        self.process.join()


def guarded(record: dict, program: Worker, action: Callable, *arguments) -> bool:
    """Calls action(program, *arguments) and returns whether it succeeded. After a failure the reason is in
    record["absent"], and the program is not called again."""
    if program.name in record["absent"]:
        return False
    try:
        action(program, *arguments)
    except Absent as error:
        record["absent"][program.name] = str(error)
        return False
    return True


def in_turn(items: list, number: int) -> list:
    """Returns `items` in the order of round `number`. Each round begins with another item, so that drift and heat do
    not always fall on the same one: ["a", "b", "c"] in round 1 is ["b", "c", "a"]."""
    first = number % len(items) if items else 0
    return [*items[first:], *items[:first]]


def serve(pipe, log, module, name, folder, threads, device, *more):
    """Runs in the new process: loads the program `name` of `module` and answers calls until the pipe is closed. Its
    output goes to the file `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    sys.path.insert(0, str(Path(__file__).parent))
    start = time.perf_counter()
    program = importlib.import_module(module).load(name, folder, threads, device, *more)
    pipe.send((time.perf_counter() - start, program.version))
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        start = time.perf_counter()
        result = getattr(program, method)(*arguments)
        pipe.send((time.perf_counter() - start, result))
