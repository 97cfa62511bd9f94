"""Selects the precision, the kernels and the native back end for a model: by the device and, on a CPU, by what is built
and what a short measurement finds faster. Other packages learn from this module alone which kernels to use."""

import contextlib
import ctypes
import functools
import subprocess
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TypeVar

import torch
from torch import Tensor

from gpt.attention import LayerCache
from gpt.device import DTYPES
from gpt.errors import note
from gpt.kernels import build
from gpt.kernels.measure import Way, faster
from gpt.kernels.measure_decode import Shape, decodes_faster, faster_engine, shape_of
from gpt.kernels.native_attention import NativeAttention, takes
from gpt.kernels.native_gelu import NativeGelu
from gpt.model import GPT, REFERENCE, KVCache, ModelConfig, Ops, count_parameters

Decode = Callable[[Tensor, KVCache], Tensor]  # see Backend.decode
Kernel = TypeVar("Kernel", bound=Callable)
Library = ctypes.CDLL | None
PRECISIONS = (torch.float32, torch.bfloat16)  # that "auto" chooses from on a CPU
BUILD_PAYS = 4e10  # steps times parameters from which waiting some seconds for the kernels to be built saves time


# ---- precision


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the torch.dtype of a precision name, for training. "auto" is bf16 on CUDA GPUs that have it, else fp16
    from capability 7.0 on; on a CPU it is whichever of fp32 and bf16 a short measurement finds faster; elsewhere
    fp32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if capability >= (8, 0) else torch.float16 if capability >= (7, 0) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and bf16_is_faster() else torch.float32


def bf16_is_faster() -> bool:
    """Returns whether this CPU multiplies matrices faster in bf16 than in fp32: 64 tokens by a matrix of GPT-2
    small."""

    def contest() -> tuple[Way, Way]:
        x, weight = torch.ones(64, 768), torch.ones(768, 768)
        half_x, half_weight = x.bfloat16(), weight.bfloat16()
        return lambda: x @ weight, lambda: half_x @ half_weight

    return faster(f"bf16 products, {torch.get_num_threads()} threads", contest)


# ---- training on a CPU


def can_build() -> bool:
    """Returns whether this machine has a C++ compiler. Without it there are no native kernels."""
    return build.compiler() is not None


# Field of Ops -> what makes its C++ from the library for training.
NATIVE_OPS: dict[str, Callable[[ctypes.CDLL], Callable]] = {"attention": NativeAttention, "gelu": NativeGelu}


def native_names(config: ModelConfig, dtype: torch.dtype) -> list[str]:
    """Returns the fields of Ops that the C++ for training computes in a model of this shape: gelu in fp32, and
    attention as native_attention.takes says."""
    computes = {
        "attention": takes(dtype, config.n_embd // config.n_head, config.dropout),
        "gelu": dtype == torch.float32,
    }
    return [name for name in NATIVE_OPS if computes[name]]


def native_kernels(names: list[str], wait: bool) -> dict[str, Callable]:
    """Returns field of Ops -> C++ for training, for the fields `names`; {} if it is not built: see `load_or_build`."""
    library = load_or_build(build.TRAINING, wait) if names else None
    return {} if library is None else {name: NATIVE_OPS[name](library) for name in names}


def faster_kernels(kernels: dict[str, Callable], config: ModelConfig, dtype: torch.dtype) -> list[str]:
    """Returns the fields of Ops whose kernels in `kernels` (field -> C++) are faster than torch's. Measures forward and
    backward pass of each by itself, on activations of this model's shape."""
    path = build.library_path(build.TRAINING)  # depends on the sources: another version must be measured anew
    shape = f"{config.block_size} positions, width {config.n_embd}, {config.n_head} heads"
    measured = f"training by {path and path.stem}, {dtype}, {shape}, {torch.get_num_threads()} threads"
    inputs = {"attention": (3 * config.n_embd, [config.n_head]), "gelu": (4 * config.n_embd, [])}

    def contest(name: str) -> tuple[Way, Way]:
        width, arguments = inputs[name]
        x = torch.randn(2, config.block_size, width).to(dtype).requires_grad_()

        def passes(kernel: Callable) -> None:
            out = kernel(x, *arguments)
            torch.autograd.grad(out, x, torch.ones_like(out))

        return lambda: passes(getattr(REFERENCE, name)), lambda: passes(kernels[name])

    return [name for name in kernels if faster(f"{name} in {measured}", partial(contest, name))]


# ---- generation on a CPU


def decode_library(backend: str, steps: int, config: ModelConfig, vocabulary: int) -> ctypes.CDLL | None:
    """Returns the C++ library for `steps` decode steps of such a model on a CPU, or None if it is not built or
    `backend` excludes it. Waits for its build for the back end native, and if the steps take longer than the build."""
    if backend not in ("auto", "native"):
        return None
    pays = steps * count_parameters(config, vocabulary) >= BUILD_PAYS
    return load_or_build(build.GENERATION, wait=pays or backend == "native")


def pick_decode_dtype(config: ModelConfig, vocabulary: int, int8: bool, rows: int, library: Library) -> torch.dtype:
    """Returns fp32 or bf16, whichever decodes `rows` rows of such a model faster on this CPU by the engines of
    decodes_faster: as the type of all weights or, with `int8`, of what is not a matrix. In plain torch bf16 must be
    faster in products of many tokens too: it may make the steps faster, but the prompts much slower."""
    fp32, bf16 = (Shape(config, vocabulary, torch.int8 if int8 else dtype, dtype) for dtype in PRECISIONS)
    if not int8 and faster_engine(bf16, rows, library) is None and not bf16_is_faster():
        return torch.float32
    return torch.bfloat16 if decodes_faster(bf16, fp32, rows, library) else torch.float32


def note_slow_int8(model: GPT, rows: int, library: Library) -> None:
    """Prints a note unless this CPU decodes `rows` rows of an int8 model clearly faster than in bf16: see `faster`."""
    bf16 = Shape(model.config, model.vocab_size, torch.bfloat16, torch.bfloat16)
    if not decodes_faster(shape_of(model), bf16, rows, library):
        without = "" if library else " without the C++ kernels"
        note("info", f"int8 is not faster than bf16 on this CPU{without}; it only saves memory")


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
