"""Runs programs with Triton kernels: on a GPU, or by Triton's interpreter where there is none."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT

MISMATCH = "only 0-dimensional arrays can be converted"  # what some versions of Triton say with some of NumPy


def run_with_triton(program: str) -> None:
    """Runs a Python program that prints "done", in a process of its own. Skips the test without Triton."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: pip install triton (a CUDA build of torch brings it)")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    if "InterpreterError" in done.stderr and MISMATCH in done.stderr:
        pytest.skip("this version of Triton cannot interpret its kernels with this version of NumPy")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
