"""A run of eight steps and its data, for the tests of starting and resuming."""

import shutil

import pytest
from training_helpers import EIGHT_STEPS, make_data, train_here


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with `data` and a finished run `run` of eight steps, checkpoints at 4 and 8; not to be changed."""
    folder = tmp_path_factory.mktemp("resume")
    make_data(folder / "data", train_size=2000)
    done = train_here("tiny", "--data", folder / "data", "--out", folder / "run", *EIGHT_STEPS)
    assert done.code == 0, done.stderr
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of that run."""
    shutil.copytree(made / "run", tmp_path / "run", symlinks=True)
    return tmp_path / "run"


@pytest.fixture
def again(made, run):
    """`again(*flags)` gives the run's own command once more, with flags that come last or instead."""

    def command(*flags, data=made / "data", out=run):
        pairs = zip(EIGHT_STEPS[::2], EIGHT_STEPS[1::2], strict=True)
        kept = [word for flag, value in pairs if flag not in flags for word in (flag, value)]
        return train_here("tiny", "--data", data, "--out", out, *kept, *flags)

    return command
