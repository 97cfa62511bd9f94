"""python -m gpt.plot RUN…: draws the losses of runs and compares them."""

import sys

from gpt.errors import run_main
from gpt.report.plot import main

if __name__ == "__main__":
    sys.argv[0] = "python -m gpt.plot"
    run_main(main)
