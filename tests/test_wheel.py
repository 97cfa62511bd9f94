"""The wheel is a complete tool: installed into an empty folder, it prepares, trains and samples from there."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

COMMANDS = ("prepare", "train", "sample", "plot", "export")


def run(*command, code=0, **options):
    """Runs a command, expects its exit code and returns what it wrote on stdout and stderr."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", **options)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The path of the wheel, built without the network."""
    pytest.importorskip("hatchling", reason="needs hatchling, the build back end: pip install hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder), cwd=ROOT)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def gpt(wheel, tmp_path_factory):
    """A function that runs the installed command `gpt` in an empty working directory."""
    pytest.importorskip("pip", reason="needs pip to install the wheel")
    target, cwd = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("cwd")
    options = ("--no-deps", "--no-index", "--quiet", "--target", str(target))
    run(sys.executable, "-m", "pip", "install", *options, str(wheel))
    [command] = (target / "bin").glob("gpt*")
    environment = os.environ | {"PYTHONPATH": str(target), "PYTHONUTF8": "1"}

    def gpt(*words, code=0):
        return run(str(command), *map(str, words), code=code, cwd=cwd, env=environment)

    gpt.target = target
    return gpt


def test_the_wheel_holds_the_scripts_the_presets_the_cpp_sources_and_the_mark_of_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    in_package = {path for kind in ("*.py", "*.cpp", "*.h", "py.typed") for path in (ROOT / "gpt").rglob(kind)}
    assert {path.relative_to(ROOT).as_posix() for path in in_package} <= names
    presets = {f"gpt/commands/presets/{path.name}" for path in (ROOT / "presets").glob("*.toml")}
    assert presets | {f"gpt/commands/{name}.py" for name in ("train", "sample", "prepare")} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"gpt", "gpt_text_generator"}


def test_gpt_lists_its_commands(gpt):
    for words in ([], ["--help"]):
        text = gpt(*words)
        assert all(f"  {name} " in text for name in COMMANDS)


def test_an_unknown_command_is_refused_with_a_suggestion(gpt):
    assert gpt("trian", code=2) == "error: gpt: no command 'trian'; perhaps you meant train\n"
    assert gpt("zzz", code=2) == "error: gpt: no command 'zzz'; gpt --help lists the commands\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(gpt, name):
    usage = gpt(name, "--help").splitlines()[0]
    assert usage.startswith("usage: ") and name in usage


def test_gpt_train_alone_lists_the_presets_of_the_wheel(gpt):
    text = gpt("train", code=2)
    assert all(f"  {path.stem} " in text for path in (ROOT / "presets").glob("*.toml"))


def test_the_wheel_prepares_trains_and_samples(gpt, tmp_path):
    text, data, out = tmp_path / "text.txt", tmp_path / "data", tmp_path / "out"
    text.write_text("the sea was calm and a gull cried once, then silence.\n" * 100)
    gpt("prepare", text, "--out", data, "--tokenizer", "byte", "--val_split", "tail", "--workers", "2")
    gpt("train", "tiny", "--data", data, "--out", out, "--max_steps", "3", "--warmup_steps", "1", "--device", "cpu")
    assert (out / "step-000000003" / "model.safetensors").exists()
    assert gpt("sample", out, "--prompt", "the sea", "--max_new_tokens", "3", "--seed", "1").count("the sea") == 1


def test_the_commands_of_the_wheel_leave_its_modules_under_the_package_name(gpt, tmp_path):
    """`import config` must not find gpt/config, nor `import train` a script."""
    code = "import runpy, sys; sys.argv = ['gpt', 'prepare', '--help']; runpy.run_module('gpt', run_name='__main__')"
    code = f"import atexit, sys; atexit.register(lambda: print(*sys.path, sep='\\n')); {code}"
    environment = os.environ | {"PYTHONPATH": str(gpt.target)}
    paths = run(sys.executable, "-c", code, cwd=tmp_path, env=environment).splitlines()
    assert str(gpt.target) in paths
    assert not [path for path in paths if Path(path).is_relative_to(gpt.target / "gpt")]


def test_a_checkout_runs_its_own_scripts(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    text = run(sys.executable, "-m", "gpt", "prepare", "--help", cwd=tmp_path, env=environment)
    assert text.startswith("usage: gpt prepare ")
