"""The interactive mode: appends what is typed to a text and lets the model, which stays in memory, continue it."""

import contextlib
import io
import json
import os
import secrets
import select
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gpt.config import flatten
from gpt.errors import Error, InputError, tell
from gpt.generate.generator import TextGenerator
from gpt.generate.prompts import SETTINGS, checked, from_flag, value_of
from gpt.generate.sequence import GenerationParams

HELP = r"""What you type is added to the text so far, on a line of its own, and the model
continues it. Lines that are pasted together are added together.
An empty line continues the text as it is.
Ctrl-C stops the text that is being written, Ctrl-D leaves.
/set NAME VALUE   change a setting: /set temperature 0.7, /set seed none,
                  /set stop "\n\n", /set stop ["a", "b"]
/set              list the settings
/reset            begin a new text; the settings stay
/help  /quit"""
SETTABLE = [name for name in (*SETTINGS, "rows", "allow_special") if name != "num_samples"]
LONGEST_TEXT = 1 << 18  # characters kept of the text so far: far more than a context holds
MOST_LINES = 1000  # lines of history that are kept
PASTE_SECONDS = 0.05  # from one pasted line to the next, at most; nobody types so fast
Write = Callable[[str], object]


def interact(
    generator: TextGenerator,
    settings: dict[str, Any],
    seed: int,
    write: Write,
    first: str | None = None,
    kind: "type[Session] | None" = None,
) -> None:
    """Lets the model continue each line that is typed, and passes the text to `write`, until the input ends. `first`,
    if not None, is treated as if it were typed first. `settings` are the fields of GenerationParams that the user gave;
    `seed` is used if they have no seed. `kind` is the class of the session, by default Session."""
    session = (kind or Session)(generator, settings, seed, write)
    terminal = bool(sys.stdin and sys.stdin.isatty() and sys.stdout.isatty())
    with contextlib.ExitStack() as stack:
        if terminal:
            stack.enter_context(history())
            stack.enter_context(every_key())
            tell(session.greeting)
        if first is not None:
            attempt(session.extend, first)
        for line in typed_lines(terminal):
            if line.rstrip() == "/quit":
                return
            attempt(session.obey, line)


def attempt(action: Callable[[str], None], line: str) -> None:
    """Calls `action(line)`. Ctrl-C and foreseen errors end the action, not the program."""
    try:
        action(line)
    except KeyboardInterrupt:
        pass
    except Error as error:
        tell(f"error: {error}")


# ---- what is typed


def typed_lines(terminal: bool) -> Iterator[str]:
    """Yields the lines that are typed or piped in, without their ends; on a terminal, lines that were pasted together
    as one. There, Ctrl-C empties the line, and a second Ctrl-C in a row ends the input. Ctrl-D after a paste yields the
    paste first."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    interrupts = 0  # in a row
    pasted: list[str] = []  # the lines so far
    while sys.stdin and interrupts < 2:
        try:
            line = input("" if pasted else "> ") if terminal else piped_line()
            pasted.append(line.removesuffix("\r"))
            if terminal and not pasted[0].startswith("/") and input_waits():
                continue
        except EOFError:
            if terminal:
                tell("")
            if pasted:
                yield "\n".join(pasted)
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            interrupts, pasted = interrupts + 1, []
            tell("\nCtrl-C again or Ctrl-D leaves" if interrupts == 1 else "")
        else:
            line, interrupts, pasted = "\n".join(pasted), 0, []
            yield line


def piped_line() -> str:
    """Returns the next line of stdin, without its end. Raises EOFError after the last one, and InputError if stdin
    cannot be read."""
    try:
        line = sys.stdin.readline()
    except OSError as error:
        raise InputError(f"stdin: {error.strerror}; type into a terminal, or pipe the lines into it") from None
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def input_waits() -> bool:
    """Returns whether the terminal has more input already, as after a paste."""
    try:
        import termios
        import tty
    except ImportError:  # Windows
        return False
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin, termios.TCSANOW)  # otherwise the terminal shows what arrives, and readline again
        return bool(select.select([sys.stdin], [], [], PASTE_SECONDS)[0])
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


@contextlib.contextmanager
def every_key() -> Iterator[None]:
    """Returns a context in which readline gets every key as it is pressed, also between two prompts. Otherwise the
    terminal turns a Ctrl-D that is pressed there into a NUL byte, which readline ignores. Does nothing without
    readline, since the terminal then edits the lines."""
    try:
        import readline  # noqa: F401 (input uses it)
        import termios
    except ImportError:
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    flags = before[3] & ~termios.ICANON
    termios.tcsetattr(sys.stdin, termios.TCSANOW, [*before[:3], flags, *before[4:]])
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


@contextlib.contextmanager
def history() -> Iterator[None]:
    """Returns a context in which lines can be edited, and earlier sessions' lines recalled, if the system has readline.
    Ignores a history that cannot be read or written."""
    try:
        import readline
    except ImportError:  # Windows, whose console edits lines by itself
        yield
        return
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state if os.path.isabs(state) else os.path.expanduser("~/.local/state")) / "gpt-text-generator"
    path = folder / "history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.set_history_length(MOST_LINES)
            readline.write_history_file(path)
            path.chmod(0o600)


# ---- what is answered


class Session:
    """The text so far, and the settings with which the model continues it."""

    help, beginning = HELP, "a new text begins"
    greeting = "type what the model is to continue; /help explains, Ctrl-D leaves"

    def __init__(self, generator: TextGenerator, settings: dict[str, Any], seed: int, write: Write):
        self.generator, self.write = generator, write
        self.settings = {"seed": seed} | settings
        self.keeps_seed = "seed" in settings  # whether a new text begins with the same seed
        self.text, self.turn = "", 1  # each turn has random numbers of its own

    def obey(self, line: str) -> None:
        """Runs a command, which begins with "/"; adds any other line to the text and lets the model continue. Raises
        InputError for an unknown command."""
        line = from_flag(line, "line")
        command, _, words = line.strip().partition(" ")
        if not line.startswith("/"):
            self.extend(line)
        elif command == "/set":
            self.set(words.strip())
        elif line.strip() == "/reset":
            self.reset()
        elif line.strip() == "/help":
            tell(self.help)
        else:
            raise InputError(f"{line}: no such command; /help lists them (a text may begin with a space)")

    def params(self) -> GenerationParams:
        return self.generator.params(**self.settings | {"truncate": True})

    def extend(self, typed: str) -> None:
        """Adds `typed`, and the model's continuation, to the text. After Ctrl-C the text keeps what was written so far;
        after an Error it is the text before the call."""
        gap = "\n" if typed and self.text and not self.text.endswith("\n") else ""
        before, begin = self.text, self.text + gap + typed
        events = self.generator.events([begin], [self.params()], [self.turn])
        self.text = begin
        self.turn += 1
        try:
            with contextlib.closing(events):
                for _, piece in events:
                    self.text += piece
                    self.write(piece)
        except Error:
            self.text = before
            raise
        finally:
            self.write("\n")
            self.text = self.text[-LONGEST_TEXT:]

    def reset(self) -> None:
        """Begins a new text. If a seed was given, the same typing then gives the same text; else a new seed is
        drawn."""
        self.text, self.turn = "", 1
        if not self.keeps_seed:
            self.settings["seed"] = secrets.randbelow(1 << 32)
        tell(self.beginning)

    def set(self, words: str) -> None:
        """Runs `/set` and `/set NAME VALUE`. Raises InputError for an unknown setting or a value that does not fit."""
        name, _, text = words.partition(" ")
        name, text = name.removeprefix("--").replace("-", "_"), text.strip()
        if not name:
            return self.show_settings(SETTABLE)
        random_seed = name == "seed" and text == "none"
        value = secrets.randbelow(1 << 32) if random_seed else value_of(name, text)
        settings, problems = checked({name: value}, SETTABLE)
        if problems:
            raise InputError(f"/set: {'; '.join(problems)}".replace("--help", "/set alone"))
        self.settings |= settings
        self.keeps_seed = not random_seed if name == "seed" else self.keeps_seed
        return self.show_settings(settings)

    def show_settings(self, names: Iterable[str]) -> None:
        values, width = flatten(self.params()), max(map(len, names))
        tell("\n".join(f"{name:{width}} = {json.dumps(values[name], ensure_ascii=False)}" for name in names))
