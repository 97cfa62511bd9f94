"""The benchmark programs run from end to end, on a tiny model and with this project alone; times are not looked at."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def benchmarks():
    """A function that imports a module of benchmarks/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module


@pytest.fixture(scope="module")
def tiny(benchmarks, tmp_path_factory):
    """The folder of a tiny model with random weights."""
    return benchmarks("weights").make_weights(tmp_path_factory.mktemp("benchmarks"), "tiny")


def run(module, monkeypatch, words, *more):
    monkeypatch.setattr(sys, "argv", [module.__name__, *words.split(), *map(str, more)])
    module.main()


@pytest.mark.parametrize("name", ["decode", "prompts", "quality"])
def test_help_names_every_flag_with_its_default(benchmarks, name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_of:
        run(benchmarks(name), monkeypatch, "--help")
    assert exit_of.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_decode_checks_and_compares_and_names_what_is_absent(tiny, tmp_path):
    out = tmp_path / "decode.json"
    impl = "ours:fp32:eager,ours:bf16:eager,nanogpt=/nowhere"
    words = f"--device cpu --model tiny --batch 1,3 --new_tokens 6 --pairs 2 --threads 1 --impl {impl}"
    command = [sys.executable, ROOT / "benchmarks/decode.py", *words.split(), "--work", tiny.parent, "--json", out]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    record = json.loads(out.read_text())
    found = {(result["program"], result["batch"]): result for result in record["results"]}
    assert found.keys() == {(f"ours:{dtype}:eager", batch) for dtype in ("fp32", "bf16") for batch in (1, 3)}
    assert all(len(result["rounds"]) == 2 for result in found.values())
    assert found["ours:fp32:eager", 3]["agreement"]["deficit"] < 1e-4
    assert "/nowhere/model.py" in record["absent"]["nanogpt=/nowhere"]
    assert "absent: nanogpt=/nowhere" in made.stdout


def test_a_program_that_computes_another_model_does_not_agree(benchmarks, tiny):
    reference = benchmarks("reference").Reference(tiny, "cpu")
    prompts = benchmarks("weights").prompts_of(tiny, 2, 5)
    with reference.torch.inference_mode():
        texts = [[reference.model(reference.torch.tensor([prompt])).argmax().item()] for prompt in prompts]
    assert reference.agreement(prompts, texts).fine(exact=True)
    texts[1][0] = (texts[1][0] + 1) % 256
    assert not reference.agreement(prompts, texts).fine(exact=False)


def test_refilled_rows_and_fixed_batches_are_compared(benchmarks, tiny, monkeypatch, capsys, one_thread):
    words = "--device cpu --model tiny --prompts 7 --rows 2 --unpadded --dtype fp32 --backend eager --threads 1 --work"
    run(benchmarks("prompts"), monkeypatch, words, tiny.parent)
    assert "ratio" in capsys.readouterr().out


def test_quality_finds_no_change_in_fp32_and_a_small_one_in_bf16(benchmarks, tiny, monkeypatch, tmp_path, one_thread):
    text, out = tmp_path / "text.txt", tmp_path / "quality.json"
    text.write_text("To be, or not to be, that is the question. " * 20)
    words = f"--device cpu --forms fp32:eager,bf16:eager --tokens 120 --rows 2 --threads 1 --json {out}"
    run(benchmarks("quality"), monkeypatch, words, tiny, text)
    _, fp32, bf16 = json.loads(out.read_text())
    assert fp32["change"] == 0
    assert 0 < bf16["rms_error"] < 0.05
