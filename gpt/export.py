"""python -m gpt.export CHECKPOINT DIR: writes a model for other programs."""

import sys

from gpt.errors import run_main
from gpt.report.export import main

if __name__ == "__main__":
    sys.argv[0] = "python -m gpt.export"
    run_main(main)
