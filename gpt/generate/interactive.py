"""The interactive mode: what is typed is appended to a text, the model goes on with it, and stays in memory."""

import contextlib
import json
import os
import secrets
import sys
from pathlib import Path

from gpt.config import flatten, suggestion
from gpt.errors import Error, InputError, printable, tell
from gpt.generate.prompts import MOST_BYTES, SETTINGS, checked, decoded, from_flag

HELP = r"""What you type is added to the text so far, on a line of its own, and the model goes on with it.
An empty line lets it go on as it is. Ctrl-C stops the text that is being written, Ctrl-D leaves.
/set NAME VALUE   change a setting: /set temperature 0.7, /set stop "\n\n", /set stop ["a", "b"], /set seed none
/set              list the settings
/reset            begin a new text; the settings stay
/help  /quit"""
FIXED = {
    "num_samples": "it is one text at a time",
    "truncate": "a text longer than the context is always cut",
    "logprobs": "it is for --prompts and --out",
    "top_logprobs": "it is for --prompts and --out",
}
SETTABLE = tuple(name for name in (*SETTINGS, "rows", "allow_special") if name not in FIXED)
WORDS = {"on": True, "yes": True, "off": False, "no": False}
LONGEST_TEXT = 1 << 18  # characters kept of the text so far: far more than a context holds
MOST_LINES = 1000  # of history


def interact(generator, settings, seed, file, first=None, escape=False):
    """Answer what is typed, writing to `file`, until the input ends. `first` is taken as if it were typed first.

    `settings` are those of GenerationParams that the user gave, `seed` is used where they have none. With `escape`
    control characters are escaped."""
    terminal = bool(sys.stdin and sys.stdin.isatty() and sys.stdout.isatty())
    session = Session(generator, settings, seed, file, escape)
    with history() if terminal else contextlib.nullcontext():
        if terminal:
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
            tell("type what the model is to go on with; /help explains, Ctrl-D leaves")
        if first is not None:
            attempt(session.go_on, first)
        for line in lines(terminal):
            if attempt(session.take, line) == "quit":
                return


def attempt(action, line):
    """The result of `action(line)`; Ctrl-C and errors end that alone."""
    try:
        return action(line)
    except KeyboardInterrupt:
        return None
    except Error as error:
        return tell(f"error: {error}")


# ---- what is typed


def lines(terminal):
    """The lines typed or piped in, without their ends. On a terminal Ctrl-C empties the line, and twice it leaves."""
    pressed = False
    while True:
        try:
            line = read_line(terminal)
        except InputError as error:
            tell(f"error: {error}")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            tell("")
            if pressed:
                return
            pressed = True
            tell("Ctrl-C again or Ctrl-D leaves")
        else:
            pressed = False
            yield line


def read_line(terminal):
    """The next line. Raises EOFError after the last, InputError for one that is not UTF-8."""
    if terminal:
        try:
            return from_flag(input("> "), "line")
        except EOFError:
            tell("")
            raise
    data = sys.stdin.buffer.readline(MOST_BYTES + 1) if sys.stdin else b""
    if not data:
        raise EOFError
    return decoded(data, "line").removesuffix("\n").removesuffix("\r")


@contextlib.contextmanager
def history():
    """Line editing, where the system has it, with the lines of earlier sessions. Nothing is lost but those lines if the
    file of history can be neither read nor written."""
    try:
        import readline
    except ImportError:  # Windows, whose console edits lines by itself
        yield
        return
    path = history_path()
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            os.chmod(path, 0o600)
            readline.set_history_length(MOST_LINES)
            readline.write_history_file(path)
            os.chmod(path, 0o600)  # some libraries replace the file


def history_path():
    folder = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(folder):  # the standard says to ignore such a one
        folder = os.path.expanduser("~/.local/state")
    return Path(folder) / "gpt-text-generator" / "history"


# ---- what is answered


class Session:
    """The text so far, and the settings with which the model goes on."""

    def __init__(self, generator, settings, seed, file, escape):
        self.generator, self.file, self.escape = generator, file, escape
        self.settings, self.seed = dict(settings), seed
        self.text, self.turn = "", 1  # turn: tells the random numbers of one text's answers apart

    def take(self, line):
        """Obey a line that begins with "/", let the model go on with any other. "quit" if that was asked."""
        if not line.startswith("/"):
            return self.go_on(line)
        command, _, rest = line[1:].strip().partition(" ")
        if command == "quit":
            return "quit"
        actions = {"help": lambda _: tell(HELP), "reset": self.reset, "set": self.set}
        if command not in actions:
            raise InputError(f"/{command}: no such command; /help lists them (a text may begin with a space)")
        if rest.strip() and command != "set":
            raise InputError(f"/{command} {rest.strip()}: it takes nothing further; give /{command} alone")
        return actions[command](rest.strip())

    def params(self):
        return self.generator.params(**{"seed": self.seed} | self.settings | {"truncate": True})

    def go_on(self, typed):
        """Add `typed` and what the model makes of it to the text. After KeyboardInterrupt what was written stays, after
        an Error the text is as before."""
        gap = "\n" if typed and self.text and not self.text.endswith("\n") else ""
        begin = self.text + gap + typed
        events = self.generator.run([begin], self.params(), [self.turn])
        self.turn += 1
        pieces = []
        try:
            with contextlib.closing(events):
                for _, piece in events:
                    pieces.append(piece)
                    self.put(piece)
            self.text = begin + "".join(pieces)
        except KeyboardInterrupt:
            self.text = begin + "".join(pieces)
            raise
        finally:
            self.put("\n")
            self.text = self.text[-LONGEST_TEXT:]

    def put(self, text):
        self.file.write(printable(text) if self.escape else text)
        self.file.flush()

    def reset(self, _=""):
        """Begin a new text: the same one with the same typing again only if a seed was given."""
        self.text, self.turn = "", 1
        self.seed = secrets.randbelow(1 << 32)
        tell("a new text begins")

    def set(self, words):
        """Obey `/set`, `/set NAME VALUE`. Raises InputError for a setting that is not there or a value that it cannot
        have."""
        name, _, text = words.partition(" ")
        name, text = name.removeprefix("--").replace("-", "_"), text.strip()
        if not name:
            return self.list_settings(SETTABLE)
        if name in FIXED:
            raise InputError(f"/set {name}: {FIXED[name]}; /set alone lists what can be set")
        if name not in SETTABLE:
            advice = suggestion(name, SETTABLE).replace("--help", "/set alone")
            raise InputError(f"/set {name}: unknown setting; {advice}")
        if not text:
            raise InputError(f"/set {name}: no value; write one after it, as in /set temperature 0.7")
        if name == "seed" and text in ("none", "None", "null"):
            self.settings.pop("seed", None)
            self.seed = secrets.randbelow(1 << 32)
        else:
            value, problems = checked(name, value_in(name, text))
            if problems:
                raise InputError(f"/set {name}: {'; '.join(problems)}; it stays as it was")
            self.settings[name] = value
        return self.list_settings([name])

    def list_settings(self, names):
        values = flatten(self.params())
        width = max(map(len, names))
        tell("\n".join(f"{name:{width}} = {json.dumps(values[name], ensure_ascii=False)}" for name in names))


def value_in(name, text):
    """What stands after /set NAME: JSON, on or off, or a string that needs no quotation marks."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return WORDS.get(text, text) if name != "stop" else text
    return value if name != "stop" or isinstance(value, (str, list)) else text
