"""The root of the repository, and the scripts' own import paths, also under a bare `pytest`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

for folder in (ROOT, ROOT / "data"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
