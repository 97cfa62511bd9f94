"""The pages tell the truth: docs/cli.md names every flag and no other, the map every module; README's commands
exist."""

import re
import shlex

import prepare
import pytest
from paths import ROOT

import sample
import train
from gpt.config import fields, find_preset, parse_flags
from gpt.report.export import ExportConfig
from gpt.report.plot import PlotConfig

README, CLI, MAP = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/cli.md", "docs/architecture.md")
)
COMMANDS = {
    "train.py": train.CommandLine,
    "sample.py": sample.SampleConfig,
    "data/prepare.py": prepare.PrepareConfig,
}
MODULES = {"python -m gpt.export": ExportConfig, "python -m gpt.plot": PlotConfig}
POSITIONAL = {"inputs", "checkpoint", "preset", "dir", "runs"}


@pytest.mark.parametrize("command", COMMANDS | MODULES)
def test_the_reference_names_every_flag_and_no_other(command):
    section = re.split(r"^###? ", CLI, flags=re.MULTILINE)
    [text] = [part for part in section if part.startswith(command)]
    named = set(re.findall(r"`--(\w+)", text))
    assert named == fields((COMMANDS | MODULES)[command]).keys() - POSITIONAL


def commands():
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    parts = [part for block in blocks for line in block.splitlines() for part in line.split("&&")]
    words = [shlex.split(part) for part in parts]
    return [w for w in words if len(w) > 1 and w[1] in COMMANDS]


def test_there_are_commands_of_all_three_kinds():
    assert {words[1] for words in commands()} == COMMANDS.keys()


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_uses_flags_and_presets_that_exist(words):
    flags = parse_flags(COMMANDS[words[1]], words[2:])
    if "preset" in flags:
        assert find_preset(flags["preset"], ROOT / "presets").exists()


def line_of(room):
    """Returns what the map says of a folder: its line, and the lines that continue it."""
    return re.search(rf"^{room}/ (.*(\n .*)*)", MAP, re.MULTILINE)[1]


def test_the_map_names_every_module():
    for path in sorted((ROOT / "gpt").rglob("*.py")):
        name, room = path.relative_to(ROOT).as_posix(), path.parent.relative_to(ROOT).as_posix()
        if path.name.startswith("__"):
            assert f"{room}/" in MAP
        elif room == "gpt":
            assert name in MAP or f"gpt.{path.stem}" in MAP, name
        else:
            assert path.stem in re.findall(r"\w+", line_of(room)), name


def test_the_readme_is_short_and_links_to_pages_that_exist():
    assert len(README.splitlines()) <= 160
    for target in re.findall(r"\]\(([^)]+)\)", README):
        page, _, place = target.partition("#")
        headings = re.findall(r"^#+ (.*)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert not place or place in [heading.lower().replace(" ", "-") for heading in headings], target
