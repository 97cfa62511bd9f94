"""Imports torch as train.py and sample.py do, with threads that soon sleep while they wait. What measures this project
in its own process imports this module before torch; other programs are measured as they are."""

import project  # noqa: F401 (makes gpt importable)

# isort: split
import gpt.kernels.waiting  # noqa: F401
