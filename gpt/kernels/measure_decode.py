"""Measures which engine, plain torch or the C++ library, decodes a model faster on this CPU, and which precision: by
decode steps of a model that has one layer and a small vocabulary, but else the shape of the one that will run.

R is the number of rows that are decoded side by side, V the vocabulary."""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gpt.kernels.measure import Way, faster
from gpt.kernels.native_model import KINDS, NativeModel
from gpt.model import GPT, KVCache, ModelConfig
from gpt.quantize import to_int8

PROBE_VOCABULARY = 8192  # at most, of a measured model: a larger head takes longer and gives the same answer
MOST_ROWS = 8  # of a measurement: with more rows the answer is the same


class Shape(NamedTuple):
    """What the time of a decode step depends on. `weights` is the type of the matrices, `dtype` that of the rest."""

    config: ModelConfig
    vocabulary: int
    weights: torch.dtype
    dtype: torch.dtype


def shape_of(model: GPT) -> Shape:
    return Shape(model.config, model.vocab_size, model.token.weight.dtype, model.dtype)


@torch.inference_mode()
def native_is_faster(shape: Shape, rows: int, library: ctypes.CDLL) -> bool:
    """Returns whether `library` decodes `rows` rows of a model of this shape faster than plain torch."""
    rows = measured_rows(rows)

    def contest() -> tuple[Way, Way]:
        probe = make_probe(shape)
        return decode_step(probe, rows, None), decode_step(probe, rows, library)

    return faster(f"decode by {version(library)}, not plain torch: {describe(shape, rows)}", contest)


@torch.inference_mode()
def decodes_faster(shape: Shape, plain: Shape, rows: int, library: ctypes.CDLL | None) -> bool:
    """Returns whether `rows` rows of a model of `shape` are decoded faster than those of a model of the shape `plain`,
    each by the engine that is faster for it: plain torch or, unless it is None, `library`."""
    rows, shapes = measured_rows(rows), (plain, shape)
    engines = [faster_engine(each, rows, library) for each in shapes]

    def contest() -> tuple[Way, Way]:
        first, second = (decode_step(make_probe(each), rows, own) for each, own in zip(shapes, engines, strict=True))
        return first, second

    names = [f"{each.weights}, {each.dtype} by {version(own)}" for each, own in zip(shapes, engines, strict=True)]
    return faster(f"decode in {names[1]}, not {names[0]}: {describe(shape, rows)}", contest)


def faster_engine(shape: Shape, rows: int, library: ctypes.CDLL | None) -> ctypes.CDLL | None:
    """Returns `library`, or None if it cannot run such a model or plain torch is faster."""
    runs = library is not None and (shape.weights, shape.dtype) in KINDS
    return library if runs and native_is_faster(shape, rows, library) else None  # type: ignore[arg-type]


# ---- the steps that are measured


def measured_rows(rows: int) -> int:
    """Returns the number of rows of a measurement: 1, 2, 4 or 8."""
    return 1 << (min(rows, MOST_ROWS) - 1).bit_length()


def describe(shape: Shape, rows: int) -> str:
    config, vocabulary = shape.config, min(shape.vocabulary, PROBE_VOCABULARY)
    sizes = f"width {config.n_embd}, {config.n_head} heads, {config.block_size} positions, {vocabulary} tokens"
    return f"{shape.weights}, {shape.dtype}, {sizes}, {rows} rows, {torch.get_num_threads()} threads"


def version(library: ctypes.CDLL | None) -> str:
    """Returns the name of a library, which depends on its sources: another version must be measured anew."""
    return "plain torch" if library is None else Path(library._name).stem


def decode_step(model: GPT, rows: int, library: ctypes.CDLL | None) -> Callable[[], Tensor]:
    """Returns a function that makes a decode step of `rows` rows at position 0 and returns its logits (R, V); without a
    `library` in plain torch."""
    ids, cache = torch.zeros(rows, dtype=torch.int64), KVCache(model.config, rows, model.dtype)
    native = None if library is None else NativeModel(model, library)

    def step() -> Tensor:
        cache.lengths.zero_()  # a context may be as short as one position
        return native.decode(ids, cache) if native else model(ids[:, None], cache=cache)

    return step


def make_probe(shape: Shape) -> GPT:
    """Returns a GPT of one layer, with at most PROBE_VOCABULARY tokens, that otherwise has this shape. Its weights are
    all 0.01: memory that is never written would be a single page of zeros."""
    with torch.device("meta"):
        probe = GPT(replace(shape.config, n_layer=1), min(shape.vocabulary, PROBE_VOCABULARY)).eval()
    values = {name: torch.full(p.shape, 0.01, dtype=shape.dtype) for name, p in probe.named_parameters()}
    probe.load_state_dict(values, assign=True)  # to_empty would import sympy, which takes half a second
    return to_int8(probe) if shape.weights == torch.int8 else probe
