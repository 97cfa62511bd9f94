"""Imports torch so that its CPU threads soon sleep while they wait for each other. train.py, sample.py and `gpt.load`
import this module before anything that needs torch. If the program has imported torch already, nothing changes.

GNU's OpenMP lets them spin for about a millisecond. If another program has one of the cores, the thread that should run
there comes late to every operation, while the others spin on a core that it could use. With 2,000 rounds of spinning
they soon sleep: on two cores, one of them busy, training makes half of the tokens of a quiet machine instead of a
third, and on a quiet machine nothing is lost.

OpenMP reads the setting once, when torch loads it. So it stands in the environment only meanwhile: programs that this
one starts do not inherit it."""

import os
import sys

SPINS = 2000

if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    try:
        import torch  # noqa: F401
    finally:
        del os.environ["GOMP_SPINCOUNT"]
