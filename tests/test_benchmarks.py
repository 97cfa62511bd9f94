"""The benchmark programs run from end to end, on a tiny model and with this project alone; times are not looked at."""

import importlib
import json
import os
import re
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


@pytest.mark.parametrize(("name", "words"), [("decode", "--device cpu"), ("prompts", ""), ("quality", "folder text")])
def test_help_names_every_flag_with_its_default(benchmarks, name, words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")  # nothing is wrapped
    with pytest.raises(SystemExit) as exit_of:
        run(benchmarks(name), monkeypatch, "--help")
    assert exit_of.value.code == 0
    entries = re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]
    help_of = {re.search(r"--(\w+)", entry)[1]: entry for entry in entries}
    config = vars(benchmarks(name).parse(words.split()))
    for flag in config.keys() - {"checkpoint", "text"}:
        value = config[flag]
        assert flag in help_of
        if value is not None and value is not False:
            assert (",".join(map(str, value)) if isinstance(value, list) else str(value)) in help_of[flag]


def test_decode_refuses_texts_of_one_token(benchmarks, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_of:
        run(benchmarks("decode"), monkeypatch, "--new_tokens 1")
    assert exit_of.value.code == 2
    assert "--new_tokens 1" in capsys.readouterr().err


def test_an_interruption_while_programs_load_ends_those_that_wait(benchmarks, tiny, monkeypatch):
    decode, Worker, started = benchmarks("decode"), benchmarks("workers").Worker, []

    class Interrupted(Worker):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            started.append(self)

        def wait_loaded(self):
            if len(started) == 2:
                assert started[0].process.is_alive()
                raise KeyboardInterrupt
            super().wait_loaded()

    monkeypatch.setattr(decode, "Worker", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(decode, monkeypatch, "--device cpu --model tiny --impl bandwidth,bandwidth --threads 1 --work", tiny.parent)
    assert [worker.process.is_alive() for worker in started] == [False, False]


def test_every_program_begins_some_round(benchmarks):
    in_turn = benchmarks("decode").in_turn
    rounds = [in_turn(["a", "b", "c"], number) for number in range(4)]
    assert rounds == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_programs_in_fp32_are_held_to_its_rounding(benchmarks):
    names = ["nanogpt=../nanoGPT", "ours:fp32:eager", "llamacpp:f32", "ours:int8", "transformers:bf16", "llamacpp:f16"]
    assert [benchmarks("decode").is_exact(name) for name in names] == [True] * 3 + [False] * 3


def test_a_step_reads_the_weights_and_a_cache_of_the_width_that_the_program_keeps(benchmarks, tiny):
    bytes_per_step = benchmarks("report").bytes_per_step
    numbers = 2 * (64 * 192 + 64 * 64 + 2 * 64 * 256) + 257 * 64  # matrices of both layers and the head
    cached = 2 * 2 * 64 * 100 * 3  # keys and values of two layers, 100 tokens, 3 texts
    for program, weight, cache in (
        ("ours:fp32", 4, 4),
        ("ours:bf16", 2, 2),
        ("ours:int8", 1, 2),
        ("llamacpp:f32", 4, 2),
    ):
        assert bytes_per_step(program, tiny, 3, 100) == numbers * weight + cached * cache
    assert bytes_per_step("nanogpt=../nanoGPT", tiny, 3, 100) is None


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


def test_refilled_rows_and_fixed_batches_are_compared(benchmarks, tiny, monkeypatch, capsys, tmp_path, one_thread):
    out = tmp_path / "prompts.json"
    words = "--device cpu --model tiny --prompts 5 --rows 2 --rounds 2 --dtype fp32 --backend eager --threads 1 --work"
    run(benchmarks("prompts"), monkeypatch, words, tiny.parent, "--json", out)
    record, lines = json.loads(out.read_text()), capsys.readouterr().out
    assert [list(seconds) for seconds in record["rounds"]] == [
        ["refilled", "fixed", "unpadded"],
        ["fixed", "unpadded", "refilled"],
    ]
    for name in ("fixed", "unpadded"):
        assert re.search(rf"refilled / {name}: \d+\.\d\d \(.+\); \d+\.\d% of the texts equal", lines)
        assert record["ratios"][name] == [each[name] / each["refilled"] for each in record["rounds"]]
    assert record["ratios"].keys() == {"fixed", "unpadded"}
    assert record["backend"] == "eager"
    assert [each["unpadded"] for each in record["equal"]] == [1, 1]  # the same products, whichever rows they are in
    assert 0 <= record["equal"][0]["fixed"] <= 1


def test_quality_finds_no_change_in_fp32_and_a_small_one_in_bf16(benchmarks, tiny, monkeypatch, tmp_path, one_thread):
    text, out = tmp_path / "text.txt", tmp_path / "quality.json"
    text.write_text("To be, or not to be, that is the question. " * 20)
    words = f"--device cpu --forms fp32:eager,bf16:eager --tokens 120 --rows 2 --threads 1 --json {out}"
    run(benchmarks("quality"), monkeypatch, words, tiny, text)
    _, fp32, bf16 = json.loads(out.read_text())
    assert fp32["change"] == 0
    assert 0 < bf16["rms_error"] < 0.05
