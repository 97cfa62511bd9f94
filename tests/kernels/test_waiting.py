"""How long torch's threads spin: OpenMP's own report, and what is in the environment while torch is imported."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

# A torch that prints the setting, as it is when torch is imported, and ends the process, or else goes on.
FAKE_TORCH = (
    "import os; print('spins', os.environ.get('GOMP_SPINCOUNT'), flush=True); os.environ.get('GO_ON') or os._exit(0)"
)


def python(code, *path, **variables):
    """Runs `code` in a fresh Python without a setting of OpenMP's. Returns the finished process."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT])), **variables}
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run


@pytest.fixture
def fake_torch(tmp_path):
    """A folder with a module `torch` that prints the setting."""
    (tmp_path / "torch.py").write_text(FAKE_TORCH)
    return tmp_path


def test_torchs_threads_soon_sleep_while_they_wait():
    """The value arrives: GNU's OpenMP reports what it has read."""
    lines = python("import gpt.kernels.waiting", OMP_DISPLAY_ENV="verbose").stderr.splitlines()
    found = [line for line in lines if "GOMP_SPINCOUNT" in line]
    if not found:
        pytest.skip("needs a torch with GNU's OpenMP")
    assert int(found[0].split("'")[1]) == 2000


@pytest.mark.parametrize(
    ("code", "spins"),
    [
        ("import train", 2000),
        ("import sample", 2000),
        ("import gpt; gpt.load('nowhere')", 2000),
        ("import decode_steps", 2000),
        ("import many_prompts; many_prompts.load = None; many_prompts.main()", 2000),
        ("import text_checks", 2000),
        ("import training_checks", 2000),
        ("import programs; programs.Ours('nowhere', [], 1, 'cpu')", 2000),
        ("import trainers; trainers.Ours('nowhere', [], 1, 'cpu', 1.0)", 2000),
        ("import gpt, gpt.model", None),
        ("import torch", None),
        ("import programs; programs.Transformers('nowhere', [], 1, 'cpu')", None),
        ("import trainers; trainers.NanoGPT('nowhere', [], 1, 'cpu', 1.0)", None),
    ],
)
def test_programs_and_their_benchmarks_import_torch_with_the_setting_and_others_without(fake_torch, code, spins):
    assert python(code, fake_torch, ROOT / "benchmarks").stdout == f"spins {spins}\n"


def test_what_the_user_has_set_stays(fake_torch):
    assert python("import train", fake_torch, GOMP_SPINCOUNT="77").stdout == "spins 77\n"
    assert python("import train", fake_torch, OMP_WAIT_POLICY="active").stdout == "spins None\n"


def test_the_environment_stays_as_it_was(fake_torch):
    before = "import os; before = dict(os.environ); "
    after = "; import gpt.kernels.waiting; print(dict(os.environ) == before)"
    assert python(before + "pass" + after, fake_torch, GO_ON="yes").stdout == "spins 2000\nTrue\n"
    assert python(before + "import torch" + after, fake_torch, GO_ON="yes").stdout == "spins None\nTrue\n"
    (fake_torch / "torch.py").write_text("raise ImportError")
    failing = "\ntry:\n  import gpt.kernels.waiting\nexcept ImportError:\n  print(dict(os.environ) == before)"
    assert python(before + failing, fake_torch).stdout == "True\n"
