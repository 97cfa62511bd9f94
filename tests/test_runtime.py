"""The machine: devices, precision, seeds, determinism, signals, memory estimates; exit.json."""

import json
import signal

import pytest
import torch
from training_helpers import tiny_model

from gpt import memory, runtime
from gpt.errors import InputError, IntegrityError, NonFiniteError, ResourceError
from gpt.log import exit_record
from gpt.model import GPT, ModelConfig
from gpt.optim import OptimConfig, make_adamw
from gpt.runtime import MachineConfig, Runtime, StopFlag, pick_device, pick_dtype, seed_step


@pytest.fixture
def settings_back():
    """torch's settings are put back after a Runtime changed them."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


# ---- devices and precision


def test_cpu_is_always_there_and_auto_finds_something():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "xpu:7", "", "cuda:-2"])
def test_a_device_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(InputError, match=r"^device .*use (auto|--device auto)") as caught:
        pick_device(name)
    assert name in str(caught.value)


def test_precision_follows_what_the_device_multiplies_natively(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for native in (True, False):
        monkeypatch.setattr(runtime, "cpu_has_bf16", lambda native=native: native)
        assert pick_dtype("auto", cpu) == (torch.bfloat16 if native else torch.float32)
    expected = {(6, 1): torch.float32, (7, 0): torch.float16, (7, 5): torch.float16}
    expected |= dict.fromkeys(((8, 0), (8, 9), (9, 0), (10, 0)), torch.bfloat16)
    for version, dtype in expected.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, version=version: version)
        assert pick_dtype("auto", cuda) == dtype
    assert pick_dtype("fp16", cpu) == torch.float16


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
    assert run.record(compiled=False, micro_batch_size=4) == {
        "torch": torch.__version__,
        "device": runtime.device_name(run.device),
        "threads": 1,
        "precision": "bfloat16",
        "compile": False,
        "micro_batch_size": 4,
        "deterministic": True,
    }


def test_compilation_is_off_on_a_cpu_unless_it_is_asked_for(settings_back):
    run = Runtime(MachineConfig(device="cpu", dtype="fp32"))
    assert [run.compiles(setting, 10**6) for setting in ("auto", "on", "off")] == [False, True, False]


def test_the_measured_peak_is_about_what_a_large_product_reaches():
    assert runtime.peak_flops(torch.device("cpu"), torch.float32) > 1e7
    assert runtime.peak_flops(torch.device("cpu"), torch.float16) > 1e5


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


# ---- memory


@pytest.mark.parametrize("vocab_size", [257, 50257])
def test_the_estimate_of_weights_and_optimizer_is_what_they_take(vocab_size):
    config = ModelConfig(n_layer=3, n_head=4, n_embd=64, block_size=32)
    model = GPT(config, vocab_size)
    optimizer = make_adamw(model, OptimConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    needs = memory.estimate(config, vocab_size, 1, torch.float32)
    size = sum(p.numel() * 4 for p in model.parameters())
    state = sum(v.numel() * 4 for s in optimizer.state.values() for v in s.values())
    assert needs["weights"] == pytest.approx(size, rel=0.1)
    assert needs["gradients"] == pytest.approx(size, rel=0.1)
    assert needs["optimizer"] == pytest.approx(state, rel=0.1)


def kept_for_backward(model, ids):
    """Bytes that a forward pass keeps for the backward pass, weights not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, ids).sum()
    assert loss.requires_grad
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize("shape", [(2, 4, 64, 128, 257), (6, 4, 128, 64, 257), (2, 2, 32, 64, 8192)])
def test_the_estimate_of_activations_is_near_what_a_forward_pass_keeps(shape):
    config, vocab_size = ModelConfig(*shape[:4]), shape[4]
    ids = torch.zeros(4, config.block_size, dtype=torch.int64)
    needs = memory.estimate(config, vocab_size, 4, torch.float32)["activations"]
    kept = kept_for_backward(GPT(config, vocab_size), ids)
    assert kept < 1.15 * needs
    assert needs < 4 * kept  # not kept, but needed: the gradient of the logits


def test_the_chosen_micro_batch_is_the_largest_divisor_that_fits(monkeypatch):
    config, cpu = ModelConfig(2, 2, 32, 64), torch.device("cpu")
    size = {n: sum(memory.estimate(config, 257, n, torch.float32).values()) for n in (1, 2, 3, 4, 6, 12)}
    for n in size:
        monkeypatch.setattr(memory, "free_memory", lambda _, n=n: size[n] / memory.USABLE + 1)
        assert memory.choose_micro_batch(config, 257, 12, torch.float32, cpu) == n
    monkeypatch.setattr(memory, "free_memory", lambda _: 0)
    assert memory.choose_micro_batch(config, 257, 12, torch.float32, cpu) == 1


def test_the_memory_line_adds_up_and_names_its_unit():
    needs = {
        "weights": memory.GIB,
        "gradients": memory.GIB,
        "optimizer": 2 * memory.GIB,
        "activations": memory.GIB // 2,
    }
    line = "memory: weights 1.0 + gradients 1.0 + optimizer 2.0 + activations 0.5 = 4.5 GiB (estimated)"
    assert memory.describe(needs) == line
    assert memory.describe({"weights": 3 * memory.MIB}) == "memory: weights 3.0 = 3.0 MiB (estimated)"


def test_fault_101_a_model_that_can_never_fit_is_refused_and_one_that_may_is_not():
    cpu = torch.device("cpu")
    memory.check_fits(tiny_model().config, 257, cpu)
    with pytest.raises(InputError, match=r"n_layer 1000000, n_embd 768 needs [0-9,]{18,} bytes"):
        memory.check_fits(ModelConfig(n_layer=10**6), 50257, cpu)


# ---- exit.json


@pytest.mark.parametrize("kind", [InputError, IntegrityError, NonFiniteError, ResourceError])
def test_the_reason_of_a_failure_stands_in_exit_json(tmp_path, kind):
    with pytest.raises(kind), exit_record(tmp_path):
        raise kind("x: y; z")
    assert json.loads((tmp_path / "exit.json").read_text()) == {"code": kind.code, "reason": "x: y; z"}
    with exit_record(tmp_path):
        assert not (tmp_path / "exit.json").exists()


def test_an_interruption_stands_in_exit_json(tmp_path):
    with pytest.raises(KeyboardInterrupt), exit_record(tmp_path):
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 130
