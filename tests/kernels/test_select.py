"""The door to the kernels: which precision, kernels and native back end a model gets."""

import contextlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpt.kernels import build, select
from gpt.kernels.select import pick_dtype
from gpt.model import GPT, REFERENCE, ModelConfig
from gpt.quantize import to_int8

VOCABULARY = 300


def make_model(dtype=torch.float32, int8=False, **shape):
    config = ModelConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 24} | shape)
    model = GPT(config, VOCABULARY).eval().requires_grad_(False).to(dtype)
    return to_int8(model) if int8 else model


# ---- precision


def test_precision_follows_the_gpu_and_on_a_cpu_a_measurement(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for bf16_wins in (True, False):
        monkeypatch.setattr(select, "faster", lambda *_, wins=bf16_wins: wins)
        assert pick_dtype("auto", cpu) == (torch.bfloat16 if bf16_wins else torch.float32)
    expected = {(6, 1): torch.float32, (7, 0): torch.float16, (7, 5): torch.float16}
    expected |= dict.fromkeys(((8, 0), (8, 9), (9, 0), (10, 0)), torch.bfloat16)
    for version, dtype in expected.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, version=version: version)
        assert pick_dtype("auto", cuda) == dtype
    assert pick_dtype("fp16", cpu) == torch.float16


# ---- generation on a CPU


def test_generation_on_a_cpu_takes_the_precision_that_decodes_faster(monkeypatch):
    config, asked = ModelConfig(), []
    monkeypatch.setattr(select, "faster_engine", lambda *_: "a library")
    for bf16_wins in (True, False):
        monkeypatch.setattr(select, "decodes_faster", lambda *args, wins=bf16_wins: asked.append(args) or wins)
        for int8 in (False, True):
            found = select.pick_decode_dtype(config, VOCABULARY, int8, 3, "a library")
            assert found == (torch.bfloat16 if bf16_wins else torch.float32)
    expected = [(config, VOCABULARY, dtype, dtype) for dtype in (torch.bfloat16, torch.float32)]
    assert asked[0] == asked[2] == (*expected, 3, "a library")
    assert asked[1][:2] == tuple((config, VOCABULARY, torch.int8, dtype) for dtype in (torch.bfloat16, torch.float32))


def test_plain_torch_decodes_in_bf16_only_where_it_reads_prompts_faster_too(monkeypatch):
    monkeypatch.setattr(select, "decodes_faster", lambda *_: True)
    for products_are_faster in (True, False):
        monkeypatch.setattr(select, "faster_engine", lambda *_: None)
        monkeypatch.setattr(select, "bf16_is_faster", lambda wins=products_are_faster: wins)
        shape = ModelConfig(), VOCABULARY
        found = select.pick_decode_dtype(*shape, False, 1, None)
        assert found == (torch.bfloat16 if products_are_faster else torch.float32)
        assert select.pick_decode_dtype(*shape, True, 1, None) == torch.bfloat16  # matrices are int8
        for engine in (None, "a library"):  # which is faster for bf16
            monkeypatch.setattr(select, "faster_engine", lambda *_, engine=engine: engine)
            found = select.pick_decode_dtype(*shape, False, 1, "a library")
            assert found == (torch.bfloat16 if engine or products_are_faster else torch.float32)


@pytest.mark.parametrize("library", [None, "a library"])
def test_int8_that_is_not_faster_than_bf16_says_so(monkeypatch, capsys, library):
    model = make_model(torch.bfloat16, int8=True)
    for int8_wins in (True, False):
        monkeypatch.setattr(select, "decodes_faster", lambda *_, wins=int8_wins: wins)
        select.note_slow_int8(model, 1, library)
        said = capsys.readouterr().err
        assert ("not faster than bf16" in said) == (not int8_wins)
        assert ("without the C++ kernels" in said) == (not int8_wins and library is None)


def test_a_missing_library_is_built_now_only_for_those_who_wait(monkeypatch, capsys):
    calls, small, large = [], ModelConfig(n_layer=1, n_embd=32, n_head=2), ModelConfig()
    for name, result in (("load_library", None), ("build_now", "a library"), ("start_background_build", True)):
        monkeypatch.setattr(build, name, lambda _, name=name, result=result: calls.append(name) or result)
    assert select.decode_library("auto", 10_000, small, VOCABULARY) is None  # many steps of a small model are short
    assert select.decode_library("auto", 100, large, 50257) is None
    assert calls == 2 * ["load_library", "start_background_build"]
    assert "built in the background" in capsys.readouterr().err
    assert select.decode_library("auto", 1000, large, 50257) == "a library"
    assert select.decode_library("native", 0, small, VOCABULARY) == "a library"
    assert calls[4:] == 2 * ["build_now"]
    for backend in ("eager", "compiled"):
        assert select.decode_library(backend, 1000, large, 50257) is None
    assert calls[6:] == []


# ---- training

SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=24)


def test_of_the_training_kernels_each_is_chosen_by_its_own_measurement(monkeypatch):
    for fast in ("attention", "gelu"):
        called = []

        def spy(name, called=called):
            return lambda *arguments: (called.append(name), getattr(REFERENCE, name)(*arguments))[1]

        def faster(_, contest, fast=fast, called=called):
            called.clear()
            contest()[1]()
            return called == [fast]

        monkeypatch.setattr(select, "faster", faster)
        assert select.faster_kernels({name: spy(name) for name in select.NATIVE_OPS}, SHAPE, torch.float32) == [fast]


@pytest.mark.parametrize(("dtype", "names"), [(torch.float32, ["attention", "gelu"]), (torch.bfloat16, ["attention"])])
def test_a_training_kernel_is_measured_forward_and_backward_beside_torchs(kernels, monkeypatch, dtype, names):
    contests, passed = [], []
    made = select.native_kernels(select.native_names(SHAPE, dtype), wait=False)
    assert list(made) == names

    def spy(name):
        def kernel(x, *arguments):
            x.register_hook(lambda gradient: passed.append((name, gradient.dtype)))
            return made[name](x, *arguments)

        return kernel

    monkeypatch.setattr(select, "faster", lambda _, contest: contests.append(contest))
    select.faster_kernels({name: spy(name) for name in names}, SHAPE, dtype)
    for contest in contests:
        plain, native = contest()
        plain()
        native()
    assert passed == [(name, dtype) for name in names]


def test_each_training_kernel_shape_precision_and_library_has_a_measurement_of_its_own(monkeypatch):
    questions, both = [], {"attention": None, "gelu": None}
    monkeypatch.setattr(select, "faster", lambda question, _: questions.append(question))
    shapes = [SHAPE, *(replace(SHAPE, **change) for change in ({"n_head": 4}, {"n_embd": 64}, {"block_size": 48}))]
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            select.faster_kernels(both, shape, dtype)
    monkeypatch.setattr(build, "library_path", lambda _: Path("/a/training-1.so"))
    select.faster_kernels(both, SHAPE, torch.float32)
    assert len(set(questions)) == 2 * (2 * len(shapes) + 1)


# ---- GPUs


def triton_error(name):
    """Returns an error of a class of Triton's, which derives from Exception."""
    return type(name, (Exception,), {"__module__": "triton.runtime.errors"})("ptxas fatal: no sm_130")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        subprocess.CalledProcessError(1, ["gcc", "Python.h"]),
        FileNotFoundError("gcc"),
        ImportError("no triton"),
        triton_error("PTXASError"),
    ],
)
def test_fault_132_where_triton_cannot_compile_plain_torch_runs_the_step(monkeypatch, capsys, error):
    def launch(*_):
        raise error

    monkeypatch.setitem(sys.modules, "gpt.kernels.triton_attention", SimpleNamespace(decode_attention=launch))
    select.triton_works.cache_clear()
    assert not select.triton_works(torch.device("cpu"))
    assert "no Triton kernel" in capsys.readouterr().err
    select.triton_works.cache_clear()


def test_where_the_triton_sampler_does_not_run_the_plain_one_is_used_with_one_note(monkeypatch, capsys):
    def launch(*_):
        raise RuntimeError("no such instruction\nsecond line")

    device = torch.device("cpu")
    for attention, note in ((None, ""), (launch, "info: no Triton kernel for sampling: no such instruction; ")):
        monkeypatch.setattr(select, "triton_works", lambda _, works=attention is not None: works)
        monkeypatch.setitem(sys.modules, "gpt.kernels.triton_sampler", SimpleNamespace(choose_next=launch))
        select.triton_sampler.cache_clear()
        assert select.triton_sampler(device, torch.bfloat16, VOCABULARY, 320) is None
        assert capsys.readouterr().err == (note and note + "plain torch is used\n")
    select.triton_sampler.cache_clear()


def test_the_triton_sampler_is_tried_with_logits_like_those_of_the_model(monkeypatch):
    shapes = []
    kernel = SimpleNamespace(
        choose_next=lambda logits, *_: shapes.append((logits.dtype, logits.shape, logits.stride()))
    )
    monkeypatch.setattr(select, "triton_works", lambda _: True)
    monkeypatch.setitem(sys.modules, "gpt.kernels.triton_sampler", kernel)
    select.triton_sampler.cache_clear()
    assert select.triton_sampler(torch.device("cpu"), torch.bfloat16, VOCABULARY, 320) is kernel.choose_next
    assert shapes == [(torch.bfloat16, (1, VOCABULARY), (320, 1))]
    select.triton_sampler.cache_clear()


def test_an_error_of_ours_in_the_triton_kernel_is_not_hidden(monkeypatch):
    monkeypatch.setitem(sys.modules, "gpt.kernels.triton_attention", SimpleNamespace(decode_attention=lambda: None))
    select.triton_works.cache_clear()
    with pytest.raises(TypeError):
        select.triton_works(torch.device("cpu"))


def test_the_triton_kernel_is_tried_on_the_gpu_of_the_model(monkeypatch):
    """A kernel is launched on the current device, cuda:0 unless a context says otherwise."""
    current, launched, zeros = [torch.device("cuda:0")], [], torch.zeros

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options))
    kernel = SimpleNamespace(decode_attention=lambda *_: launched.append(current[-1]))
    monkeypatch.setitem(sys.modules, "gpt.kernels.triton_attention", kernel)
    select.triton_works.cache_clear()
    assert select.triton_works(torch.device("cuda:1"))
    assert launched == [torch.device("cuda:1")]
    select.triton_works.cache_clear()
