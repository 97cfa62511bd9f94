"""Programs in processes of their own, of which one runs while the others are stopped.

A library's idle threads may spin, and one library's threads disturb another's: so each program has a fresh process, and
a stopped process uses no processor."""

import importlib
import math
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

LIMIT = 900  # seconds that a program may take to load or to answer


class Absent(Exception):
    """A program that is not installed, does not load or has crashed; the text is the reason."""


class Worker:
    """A program of `module` in its own process, stopped unless it is being asked something. What it has not answered
    by the monotonic time `until` counts as never. Whoever makes one must `close` it, whatever happens: at exit Python
    waits for the process, and one that is stopped never ends."""

    def __init__(self, name, spec, folder, threads, device, *more, module="programs", until=math.inf):
        self.name, self.until = name, until
        self.log = Path(folder).parent / f"{name.replace('/', '-').replace(':', '-')}.log"
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, self.log, module, spec, folder, threads, device, *more)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def wait_loaded(self):
        """Wait until the program is ready to be asked. Raises Absent."""
        self.load_seconds, self.version = self.answer()
        self.signal("SIGSTOP")

    def ask(self, method, *arguments):
        """(seconds, result) of a method of the program. Raises Absent."""
        self.signal("SIGCONT")
        self.pipe.send((method, arguments))
        found = self.answer()
        self.signal("SIGSTOP")
        return found

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
        if hasattr(signal, name) and self.process.is_alive():  # Windows has neither
            os.kill(self.process.pid, getattr(signal, name))

    def close(self):
        """End the process: of its own accord when it sees that the pipe is closed, else by force."""
        self.signal("SIGCONT")
        self.pipe.close()
        self.process.join(5)
        self.process.kill()
        self.process.join()


def guarded(record, program, act, *arguments):
    """Whether `act` of the program went well; the reason if not goes into the record, and it takes part no more."""
    if program.name in record["absent"]:
        return False
    try:
        act(program, *arguments)
    except Absent as error:
        record["absent"][program.name] = str(error)
        return False
    return True


def in_turn(items, number):
    """`items` in the order of round `number`: each round begins with the next, so that drift and heat do not always
    fall on the same one."""
    first = number % len(items) if items else 0
    return [*items[first:], *items[:first]]


def serve(pipe, log, module, name, folder, threads, device, *more):
    """The process: load the program `name` of a module of this folder, then answer until the pipe is closed. What it
    prints goes to `log`."""
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
