"""The machine: devices, precision, compilation, determinism, seeds, signals."""

import platform
import signal
import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from paths import ROOT
from training_helpers import make_data, train_here

from gpt import device
from gpt.config import refuse
from gpt.errors import InputError, ResourceError
from gpt.kernels import build, select
from gpt.model import REFERENCE, ModelConfig, Ops
from gpt.train import runtime
from gpt.train.cost import KERNELS_PAY
from gpt.train.ranks import Ranks
from gpt.train.runtime import MachineConfig, Runtime, StopFlag, check_runtime, own_device, seed_step


@pytest.fixture
def settings_back():
    """torch's settings are put back after a Runtime changed them."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


# ---- devices and precision


def test_of_several_processes_each_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    second, one_of_three = Ranks(), Ranks()
    second.size, second.local_rank, second.local_size = 4, 1, 2
    one_of_three.size = one_of_three.local_size = 3
    assert own_device(torch.device("cuda"), second) == torch.device("cuda:1")
    assert own_device(torch.device("cuda"), Ranks()) == torch.device("cuda")
    assert own_device(torch.device("cpu"), one_of_three) == torch.device("cpu")
    with pytest.raises(InputError, match="3 processes on this machine, 2 GPUs"):
        own_device(torch.device("cuda"), one_of_three)
    for name in ("cuda:1", "mps"):
        with pytest.raises(InputError, match=f"device {name}: 4 processes cannot share it"):
            own_device(torch.device(name), second)


def test_fp32_means_no_shorter_products(settings_back):
    run = Runtime(MachineConfig(device="cpu", dtype="fp32"))
    assert torch.get_float32_matmul_precision() == "highest"
    with run.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with Runtime(MachineConfig(device="cpu", dtype="bf16")).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_on_a_cpu_a_run_is_deterministic_and_its_record_says_what_bits_depend_on(settings_back):
    run = Runtime(MachineConfig(device="cpu", dtype="bf16", threads=1))
    assert torch.are_deterministic_algorithms_enabled()
    assert run.record(compiled=False, ops=Ops(attention=print), micro_batch_size=4) == {
        "torch": torch.__version__,
        "device": device.device_name(run.device),
        "threads": 1,
        "precision": "bfloat16",
        "compile": False,
        "kernels": ["attention"],
        "micro_batch_size": 4,
        "deterministic": True,
        "world_size": 1,
    }


def test_compilation_is_off_on_a_cpu_unless_it_is_asked_for(settings_back):
    run = Runtime(MachineConfig(device="cpu", dtype="fp32"))
    assert [run.compiles(setting, 1e21) for setting in ("auto", "on", "off")] == [False, True, False]


def test_a_run_that_is_continued_on_the_same_device_stays_compiled_or_not(settings_back):
    run = Runtime(MachineConfig(device="cpu", dtype="fp32"))
    before = run.record(compiled=True, ops=REFERENCE, micro_batch_size=4)
    again = continued(before)
    assert [again.compiles(setting, 1e21) for setting in ("auto", "on", "off")] == [True, True, False]
    assert not continued(before | {"device": "another"}).compiles("auto", 1e21)


def test_a_run_on_a_gpu_is_compiled_if_it_is_long_enough_to_save_the_minute_that_takes(settings_back, monkeypatch):
    run = Runtime(MachineConfig(device="cpu", dtype="fp32"))
    run.device = torch.device("cuda")
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA L4", 121e12), ("unknown", 312e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert run.compiles("auto", 210 * peak / 4)  # 210 seconds uncompiled, of which it saves 63
        assert not run.compiles("auto", 190 * peak / 4)


@pytest.fixture
def builds(monkeypatch):
    """Where kernels are not built yet: what was done about it, "built" or "begun"."""
    done, library = [], SimpleNamespace(gpt_causal_attention=SimpleNamespace(), gpt_gelu=SimpleNamespace())
    monkeypatch.setattr(build, "load_library", lambda purpose: library if "built" in done else None)
    monkeypatch.setattr(build, "build_now", lambda purpose: done.append("built") or library)
    monkeypatch.setattr(build, "start_background_build", lambda purpose: done.append("begun") or True)
    return done


SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16)


def bf16_runtime(**settings):
    return Runtime(MachineConfig(device="cpu", dtype="bf16", **settings))


def continued(record, config=None):
    """The Runtime of a run that continues a checkpoint with this record of the machine."""
    return Runtime(
        config or MachineConfig(device="cpu", dtype="bf16"), Ranks(), SimpleNamespace(state={"runtime": record})
    )


@pytest.fixture
def kernels_win(monkeypatch):
    """The measurement says that all C++ is faster; a list of the kernels that were measured."""
    asked = []
    monkeypatch.setattr(runtime, "faster_kernels", lambda kernels, *_: asked.extend(kernels) or list(kernels))
    return asked


def native(ops):
    """The fields of `ops` that are not torch's."""
    return [field.name for field in fields(Ops) if getattr(ops, field.name) is not getattr(REFERENCE, field.name)]


def test_a_long_run_waits_for_its_kernels_and_a_short_one_has_them_built_for_the_next(
    settings_back, builds, kernels_win, capsys
):
    run = bf16_runtime()
    assert run.ops("auto", SHAPE, False, KERNELS_PAY / 2) is REFERENCE
    assert builds == ["begun"]
    assert "built in the background" in capsys.readouterr().err
    assert run.ops("auto", SHAPE, False, KERNELS_PAY) is not REFERENCE
    assert builds == ["begun", "built"]
    assert run.ops("auto", SHAPE, False, 1) is not REFERENCE
    assert builds == ["begun", "built"]


def test_kernels_are_for_uncompiled_runs_on_a_cpu_in_bf16_without_dropout_or_in_fp32(
    settings_back, builds, kernels_win
):
    run = bf16_runtime()
    assert run.ops("auto", SHAPE, True, 1e21) is REFERENCE
    assert run.ops("off", SHAPE, False, 1e21) is REFERENCE
    assert run.ops("auto", replace(SHAPE, dropout=0.1), False, 1e21) is REFERENCE
    assert run.ops("auto", replace(SHAPE, n_embd=30), False, 1e21) is REFERENCE  # heads of an odd width
    run.device = torch.device("cuda")
    assert run.ops("auto", SHAPE, False, 1e21) is REFERENCE
    assert builds == []
    fp32 = Runtime(MachineConfig(device="cpu", dtype="fp32"))
    assert fp32.ops("auto", SHAPE, True, 1e21) is REFERENCE
    for shape, names in (
        (SHAPE, ["attention", "gelu"]),
        (replace(SHAPE, n_embd=30), ["attention", "gelu"]),
        (replace(SHAPE, dropout=0.1), ["gelu"]),
    ):
        assert [native(fp32.ops(setting, shape, False, 1e21)) for setting in ("auto", "on")] == [names, names]
    with pytest.raises(InputError, match="exclude each other"):
        refuse(MachineConfig(kernels="on", compile="on").problems())


def test_auto_uses_each_kernel_only_where_a_measurement_finds_it_faster(settings_back, builds, monkeypatch):
    run = Runtime(MachineConfig(device="cpu", dtype="fp32"))
    for fast in ([], ["attention"], ["gelu"], ["attention", "gelu"]):
        monkeypatch.setattr(runtime, "faster_kernels", lambda *_, fast=fast: fast)
        ops = run.ops("auto", SHAPE, False, 1e21)
        assert native(ops) == run.record(False, ops, 4)["kernels"] == fast
        assert native(run.ops("on", SHAPE, False, 1)) == ["attention", "gelu"]


def test_a_run_that_is_continued_keeps_to_its_kernels_or_to_plain_torch(settings_back, builds, kernels_win):
    config = MachineConfig(device="cpu", dtype="fp32")
    before = Runtime(config).record(False, REFERENCE, micro_batch_size=4)
    assert continued(before, config).ops("auto", SHAPE, False, 1e21) is REFERENCE
    assert builds == []
    for names in (["attention"], ["gelu"], ["attention", "gelu"]):
        assert native(continued(before | {"kernels": names}, config).ops("auto", SHAPE, False, 1)) == names
    assert builds == ["built"] * 3
    assert kernels_win == []
    another = continued(before | {"device": "another", "kernels": ["gelu"]}, config)
    assert native(another.ops("auto", SHAPE, False, 1e21)) == kernels_win == ["attention", "gelu"]


def test_checkpoints_that_hold_only_whether_there_were_kernels_continue_with_all_or_none(
    settings_back, builds, kernels_win, capsys
):
    for dtype, used, names in (
        ("fp32", True, ["attention", "gelu"]),
        ("bf16", True, ["attention"]),
        ("fp32", False, []),
        ("bf16", False, []),
    ):
        config = MachineConfig(device="cpu", dtype=dtype)
        before = Runtime(config).record(False, REFERENCE, 4) | {"kernels": used}
        run = continued(before, config)
        ops = run.ops("auto", SHAPE, False, 1e21)
        assert native(ops) == names
        check_runtime(before, run.record(False, ops, 4))
        assert capsys.readouterr().err == ""
        check_runtime(before, run.record(False, REFERENCE if used else Ops(gelu=print), 4))
        assert "warning: not bitwise the same run any more: kernels" in capsys.readouterr().err
    assert kernels_win == []


def test_a_run_that_is_continued_keeps_its_precision_unless_another_is_asked_for(settings_back, monkeypatch):
    before = Runtime(MachineConfig(device="cpu", dtype="fp32")).record(False, REFERENCE, 4)
    monkeypatch.setattr(select, "bf16_is_faster", lambda: True)
    auto = MachineConfig(device="cpu")
    assert Runtime(auto).dtype == torch.bfloat16
    assert continued(before, auto).dtype == torch.float32
    assert continued(before | {"device": "another"}, auto).dtype == torch.bfloat16
    assert continued(before, MachineConfig(device="cpu", dtype="bf16")).dtype == torch.bfloat16


def test_kernels_that_one_rank_lacks_are_not_used(settings_back, builds, kernels_win):
    run = bf16_runtime()
    assert run.ops("auto", SHAPE, False, 1e21) is not REFERENCE
    run.ranks = type("Ranks", (Ranks,), {"least": lambda self, number: 0})()
    assert run.ops("auto", SHAPE, False, 1e21) is REFERENCE


class Linked(Ranks):
    """A rank alone in its process that notes its collective calls. Rank 1 is given rank 0, which ran before, and gets
    its numbers from `first`."""

    def __init__(self, leader=None):
        super().__init__(rank=0 if leader is None else 1)
        self.calls, self.numbers, self.leader = [], [], leader

    def first(self, number):
        self.calls.append("first")
        self.numbers.append(number)
        return self.leader.numbers[len(self.numbers) - 1] if self.leader else number

    def least(self, number):
        self.calls.append("least")
        return number


@pytest.mark.parametrize("names", [("A100", "A100"), ("A100", "H100"), ("H100", "A100")])
@pytest.mark.parametrize("kernels", [["attention"], []])
def test_ranks_with_different_devices_follow_rank_0_and_take_part_in_the_same_calls(
    settings_back, builds, kernels_win, monkeypatch, names, kernels
):
    """One collective call more on one rank would hang the run."""
    monkeypatch.setattr(runtime, "pick_dtype", lambda *_: torch.bfloat16)
    plain = Runtime(MachineConfig(device="cpu", dtype="bf16")).record(False, REFERENCE, 4)
    record = plain | {"device": "A100", "kernels": kernels}
    checkpoint, leader, outcomes = SimpleNamespace(state={"runtime": record}), None, []
    for name in names:
        monkeypatch.setattr(runtime, "device_name", lambda _, name=name: name)
        ranks = Linked(leader)
        run = Runtime(MachineConfig(device="cpu"), ranks, checkpoint)
        ops = run.ops("auto", SHAPE, run.compiles("auto", 1e21), 1e21)
        outcomes.append((ranks.calls, run.dtype, run.before is None, ops is REFERENCE))
        leader = ranks
    assert outcomes[0] == outcomes[1]


def test_rank_0_alone_measures_which_precision_is_faster(settings_back, monkeypatch):
    monkeypatch.setattr(runtime, "pick_dtype", lambda *_: torch.bfloat16)
    leader = Linked()
    assert Runtime(MachineConfig(device="cpu"), leader).dtype == torch.bfloat16
    monkeypatch.setattr(runtime, "pick_dtype", None)
    assert Runtime(MachineConfig(device="cpu"), Linked(leader)).dtype == torch.bfloat16


def test_rank_0_alone_measures_which_kernels_are_faster(settings_back, builds, monkeypatch):
    run = Runtime(MachineConfig(device="cpu", dtype="fp32"))
    leader, found = None, []
    for fast in (["gelu"], None):
        monkeypatch.setattr(runtime, "faster_kernels", fast and (lambda *_: ["gelu"]))
        run.ranks = leader = Linked(leader)
        found.append((native(run.ops("auto", SHAPE, False, 1e21)), leader.calls))
    assert found[0] == found[1]
    assert found[0][0] == ["gelu"]


def test_where_kernels_cannot_be_built_auto_goes_without_and_on_is_an_error(settings_back, monkeypatch):
    for name in ("load_library", "build_now", "start_background_build"):
        monkeypatch.setattr(build, name, lambda purpose: None)
    run = bf16_runtime()
    assert run.ops("auto", SHAPE, False, 1e21) is REFERENCE
    with pytest.raises(ResourceError, match="kernels on: the C\\+\\+ library could not be built; use auto"):
        run.ops("on", SHAPE, False, 1e21)


NEEDS = "in bf16 the C++ needs dropout 0 and heads of an even width (n_embd / n_head)"


@pytest.mark.parametrize(
    ("reason", "dtype", "changes", "compiled"),
    [
        ("the C++ runs on a CPU, not on cuda", "bf16", {}, False),
        ("the C++ computes fp32 and bf16, not float16", "fp16", {}, False),
        (
            "in bf16 the C++ needs dropout 0 and heads of an even width (n_embd / n_head)",
            "bf16",
            {"dropout": 0.1},
            False,
        ),
        (NEEDS, "bf16", {"n_embd": 30}, False),
        ("the run is compiled, and the compiler makes its own", "fp32", {}, True),
        ("no C++ compiler found", "fp32", {}, False),
    ],
)
def test_where_the_cpp_computes_nothing_auto_goes_without_and_on_says_why(
    settings_back, builds, kernels_win, monkeypatch, reason, dtype, changes, compiled
):
    run = Runtime(MachineConfig(device="cpu", dtype=dtype, kernels="on"))
    if "cuda" in reason:
        run.device = torch.device("cuda")
    if "compiler found" in reason:
        monkeypatch.setattr(build, "compiler", lambda: None)
    shape = replace(SHAPE, **changes)
    assert run.ops("auto", shape, compiled, 1e21) is REFERENCE
    with pytest.raises(InputError) as raised:
        run.ops("on", shape, compiled, 1e21)
    assert str(raised.value) == f"kernels on: {reason}; use auto"
    assert builds == []


@pytest.mark.parametrize(("variable", "path"), [(None, ""), ("no-such-compiler", None), ("", None)])
def test_fault_132_compile_on_without_a_compiler_is_exit_2_and_makes_nothing(tmp_path, monkeypatch, variable, path):
    if path is not None:
        monkeypatch.setenv("PATH", path)
    monkeypatch.delenv("CXX", raising=False)
    if variable is not None:
        monkeypatch.setenv("CXX", variable)
    data = make_data(tmp_path / "data")
    done = train_here("tiny", "--data", data, "--out", tmp_path / "out", "--compile", "on")
    assert (done.code, done.last) == (2, "error: compile on: no C++ compiler found; install one or use --compile off")
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_named_by_number_becomes_the_current_one(settings_back, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    for name in ("cuda:1", "cuda", "cpu", "cpu:0"):
        Runtime(MachineConfig(device=name, dtype="fp32"))
    assert chosen == [torch.device("cuda:1")]


# ---- seeds


def draws(seed, step, rank=0):
    seed_step(seed, step, rank)
    return torch.rand(4).tolist()


def test_random_numbers_are_a_function_of_seed_step_and_rank():
    first = draws(1, 2, 3)
    torch.rand(100)
    assert draws(1, 2, 3) == first
    others = [draws(seed, step, rank) for seed in (0, 1, 2**63) for step in (0, 1, 10**7) for rank in (0, 1)]
    assert len({tuple(numbers) for numbers in others}) == 18


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_fault_071_the_first_signal_only_sets_a_flag(number):
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert not stop
        signal.raise_signal(number)
        assert stop
        signal.raise_signal(signal.SIGTERM)  # a second SIGTERM never breaks a save
        assert stop
    assert signal.getsignal(number) is before


def test_fault_070_a_second_ctrl_c_interrupts():
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop


REUSE = """
import resource, torch
from gpt.train.runtime import keep_freed_memory
keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(32):  # it may take some until there is a piece that is large enough
    before = faults()
    torch.ones(64 << 20, dtype=torch.uint8)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_memory_of_tensors_that_are_gone_is_used_again_without_the_system():
    done = subprocess.run([sys.executable, "-c", REUSE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # of 16,384 pages
