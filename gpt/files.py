"""Files and folders: durable writes, names that were read from files, hashes, JSON, locks, the cache folder."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from gpt.errors import InputError, IntegrityError, ResourceError, note

JSON_LIMIT = 1 << 28  # bytes; the tokenizer.json of a vocabulary of 200,000 takes 15 MB
STEP_FOLDER = re.compile(r"^step-\d{9}$")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LOCK = "lock"
LOCKED_BYTE = 1 << 30  # the byte that Windows locks: far behind the text, which must stay readable
LOCK_POLL_SECONDS = 0.1
# Answers of file systems that cannot flush a folder. After a full disk or a quota, a new name may really be lost.
UNSUPPORTED = {errno.EINVAL, errno.EIO, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES}


# ---- writing


def whole_utf_8(text: str) -> bytes:
    """Returns `text` as UTF-8. Bytes of a path that the locale could not decode (LANG=C) are read as UTF-8 first."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode("utf-8")


def write_durably(path: Path, content: str | bytes) -> None:
    """Replaces a small file. A reader sees the old or the new content, even after a crash. Raises OSError if writing
    fails; then the old file stays, and no temporary file."""
    data = content if isinstance(content, bytes) else whole_utf_8(content)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb", opener=no_link) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def no_link(path: str, flags: int) -> int:
    """Opens a file; a new file can be written by its owner alone. Refuses a symbolic link, where the system can. Use it
    as the `opener` of `open`."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o644)


def sync_folder(folder: Path) -> None:
    """Flushes the entries of a folder to the disk; a no-op on Windows. Only warns if the file system cannot do it, as
    on cloud drives and network shares. Raises OSError for other errors."""
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_refused("flush folders", error.strerror, "after a power cut the newest files may be missing")


def set_mode(path: Path, mode: int) -> None:
    """Sets the permissions of a file; only warns if the file system refuses."""
    try:
        path.chmod(mode)
    except OSError as error:
        warn_refused("change permissions", error.strerror, "files keep those that they have")


@functools.cache  # warns once
def warn_refused(what: str, reason: str, result: str) -> None:
    """Warns that the file system refused to do something that no result needs."""
    note("warning", f"this file system does not {what} ({reason}): {result}")


def remove_tree(folder: Path) -> None:
    """Removes a folder, or the file or link in its place, if it exists. Never follows a link."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


# ---- reading


def is_folder(path: str | Path) -> bool:
    """Returns whether `path` is a folder. Unlike Path.is_dir, does not raise for a name that is too long."""
    return os.path.isdir(path)


def inside(folder: Path, name: Any) -> Path:
    """Returns `folder / name`, for a name that was read from a file. Raises IntegrityError unless the name is relative
    and has no "..", backslash, NUL or drive letter."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\\x00]|^[A-Za-z]:", name):
        raise IntegrityError(f"manifest path leaves its directory: {name!r} in {folder}; do not trust this folder")
    return folder / name


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_limited(path: Path) -> bytes | None:
    """Returns the content of a file, or None if the file does not exist. Raises IntegrityError if it is longer than
    JSON_LIMIT, ResourceError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read(JSON_LIMIT + 1)
        refuse_lfs_pointer(path, data)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ResourceError(f"{path}: {error.strerror}; make it readable") from None
    if len(data) > JSON_LIMIT:
        raise IntegrityError(f"{path}: {path.stat().st_size} bytes, at most {JSON_LIMIT} are read; restore it")
    return data


def refuse_lfs_pointer(path: Path, data: bytes | None = None) -> None:
    """Raises InputError if a file, or its content `data`, is the pointer that git leaves where git-lfs is not
    installed."""
    if data is None:
        with open(path, "rb") as file:
            data = file.read(len(LFS_POINTER))
    if data.startswith(LFS_POINTER):
        raise InputError(f"{path}: git-lfs's pointer, not the file; run git lfs install and git lfs pull in its folder")


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file, or None if the file does not exist. Raises as read_limited does, and
    IntegrityError if the file holds anything else."""
    data = read_limited(path)
    if data is None:
        return None
    values = parse_object(data)
    if values is None:
        raise IntegrityError(f"{path}: not a JSON object; restore it")
    return values


def json_object(line: str, field: str, where: str, advice: str = "correct the line") -> dict[str, Any]:
    """Returns the JSON object in `line`. Raises InputError unless there is one and it has a string called `field`; the
    message begins with `where` and ends with `advice`."""
    values = parse_object(line)
    if values is None or not isinstance(values.get(field), str):
        raise InputError(f'{where}: expected an object with string field "{field}"; {advice}')
    return values


def parse_object(text: str | bytes) -> dict[str, Any] | None:
    """Returns the object that a JSON text holds, or None if the text is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# ---- run folders


def step_folders(out: str | Path) -> list[Path]:
    """Returns the step folders of a run, newest first, valid or not."""
    if not is_folder(out):
        return []
    return sorted((p for p in Path(out).iterdir() if STEP_FOLDER.match(p.name) and p.is_dir()), reverse=True)


def step_number(folder: Path) -> int:
    """Returns the step in a folder's name: step_number(Path("out/mine/step-000000100")) == 100."""
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
def lock_folder(folder: Path) -> Iterator[Callable[[], None]]:
    """Locks a folder until the context or this process ends. Raises ResourceError, which names the holder, if another
    program has locked the folder with lock_folder. Only warns if the file system has no locks.

    Yields a function that raises ResourceError if the folder or its lock file has been deleted, moved or replaced
    since: another program may then have locked what stands there now."""
    path = folder / LOCK
    try:
        file = open(path, "a+b", buffering=0, opener=no_link)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be opened ({error.strerror}); remove it or give another --out") from None
    with file, open_folder(folder) as descriptor:
        take_lock(file, folder)
        write_holder(file, f"pid {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        opened = {path: file.fileno(), folder: descriptor}
        watched = {place: number for place, number in opened.items() if in_place(place, number)}

        def check() -> None:
            for place, number in reversed(watched.items()):
                if not in_place(place, number):
                    raise ResourceError(
                        f"{place}: was deleted, moved or replaced while in use; put it back, or give the command again"
                    )

        try:
            yield check
        finally:
            write_holder(file, "")


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    """Yields a descriptor of a folder, -1 if the system has none. While it is open, no other folder gets its inode."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # always on Windows, which does not let a folder go whose files are open
        yield -1
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def in_place(path: Path, descriptor: int) -> bool:
    """Returns whether `path` is still the open file or folder of `descriptor`, by device and inode."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def take_lock(file: IO[bytes], folder: Path) -> None:
    """Locks the lock file of a folder. Raises ResourceError, which names the holder, if another program has locked it;
    only warns if the file system has no locks."""
    try:
        is_ours = lock_file(file)
    except OSError as error:  # some network file systems have no locks
        note("warning", f"{folder}: cannot be locked ({error.strerror}); take care not to start a second run in it")
        return
    if not is_ours:
        file.seek(0)
        holder = file.read(200).decode("utf-8", "replace").strip() or "another program"
        raise ResourceError(f"{folder}: in use by {holder}; wait for it or give another --out")


def write_holder(file: IO[bytes], text: str) -> None:
    """Replaces the text of a lock file. Ignores errors, because the lock does not need the text."""
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(text.encode("utf-8", "replace"))


def lock_file(file: IO[Any], wait_seconds: float = 0) -> bool:
    """Locks an open file against other programs that call lock_file. Returns False if another program still holds the
    lock after `wait_seconds`. Raises OSError if the file system has no locks.

    The lock belongs to the open file: it is free again when this process, and every process that inherited the file,
    has closed it or ended. On Windows lock_file moves the file's position, so open the file for appending."""
    deadline = time.monotonic() + wait_seconds
    while not try_lock(file.fileno()):
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOCK_POLL_SECONDS)
    return True


def try_lock(descriptor: int) -> bool:
    """Locks an open file, by its descriptor, without waiting. Returns False if another program holds the lock."""
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
    """Returns this user's folder for files that can be made or downloaded again, or None if the user has no home
    folder. The folder may not exist yet: see `make_private`."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        cache = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return cache / "gpt-text-generator"


def make_private(folder: Path) -> None:
    """Creates a folder and the missing folders above it. No other user can open the new folders."""
    for path in reversed([folder, *folder.parents]):
        path.mkdir(mode=0o700, exist_ok=True)
