"""README tells the truth: its reference names every flag and no other, its map every module, its commands exist."""

import re
import shlex

import prepare
import pytest
from conftest import ROOT

import sample
import train
from gpt.config import fields, find_preset, parse_flags

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = {
    "train.py": train.CommandLine,
    "sample.py": sample.SampleConfig,
    "data/prepare.py": prepare.PrepareConfig,
}
POSITIONAL = {"inputs", "checkpoint", "preset"}


@pytest.mark.parametrize("script", COMMANDS)
def test_the_reference_names_every_flag_and_no_other(script):
    section = re.split(r"^### ", README, flags=re.MULTILINE)
    [text] = [part for part in section if part.startswith(script)]
    named = set(re.findall(r"`--(\w+)", text))
    assert named == fields(COMMANDS[script]).keys() - POSITIONAL


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


def test_the_map_names_every_module():
    for path in sorted((ROOT / "gpt").glob("*.py")):
        if path.name != "__init__.py":
            assert re.search(rf"\bgpt/{path.stem}\.py|\b{path.stem}: ", README), path.name
