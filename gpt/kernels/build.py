"""The native libraries: compiled from the C++ files of this folder by the system's compiler, once, in a per-user cache.

Nothing here imports torch, nor the rest of gpt: the background build runs this file by itself and starts at once."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
GENERATION, TRAINING = "generation", "training"
SOURCES = {  # of each library; what takes longest to compile comes first
    GENERATION: [FOLDER / "forward.cpp", FOLDER / "choose.cpp"],
    TRAINING: [FOLDER / "causal.cpp", FOLDER / "training.cpp"],
}
HEADERS = sorted(FOLDER.glob("*.h"))
COMMON = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-Wno-psabi"]
FLAGS = [  # the first that the compiler takes; without OpenMP the library works with one thread
    [*COMMON, "-march=native", "-fopenmp"],
    [*COMMON, "-march=native"],
    [*COMMON, "-mcpu=native", "-fopenmp"],
    [*COMMON, "-mcpu=native"],
]
HEAD_START = 2  # seconds that the program which starts a background build has the machine to itself
COMPILE_SECONDS = 300  # at most
DIGEST_BYTES = 32
MESSAGE_CHARACTERS = 10_000  # kept of what a compiler that failed says


def load(purpose=GENERATION):
    """The library of a purpose as ctypes has it, or None where it is not built or must not be trusted; never waits."""
    path = library_path(purpose)
    if path is None or not (ours(path.parent) and ours(path) and whole(path)):
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def build(purpose=GENERATION):
    """The library, built now unless it is there: takes seconds. None where that cannot be done or has failed before;
    then `<library>.failed` in the cache folder says why."""
    path = library_path(purpose)
    if path is not None and not whole(path) and may_build(path):
        with contextlib.suppress(OSError):  # the disk is full or read-only
            compile_into(path, SOURCES[purpose])
    return load(purpose)


def start_build(purpose=GENERATION):
    """Let a process of its own build the library, which goes on when this one ends. Does nothing where it is built,
    has failed before, or cannot be. Whether it began."""
    path = library_path(purpose)
    if path is None or whole(path) or not may_build(path):
        return False
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with contextlib.suppress(OSError):
        process = subprocess.Popen([sys.executable, "-P", __file__, purpose], **quiet, start_new_session=True)
        threading.Thread(target=process.wait, daemon=True).start()  # or a dead process stays in the system's list
        return True
    return False


# ---- where


def library_path(purpose=GENERATION):
    """Where the library of its sources, this compiler, CPU and torch is or would be; None where there is none."""
    command, home = compiler(), os.environ.get("XDG_CACHE_HOME", "")
    if command is None:
        return None
    try:
        cache = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    except RuntimeError:  # no home
        return None
    return cache / "gpt-text-generator" / f"{purpose}-{key(command, purpose)}.so"


def compiler():
    """The command that compiles C++, a list of words; None where there is none."""
    if os.name == "nt":
        return None
    for command in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return [shutil.which(words[0]), *words[1:]]
    return None


def key(command, purpose):
    digest = hashlib.sha256()
    for part in (command, FLAGS, cpu(), torch_version()):
        digest.update(repr(part).encode())
    for source in [*SOURCES[purpose], *HEADERS]:
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:32]


@functools.cache
def cpu():
    """What the instructions that -march=native chooses depend on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    first = text.split("\n\n")[0].splitlines()
    named = [
        line for line in first if line.lower().startswith(("model", "cpu family", "flags", "features", "cpu part"))
    ]
    return platform.machine(), platform.processor(), named


@functools.cache
def torch_version():
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def ours(path):
    """Whether a file or folder is there, belongs to this user, and nobody else may write to it."""
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def whole(path):
    """Whether a library is there as `seal` left it: the system kills a program that loads one whose end is missing."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data[:-DIGEST_BYTES]).digest() == data[-DIGEST_BYTES:]


# ---- building


def may_build(path):
    """Make the cache folder; whether it is ours and no build has failed there."""
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return False
    return ours(path.parent) and not failed_marker(path).exists()


def failed_marker(path):
    return path.with_suffix(".failed")


def compile_into(path, sources):
    """Compile to a file of its own, then rename it: whoever builds at the same time, `path` is always whole. Without
    success the marker is written. Raises OSError."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix="building-", suffix=".so")
    os.close(descriptor)
    try:
        message = try_flags(name, sources)
        if message is None:
            seal(Path(name))
            os.replace(name, path)
        else:
            failed_marker(path).write_text(message, encoding="utf-8")
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def seal(path):
    """Append the sha256 of a library to it, which loaders pass over."""
    path.chmod(0o700)
    with open(path, "r+b") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def try_flags(target, sources):
    """Compile with the first of FLAGS that works, all files at once: None, or what the compiler says of the first."""
    messages, parent = [], Path(target).parent
    with tempfile.TemporaryDirectory(dir=parent, prefix="building-") as folder, ThreadPoolExecutor(cores()) as pool:
        objects = [os.path.join(folder, f"{source.stem}.o") for source in sources]
        for flags in FLAGS:
            parts = [[*flags, "-c", str(source), "-o", part] for source, part in zip(sources, objects, strict=True)]
            found = [message for message in pool.map(run_compiler, parts) if message is not None]
            message = found[0] if found else run_compiler([*flags, *objects, "-o", target])
            if message is None:
                return None
            messages.append(message)
    return messages[0][:MESSAGE_CHARACTERS]


def run_compiler(arguments):
    """None, or what it says of why it failed."""
    try:
        run = subprocess.run(
            [*compiler(), *arguments], capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if run.returncode == 0 else run.stderr or f"exit code {run.returncode}"


def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def step_back():
    """Let everything else on the machine go first."""
    os.nice(19)
    with contextlib.suppress(OSError):  # Linux may weigh the processes of sessions against each other instead
        Path("/proc/self/autogroup").write_text("19")


if __name__ == "__main__":
    step_back()
    time.sleep(HEAD_START)
    build(*sys.argv[1:])
