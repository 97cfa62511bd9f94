"""The native forward pass against the model without a cache, and against itself in other company."""

import copy
import math
import mmap
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn as nn

from gpt.device import lie_together
from gpt.kernels.native_model import CHUNK, NativeModel, move_together, supports
from gpt.model import GPT, KVCache, ModelConfig
from gpt.quantize import to_int8

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY = 211
KINDS = ("fp32", "bf16", "fp16", "int8", "int8 in bf16")
WIDE = (12, 768)  # heads and width of the smallest GPT-2
SHAPES = [(3, 24), (2, 30), (1, 7), (4, 96), (2, 96), (2, 128), WIDE]  # width of a head: 8, 15, 7, 24, 48, 64, 64


def make_model(heads=2, width=30, block_size=2 * CHUNK + 22, layers=2):
    """A model whose biases and layer norms are not the 0 and 1 that they start from, and that attends sharply."""
    torch.manual_seed(width)
    model = GPT(ModelConfig(layers, heads, width, block_size), VOCABULARY).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += torch.randn_like(parameter) * 0.1
    for block in model.blocks:
        block.attn.qkv.weight *= 3
    return model


def as_kind(model, kind):
    model = copy.deepcopy(model)
    if "bf16" in kind:
        model = model.bfloat16()
    if "fp16" in kind:
        model = model.half()
    return to_int8(model) if "int8" in kind else model


def dequantized(model, original):
    """`original` with the weights that the int8 `model` stands for, in fp32."""
    result = copy.deepcopy(original)
    for source, target in zip(model.modules(), result.modules(), strict=True):
        if hasattr(source, "scale"):
            target.weight.copy_(source.weight * source.scale[:, None])
    return result


def random_ids(rows, tokens):
    return torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))


def continued(native, ids, lengths, steps, dtype):
    """Prefill row r with its first lengths[r] ids and decode `steps` more: the logits (steps, R, V), and the cache."""
    cache = KVCache(native.config, len(ids), dtype)
    for row, length in enumerate(lengths):
        native.prefill(ids[row : row + 1, :length], cache.empty_row(row))
    rows = torch.arange(len(ids))
    logits = [native.decode(ids[rows, cache.lengths], cache).clone() for _ in range(steps)]
    return torch.stack(logits), cache


def uncached(model, ids, lengths, steps):
    """What `continued` should give, one forward pass each."""
    rows = range(len(ids))
    return torch.stack(
        [torch.cat([model(ids[row : row + 1, : lengths[row] + step + 1]) for row in rows]) for step in range(steps)]
    )


def with_rounded_inputs(model):
    """`model` with the inputs of all products rounded to 8 bits in spans of 256, as the native int8 product does it."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: round_spans(inputs[0]))
    model.token.logits = lambda x: nn.functional.linear(round_spans(x), model.token.weight)
    return model


def round_spans(x, span=256):
    parts = []
    for part in x.split(span, dim=-1):
        scale = part.abs().amax(-1, keepdim=True) / 127
        parts.append((part / scale).round() * scale)
    return torch.cat(parts, -1)


def inputs_of_spans(width, ties):
    """Returns random inputs (width,) with a scale for each 256 of them. With `ties` the scales are powers of two and
    half of the inputs lie exactly between two numbers of 8 bits, which bf16 can hold; without, none does."""
    random, spans = np.random.default_rng(width), math.ceil(width / 256)
    scales = 2.0 ** random.integers(-3, 4, spans) if ties else np.exp(random.normal(size=spans))
    inputs = random.integers(-253, 254, width) / 2 if ties else random.integers(-126, 127, width) + 0.25
    inputs[::256] = -127  # the largest of each span
    return torch.tensor(inputs * scales.repeat(256)[:width])


def product_of_spans(x, weight, scale):
    """Returns the product (N,) of inputs x (K,) and an int8 matrix (N, K) with scales (N,), as weights.h describes it,
    in float64: inputs of 8 bits, one scale for each 256 of them, exact sums."""
    result = np.zeros(len(weight))
    for start in range(0, len(x), 256):
        part, step = x[start : start + 256], np.abs(x[start : start + 256]).max() / 127
        whole = np.rint(part / step) if step else np.zeros_like(part)  # ties to even
        result += step * (weight[:, start : start + 256] @ whole)
    return result * scale


def share_of_deviation(logits, reference):
    return ((logits - reference).square().mean().sqrt() / reference.std()).item()


# ---- what it computes


@pytest.mark.parametrize(("heads", "width"), SHAPES)
def test_logits_of_unequal_rows_are_those_of_the_uncached_model_in_fp32(kernels, heads, width):
    model, ids, lengths = make_model(heads, width), random_ids(4, CHUNK + 20), [1, 17, 33, CHUNK + 13]
    reference = uncached(model, ids, lengths, 5)
    logits, cache = continued(NativeModel(model, kernels), ids, lengths, 5, torch.float32)
    assert (logits - reference).abs().max() < 1e-4
    assert cache.lengths.tolist() == [length + 5 for length in lengths]


SMALL_WEIGHTS = [(*shape, kind) for shape in ((2, 30), WIDE) for kind in KINDS[1:]]


@pytest.mark.parametrize(("heads", "width", "kind"), [*SMALL_WEIGHTS, (2, 30, "int8 in fp16")])
def test_the_logit_error_of_small_weights_is_within_its_bound(kernels, heads, width, kind):
    bounds = {"bf16": 0.01, "fp16": 0.001, "int8": 1e-5 if width == 30 else 0.01}
    bound = bounds.get(kind, 0.03)  # of int8 in bf16 and in fp16: some inputs round to another int8
    original = make_model(heads, width)
    model, ids, lengths = as_kind(original, kind), random_ids(2, 60), [3, 40]
    rounded = dequantized(model, original) if "int8" in kind else copy.deepcopy(model).float()
    logits, _ = continued(NativeModel(model, kernels), ids, lengths, 8, model.dtype)
    error = share_of_deviation(logits, uncached(rounded, ids, lengths, 8))
    if "int8" in kind:  # where the CPU has the instructions, products round their inputs too
        assert error < 0.05
        error = min(error, share_of_deviation(logits, uncached(with_rounded_inputs(rounded), ids, lengths, 8)))
    assert error < bound


INT8_INPUTS = [
    ("int8", "no ties"),
    ("int8", "no ties, one sign"),
    *product(("int8", "int8 in bf16"), ("ties", "largest", "zeros")),
]


@pytest.mark.parametrize(("kind", "inputs"), INT8_INPUTS)
@pytest.mark.parametrize("width", [7, 256, 300, 520])
def test_an_int8_product_rounds_its_inputs_in_spans_of_256_and_sums_exactly(kernels, width, kind, inputs):
    model = as_kind(make_model(1, width, layers=1), kind)
    x = inputs_of_spans(width, ties="no ties" not in inputs)
    if inputs == "largest":  # sums of 16 bits, where there are any, come close to their limits
        x[:], model.token.weight[:100], model.token.weight[100:120] = 1, 127, -127
    elif inputs == "zeros":
        x[-256:] = 0
    elif "one sign" in inputs:  # with VNNI large sums are subtracted from large ones
        x.abs_()
    model.ln_f.weight.zero_()  # so that its bias is what the head gets
    model.ln_f.bias.copy_(x)
    arrays = (tensor.double().numpy() for tensor in (model.ln_f.bias, model.token.weight, model.token.scale))
    expected = product_of_spans(*arrays)[:VOCABULARY]
    for rows in range(1, 6):
        logits = NativeModel(model, kernels).decode(torch.arange(rows), KVCache(model.config, rows, model.dtype))
        assert np.abs(logits.double().numpy() - expected).max() <= 1e-6 * np.abs(expected).max()


def test_every_finite_weight_in_fp16_is_read_exactly(kernels):
    model = GPT(ModelConfig(1, 1, 32, 8), 2048).eval().requires_grad_(False).half()
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    model.token.weight.copy_(numbers.nan_to_num(0, 0, 0).view(2048, 32))
    model.ln_f.weight.zero_()  # so that its bias is what the head gets
    for column in range(32):
        model.ln_f.bias.copy_(torch.arange(32) == column)
        rows = column % 8 + 1
        logits = NativeModel(model, kernels).decode(torch.arange(rows), KVCache(model.config, rows, model.dtype))
        assert all(torch.equal(row, model.token.weight[:, column].float()) for row in logits)


def test_keys_and_values_in_fp16_are_the_nearest_numbers(kernels):
    bits = torch.cat([torch.linspace(0, 0x3FF, 50), torch.linspace(0x400, 0x7BFE, 145)]).to(torch.int16)
    below, above = (each.view(torch.float16).float() for each in (bits, bits + 1))  # neighbours, subnormal ones first
    ties = torch.cat([(below + above) / 2, torch.tensor([65520, 1e6, math.inf, math.nan, 1e-40])])
    values = torch.cat([ties, *(ties.nextafter(torch.tensor(end)) for end in (0.0, math.inf))])
    model = make_model(1, 600, layers=1).half()
    model.blocks[0].attn.qkv.weight.zero_()
    model.blocks[0].attn.qkv.bias = nn.Parameter(torch.cat([torch.zeros(600), values, -values]))
    cache = KVCache(model.config, 1, model.dtype)
    NativeModel(model, kernels).prefill(random_ids(1, 1), cache)
    found = torch.cat([cache.keys[0][0, 0, 0], cache.values[0][0, 0, 0]])
    assert torch.equal(found.view(torch.int16), torch.cat([values, -values]).half().view(torch.int16))


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_stores_can_be_continued_by_plain_torch_and_the_reverse(kernels, kind):
    model = as_kind(make_model(2, 128), kind)
    native, ids = NativeModel(model, kernels), random_ids(3, 50)
    caches = [KVCache(model.config, 3, model.dtype) for _ in range(2)]
    native.prefill(ids[:, :49], caches[0])
    model.hidden(ids[:, :49], caches[1])
    assert caches[0].lengths.tolist() == caches[1].lengths.tolist() == [49] * 3
    reference = dequantized(model, make_model(2, 128)) if "int8" in kind else copy.deepcopy(model).float()
    expected = reference(ids)
    bound = 0.001 if kind == "fp32" else 0.02
    assert share_of_deviation(model(ids[:, 49:50], cache=caches[0]), expected) < bound
    assert share_of_deviation(native.decode(ids[:, 49], caches[1]), expected) < bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "width"), [(2, 30), (2, 96), (2, 128)])
def test_the_bits_of_a_row_depend_on_nothing_but_its_own_ids(kernels, heads, width, kind):
    model = as_kind(make_model(heads, width), kind)
    native, ids, lengths = NativeModel(model, kernels), random_ids(11, 60), [20, 1, 7, 33, 20, 2, 50, 3, 4, 5, 6]
    together, _ = continued(native, ids, lengths, 4, model.dtype)
    for company in ([0], [3, 1], [6, 3, 0], [2, 3, 1, 0, 10], [*range(7, 11), 3, 0, 1]):
        logits, _ = continued(native, ids[company], [lengths[row] for row in company], 4, model.dtype)
        assert torch.equal(logits, together[:, company])


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_do_not_depend_on_how_a_prompt_is_cut(kernels, kind):
    model = as_kind(make_model(2, 128), kind)
    native, ids = NativeModel(model, kernels), random_ids(1, CHUNK + 30)

    def last_logits(*cuts):
        cache = KVCache(model.config, 1, model.dtype)
        for start, end in zip([0, *cuts], [*cuts, ids.shape[1] - 1], strict=True):
            native.prefill(ids[:, start:end], cache)
        return native.decode(ids[:, -1], cache)

    whole = last_logits()
    assert torch.equal(last_logits(5, 6, 8, 11, 75), whole)
    assert torch.equal(last_logits(*range(1, ids.shape[1] - 1)), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_do_not_depend_on_the_number_of_threads(kernels, kind):
    model = as_kind(make_model(3, 96), kind)
    native, ids, lengths = NativeModel(model, kernels), random_ids(3, 60), [20, 1, 47]
    alone, _ = continued(native, ids, lengths, 3, model.dtype)
    for threads in (2, 3):  # set back by one_thread
        torch.set_num_threads(threads)
        logits, _ = continued(native, ids, lengths, 3, model.dtype)
        assert torch.equal(logits, alone)


@pytest.mark.parametrize("damage", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_not_finite_shows_in_the_logits(kernels, kind, damage):
    model = as_kind(make_model(2, 64), kind)
    model.blocks[0].mlp.fc.bias[5] = damage
    native = NativeModel(model, kernels)
    logits = native.decode(torch.tensor([3]), KVCache(model.config, 1, model.dtype))
    assert not logits.isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_beyond_a_rows_length_does_not_matter(kernels, kind):
    model = as_kind(make_model(2, 64), kind)
    native, ids = NativeModel(model, kernels), random_ids(1, 6)
    clean, dirty = (KVCache(model.config, 1, model.dtype) for _ in range(2))
    for buffer in (*dirty.keys, *dirty.values):
        buffer.fill_(math.nan)
    for cache in (clean, dirty):
        native.prefill(ids[:, :5], cache)
    assert torch.equal(native.decode(ids[:, 5], clean), native.decode(ids[:, 5], dirty))


def test_ids_and_positions_that_do_not_exist_are_refused(kernels):
    model = make_model(block_size=4)
    native, cache = NativeModel(model, kernels), KVCache(model.config, 2)
    for id in (-1, VOCABULARY):
        with pytest.raises(ValueError, match=rf"token {id} at position 0 of row 1: vocabulary {VOCABULARY}"):
            native.decode(torch.tensor([0, id]), cache)
    with pytest.raises(ValueError, match=r"position 4 of row 0.* block_size 4"):
        native.prefill(random_ids(1, 5), cache.empty_row(0))
    assert cache.lengths.tolist() == [0, 0]


def test_only_models_of_one_known_kind_on_the_cpu_are_supported():
    model = make_model()
    assert all(supports(as_kind(model, kind)) for kind in (*KINDS, "int8 in fp16"))
    assert not supports(copy.deepcopy(model).double())
    assert not supports(copy.deepcopy(model).to("meta"))
    mixed = copy.deepcopy(model)
    mixed.blocks[1].mlp.bfloat16()
    assert not supports(mixed)
    other_cache = copy.deepcopy(model).half()
    other_cache.position.float()  # the type of the cache
    assert not supports(other_cache)


def test_moving_the_weights_leaves_the_model_as_it_was(kernels):
    model, ids = make_model(), random_ids(2, 9)
    before, values = model(ids), copy.deepcopy(model.state_dict())
    NativeModel(model, kernels)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(ids), before)


def test_two_of_one_model_work_side_by_side_and_after_it_is_gone(kernels):
    model, ids = make_model(), torch.tensor([7])
    expected = model(ids[None])
    natives = [NativeModel(model, kernels) for _ in range(2)]
    for parameter in model.parameters():
        parameter.data = torch.zeros(0)
    for native in natives:
        assert (native.decode(ids, KVCache(native.config, 1)) - expected).abs().max() < 1e-4


def test_without_large_pages_the_native_model_leaves_weights_where_they_are(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    tensors = [torch.ones(3, 5), torch.ones(7)]
    places = [tensor.data_ptr() for tensor in tensors]
    move_together(tensors)
    assert [tensor.data_ptr() for tensor in tensors] == places


def test_moved_tensors_keep_their_values_and_are_not_moved_twice():
    tensors = [torch.randn(300, 5), torch.randn(7)]
    before = [tensor.clone() for tensor in tensors]
    move_together(tensors)
    assert lie_together(tensors)
    assert all(map(torch.equal, tensors, before))
    places = [tensor.data_ptr() for tensor in tensors]
    move_together(tensors)
    assert [tensor.data_ptr() for tensor in tensors] == places


# ---- threads


def logits_of(native, ids, threads):
    torch.set_num_threads(threads)
    return continued(native, ids, [20, 1], 3, torch.float32)[0]


@pytest.mark.parametrize("threads", [[4, 2, 1, 4], [2, 8, 3]])
def test_calls_of_any_numbers_of_threads_give_the_same_bits(kernels, threads):
    native, ids = NativeModel(make_model(2, 128), kernels), random_ids(2, 40)
    expected = logits_of(native, ids, 1)
    for number in threads:
        assert torch.equal(logits_of(native, ids, number), expected)


def test_callers_at_the_same_time_do_not_disturb_each_other(kernels):
    native, ids = NativeModel(make_model(2, 128), kernels), random_ids(2, 40)
    expected = logits_of(native, ids, 2)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: logits_of(native, ids, 2), range(12)):
            assert torch.equal(found, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_process_does_not_wait_for_threads_that_only_its_parent_has(kernels, monkeypatch):
    native, ids = NativeModel(make_model(2, 128), kernels), random_ids(2, 40)
    expected = logits_of(native, ids, 2)
    child = os.fork()
    if not child:
        signal.alarm(60)  # ends a child that waits
        torch.set_num_threads(1)  # torch itself would wait for its own
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # what the library is told
        cache = KVCache(native.config, 2, torch.float32)
        native.prefill(ids[:, :30], cache)
        os._exit(0 if native.decode(ids[:, 30], cache).isfinite().all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(logits_of(native, ids, 2), expected)
