"""The foreseen errors, one class per exit code; how an error ends a program; and text for the user.

`say` prints on stdout and raises an error if that fails. `note` and `tell` print on stderr and ignore failures."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

READER_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF)
# Control characters, bidirectional embeddings, overrides and isolates, separators of lines and paragraphs, lone
# surrogates. Left-to-right and right-to-left marks and joiners are safe: Arabic, Persian and emoji need them.
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Error(Exception):
    """A foreseen error. Its text reads `<where or what>: <details>; <what to do>`."""

    code = 1


class InputError(Error):
    """Bad input or settings. Raised before an output file is created or changed."""

    code = 2


class IntegrityError(Error):
    """A file is not what it should be: truncated, changed, malformed or of another format."""

    code = 3


class NonFiniteError(Error):
    """A loss, gradient, weight or logit is not finite."""

    code = 4


class ResourceError(Error):
    """Input or output failed, another program holds a lock, or memory or disk space ran out."""

    code = 5


class Stopped(Error):
    """A signal asked the program to stop and a checkpoint was saved."""

    code = 75


class Elsewhere(Error):
    """Another rank of the same run ended with `code`, and has already told the user why."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code = code


def code_and_reason(error: BaseException) -> tuple[int, str]:
    """Returns the exit code of an error, and its reason in words."""
    if isinstance(error, Error):
        return error.code, str(error)
    return (130, "interrupted") if isinstance(error, KeyboardInterrupt) else (1, repr(error))


# ---- the end of a program


def run_main(main: Callable[[], int | None], quiet_pipe: bool = True) -> None:
    """Runs `main()` and exits with its code. A foreseen error becomes one `error:` line on stderr; any other error
    keeps its traceback and exits with 1. With `quiet_pipe`, the program exits with 0 if the reader of stdout closes the
    pipe."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the start
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # characters that cp1252 or the C locale lacks are shown escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        code = exit_code(main, quiet_pipe) or exit_code(flush_stdout)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # ValueError: the program has closed it
                silence(stream)  # otherwise the interpreter's own flush fails, and exits with 120
    sys.exit(code)


def exit_code(function: Callable[[], int | None], quiet_pipe: bool = True) -> Any:
    """Calls `function()` and returns its exit code. For a foreseen error, prints a line on stderr and returns the
    error's code."""
    try:
        return function() or 0
    except SystemExit as stop:  # --help
        return stop.code
    except Elsewhere as error:
        return error.code
    except (Error, KeyboardInterrupt) as error:
        code, reason = code_and_reason(error)
        note("stopped" if isinstance(error, (Stopped, KeyboardInterrupt)) else "error", reason)
        return code
    except BrokenPipeError:
        if not quiet_pipe:
            raise
        return 0


# ---- text on stdout


def say(text: str) -> None:
    """Prints `text` on stdout. Raises ResourceError if writing fails, BrokenPipeError if the reader has closed the
    pipe."""
    with stdout_errors():
        print(text, flush=True)


def flush_stdout() -> None:
    """Flushes stdout. Raises the errors that `say` raises."""
    with stdout_errors():
        if not sys.stdout.closed:
            sys.stdout.flush()


@contextlib.contextmanager
def stdout_errors() -> Iterator[None]:
    """Turns errors from writing to stdout into ResourceError; a closed pipe stays BrokenPipeError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        silence(sys.stdout)  # otherwise the last flush fails too
        raise ResourceError(f"stdout: {error.strerror}; free space or redirect it elsewhere") from None


# ---- text on stderr


def note(kind: str, text: str) -> None:
    """Prints one line, "kind: text", on stderr; a line break in `text` is escaped. Kinds are info, warning, error and
    stopped."""
    tell(f"{kind}: {printable(text, keep='')}")


def tell(text: str) -> None:
    """Prints `text` on stderr, with unsafe characters escaped, above the progress bars. Ignores errors from writing."""
    if sys.stderr is None or sys.stderr.closed:  # print(file=None) would print on stdout
        return
    tqdm = sys.modules.get("tqdm")  # if nothing has imported tqdm, there are no bars
    above_bars = tqdm.tqdm.external_write_mode(file=sys.stderr, nolock=True) if tqdm else contextlib.nullcontext()
    with ignore_write_errors(sys.stderr), above_bars:
        print(printable(text), file=sys.stderr, flush=True)


@contextlib.contextmanager
def ignore_write_errors(stream: TextIO) -> Iterator[None]:
    """Ignores errors from writing to `stream`. If the reader has gone, also silences the stream; after other errors,
    such as a full disk, later writes may succeed."""
    try:
        yield
    except OSError as error:
        if error.errno in READER_GONE:
            silence(stream)


def silence(stream: TextIO) -> None:
    """Redirects `stream` to os.devnull, so that neither later writes nor the interpreter's last flush can fail. Does
    nothing for a stream that is closed or has no file descriptor."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), stream.fileno())


def printable(text: str, keep: str = "\n\t") -> str:
    """Returns `text` with unsafe characters escaped, so that neither a file name nor a model's output can control the
    terminal. Characters in `keep` stay.

    printable("a\\x1b[2J") -> "a\\\\x1b[2J"
    """
    return UNSAFE.sub(lambda match: match[0] if match[0] in keep else escaped(ord(match[0])), text)


def escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
