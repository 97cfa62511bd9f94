"""Selects the precision, the kernels and the native back end for a model: by the device and, on a CPU, by what is built
and what a short measurement finds faster. Other packages learn from this module alone which kernels to use."""

import contextlib
import ctypes
import functools
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import torch
from torch import Tensor

from gpt.attention import LayerCache
from gpt.device import DTYPES
from gpt.errors import note
from gpt.kernels import build
from gpt.kernels.measure import Way, faster
from gpt.kernels.native_attention import NativeAttention, takes
from gpt.kernels.native_gelu import NativeGelu
from gpt.kernels.native_model import NativeModel, supports
from gpt.model import GPT, REFERENCE, KVCache, ModelConfig, Ops
from gpt.quantize import to_int8

Decode = Callable[[Tensor, KVCache], Tensor]  # see Backend.decode
Kernel = TypeVar("Kernel", bound=Callable)
PROBE_VOCABULARY = 8192  # of a measured model: a larger head takes longer and gives the same answer


# ---- precision


def pick_dtype(name: str, device: torch.device, generates: bool = False) -> torch.dtype:
    """Returns the torch.dtype of a precision name. "auto" is bf16 on CUDA GPUs that have it, else fp16 from capability
    7.0 on; on a CPU it is whichever of fp32 and bf16 a short measurement finds faster, for a program that only
    `generates` by its decode steps; elsewhere fp32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if capability >= (8, 0) else torch.float16 if capability >= (7, 0) else torch.float32
    bf16_wins = bf16_decodes_faster if generates else bf16_is_faster
    return torch.bfloat16 if device.type == "cpu" and bf16_wins() else torch.float32


def bf16_is_faster() -> bool:
    """Returns whether this CPU multiplies matrices faster in bf16 than in fp32: 64 tokens by a matrix of GPT-2
    small."""

    def contest() -> tuple[Way, Way]:
        x, weight = torch.ones(64, 768), torch.ones(768, 768)
        half_x, half_weight = x.bfloat16(), weight.bfloat16()
        return lambda: x @ weight, lambda: half_x @ half_weight

    return faster(f"bf16 products, {torch.get_num_threads()} threads", contest)


def bf16_decodes_faster() -> bool:
    """Returns whether this CPU decodes one text faster in bf16 than in fp32: by the C++ library, if it is built, since
    that gains by bf16 also where the CPU cannot multiply it; else by the products of plain torch."""
    if build.load_library() is None:
        return bf16_is_faster()
    return decodes_faster("bf16", "fp32", torch.bfloat16, torch.float32)


def note_slow_int8() -> None:
    """Prints a note unless this CPU decodes one text clearly faster in int8 than in bf16: see `faster`."""
    if not decodes_faster("int8", "bf16", torch.int8, torch.bfloat16):
        until = "" if build.load_library() else " without the C++ kernels"
        note("info", f"int8 is not faster than bf16 on this CPU{until}; it only saves memory")


@torch.inference_mode()
def decodes_faster(name: str, other: str, weights: torch.dtype, other_weights: torch.dtype) -> bool:
    """Returns whether one text is decoded faster with matrices of the type `weights` than with `other_weights`, by the
    C++ library if it is built, measured with a layer of GPT-2 small."""
    library = build.load_library()

    def contest() -> tuple[Way, Way]:
        layer = ModelConfig(n_layer=1, n_head=12, n_embd=768, block_size=64)
        probes = [make_probe(layer, PROBE_VOCABULARY, torch.bfloat16, kind) for kind in (other_weights, weights)]
        return decode_step(probes[0], 1, library), decode_step(probes[1], 1, library)

    engine = "plain torch" if library is None else version(library)
    return faster(f"decode in {name}, not {other}, by {engine}, {torch.get_num_threads()} threads", contest)


# ---- training on a CPU


def can_build() -> bool:
    """Returns whether this machine has a C++ compiler. Without it there are no native kernels."""
    return build.compiler() is not None


def native_ops(wait: bool) -> Ops | None:
    """Returns the C++ attention and GELU for training, or None if they are not built: see `load_or_build`."""
    library = load_or_build(build.TRAINING, wait)
    return None if library is None else Ops(attention=NativeAttention(library), gelu=NativeGelu(library))


def native_ops_take(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Returns whether the C++ for training computes anything in a model of this shape: GELU in fp32, and attention as
    native_attention.takes says."""
    return dtype == torch.float32 or takes(dtype, config.n_embd // config.n_head, config.dropout)


def native_ops_are_faster(ops: Ops, config: ModelConfig, dtype: torch.dtype) -> bool:
    """Returns whether forward and backward pass of the C++ in `ops` are faster than torch's, measured with this model's
    heads, width, block_size and dropout. In bf16 GELU is torch's and is left out."""
    heads, positions, width = config.n_head, config.block_size, config.n_embd

    def contest() -> tuple[Way, Way]:
        qkv = torch.randn(2, positions, 3 * width).to(dtype).requires_grad_()
        hidden = torch.randn(2, positions, 4 * width).requires_grad_()

        def passes(ops: Ops) -> None:
            out = ops.attention(qkv, heads, config.dropout)
            torch.autograd.grad(out, qkv, torch.ones_like(out))
            if dtype == torch.float32:
                torch.autograd.grad(ops.gelu(hidden), hidden, torch.ones_like(hidden))

        return lambda: passes(REFERENCE), lambda: passes(ops)

    path = build.library_path(build.TRAINING)  # depends on the sources: another version must be measured anew
    shape = f"{heads} heads of {width // heads}, {positions} positions, dropout {config.dropout}"
    question = f"training by {path and path.stem}, {dtype}, {shape}, {torch.get_num_threads()} threads"
    return faster(question, contest)


# ---- generation on a CPU


def native_library(model: GPT, wait: bool) -> ctypes.CDLL | None:
    """Returns the C++ library for generation, or None if it is not built or cannot run this model. `wait`: see
    `load_or_build`."""
    return load_or_build(build.GENERATION, wait) if supports(model) else None


@torch.inference_mode()
def native_is_faster(model: GPT, rows: int, library: ctypes.CDLL) -> bool:
    """Returns whether `library` decodes `rows` rows faster than plain torch, measured with steps of a model of one
    layer that is otherwise like `model`."""
    config, rows = model.config, 1 << (min(rows, 8) - 1).bit_length()  # 1, 2, 4 or 8
    types = f"{model.token.weight.dtype}, {model.dtype}, {rows} rows, {torch.get_num_threads()} threads"
    shape = f"width {config.n_embd}, {config.n_head} heads, {config.block_size} positions, {model.vocab_size} tokens"

    def contest() -> tuple[Way, Way]:
        probe = one_layer_like(model)
        return decode_step(probe, rows, None), decode_step(probe, rows, library)

    return faster(f"decode by {version(library)}, {types}, {shape}", contest)


def version(library: ctypes.CDLL) -> str:
    """Returns the name of a library, which depends on its sources: another version must be measured anew."""
    return Path(library._name).stem


def decode_step(model: GPT, rows: int, library: ctypes.CDLL | None) -> Callable[[], Tensor]:
    """Returns a function that makes a decode step of `rows` rows at position 0 and returns its logits (R, V); without a
    `library` in plain torch."""
    ids, cache = torch.zeros(rows, dtype=torch.int64), KVCache(model.config, rows, model.dtype)
    native = None if library is None else NativeModel(model, library)

    def step() -> Tensor:
        cache.lengths.zero_()  # a context may be as short as one position
        return native.decode(ids, cache) if native else model(ids[:, None], cache=cache)

    return step


def one_layer_like(model: GPT) -> GPT:
    """Returns a GPT of one layer, with at most PROBE_VOCABULARY tokens, that is otherwise like `model`."""
    config, vocabulary = replace(model.config, n_layer=1), min(model.vocab_size, PROBE_VOCABULARY)
    return make_probe(config, vocabulary, model.dtype, model.token.weight.dtype)


def make_probe(config: ModelConfig, vocabulary: int, dtype: torch.dtype, weights: torch.dtype) -> GPT:
    """Returns a GPT for measurements with matrices of the type `weights`; if that is int8, its vectors are of `dtype`.
    Its weights are all 0.01: memory that is never written would be a single page of zeros."""
    with torch.device("meta"):
        probe = GPT(config, vocabulary).eval()
    dtype = dtype if weights == torch.int8 else weights
    values = {name: torch.full(p.shape, 0.01, dtype=dtype) for name, p in probe.named_parameters()}
    probe.load_state_dict(values, assign=True)  # to_empty would import sympy, which takes half a second
    return to_int8(probe) if weights == torch.int8 else probe


def load_or_build(purpose: str, wait: bool) -> ctypes.CDLL | None:
    """Returns the C++ library for `purpose`, or None. If it is not built, `wait` builds it now; without `wait` returns
    None and starts a build in the background, for later runs."""
    library = build.build_now(purpose) if wait else build.load_library(purpose)
    if library is None and not wait and build.start_background_build(purpose):
        note("info", "C++ kernels are being built in the background, for later runs; this one uses plain torch")
    return library


# ---- generation on a GPU


def gpu_ops(device: torch.device) -> Ops:
    """Returns the Ops of a decode step on a GPU: REFERENCE if Triton cannot be used."""
    if not triton_works(device):
        return REFERENCE
    from gpt.kernels.triton_attention import decode_attention

    return Ops(cached_attention=decode_attention)


def gpu_decode(model: GPT) -> Decode | None:
    """Returns a decode step in Triton, in place of Backend.decode, or None if Triton cannot be used."""
    if not triton_works(model.device):
        return None
    from gpt.kernels.triton_model import TritonModel

    return TritonModel(model).decode


@functools.cache
def triton_works(device: torch.device) -> bool:
    """Returns whether Triton runs on a GPU: see `tried`."""

    def trial() -> Callable[..., Tensor]:
        from gpt.kernels.triton_attention import decode_attention

        keys, values = torch.zeros(2, 1, 1, 8, 16, device=device)
        layer = LayerCache(keys, values, torch.zeros(1, 1, dtype=torch.int64, device=device), is_empty=False)
        decode_attention(torch.zeros(1, 1, 48, device=device), 1, layer)
        return decode_attention

    return tried("the decode step", device, trial) is not None


@functools.cache
def triton_sampler(
    device: torch.device, dtype: torch.dtype, vocabulary: int, padded: int
) -> Callable[..., Tensor] | None:
    """Returns triton_sampler.choose_next, or None: see `tried`. The trial compiles it for logits of this type, whose
    rows have `padded` values."""
    if not triton_works(device):  # which has printed a note
        return None

    def trial() -> Callable[..., Tensor]:
        from gpt.kernels.triton_sampler import choose_next

        whole, streams = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, 4, dtype=torch.int64)
        names = {"temperature": torch.float32, "top_k": torch.int64, "top_p": torch.int64, "min_p": torch.float32}
        filters = SimpleNamespace(**{name: whole.to(dtype) for name, dtype in names.items()})
        logits = torch.zeros(1, padded, dtype=dtype, device=device)[:, :vocabulary]
        choose_next(logits, filters, streams.to(device), whole, whole.clone(), whole.bool(), 0)
        return choose_next

    return tried("sampling", device, trial)


def tried(name: str, device: torch.device, trial: Callable[[], Kernel]) -> Kernel | None:
    """Returns trial(), which launches a Triton kernel and returns its function. Returns None, and prints a note, if
    Triton is missing or cannot compile: the first launch needs a C compiler and Python's headers."""
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return trial()
    except Exception as error:  # Triton's own derive from it, and have no other base
        known = isinstance(error, (ImportError, OSError, RuntimeError, subprocess.CalledProcessError))
        if not known and not type(error).__module__.startswith("triton"):
            raise
        note("info", f"no Triton kernel for {name}: {str(error).partition(chr(10))[0]}; plain torch is used")
        return None
