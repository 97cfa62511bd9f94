"""The foreseen errors, one class per exit code, and the one place that turns them into a last line and a code."""

import contextlib
import errno
import os
import sys

READER_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF)


class Error(Exception):
    """A foreseen error. Its text reads `<what>: <where>; <what to do>`."""

    code = 1


class InputError(Error):
    """Bad input or settings; nothing was created and no device touched."""

    code = 2


class IntegrityError(Error):
    """A file is not what it claims to be: cut, changed, malformed or from another format."""

    code = 3


class NonFiniteError(Error):
    """A loss, gradient, weight or logit is not finite."""

    code = 4


class ResourceError(Error):
    """Input/output failed, something is locked, or memory or disk space ran out."""

    code = 5


class Stopped(Error):
    """A signal asked the program to stop and a checkpoint was saved."""

    code = 75


class Elsewhere(Error):
    """Another rank of the same run ended with `code` and has told why."""

    def __init__(self, code, reason):
        super().__init__(reason)
        self.code = code


def code_and_reason(error):
    """The exit code of an error, and why in words."""
    if isinstance(error, Error):
        return error.code, str(error)
    return (130, "interrupted") if isinstance(error, KeyboardInterrupt) else (1, repr(error))


def run_main(main, quiet_pipe=True):
    """Runs `main()` and exits with its code. A foreseen error ends in one `error:` line on stderr; any other keeps its
    traceback and exits with 1. With `quiet_pipe` a reader who closes the pipe ends the program with success."""
    open_closed_streams()
    try:
        code = exit_code(main, quiet_pipe) or exit_code(flush_stdout)
    finally:
        for stream in (sys.stdout, sys.stderr):
            flush_last(stream)
    sys.exit(code)


def exit_code(function, quiet_pipe=True):
    """Calls `function()` and returns the exit code of its end; a foreseen error is told on stderr."""
    try:
        return function() or 0
    except SystemExit as stop:  # --help
        return stop.code
    except Elsewhere as error:
        return error.code
    except Error as error:
        tell(f"{'stopped' if isinstance(error, Stopped) else 'error'}: {error}")
        return error.code
    except KeyboardInterrupt:
        tell("stopped: interrupted")
        return 130
    except BrokenPipeError:
        if not quiet_pipe:
            raise
        return 0


def open_closed_streams():
    """Opens os.devnull for stdout and stderr where they were closed before the start: Python sets these to None."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))


def flush_stdout():
    """Flushes stdout. Raises ResourceError if text for the user is lost."""
    with stdout_errors():
        if not sys.stdout.closed:
            sys.stdout.flush()


def flush_last(stream):
    """Flushes `stream` and ignores errors, which would turn the exit code into 120 if the interpreter met them."""
    try:
        if not stream.closed:
            stream.flush()
    except OSError:
        silence(stream)


# ---- text on stdout


def say(text):
    """Prints `text` on stdout. Raises ResourceError if that fails, but BrokenPipeError if the reader has gone."""
    with stdout_errors():
        print(text, flush=True)


@contextlib.contextmanager
def stdout_errors():
    """Turns errors from writing to stdout into ResourceError; a closed pipe stays BrokenPipeError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        silence(sys.stdout)  # or the last flush fails too
        raise ResourceError(f"stdout: {error.strerror}; free space or redirect it elsewhere") from None


# ---- telling the user


def note(kind, text):
    """Tell `text` in a line of its own: `kind` is "info" or "warning"."""
    tell(f"{kind}: {text}")


def tell(text):
    """Print `text` on stderr, escaped, and beside the progress bars that are there; an error in that ends nothing."""
    if sys.stderr is None:  # closed before the start: print would take stdout instead
        return
    tqdm = sys.modules.get("tqdm")  # not imported: no bars
    beside = tqdm.tqdm.external_write_mode(file=sys.stderr, nolock=True) if tqdm else contextlib.nullcontext()
    with ignore_write_errors(sys.stderr), beside:
        print(printable(text), file=sys.stderr, flush=True)


@contextlib.contextmanager
def ignore_write_errors(stream):
    """Ignores errors from writing to `stream`, and silences a stream without a reader."""
    try:
        yield
    except OSError as error:  # but a full disk may have room again, and a slow reader catch up
        if error.errno in READER_GONE:
            silence(stream)
    except ValueError:
        if not stream.closed:
            raise


def silence(stream):
    """Redirects `stream` to os.devnull, so that neither later writes nor the interpreter's last flush can fail."""
    with contextlib.suppress(OSError):  # not a file of the system
        number, null = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)


def printable(text, keep="\n\t"):
    """`text` with control characters, bidirectional overrides and lone surrogates escaped (`\\x1b`, `\\u202e`), so that
    neither a file name nor a model's output can drive the terminal. Characters in `keep` stay.

    printable("a\\x1b[2J") -> "a\\\\x1b[2J"
    """
    return "".join(c if c in keep or not drives_terminal(c) else escape(c) for c in text)


def drives_terminal(character):
    code = ord(character)
    return (
        code < 0x20
        or 0x7F <= code < 0xA0
        or code in (0x061C, 0x200E, 0x200F, 0x2028, 0x2029)
        or 0x202A <= code <= 0x202E
        or 0x2066 <= code <= 0x2069
        or 0xD800 <= code <= 0xDFFF
    )


def escape(character):
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
