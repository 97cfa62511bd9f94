"""The foreseen errors, one class per exit code, and the one place that turns them into a last line and a code."""

import os
import sys


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


def run_main(main):
    """Run `main()` and exit with its code: a foreseen error ends in one `error:` line on stderr, any other keeps its
    traceback (exit 1). A reader that closes the pipe ends the program quietly."""
    try:
        code = main() or 0
        sys.stdout.flush()
    except Error as error:
        code = error.code
        label = "stopped" if isinstance(error, Stopped) else "error"
        print(f"{label}: {printable(str(error))}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        print("stopped: interrupted", file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter's last flush must not fail too
        code = 0
    sys.exit(code)


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
