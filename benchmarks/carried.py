"""Packages and tokenizer files that gpu_run.py finds in a folder carried to a machine without a network."""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

NEEDED = ("numpy", "pytest", "safetensors", "tiktoken", "torch", "triton")
WHEELS, TOKENIZER = "wheels", "tiktoken_cache"  # subfolders
CACHE = "TIKTOKEN_CACHE_DIR"  # environment variable


def find_tokenizer(carried: Path | None) -> None:
    """Lets tiktoken read the files of `carried`/tiktoken_cache, if there are any and its variable is not set yet."""
    if carried and any((carried / TOKENIZER).glob("*")):
        os.environ.setdefault(CACHE, str((carried / TOKENIZER).absolute()))


def install_wheels(carried: Path, site: Path) -> None:
    """Installs the wheels of `carried`/wheels whose packages are missing here into the folder `site`, for this program
    and those that it starts. The environment of this Python stays as it is."""
    wheels = [wheel for wheel in sorted((carried / WHEELS).glob("*.whl")) if not is_installed(wheel.name.split("-")[0])]
    if not wheels:
        return
    for wheel in wheels:
        options = ["--quiet", "--no-index", "--no-deps", "--target", site]
        code = subprocess.run([sys.executable, "-m", "pip", "install", *options, wheel]).returncode
        print(f"{'pip fails with' if code else 'installed for this run:'} {wheel.name}", flush=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()


def is_installed(package: str) -> bool:
    """Returns whether a package of any version is installed."""
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def missing(needed: Sequence[str] = NEEDED) -> list[str]:
    """Returns what the steps need and cannot find: packages, and GPT-2's tokenizer files."""
    packages = [name for name in needed if importlib.util.find_spec(name) is None]
    return packages + ["tokenizer files"] * (CACHE not in os.environ)
