"""Builds and loads the native libraries: the C++ files of this folder, compiled once into the user's cache folder.

Every build runs in a process of its own, `python -m gpt.kernels.build`, which must start fast: never import torch here.
The standard input of that process and of its compiler is the locked file `<purpose>.lock` in the cache folder. The
system frees the lock when both have ended, however they end. So only one build of a library runs at a time."""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import BinaryIO

from gpt.errors import ResourceError, note
from gpt.files import cache_folder, lock_file, make_private, no_link, write_durably
from gpt.kernels.measure import cpu_identity, torch_version

FOLDER = Path(__file__).parent
GENERATION, TRAINING = "generation", "training"  # the purpose of a library
SOURCES = {GENERATION: ["model.cpp", "sampler.cpp"], TRAINING: ["attention.cpp"]}
HEADERS = ["products.h", "team.h", "vectors.h", "weights.h"]
COMMON = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-Wno-psabi"]
FLAGS = [[*COMMON, cpu] for cpu in ("-march=native", "-mcpu=native")]  # in order of preference
BACKGROUND_NICENESS = 10  # with 19, a build on a busy machine may never end
HEAD_START = 2  # seconds in which a background build leaves the machine to the program that started it
BUILD_SECONDS = 600  # limit for a build
WAIT_SECONDS = 120  # limit for waiting for another build, and then for our own; ranks wait 300 seconds for each other
RETRY_SECONDS = 24 * 3600  # after a compiler error; a system update may have repaired the compiler
MESSAGE_CHARACTERS = 10_000  # of a compiler's message that are kept
INTERRUPTED = re.compile(  # a compiler with such a message did not run to its end, because of the state of the machine
    r"signal terminated program|terminated with signal|due to signal|unable to execute command|out of memory"
    r"|memory exhausted|cannot allocate memory|bad_alloc|no space left|quota exceeded|read-only file system"
    r"|input/output error|stale file handle|resource temporarily unavailable|too many open files",
    re.IGNORECASE,
)


def load_library(purpose: str = GENERATION) -> ctypes.CDLL | None:
    """Returns the C++ library for `purpose`, or None if it is not built, is damaged, or may have been written by
    another user. Never waits."""
    path = library_path(purpose)
    if path is None or not (is_ours(path.parent) and is_ours(path) and is_whole(path)):
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def build_now(purpose: str = GENERATION) -> ctypes.CDLL | None:
    """Returns the C++ library for `purpose`. If it is missing, builds it or waits for the process that builds it; this
    takes seconds. Returns None if it cannot be built, the build fails, or a wait exceeds WAIT_SECONDS."""
    library = load_library(purpose)
    if library is None:
        builder = start_builder(purpose, wait_seconds=WAIT_SECONDS)
        if builder is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # the builder goes on, as it does after Ctrl-C
                builder.wait(WAIT_SECONDS)
        library = load_library(purpose)
    return library


def start_background_build(purpose: str = GENERATION) -> bool:
    """Starts a build of the library for `purpose` at low priority, which goes on when this program ends. Returns False,
    and starts none, if the library exists, cannot be built, or is being built by another process."""
    builder = start_builder(purpose, "background")
    if builder is None:
        return False
    threading.Thread(target=builder.wait, daemon=True).start()  # otherwise the ended builder remains as a zombie
    return True


# ---- the path of a library


def library_path(purpose: str = GENERATION) -> Path | None:
    """Returns the path of the library for `purpose`, whose name depends on sources, flags, CPU, compiler and torch.
    Returns None if there is no compiler or no home folder."""
    command, folder = compiler(), cache_folder()
    if command is None or folder is None:
        return None
    key = hashlib.sha256(repr((command, FLAGS, cpu_identity(), torch_version())).encode())
    for name in [*SOURCES[purpose], *HEADERS]:
        key.update(name.encode() + (FOLDER / name).read_bytes())
    return folder / f"{purpose}-{key.hexdigest()[:32]}.so"


def compiler() -> list[str] | None:
    """Returns the words of the command that compiles C++, or None if there is no compiler."""
    if os.name == "nt":
        return None
    for words in (split_command(os.environ.get("CXX", "")), ["c++"], ["g++"], ["clang++"]):
        program = shutil.which(words[0]) if words else None
        if program:
            return [program, *words[1:]]
    return None


@functools.cache  # warns once
def split_command(text: str) -> list[str]:
    """Returns the words of `text`, the value of CXX; [] with a warning if a quote is not closed."""
    try:
        return shlex.split(text)
    except ValueError as error:
        note("warning", f"CXX={text}: not a command ({error}), ignored; correct or unset this environment variable")
        return []


# ---- the state of the cache folder


def is_ours(path: Path) -> bool:
    """Returns whether a file or folder exists, belongs to this user, and can be written by no other user."""
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def is_whole(path: Path) -> bool:
    """Returns whether a library ends in the sha256 of the bytes before it. The system would kill a program that loads a
    truncated library."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return data[-32:] == hashlib.sha256(data[:-32]).digest()


def failed_marker(path: Path) -> Path:
    return path.with_suffix(".failed")


def needs_build(path: Path) -> bool:
    """Returns whether a library is missing or damaged, and no compiler has rejected it in the last RETRY_SECONDS."""
    with contextlib.suppress(OSError):
        if abs(time.time() - failed_marker(path).stat().st_mtime) < RETRY_SECONDS:
            return False
    return not is_whole(path)


# ---- the process that builds


def start_builder(purpose: str, *arguments: str, wait_seconds: float = 0) -> subprocess.Popen[bytes] | None:
    """Starts a process that holds the lock and calls `run_builder(path, purpose, *arguments)`. Returns None if a build
    is not needed or not possible, or if another process still holds the lock after `wait_seconds`."""
    path = library_path(purpose)
    if path is None or not needs_build(path):
        return None
    search_path = filter(None, [str(FOLDER.parents[1]), os.environ.get("PYTHONPATH")])
    try:
        make_private(path.parent)
        if not is_ours(path.parent):
            return None
        with open(path.parent / f"{purpose}.lock", "ab", opener=no_link) as lock:
            if not lock_and_sweep(lock, path.parent, purpose, wait_seconds) or not needs_build(path):
                return None
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "gpt.kernels.build", str(path), purpose, *arguments],
                stdin=lock,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(search_path)},
                start_new_session=True,
            )
    except OSError:  # the disk is full or read-only
        return None


def lock_and_sweep(lock: BinaryIO, folder: Path, purpose: str, wait_seconds: float) -> bool:
    """Locks the file `lock` and removes what killed builds for `purpose` left in `folder`. Returns False if another
    process still holds the lock after `wait_seconds`. On a file system without locks does neither and returns True."""
    try:
        if not lock_file(lock, wait_seconds):
            return False
    except OSError:  # a file system without locks: other builds may be running, whose files must stay
        return True
    for leftover in folder.glob(f"building-{purpose}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return True


def run_builder(path: str, purpose: str, priority: str = "normal") -> None:
    """Builds the library `path`. Must run in the leader of a process group: after BUILD_SECONDS it kills the group, the
    compiler included."""
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))
    signal.alarm(BUILD_SECONDS)
    if priority == "background":
        os.nice(BACKGROUND_NICENESS)
        time.sleep(HEAD_START)
    compile_library(Path(path), purpose)


def compile_library(path: Path, purpose: str) -> None:
    """Writes the library `path`, built with the first of FLAGS that the compiler accepts. If the compiler accepts none,
    writes the date and its message about FLAGS[0] to `<library>.failed`. Raises ResourceError or OSError, and writes
    neither, if the compiler does not run to its end."""
    sources, messages = [str(FOLDER / name) for name in SOURCES[purpose]], []
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"building-{purpose}-") as folder:
        target = Path(folder) / path.name
        for flags in FLAGS:
            message = run_compiler([*flags, *sources, "-o", str(target)])
            if not message:
                library = target.read_bytes()
                write_durably(target, library + hashlib.sha256(library).digest())
                os.replace(target, path)
                failed_marker(path).unlink(missing_ok=True)
                return
            messages.append(message)
    date = time.strftime("%Y-%m-%d %H:%M:%S")
    write_durably(failed_marker(path), f"{date}\n{messages[0][:MESSAGE_CHARACTERS]}")


def run_compiler(arguments: list[str]) -> str:
    """Returns "", or the compiler's message if it rejects its input. Raises ResourceError if the compiler was killed or
    if memory or disk space ran out, which says nothing about the input; OSError if it cannot be started."""
    command = [*(compiler() or ["c++"]), *arguments]
    english = os.environ | {"LC_ALL": "C"}  # INTERRUPTED searches for English messages
    # The compiler inherits the standard input, so that it keeps the lock if it outlives a killed builder.
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=english)
    if run.returncode == 0:
        return ""
    message = run.stdout.decode("utf-8", "replace") or f"exit code {run.returncode}"
    if run.returncode < 0 or 128 < run.returncode < 193 or INTERRUPTED.search(message):  # a shell adds 128 to a signal
        raise ResourceError(f"compiler ended early: {message}; start again")
    return message


if __name__ == "__main__":
    run_builder(*sys.argv[1:])
