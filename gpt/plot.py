"""python -m gpt.plot RUN…: draws the losses of runs and compares them."""

from gpt.errors import run_main
from gpt.report.plot import main

if __name__ == "__main__":
    run_main(main)
