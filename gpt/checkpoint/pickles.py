"""The files of torch.save (.bin, .pt), which hold a pickle. No other function of the project than `read_pickle` opens
one.

A pickle is a program: Python's own reader would run whatever it says. torch.load(weights_only=True) builds nothing but
tensors and plain values, and refuses the rest. It does believe the sizes in the file, so they are checked before:

    archive (zip)    no entry is compressed, the pickle is short; a first reading on the device "meta", which reads no
                     values, gives place and size of each tensor: all are in the file
    older format     the pickle is short, and no number in it is above the size of the file"""

import io
import pickletools
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from gpt.errors import Error, IntegrityError, ResourceError
from gpt.files import refuse_lfs_pointer

SAFE_TORCH = "2.10"  # CVE-2025-32434 before 2.6, CVE-2026-24747 before 2.10
PICKLE_LIMIT = 1 << 20  # bytes; 5,000 tensors need them. As many bytes of empty dictionaries take 80 MB and 2 s
ARCHIVE = b"PK\x03\x04"
ENTRY = struct.Struct("<4s6H3I5H2I")  # of a zip archive's directory; name, extra field and comment follow
END = struct.Struct("<4s4H2IH")  # the last bytes of an archive: where its directory is
END_64 = struct.Struct("<4sQ2H2I4Q")  # the same in 64 bits, before LOCATOR and END
LOCATOR = struct.Struct("<4sIQI")
GLOBAL = re.compile(r"GLOBAL (\S+)")  # in torch's message: the function that a pickle would call


def read_pickle(path: Path) -> Any:
    """Returns the tensors and plain values in a file of torch.save, on the CPU. Tensors of an archive are mapped into
    memory, so values are read at their first use.

    Raises IntegrityError if the file holds anything else, is damaged, or claims more than it holds; ResourceError if it
    cannot be read, or if torch is too old to read it safely."""
    if torch.__version__ < SAFE_TORCH:
        raise ResourceError(
            f"{path}: torch {torch.__version__} reads pickles unsafely; update to {SAFE_TORCH} or later"
        )
    try:
        refuse_lfs_pointer(path)
        size = path.stat().st_size
        with open(path, "rb") as file:
            is_archive = file.read(len(ARCHIVE)) == ARCHIVE
            (check_archive if is_archive else check_older_format)(file, size)
        for device in ("meta", "cpu") if is_archive else ("cpu",):
            values = torch.load(path, map_location=device, weights_only=True, mmap=is_archive)
            check_tensors(values, size)
        return values
    except Error:
        raise
    except FileNotFoundError:
        raise IntegrityError(f"{path}: missing; restore it or use another checkpoint") from None
    except OSError as error:
        raise ResourceError(f"{path}: {error.strerror}; make it readable") from None
    except Exception as error:  # a damaged pickle fails anywhere in its reader, with any error
        raise refusal(path, error) from None


def refusal(path: Path, error: Exception) -> Error:
    """Returns what to raise for an `error` while a pickle was read."""
    if "can't allocate memory" in str(error):
        return ResourceError(f"{path}: not enough memory to read it; close other programs or take a smaller model")
    what = "not a file of tensors as torch.save writes it"
    if called := GLOBAL.search(str(error)):
        what = f"its pickle wants to call {called[1]}, which is not run"
    elif isinstance(error, Refused):
        what += f" ({error})"
    return IntegrityError(f"{path}: {what}; use another checkpoint")


class Refused(ValueError):
    """A file claims more than it holds."""


# ---- before torch reads a file


def check_archive(file: IO[bytes], size: int) -> None:
    """Raises Refused unless each entry of a zip archive is stored without compression, and is short if it is no tensor;
    struct.error for a malformed archive. `size`: that of the file."""
    directory = read_directory(file, size)
    at = 0
    while at < len(directory):
        kind, _, _, flags, method, _, _, _, packed, length, *sizes = ENTRY.unpack_from(directory, at)[:13]
        name_size = sizes[0]
        name = directory[at + ENTRY.size : at + ENTRY.size + name_size].partition(b"/")[2]
        if kind != b"PK\x01\x02" or flags & 1 or method or packed != length:
            raise Refused("an entry is compressed")
        if length > PICKLE_LIMIT and not name.startswith(b"data/"):
            raise Refused(f"{length} bytes beside the tensors, at most {PICKLE_LIMIT} are read")
        at += ENTRY.size + sum(sizes)


def read_directory(file: IO[bytes], size: int) -> bytes:
    """Returns the directory of a zip archive, which must stand where the archive ends: other programs would look for it
    there."""
    file.seek(max(size - END_64.size - LOCATOR.size - END.size, 0))
    tail = file.read()
    end = size - END.size
    kind, _, _, _, _, length, start, comment = END.unpack(tail[-END.size :])
    if tail.startswith(b"PK\x06\x06"):
        end -= END_64.size + LOCATOR.size
        length, start = END_64.unpack_from(tail)[-2:]
    if kind != b"PK\x05\x06" or comment or start + length != end or length > PICKLE_LIMIT:
        raise Refused("its directory is not where it should be")
    file.seek(start)
    return file.read(length)


def check_older_format(file: IO[bytes], size: int) -> None:
    """Raises Refused if a number in the pickle of a file of torch before 1.6 is above `size`, that of the file: torch
    would allocate so much. Raises ValueError for a malformed file. The file begins with a magic number, a version and
    facts about the system, a pickle each; then comes the pickle of the tensors."""
    file.seek(0)
    pickles = io.BytesIO(file.read(PICKLE_LIMIT))
    for _ in range(4):
        numbers = [argument for _, argument, _ in pickletools.genops(pickles) if isinstance(argument, int)]
    if max(numbers, default=0) > size:
        raise Refused("its tensors are larger than the file")


# ---- what torch has read


def check_tensors(values: Any, size: int) -> None:
    """Raises Refused unless the tensors in `values`, on any device, are parts of a file of `size` bytes. They may
    overlap, as tied weights do, but all of them together may not be larger than two files: a file could claim any
    number of tensors in the same place."""
    total = 0
    for tensor in tensors_in(values):
        storage = tensor.untyped_storage()
        end = (getattr(storage, "_checkpoint_offset", None) or 0) + storage.nbytes()
        total += tensor.nbytes
        if tensor.layout != torch.strided or tensor.nbytes > storage.nbytes() or max(end, total // 2) > size:
            raise Refused("its tensors are larger than the file")


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested dictionaries, lists and tuples; a container that holds itself is read once."""
    todo, seen = [values], set()
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            todo += value.values() if isinstance(value, dict) else value
