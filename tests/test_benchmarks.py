"""The benchmark programs run from end to end, on a tiny model and with this project alone; times are not looked at."""

import importlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from graph_helpers import Recorded
from paths import ROOT
from training_helpers import make_data, run_script, tiny_model

from gpt.generate.generator import TextGenerator
from gpt.model import ModelConfig
from gpt.text.tokenizer import load_tokenizer


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


def run_alone(name, words, *more):
    """Runs a program as a user does: in a process of its own, without PYTHONPATH."""
    command = [sys.executable, ROOT / f"benchmarks/{name}.py", *words.split(), *map(str, more)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def test_no_module_has_the_name_of_one_of_the_product_s():
    own, product = (
        {path.stem for folder in folders for path in folder.glob("*.py")}
        for folders in ([ROOT / "benchmarks"], [ROOT, ROOT / "data"])
    )
    assert "train" in product
    assert not own & product


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("decode_speed", "--device cpu"),
        ("decode_steps", "--device cpu"),
        ("train_speed", "--device cpu"),
        ("many_prompts", ""),
        ("quality", "folder text"),
        ("learning_curve", "--text text"),
    ],
)
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
        run(benchmarks("decode_speed"), monkeypatch, "--new_tokens 1")
    assert exit_of.value.code == 2
    assert "--new_tokens 1" in capsys.readouterr().err


def test_an_interruption_while_programs_load_ends_those_that_wait(benchmarks, tiny, monkeypatch):
    decode, Worker, started = benchmarks("decode_speed"), benchmarks("workers").Worker, []

    class Interrupted(Worker):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
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
    in_turn = benchmarks("workers").in_turn
    rounds = [in_turn(["a", "b", "c"], number) for number in range(4)]
    assert rounds == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_programs_in_fp32_are_held_to_its_rounding(benchmarks):
    names = ["nanogpt=../nanoGPT", "ours:fp32:eager", "llamacpp:f32", "ours:int8", "transformers:bf16", "llamacpp:f16"]
    assert [benchmarks("decode_speed").is_exact(name) for name in names] == [True] * 3 + [False] * 3


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
    made = run_alone("decode_speed", words, "--work", tiny.parent, "--json", out)
    assert made.returncode == 0, made.stderr
    record = json.loads(out.read_text())
    found = {(result["program"], result["batch"]): result for result in record["results"]}
    assert found.keys() == {(f"ours:{dtype}:eager", batch) for dtype in ("fp32", "bf16") for batch in (1, 3)}
    assert all(len(result["rounds"]) == 2 for result in found.values())
    assert found["ours:fp32:eager", 3]["agreement"]["deficit"] < 1e-4
    assert "/nowhere/model.py" in record["absent"]["nanogpt=/nowhere"]
    assert "absent: nanogpt=/nowhere" in made.stdout


@pytest.mark.parametrize(
    ("name", "words", "stop"),
    [
        ("decode_speed", "--batch 2 --new_tokens 4 --pairs 10000 --impl ours:fp32:eager", signal.SIGTERM),
        (
            "train_speed",
            "--sizes tiny --block_size 8 --batch 1 --check 0 --pairs 9999 --impl ours:fp32",
            signal.SIGINT,
        ),
        ("decode_steps", "--rows 1 --contexts 4,5,6 --new_tokens 4 --runs 100", signal.SIGTERM),
        ("many_prompts", "--prompts 3 --rounds 10000 --backend eager", signal.SIGINT),
    ],
)
def test_a_stopped_program_keeps_and_shows_what_it_has_measured(processes, tiny, tmp_path, name, words, stop):
    out = tmp_path / "figures.json"
    words += " --device cpu" + (" --model tiny" if name != "train_speed" else "")
    words += f" --threads 1 --work {tiny.parent}" if name != "decode_steps" else ""
    command = "test_benchmarks.run_on_one_thread", f"benchmarks/{name}.py", *words.split(), "--json", str(out)
    process = processes.open(*command)
    while not out.exists() or not rounds_of(json.loads(out.read_text())):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(stop)
    shown = process.communicate()[0].decode()
    assert process.returncode == 128 + stop
    record = json.loads(out.read_text())
    assert rounds_of(record)
    assert record["stopped"] == stop.name
    assert record["machine"]["processor"] in shown.splitlines()[0]
    last = shown.splitlines()[-3:]
    assert any(re.search(r"ours:fp32.*\d|greedy against .*\(1\)|refilled +\d", line) for line in last), shown


PROGRAM = """
import workers

class Idle:
    version = "1"

def load(*_):
    return Idle()

if __name__ == "__main__":
    workers.Worker("idle", "idle", "folder", 1, "cpu", module="program").wait_loaded()
"""


def test_a_program_ends_although_it_has_not_closed_a_worker_which_is_stopped(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(tmp_path)])}
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment, timeout=60)
    assert done.returncode == 0


def run_on_one_thread(path, *args):
    torch.set_num_threads(1)
    run_script(path, *args)


def rounds_of(record):
    """Returns all rounds of a record, or all lines of decode_steps.py."""
    return record.get("rounds") or [number for each in record["results"] for number in each.get("rounds", [each])]


def test_the_instruction_sets_of_a_cpu_are_named(benchmarks, monkeypatch, tmp_path):
    machine, file = benchmarks("machine"), tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "CPUINFO", file)
    file.write_text("processor : 0\nmodel name : Some CPU: fast\nflags : fpu avx2 avx512f avx512_bf16\nbugs : x\n")
    assert machine.processor_name() == "Some CPU: fast"
    assert machine.instruction_sets() == ["AVX2", "AVX-512F", "AVX-512 BF16"]
    file.write_text("processor : 0\nFeatures : fp asimd asimddp bf16\nCPU part : 0xd0c\n")
    assert machine.instruction_sets() == ["NEON", "dotprod", "bf16"]
    file.unlink()
    assert machine.instruction_sets() == []


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("c++"), reason="needs a compiler for x86-64")
def test_kernels_held_to_avx2_are_compiled_without_avx512(benchmarks, tmp_path):
    code = f"""
import os, pathlib, subprocess, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "benchmarks")!r}]
from machine import hold_to_avx2
from gpt.kernels.build import compiler, library_path
hold_to_avx2(pathlib.Path({str(tmp_path)!r}))
assert {str(tmp_path)!r} in str(library_path())
flags = ["-march=sapphirerapids", "-x", "c++", "-dM", "-E", os.devnull]
print(subprocess.run([*compiler(), *flags], check=True, capture_output=True, text=True).stdout)
"""
    macros = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "__AVX2__" in macros
    assert "__FMA__" in macros
    assert "__AVX512F__" not in macros
    assert "__AVXVNNI__" not in macros


def test_a_program_that_computes_another_model_does_not_agree(benchmarks, tiny):
    reference = benchmarks("reference").Reference(tiny, "cpu")
    prompts = benchmarks("weights").prompts_of(tiny, 2, 5)
    with torch.inference_mode():
        texts = [[reference.model(torch.tensor([prompt])).argmax().item()] for prompt in prompts]
    assert reference.agreement(prompts, texts).fine(exact=True)
    texts[1][0] = (texts[1][0] + 1) % 256
    assert not reference.agreement(prompts, texts).fine(exact=False)


def test_refilled_rows_and_fixed_batches_are_compared(benchmarks, tiny, monkeypatch, capsys, tmp_path, one_thread):
    out = tmp_path / "prompts.json"
    words = "--device cpu --model tiny --prompts 5 --rows 2 --rounds 2 --dtype fp32 --backend eager --threads 1 --work"
    run(benchmarks("many_prompts"), monkeypatch, words, tiny.parent, "--json", out)
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
    assert record["machine"]["processor"] in lines
    assert [each["unpadded"] for each in record["equal"]] == [1, 1]  # the same products, whichever rows they are in
    assert 0 <= record["equal"][0]["fixed"] <= 1


def test_quality_finds_no_change_in_fp32_and_a_small_one_in_bf16(benchmarks, tiny, monkeypatch, tmp_path, one_thread):
    text, out = tmp_path / "text.txt", tmp_path / "quality.json"
    text.write_text("To be, or not to be, that is the question. " * 20)
    words = f"--device cpu --forms fp32:eager,bf16:eager --tokens 120 --rows 2 --threads 1 --json {out}"
    run(benchmarks("quality"), monkeypatch, words, tiny, text)
    _, fp32, bf16 = json.loads(out.read_text())["results"]
    assert fp32["change"] == 0
    assert 0 < bf16["rms_error"] < 0.05


def test_the_bandwidth_of_the_memory_is_measured(benchmarks, one_thread):
    assert benchmarks("programs").Bandwidth("", [], 1, "cpu").read(megabytes=1) > 0


def test_a_proof_trains_the_model_that_its_checks_need_and_ends_with_a_table(tmp_path):
    make_data(tmp_path / "data", train_size=20_000)
    made = run_alone("prove_cuda", "--device cpu --only greedy,graph", "--out", tmp_path)
    assert made.returncode == 0, made.stdout + made.stderr
    *_, greedy, graph = made.stdout.splitlines()
    assert re.match(r"\| greedy +\| pass ", greedy)
    assert re.match(r"\| graph +\| skip ", graph)


@pytest.mark.parametrize("captured", [True, False])
def test_the_proof_times_captured_steps_and_those_launched_one_by_one(benchmarks, monkeypatch, one_thread, captured):
    graphs, checks = [], benchmarks("training_checks")
    monkeypatch.setattr("gpt.train.muon.host_asks", lambda device: False)  # as on a GPU
    monkeypatch.setattr(checks, "CudaGraph", lambda device: graphs.append(Recorded()) or graphs[-1])
    monkeypatch.setattr(checks, "milliseconds", lambda device, step, calls: [step() for _ in range(5)])
    checks.step_milliseconds("cpu", ModelConfig(1, 1, 16, 16), 2, captured)
    torch.use_deterministic_algorithms(False)
    assert [bool(graph.operations) for graph in graphs] == [True] * captured


def test_the_gap_of_a_text_is_that_of_every_token_by_itself_past_the_context_too(benchmarks):
    largest_gap = benchmarks("text_checks").largest_gap
    generator = TextGenerator(tiny_model().eval(), load_tokenizer("byte"))
    ids = torch.randint(256, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    window, gaps = list(b"import"), []
    for chosen in ids:
        with torch.inference_mode():
            logits = generator.model(torch.tensor([window]))[0]
        gaps.append((logits[:256].max() - logits[chosen]).item())
        window = [*window, chosen] if len(window) < 32 else [*window, chosen][-16:]
    for count in (1, 27, 28, 50, 100):
        assert largest_gap(generator, "import", ids[:count]) == pytest.approx(max(gaps[:count]), abs=1e-4)


@pytest.mark.parametrize(
    ("code", "limit", "expected"),
    [
        ("open(sys.argv[1], 'w').write('[\"pass\", \"equal\"]')", 100, ("pass", "equal")),
        ("os.abort()", 100, ("FAIL", "exit code -6, see above")),
        ("time.sleep(600)", 0.5, ("TIME", "not done after 0 s")),
    ],
)
def test_a_check_that_crashes_or_hangs_only_ends_itself(benchmarks, tmp_path, code, limit, expected):
    command = [sys.executable, "-c", f"import os, sys, time; {code}", tmp_path / "result"]
    assert benchmarks("apart").run_apart(command, tmp_path / "result", limit) == expected


def test_a_check_ends_with_the_proof_that_started_it(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    lock, held = tmp_path / "lock", tmp_path / "held"
    begin = f"import fcntl, pathlib, sys, time; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import apart\n"
    inner = f"{begin}apart.end_with_parent(); file = open({str(lock)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
    inner += f"open({str(held)!r}, 'w'); time.sleep(600)"
    outer = (
        f"{begin}apart.run_apart([sys.executable, '-c', {inner!r}], pathlib.Path({str(tmp_path / 'result')!r}), 600)"
    )
    proof = subprocess.Popen([sys.executable, "-c", outer])
    while not held.exists():
        assert proof.poll() is None
        time.sleep(0.01)
    proof.kill()
    proof.wait()
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits until the check has ended


def test_the_steps_of_a_tiny_model_are_timed_and_its_greedy_text_is_checked(tmp_path):
    out = tmp_path / "steps.json"
    words = "--device cpu --model tiny --dtype fp32 --rows 1,3 --contexts 5,9 --new_tokens 8 --runs 1"
    made = run_alone("decode_steps", words, "--json", out)
    assert made.returncode == 0, made.stderr
    record = json.loads(out.read_text())
    found = [(result["rows"], result["prompt"], result["sampler"]) for result in record["results"]]
    assert found == [(rows, prompt, name) for rows in (1, 3) for prompt in (5, 9) for name in ("greedy", "sampled")]
    for result in record["results"]:
        assert result["speed"] == pytest.approx(1000 * result["rows"] / result["step_ms"])
        assert 0 < result["first_ms"] < 1000 * result["rows"] * 8 / result["whole_speed"]
    assert record["greedy_gap"] < 1e-3
    assert made.stdout.count("\n") == 3 + 8 + 1


def test_steps_side_by_side_that_fail_or_hang_are_named_in_the_table(benchmarks, monkeypatch, tmp_path, capsys):
    steps, pids = benchmarks("steps"), tmp_path / "pids"
    hang = f"import os, time; open({str(pids)!r}, 'w').write(str(os.getpid())); print(7, flush=True); time.sleep(600)"

    def step(name, limit, code):
        return steps.Step(name, limit, [sys.executable, "-c", code])

    groups = [
        [
            step("hangs", 2, hang),
            step("fails", 60, "print(5); raise SystemExit(3)"),
            step("fine", 60, "print('| a | b |')"),
        ],
        [step("late", 60, "")],
    ]
    record, start, saved = {"steps": []}, time.monotonic(), []
    assert steps.run_steps(groups, 1, tmp_path, record, lambda: saved.append(len(record["steps"]))) == 1
    assert time.monotonic() - start < 30
    lines = {name: (state, found) for name, state, _, found in record["steps"]}
    assert lines.pop("hangs") == ("TIME", "not done after 2 s")
    assert lines == {"fails": ("FAIL", "exit code 3, see above"), "fine": ("pass", "a b"), "late": ("pass", "")}
    assert saved == [1, 2, 3, 4]
    assert (tmp_path / "hangs.log").read_text() == "7\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids.read_text()), 0)
    steps.print_steps(record)
    *_, table = capsys.readouterr().out.split("\n\n")
    assert [line.split()[1] for line in table.splitlines()[2:]] == [name for name, *_ in record["steps"]]

    record = {"steps": []}
    assert steps.run_steps(groups[1:], 0.1, tmp_path, record, list) == 0
    assert record["steps"] == [["late", "skip", "0", "not begun: the minutes are over"]]

    monkeypatch.setattr(steps, "TOO_SHORT", 0)
    record = {"steps": []}
    assert steps.run_steps([[step("hangs", 600, hang)]], 0.01, tmp_path, record, list) == 1  # ends with the session
    assert record["steps"][0][1] == "TIME"


def test_missing_packages_come_from_the_carried_wheels(benchmarks, monkeypatch, tmp_path):
    carried, wheels, site = benchmarks("carried"), tmp_path / "wheels", tmp_path / "site"
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setattr(sys, "path", sys.path[:])
    wheels.mkdir()
    for name in ("thing_one", "pytest"):
        with zipfile.ZipFile(wheels / f"{name}-0.1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "x = 1")
            wheel.writestr(f"{name}-0.1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
            wheel.writestr(f"{name}-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{name}-0.1.dist-info/RECORD", "")
    assert carried.missing(["thing_one", "pytest"]) == ["thing_one", "tokenizer files"]
    carried.install_wheels(tmp_path, site)
    assert carried.missing(["thing_one", "pytest"]) == ["tokenizer files"]
    subprocess.run([sys.executable, "-c", "import thing_one"], check=True)
    assert not list(site.glob("pytest*"))  # it is installed here, in another version

    (tmp_path / "tiktoken_cache").mkdir()
    carried.find_tokenizer(tmp_path)
    assert "TIKTOKEN_CACHE_DIR" not in os.environ
    (tmp_path / "tiktoken_cache/file").touch()
    carried.find_tokenizer(tmp_path)
    assert carried.missing(["pytest"]) == []


def test_a_session_on_a_gpu_plans_the_most_important_steps_first(benchmarks, monkeypatch, tmp_path, capsys):
    gpu_run = benchmarks("gpu_run")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    config = gpu_run.parse(["--device", "cpu", "--nanogpt", "../nanoGPT"])
    assert config.out == tmp_path / "out"
    config.device = "cuda"
    groups = [[step.name for step in group] for group in gpu_run.plan(config, tmp_path)]
    assert groups[0][:2] == ["triton_attention", "triton_model"]
    assert groups[1:3] == [["captured-bf16"], ["train"]]
    assert groups[-1] == ["text"]
    checks = ",".join(gpu_run.PROOFS["cuda"]).split(",")
    assert sorted(checks) == sorted(benchmarks("prove_cuda").CHECKS.keys() - {"speed"})  # the step `text` is that
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    assert [[step.name for step in group] for group in gpu_run.plan(config, tmp_path)] == groups[:-1]
    with pytest.raises(SystemExit):
        gpu_run.parse(["--device", "cpu", "--only", "train,nothing"])
    assert "--only nothing: no such step" in capsys.readouterr().err


def test_all_programs_train_on_the_same_tokens_in_the_same_order(benchmarks):
    tokens = benchmarks("trainers").tokens
    first = tokens(257, 3, 4, 300)
    assert first.shape == (4, 301)
    assert (first == tokens(257, 3, 4, 300)).all()
    assert (first != tokens(257, 4, 4, 300)).any()
    assert first.min() >= 0
    assert first.max() < 257
    repeated = sum(first[0, place] in first[0, max(0, place - 8) : place] for place in range(301))
    assert repeated > 100


def test_a_program_is_named_by_its_kind_a_path_and_words(benchmarks):
    parts_of, train_speed = benchmarks("trainers").parts_of, benchmarks("train_speed")
    assert parts_of("ours:bf16:compile") == ("ours", ["bf16", "compile"])
    assert parts_of("nanogpt=../nanoGPT:bf16") == ("nanogpt", ["../nanoGPT", "bf16"])
    assert parts_of("nanogpt=C:/nanoGPT") == ("nanogpt", ["C:/nanoGPT"])
    assert parts_of("peak") == ("peak", [])
    assert train_speed.label("nanogpt=/some/folder:bf16") == "nanogpt:bf16"
    assert train_speed.reference_of("ours:bf16:compile:muon") == "ours:fp32:muon"


def test_training_is_timed_only_where_the_losses_are_those_of_fp32(benchmarks, tiny, tmp_path):
    out = tmp_path / "train.json"
    words = "--device cpu --sizes tiny --block_size 16 --batch 2 --steps 1 --check 3 --pairs 2 --threads 1"
    undone = ":".join(["ours:bf16:by1", *sorted(benchmarks("trainers").UNDONE)])  # where nothing is, it is an error
    impl = f"ours:bf16,{undone},nanogpt=/nowhere"
    made = run_alone("train_speed", words, "--impl", impl, "--work", tiny.parent, "--json", out)
    assert made.returncode == 0, made.stderr
    record = json.loads(out.read_text())
    result, other = record["results"]
    assert (result["program"], other["program"]) == ("ours:bf16", undone)
    assert result["losses"] != other["losses"] == pytest.approx(result["losses"], abs=0.02)
    assert 0 < result["difference"] < 0.02
    assert len(result["losses"]) == 3 + 2 * (2 + 1)  # each round has two more, untimed
    assert len(result["speeds"]) == 2
    assert result["mfu"] > 0
    assert "/nowhere/model.py" in record["absent"]["tiny: nanogpt=/nowhere"]


def test_a_program_with_other_losses_is_not_timed(benchmarks):
    class Program:
        name = "transformers:bf16"

    compare = benchmarks("train_speed").compare

    with pytest.raises(benchmarks("workers").Absent, match=r"0\.0300"):
        compare(Program, [5.0, 4.0], {"losses": [5.0, 4.03]})
    with pytest.raises(benchmarks("workers").Absent):
        compare(Program, [5.0, 4.0], {"losses": [5.0, float("nan")]})
    fine = {"losses": [5.0, 4.01]}
    compare(Program, [5.0, 4.0], fine)
    assert fine["difference"] == pytest.approx(0.01)


@pytest.mark.parametrize("length", [2, 8, 9, 30, 33])
def test_the_scorer_reads_every_target_once_in_windows_that_do_not_overlap(benchmarks, length):
    seen = []

    def losses(ids, targets):
        seen.extend(targets.flatten().tolist())
        assert ids.shape[1] <= 8
        assert (targets - ids == 1).all()
        return targets.float()

    found = benchmarks("curves").mean_loss(losses, torch.arange(length), 8)
    assert sorted(seen) == list(range(1, length))
    assert found == pytest.approx(sum(range(1, length)) / (length - 1))


def test_a_loss_counts_as_reached_at_the_first_snapshot_that_has_it(benchmarks):
    curves = benchmarks("curves")
    points = [{"seconds": second, "loss": loss} for second, loss in ((1, 3.0), (2, 1.9), (4, 1.8), (8, 1.85))]
    assert curves.first_at(points, 1.886) == 4
    assert curves.first_at(points, 1.7) == float("inf")
    assert curves.loss_at(points, 5) == 1.8
    assert curves.loss_at(points, 0.5) == float("inf")


def test_learning_is_summed_up_by_medians_and_by_ratios_within_a_seed(benchmarks):
    def run_of(program, seed, wall, *points):
        points = [{"seconds": second, "loss": loss} for second, loss in points]
        figures = {"wall": wall, "own_loss": points[-1]["loss"], "kept_seconds": 0.0}
        return {"program": program, "seed": seed, "points": points} | figures

    runs = [run_of("nanogpt", seed, wall, (wall - 1, 1.9)) for seed, wall in enumerate((100, 200, 100))]
    runs += [run_of("mine", seed, 80, (20, 1.89), (70, last)) for seed, last in enumerate((1.7, 1.6, 1.8))]
    found = benchmarks("curves").summary(runs, "mine", 1.886)
    assert found["to_target"] == 70
    assert found["target_share"] == 0.7
    assert found["peer_final_share"] == 0.2
    assert found["at_peer_wall"] == found["final"] == 1.7
    assert benchmarks("curves").summary(runs, "nanogpt", 1.886)["to_target"] is None


def test_nanogpt_gets_the_text_as_its_own_program_writes_it(benchmarks, tmp_path):
    import pickle
    from types import SimpleNamespace

    import numpy as np

    learn, checkout = benchmarks("learning_curve"), tmp_path / "checkout"
    for name in learn.COPIED:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("")
    text = b"To be, or not to be.\n" * 5
    made = learn.prepare_nanogpt(SimpleNamespace(work=tmp_path, nanogpt=checkout), text)
    folder = tmp_path / "nanogpt/data/shakespeare_char"
    ids = [np.fromfile(folder / f"{split}.bin", dtype=np.uint16) for split in ("train", "val")]
    characters = pickle.loads((folder / "meta.pkl").read_bytes())
    assert "".join(characters["itos"][number] for number in np.concatenate(ids).tolist()) == text.decode()
    assert characters["vocab_size"] == len(made) == len(set(text))
    assert len(ids[0]) == int(0.9 * len(text))


def test_a_preset_is_run_and_its_snapshots_are_scored(monkeypatch, benchmarks, tmp_path, capsys, one_thread):
    text, out = tmp_path / "text.txt", tmp_path / "learn.json"
    text.write_text("To be, or not to be, that is the question. " * 100)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    words = "--presets tiny --seeds 1 --threads 1 --target 4.5 --text"
    run(benchmarks("learning_curve"), monkeypatch, words, text, "--work", tmp_path / "work", "--json", out)
    record = json.loads(out.read_text())
    [one] = record["runs"]
    assert one["points"][0]["step"] == 1
    assert one["points"][-1]["step"] == 50
    assert one["points"][-1]["loss"] < 4.5 < one["points"][0]["loss"]
    assert one["wall"] > one["points"][-1]["seconds"] > one["points"][0]["seconds"] > 0
    assert one["kept_seconds"] < one["wall"]
    assert record["summary"]["tiny"]["to_target"] <= one["wall"]
    assert "| tiny" in capsys.readouterr().out


def test_padding_is_measured_both_ways(benchmarks, monkeypatch, tmp_path, capsys, one_thread):
    module, out = benchmarks("padding"), tmp_path / "padding.json"
    widths, step = [], module.take_step
    keep = lambda *words: widths.append({part.shape[1] - 1 for part in words[-1]}) or step(*words)  # noqa: E731
    monkeypatch.setattr(module, "take_step", keep)
    run(module, monkeypatch, "--n_layer 1 --n_embd 16 --rounds 1 --json", out)
    assert widths[1:3] == [{512}, {512}] and all(width % 64 == 0 for width in widths[0] | widths[3])
    assert len(widths[0]) > 1
    [speeds] = json.loads(out.read_text())["results"]
    assert speeds.keys() == module.WAYS.keys() and min(speeds.values()) > 0
    assert re.search(r"padded to multiples of 64 +\| [\d,]+", capsys.readouterr().out)
