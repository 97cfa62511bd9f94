"""Built-in corpora: the Python standard library of this interpreter, and tinyshakespeare from the network."""

import hashlib
import platform
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from gpt.errors import ResourceError
from gpt.text.sources import TextSource

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
NOT_SOURCES = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")


def standard_library(folder: Path | None = None) -> tuple[list[TextSource], dict[str, Any]]:
    """Returns the Python files of the standard library without its tests, each one document, and the corpus's entries
    in the manifest."""
    folder = Path(folder or sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    names = [name for name in names if not set(name.split("/")[:-1]) & set(NOT_SOURCES) and (folder / name).is_file()]
    listing = "".join(f"{name} {(folder / name).stat().st_size}\n" for name in names)
    origin = {
        "corpus": "stdlib",
        "python": platform.python_version(),
        "files": len(names),
        "sha256_of_names_and_sizes": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest(),
    }
    return [TextSource(str(folder / name), "python", folder / name) for name in names], origin


def shakespeare(url: str, spool_folder: Path) -> tuple[list[TextSource], dict[str, Any]]:
    """Returns tinyshakespeare, one document, downloaded to an unnamed temporary file, and the corpus's entries in the
    manifest."""
    from gpt.text.download import fetch

    try:
        file = tempfile.TemporaryFile(dir=spool_folder)
        fetch(url, file, SHAKESPEARE_SHA256, SHAKESPEARE_BYTES)
    except OSError as error:
        raise ResourceError(f"storing the download failed: {spool_folder}: {error.strerror}; free some space") from None
    return [TextSource(url, "text", spool=file)], {"corpus": "shakespeare", "url": url, "sha256": SHAKESPEARE_SHA256}
