"""Files and folders handled with care: durable writes, names from elsewhere, hashes, JSON, locks, the cache folder."""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path
from typing import IO, Any

from gpt.errors import InputError, IntegrityError, ResourceError, note

JSON_LIMIT = 1 << 28  # bytes; the tokenizer.json of a vocabulary of 200,000 takes 15 MB
STEP_FOLDER = re.compile(r"^step-\d{9}$")
LOCK = "lock"
LOCKED_BYTE = 1 << 30  # where Windows locks: far behind the text, which must stay readable
LOCK_POLL_SECONDS = 0.1


# ---- writing


def write_durably(path, content):
    """Replace a small file so that a reader sees the old or the new content, text or bytes, whatever happens. Raises
    OSError, and leaves nothing half done."""
    content = content if isinstance(content, bytes) else content.encode("utf-8")
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb", opener=no_link) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def no_link(path, flags):
    """The opener of `open` for files that we make: a link that somebody put there is refused, and nobody but the owner
    may write to them."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o644)


def sync_folder(folder):
    if os.name == "nt":  # Windows has no such thing
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(folder):
    """Remove a folder of ours if it is there; a link is removed itself, never followed."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


# ---- reading


def is_folder(path):
    """Whether there is a folder, for any text that a user may give: Path.is_dir raises for a name that is too long."""
    return os.path.isdir(path)


def inside(folder, name):
    """`folder / name`, for a name read from a file. Raises IntegrityError unless it is a plain relative name."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\\x00]|^[A-Za-z]:", name):
        raise IntegrityError(f"manifest path leaves its directory: {name!r} in {folder}; do not trust this folder")
    return folder / name


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path):
    """The object in a JSON file, or None if there is no such file. Raises IntegrityError if it holds something else or
    is longer than JSON_LIMIT, ResourceError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read(JSON_LIMIT + 1)
        values = json.loads(data.decode("utf-8")) if len(data) <= JSON_LIMIT else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        raise IntegrityError(f"{path}: not valid JSON; restore it") from None
    except OSError as error:
        raise ResourceError(f"{path}: {error.strerror}; make it readable") from None
    if len(data) > JSON_LIMIT:
        raise IntegrityError(f"{path}: {path.stat().st_size} bytes, at most {JSON_LIMIT} are read; restore it")
    if not isinstance(values, dict):
        raise IntegrityError(f"{path}: not a JSON object; restore it")
    return values


def json_object(line: str, field: str, where: str, advice: str = "correct the line") -> dict[str, Any]:
    """Returns the object on a line of JSON. Raises InputError unless it is one and has a string `field`."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        raise InputError(f'{where}: expected an object with string field "{field}"; {advice}')
    return value


# ---- run folders


def step_folders(out: str | Path) -> list[Path]:
    """Returns the step folders of a run, newest first, valid or not."""
    if not is_folder(out):
        return []
    return sorted((p for p in Path(out).iterdir() if STEP_FOLDER.match(p.name) and p.is_dir()), reverse=True)


def step_number(folder: Path) -> int:
    """step_number(Path("out/mine/step-000000100")) -> 100"""
    return int(folder.name.removeprefix("step-"))


def read_pointer(out: str | Path, name: str) -> Path | None:
    """Returns the folder that `out/<name>.txt` names, or None if it names no step folder of this run."""
    try:
        text = (Path(out) / f"{name}.txt").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    folder = Path(out) / text
    return folder if STEP_FOLDER.match(text) and folder.is_dir() else None


# ---- one program at a time


@contextlib.contextmanager
def lock_folder(folder):
    """Within this context no other program that asks the same has `folder`. The system gives the lock back when this
    process ends, however it does. Raises ResourceError, naming the holder, if another has it."""
    path = folder / LOCK
    try:
        file = open(path, "a+b", buffering=0, opener=no_link)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be opened ({error.strerror}); remove it or give another --out") from None
    with contextlib.closing(file):
        take_lock(file, folder)
        write_holder(file, f"pid {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        try:
            yield
        finally:
            write_holder(file, "")


def take_lock(file, folder):
    try:
        free = lock_file(file)
    except OSError as error:  # some network file systems have no locks
        note("warning", f"{folder}: cannot be locked ({error.strerror}); take care not to start a second run in it")
        return
    if not free:
        file.seek(0)
        holder = file.read(200).decode("utf-8", "replace").strip() or "another program"
        raise ResourceError(f"{folder}: in use by {holder}; wait for it or give another --out")


def write_holder(file, text):
    with contextlib.suppress(OSError):  # a full disk: the lock holds without it
        file.truncate(0)
        file.write(text.encode("utf-8", "replace"))


def lock_file(file: IO[Any], wait_seconds: float = 0) -> bool:
    """Locks an open file against other programs that call this. Returns False if another one still holds the lock after
    `wait_seconds`. Raises OSError if the file system has no locks.

    The lock belongs to the open file: it is free again when this process, and every process that inherited the file,
    has closed it or ended. On Windows this moves the file's position, so open the file for appending."""
    deadline = time.monotonic() + wait_seconds
    while not try_lock(file.fileno()):
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOCK_POLL_SECONDS)
    return True


def try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


# ---- the cache


def cache_folder() -> Path | None:
    """Returns the folder for what this program can make or download again, or None without a home folder. It may not
    exist yet: see make_private."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        cache = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return cache / "gpt-text-generator"


def make_private(folder: Path) -> None:
    """Creates a folder and the missing folders above it, all for this user alone."""
    for path in reversed([folder, *folder.parents]):
        path.mkdir(mode=0o700, exist_ok=True)
