"""Makes the project's own modules (`gpt`, `train`) importable, whether the project is installed or not."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

sys.path.insert(1, str(ROOT))  # after the folder of the program that runs
