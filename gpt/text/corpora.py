"""Built-in corpora: the Python standard library of this interpreter, as text or as examples, and tinyshakespeare from
the network."""

import ast
import contextlib
import hashlib
import json
import platform
import sysconfig
import tempfile
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt.errors import ResourceError
from gpt.text.examples import COMPLETION, PROMPT, PROMPTS, Form
from gpt.text.sources import TextSource

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
LONGEST_FUNCTION = 250  # characters of a function of the corpus docstrings
NOT_SOURCES = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")


def built_in(corpus: str, url: str, spool_folder: Path) -> tuple[list[TextSource], dict[str, Any]]:
    """Returns the sources of the corpus of this name, and its entries in the manifest."""
    if corpus == "shakespeare":
        return shakespeare(url, spool_folder)
    return docstrings(spool_folder) if corpus == "docstrings" else standard_library()


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


def docstrings(spool_folder: Path) -> tuple[list[TextSource], dict[str, Any]]:
    """Returns examples of the standard library's short functions, in an unnamed temporary file, and the corpus's
    entries in the manifest. A prompt is the beginning of a docstring, the completion is its function without it."""
    files, origin = standard_library()
    with storing("the examples", spool_folder):
        spool = tempfile.TemporaryFile(dir=spool_folder)
        for file in files:
            for prompt, completion in functions_in(file.path):
                spool.write(json.dumps({PROMPT: prompt, COMPLETION: completion}).encode() + b"\n")
        spool.seek(0)
    form = Form(PROMPTS, (PROMPT, COMPLETION))
    return [TextSource("docstrings", "jsonl", spool=spool, form=form)], origin | {"corpus": "docstrings"}


def functions_in(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (first paragraph of its docstring, quoted; the function without docstring and decorators, laid out anew)
    for the functions of a Python file of at most LONGEST_FUNCTION characters. Yields nothing for a file that is not
    Python."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings(action="ignore"):
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and (text := ast.get_docstring(node)):
            node.body, node.decorator_list = node.body[1:], []
            function = ast.unparse(node)
            if len(function) <= LONGEST_FUNCTION:
                summary = " ".join(text.partition("\n\n")[0].split())
                yield f'"""{summary}"""\n', f"{function}\n"


def shakespeare(url: str, spool_folder: Path) -> tuple[list[TextSource], dict[str, Any]]:
    """Returns tinyshakespeare, one document, downloaded to an unnamed temporary file, and the corpus's entries in the
    manifest."""
    from gpt.text.download import fetch

    with storing("the download", spool_folder):
        file = tempfile.TemporaryFile(dir=spool_folder)
        fetch(url, file, SHAKESPEARE_SHA256, SHAKESPEARE_BYTES)
    return [TextSource(url, "text", spool=file)], {"corpus": "shakespeare", "url": url, "sha256": SHAKESPEARE_SHA256}


@contextlib.contextmanager
def storing(what: str, folder: Path) -> Iterator[None]:
    """Turns an OSError within this context into a ResourceError about storing `what` in `folder`."""
    try:
        yield
    except OSError as error:
        raise ResourceError(f"storing {what} failed: {folder}: {error.strerror}; free some space") from None
