"""The door to the kernels: which precision, kernels and native back end a model gets."""

import contextlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from gpt.kernels import build, select
from gpt.kernels.native_model import supports
from gpt.kernels.select import native_is_faster, one_layer_like, pick_dtype
from gpt.model import GPT, ModelConfig
from gpt.quantize import to_int8

VOCABULARY = 300
KINDS = [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True)]


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


def test_generation_on_a_cpu_takes_the_precision_in_which_the_library_decodes_faster(kernels, monkeypatch):
    cpu, questions = torch.device("cpu"), []
    for bf16_wins in (True, False):
        monkeypatch.setattr(select, "faster", lambda name, _, wins=bf16_wins: questions.append(name) or wins)
        assert pick_dtype("auto", cpu, generates=True) == (torch.bfloat16 if bf16_wins else torch.float32)
    assert all("decode in bf16, not fp32, by generation-" in question for question in questions)
    monkeypatch.setattr(build, "load_library", lambda: None)  # plain torch decides by its own products
    assert pick_dtype("auto", cpu, generates=True) == torch.float32
    assert "bf16 products" in questions[-1]


@pytest.mark.parametrize("built", [True, False])
def test_int8_that_is_not_faster_than_bf16_says_so(kernels, monkeypatch, capsys, built):
    if not built:
        monkeypatch.setattr(build, "load_library", lambda: None)
    for int8_wins in (True, False):
        monkeypatch.setattr(select, "faster", lambda *_, wins=int8_wins: wins)
        select.note_slow_int8()
        said = capsys.readouterr().err
        assert ("not faster than bf16" in said) == (not int8_wins)
        assert ("without the C++ kernels" in said) == (not int8_wins and not built)


@pytest.mark.parametrize("built", [True, False])
def test_precisions_are_compared_by_decode_steps_of_equal_models(kernels, monkeypatch, built):
    if not built:
        monkeypatch.setattr(build, "load_library", lambda: None)
    contests, types = [], (torch.int8, torch.bfloat16, torch.float32)
    monkeypatch.setattr(select, "faster", lambda question, contest: contests.append((question, contest)))
    for one in types:
        for other in types:
            select.decodes_faster(str(one), str(other), one, other)
    assert len({question for question, _ in contests}) == 9
    with torch.inference_mode():
        logits = [way().float() for _, contest in contests for way in contest()]
    for found in logits:
        assert found.shape == (1, select.PROBE_VOCABULARY)
        assert (found - logits[-1]).abs().max() <= 0.02 * logits[-1].abs().max()


# ---- native code


def test_a_missing_library_is_built_now_only_for_those_who_wait(monkeypatch, capsys):
    calls = []
    for name, result in (("load_library", None), ("build_now", "a library"), ("start_background_build", True)):
        monkeypatch.setattr(build, name, lambda _, name=name, result=result: calls.append(name) or result)
    model = make_model()
    assert select.native_library(model, wait=False) is None
    assert calls == ["load_library", "start_background_build"]
    assert "built in the background" in capsys.readouterr().err
    assert select.native_library(model, wait=True) == "a library"
    assert calls[2:] == ["build_now"]
    assert select.native_library(model.half(), wait=True) is None
    assert calls[3:] == []


def test_each_kind_and_shape_of_model_and_each_library_has_a_measurement_of_its_own(monkeypatch):
    questions, library, next_version = [], SimpleNamespace(_name="/a/generation-1.so"), SimpleNamespace(_name="/a/b.so")
    monkeypatch.setattr(select, "faster", lambda question, _: questions.append(question))
    models = [make_model(*kind) for kind in KINDS]
    models += [make_model(n_embd=64), make_model(n_head=4), make_model(block_size=48)]
    for model in models:
        for rows in (1, 2, 4, 8):
            native_is_faster(model, rows, library)
    assert len(set(questions)) == 4 * len(models)
    for rows in (3, 5, 50):
        native_is_faster(models[0], rows, library)
    assert set(questions[-3:]) <= set(questions[:4])
    native_is_faster(models[0], 1, next_version)
    assert questions[-1] not in questions[:-1]


@pytest.mark.parametrize(("dtype", "int8"), KINDS)
def test_a_measurement_runs_one_layer_of_the_same_kind_both_ways(kernels, monkeypatch, dtype, int8):
    model = make_model(dtype, int8)
    probe = one_layer_like(model)
    assert len(probe.blocks) == 1 and supports(probe)
    assert (probe.dtype, probe.token.weight.dtype) == (model.dtype, model.token.weight.dtype)
    contests = []
    monkeypatch.setattr(select, "faster", lambda _, contest: contests.append(contest))
    native_is_faster(model, 2, kernels)
    with torch.inference_mode():
        plain, native = contests[0]()
        for _ in range(3):
            expected, logits = plain(), native()
            assert logits.shape == (2, VOCABULARY)
            assert (logits - expected).abs().max() <= 0.02 * expected.abs().max()


def test_a_model_of_any_context_can_be_measured(kernels):
    assert isinstance(native_is_faster(make_model(block_size=1), 1, kernels), bool)


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
