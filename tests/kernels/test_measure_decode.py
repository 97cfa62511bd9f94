"""Which engine and which precision decode faster: what is measured, and for which models a measurement holds."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from gpt.kernels import measure_decode
from gpt.kernels.measure_decode import PROBE_VOCABULARY, Shape, decodes_faster, native_is_faster, shape_of
from gpt.model import GPT, ModelConfig
from gpt.quantize import to_int8

VOCABULARY = 300
CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=24)
FP32, BF16, FP16, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
KINDS = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (INT8, FP32), (INT8, BF16), (INT8, FP16)]
LIBRARY, NEXT_VERSION = SimpleNamespace(_name="/a/generation-1.so"), SimpleNamespace(_name="/a/generation-2.so")


@pytest.fixture
def contests(monkeypatch):
    """The measurements that are asked for, as (question, contest); none is made, and the plain way always wins."""
    asked = []
    monkeypatch.setattr(measure_decode, "faster", lambda *args: asked.append(args))
    return asked


def make_shape(weights=FP32, dtype=FP32, vocabulary=VOCABULARY, **changed):
    return Shape(ModelConfig(**vars(CONFIG) | changed), vocabulary, weights, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shape_of_a_model_names_its_types(kind):
    weights, dtype = kind
    model = GPT(CONFIG, VOCABULARY).to(dtype)
    assert shape_of(to_int8(model) if weights == INT8 else model) == Shape(CONFIG, VOCABULARY, *kind)


def test_each_kind_and_shape_of_model_and_each_library_has_a_measurement_of_its_own(contests):
    shapes = [make_shape(*kind) for kind in KINDS]
    shapes += [make_shape(n_embd=64), make_shape(n_head=4), make_shape(block_size=48), make_shape(vocabulary=400)]
    for shape, rows in itertools.product(shapes, (1, 2, 4, 8)):
        native_is_faster(shape, rows, LIBRARY)
    questions = [question for question, _ in contests]
    assert len(set(questions)) == 4 * len(shapes)
    native_is_faster(shapes[0], 1, NEXT_VERSION)
    assert contests[-1][0] not in questions


def test_models_that_differ_in_what_is_not_measured_share_a_measurement(contests):
    native_is_faster(make_shape(vocabulary=50257), 4, LIBRARY)
    native_is_faster(make_shape(vocabulary=50304, n_layer=12), 3, LIBRARY)
    native_is_faster(make_shape(), 8, LIBRARY)
    native_is_faster(make_shape(), 50, LIBRARY)
    questions = [question for question, _ in contests]
    assert questions[0] == questions[1] != questions[2] == questions[3]


@pytest.mark.parametrize("kind", KINDS)
def test_a_measurement_runs_the_same_model_of_one_layer_in_both_engines(kernels, contests, kind):
    native_is_faster(make_shape(*kind), 2, kernels)
    with torch.inference_mode():
        plain, native = contests[0][1]()
        for _ in range(3):
            expected, logits = plain(), native()
            assert logits.shape == (2, VOCABULARY)
            assert (logits - expected).abs().max() <= 0.02 * expected.abs().max()


def test_a_model_of_any_context_can_be_measured(kernels):
    assert isinstance(native_is_faster(make_shape(block_size=1), 1, kernels), bool)


def test_the_weights_of_a_measured_model_have_the_named_types_and_fill_memory():
    for weights, dtype in KINDS:
        probe = measure_decode.make_probe(make_shape(weights, dtype, vocabulary=50257))
        assert (probe.token.weight.dtype, probe.dtype, len(probe.blocks)) == (weights, dtype, 1)
        assert len(probe.token.weight) == PROBE_VOCABULARY
        assert all(weight.count_nonzero() == weight.numel() for weight in probe.parameters())


@pytest.mark.parametrize("by_library", [True, False])
def test_precisions_are_compared_by_decode_steps_of_equal_models(kernels, contests, monkeypatch, by_library):
    monkeypatch.setattr(measure_decode, "native_is_faster", lambda *_: by_library)
    shapes = [make_shape(*kind) for kind in KINDS]
    for shape, plain in itertools.product(shapes, shapes):
        decodes_faster(shape, plain, 3, kernels)
    assert len({question for question, _ in contests}) == len(KINDS) ** 2
    with torch.inference_mode():
        logits = [way().float() for _, contest in contests for way in contest()]
    for found in logits:
        assert found.shape == (4, VOCABULARY)
        assert (found - logits[0]).abs().max() <= 0.02 * logits[0].abs().max()


def test_each_precision_is_measured_by_the_engine_that_is_faster_for_it(contests, monkeypatch):
    """Where bf16 is fast in C++ alone and fp32 in plain torch, these two are compared."""
    engines = []
    monkeypatch.setattr(measure_decode, "native_is_faster", lambda shape, *_: shape.dtype == BF16)
    monkeypatch.setattr(measure_decode, "decode_step", lambda _, rows, library: engines.append((rows, library)))
    decodes_faster(make_shape(BF16, BF16), make_shape(), 3, LIBRARY)
    contests[0][1]()
    assert engines == [(4, None), (4, LIBRARY)]
    assert "bfloat16 by generation-1, not torch.float32, torch.float32 by plain torch" in contests[0][0]


@pytest.mark.parametrize("shape", [make_shape(torch.float64, torch.float64), make_shape(INT8, torch.float64)])
def test_what_the_library_cannot_run_is_measured_in_plain_torch(contests, shape):
    decodes_faster(shape, make_shape(), 1, None)
    decodes_faster(make_shape(), shape, 1, LIBRARY)
    assert all("float64 by plain torch" in contests[i][0] for i in (0, 2))
