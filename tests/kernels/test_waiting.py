"""How long torch's threads spin: OpenMP's own report, printed when it is loaded."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

PROGRAMS = ["train", "sample"]


def spins(program, **variables):
    """Returns the number of rounds that GNU's OpenMP reports in a process that imports `program`."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    environment |= {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "verbose", **variables}
    run = subprocess.run([sys.executable, "-c", f"import {program}"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not lines:
        pytest.skip("needs a torch with GNU's OpenMP")
    return int(lines[0].split("'")[1])


@pytest.mark.parametrize("program", PROGRAMS)
def test_torchs_threads_soon_sleep_while_they_wait(program):
    assert spins(program) == 2000


def test_what_the_user_has_set_stays():
    assert spins("train", GOMP_SPINCOUNT="77") == 77
    assert spins("train", OMP_WAIT_POLICY="active") > 1_000_000
