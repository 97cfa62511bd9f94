"""Opens compressed files, and lists and opens the members of zip and tar archives."""

import bz2
import contextlib
import functools
import gzip
import importlib
import io
import lzma
import stat
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from gpt.errors import InputError
from gpt.text.kinds import HEAD_BYTES, compression_of, kind_of_zip, named_compression

MEMBERS = 1_000_000  # of an archive; a list of more would take too much memory
SPOOL_BYTES = 1 << 24  # a longer copy of a member goes to the disk


class Member(NamedTuple):
    """A member of an archive. `open` is valid until the next member is asked for, and gives a file that can seek."""

    name: str
    kind: str  # file, folder, or other for links and devices
    open: Callable[[], IO[bytes]]


def open_compressed(name: str, file: IO[bytes]) -> IO[bytes]:
    """Returns a decompressed view of `file`, or `file` itself if it is not compressed. Its first bytes decide; if only
    the name tells a compression, the file is damaged and reading it will say so."""
    compression = compression_of(peek(file)) or named_compression(name)
    if compression == "zstd":
        return zstd(name).ZstdFile(file)
    openers: dict[str, Callable[[IO[bytes]], Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
    return openers[compression](file) if compression else file


def peek(file: IO[bytes]) -> bytes:
    """Returns the first HEAD_BYTES of a file, and goes back to its start."""
    head = file.read(HEAD_BYTES)
    file.seek(0)
    return head


def zstd(name: str) -> Any:
    """Returns the module that reads zstd: a part of Python from 3.14 on, its backport before. Raises InputError for the
    file `name` if it is not installed."""
    return extra(name, "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", "a zstd file")


def extra(name: str, module: str, what: str) -> Any:
    """Returns a module of the extra [data]. Raises InputError for the file `name`, which is `what`, without it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module if module == "backports.zstd" else module.split(".")[0]
        command = f'pip install -c constraints.txt -e ".[data]", or pip install {package}'
        raise InputError(f"{name}: {what} needs {package}; run: {command}") from None


@contextlib.contextmanager
def damage(name: str) -> Iterator[None]:
    """Turns the errors of damaged compressed files and archives into an InputError that names the file."""
    try:
        yield
    except damage_errors() as error:
        raise damaged(name, error) from None
    except NotImplementedError as error:
        raise InputError(f"{name}: packed in a way that is not read ({error}); unpack it") from None
    except OSError as error:
        if error.errno is not None:  # of the file system
            raise
        raise damaged(name, error) from None  # of gzip and bz2


def damage_errors() -> tuple[type[Exception], ...]:
    loaded = filter(None, map(sys.modules.get, ("compression.zstd", "backports.zstd")))
    errors = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)
    return errors + tuple(module.ZstdError for module in loaded)


def damaged(name: str, error: Exception) -> InputError:
    what = f"{named_compression(name)} " if named_compression(name) else ""
    return InputError(f"{name}: damaged {what}file ({error}); restore it")


# ---- archives


def archive_kind(name: str, file: IO[bytes]) -> str:
    """Returns "docx" or "zip" for a zip file. Raises InputError for the formats that are zip files of another use."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        mimetype = archive.read("mimetype")[:200].decode("ascii", "replace") if mimetype_of(archive) else ""
    return kind_of_zip(name, names, mimetype)


def mimetype_of(archive: zipfile.ZipFile) -> bool:
    """Returns whether a zip file has a member "mimetype" that is as short as it should be."""
    return any(entry.filename == "mimetype" and entry.file_size < 200 for entry in archive.infolist())


def members(name: str, kind: str, file: IO[bytes]) -> Iterator[Member]:
    """Yields the members of a zip or tar archive, in its order. Raises InputError for encrypted members and for more
    than MEMBERS."""
    for number, member in enumerate(zip_members(name, file) if kind == "zip" else tar_members(file)):
        if number >= MEMBERS:
            raise InputError(f"{name}: more than {MEMBERS:,} members; unpack it")
        yield member


def zip_members(name: str, file: IO[bytes]) -> Iterator[Member]:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.flag_bits & 1:
                raise InputError(f"{name}: encrypted; unpack it")
            kind = "folder" if entry.is_dir() else "other" if stat.S_ISLNK(entry.external_attr >> 16) else "file"
            yield Member(entry.filename, kind, functools.partial(archive.open, entry))


def tar_members(file: IO[bytes]) -> Iterator[Member]:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for entry in archive:
            kind = "file" if entry.isreg() else "folder" if entry.isdir() else "other"
            yield Member(entry.name, kind, functools.partial(tar_member, archive, entry))


def tar_member(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(entry)
    assert file is not None  # `members` opens files alone
    return spooled(file)


def random_access(file: IO[bytes]) -> IO[bytes]:
    """Returns `file`, or a copy of it if seeking in it is slow."""
    fast = isinstance(file, (io.BufferedReader, io.BufferedRandom, tempfile.SpooledTemporaryFile))
    return file if fast else spooled(file)


def spooled(file: IO[bytes]) -> IO[bytes]:
    """Returns a temporary copy of a file, in which seeking is cheap; in a compressed file it is not."""
    copy = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # the caller closes it
    while block := file.read(1 << 16):
        copy.write(block)
    copy.seek(0)
    return copy  # type: ignore[return-value]
