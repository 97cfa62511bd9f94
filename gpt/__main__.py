"""The command `gpt NAME …`, also `python -m gpt NAME …`: runs one of the programs below."""

import difflib
import importlib
import sys

from gpt import __version__
from gpt.errors import InputError, run_main, say

# Name -> the module whose `main` it runs, and what that does.
COMMANDS = {
    "prepare": ("gpt.commands.prepare", "text -> token shards"),
    "train": ("gpt.commands.train", "token shards -> a trained model; without a preset it lists them"),
    "sample": ("gpt.commands.sample", "a trained model and prompts -> text"),
    "plot": ("gpt.report.plot", "draws and compares the losses of runs"),
    "export": ("gpt.report.export", "a trained model -> a folder or a GGUF file for other programs"),
}


def main() -> None:
    """Runs the command that is the first word of the command line; without a word, lists the commands."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    special = {"-h": list_commands, "--help": list_commands, "--version": say_version}
    program = special.get(name, lambda: run_command(name))
    run_main(program, quiet_pipe=name != "train")  # a training run continues when nobody reads its output


def run_command(name: str) -> None:
    """Runs the command `name` with the words after it as its arguments. Raises InputError if there is no such
    command."""
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"perhaps you meant {close[0]}" if close else "gpt --help lists the commands"
        raise InputError(f"gpt: no command {name!r}; {advice}")
    sys.argv = [f"gpt {name}", *sys.argv[2:]]
    importlib.import_module(COMMANDS[name][0]).main()


def list_commands() -> None:
    lines = [f"  {name:8}  {text}" for name, (_, text) in COMMANDS.items()]
    say("\n".join(["usage: gpt [--version] NAME …", "", *lines, "", "gpt NAME --help explains each of them."]))


def say_version() -> None:
    say(f"gpt-text-generator {__version__}")


if __name__ == "__main__":
    main()
