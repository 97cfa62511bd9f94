"""Fixtures for tests of checkpoints."""

import shutil

import pytest
from training_helpers import make_data, train_here

from gpt.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def byte():
    """The byte tokenizer."""
    return load_tokenizer("byte")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of eight steps with checkpoints at 2, 4, 6 and 8, all kept whole; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoint")
    data = make_data(folder / "data", train_size=2000)
    out = folder / "run"
    settings = ("--max_steps", "8", "--save_every", "2", "--keep_last", "4", "--eval_every", "0")
    done = train_here("tiny", "--data", data, "--out", out, *settings)
    assert done.code == 0, done.stderr
    return out


@pytest.fixture
def run(run_folder, tmp_path):
    """A copy of that run, to be damaged. The settings and the data folder's place are the same."""
    shutil.copytree(run_folder, tmp_path / "run", symlinks=True)
    return tmp_path / "run"
