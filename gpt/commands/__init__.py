"""The scripts train.py, sample.py and data/prepare.py as modules of this package, for the command `gpt`.

A wheel carries the scripts and the presets in this folder. In a checkout they are in its root
and in data/, so these folders are searched too."""

from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
__path__ += [str(CHECKOUT), str(CHECKOUT / "data")]
