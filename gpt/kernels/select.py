"""The one door to native code: the precision and the kernels that a model gets, by device and a short measurement."""

import functools
import subprocess

import torch

from gpt.attention import LayerCache, causal_attention, merge_heads
from gpt.device import DTYPES
from gpt.errors import note
from gpt.kernels import build
from gpt.kernels.measure import faster
from gpt.kernels.native_attention import NativeAttention
from gpt.kernels.native_model import NativeModel
from gpt.model import GPT, REFERENCE, KVCache, ModelConfig, Ops
from gpt.quantize import to_int8

PROBE_VOCABULARY = 8192  # of a measured model: the head of a larger one takes longer and says the same


# ---- precision


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the torch.dtype of a precision name. "auto" is bf16 on GPUs that have it, fp16 on older ones, and on a
    CPU whichever of fp32 and bf16 a short measurement finds faster."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if capability >= (8, 0) else torch.float16 if capability >= (7, 0) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and bf16_is_faster() else torch.float32


def bf16_is_faster() -> bool:
    """Returns whether this CPU multiplies bf16 matrices faster than fp32 ones: 256 tokens by a matrix of GPT-2 small,
    as in training. On a CPU without bf16 instructions it takes a hundred times as long."""

    def contest():
        x, weight = torch.ones(256, 768), torch.ones(768, 768)
        half_x, half_weight = x.bfloat16(), weight.bfloat16()
        return lambda: x @ weight, lambda: half_x @ half_weight

    return faster(f"bf16 products, {torch.get_num_threads()} threads", contest)


# ---- GPUs


def gpu_ops(device: torch.device) -> Ops:
    """Returns the Ops that generate on a GPU: REFERENCE where Triton cannot be used."""
    attention = triton_attention(device)
    if attention is None:
        return REFERENCE

    def cached_attention(qkv: torch.Tensor, heads: int, layer: LayerCache) -> torch.Tensor:
        q = layer.append(qkv, heads)
        return merge_heads(attention(q, layer.keys, layer.values, layer.positions))

    return Ops(cached_attention=cached_attention)


@functools.cache
def triton_attention(device: torch.device):
    """Returns the Triton kernel for attention, or None with a note where Triton is missing or cannot compile: its first
    launch needs a C compiler and Python's headers."""
    try:
        from gpt.kernels.triton_attention import decode_attention

        q, cached = (torch.zeros(1, 1, length, 16, device=device) for length in (1, 8))
        decode_attention(q, cached, cached, torch.zeros(1, 1, dtype=torch.int64, device=device))
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        note("info", f"no Triton kernel for attention: {str(error).partition(chr(10))[0]}; plain torch is used")
        return None
    return decode_attention


# ---- CPUs


@torch.inference_mode()
def native_is_faster(model: GPT, rows: int) -> bool:
    """Returns whether the native library decodes faster than plain torch, by a step of a model of one layer that is
    otherwise like this one."""
    config, dtype = model.config, model.token.weight.dtype
    rows = 1 << (min(rows, 8) - 1).bit_length()  # 1, 2, 4 or 8
    shape = f"width {config.n_embd}, {config.n_head} heads, vocabulary {min(model.vocab_size, PROBE_VOCABULARY)}"
    question = f"native decode, {dtype}, {shape}, {rows} rows, {torch.get_num_threads()} threads"

    def contest():
        probe = one_layer_like(model)
        ids, caches = torch.zeros(rows, dtype=torch.int64), [KVCache(probe.config, rows, probe.dtype) for _ in "ab"]
        native = NativeModel(probe, build.load_library())

        def plain():
            caches[0].lengths.fill_(probe.config.block_size // 2)
            caches[0].is_empty = False
            probe(ids[:, None], cache=caches[0])

        def other():
            caches[1].lengths.fill_(probe.config.block_size // 2)
            native.decode(ids, caches[1])

        return plain, other

    return faster(question, contest)


def one_layer_like(model: GPT) -> GPT:
    """Returns a GPT of one layer with the width, heads and weight types of `model`, filled with a constant: zeros would
    all lie in one page of memory."""
    config = ModelConfig(1, model.config.n_head, model.config.n_embd, block_size=128)
    with torch.device("meta"):
        probe = GPT(config, min(model.vocab_size, PROBE_VOCABULARY))
    values = {name: torch.full(p.shape, 0.01, dtype=model.dtype) for name, p in probe.named_parameters()}
    probe.load_state_dict(values, assign=True)
    return to_int8(probe.eval()) if model.token.weight.dtype == torch.int8 else probe.eval()


def training_library(wait: bool):
    """Returns the library with the C++ attention, or None. If it is missing, builds it now or, without `wait`, in the
    background for later runs."""
    if wait:
        return build.build_now(build.TRAINING)
    library = build.load_library(build.TRAINING)
    if library is None and build.start_background_build(build.TRAINING):
        note("info", "C++ kernels are being built in the background, for later runs; this one uses torch")
    return library


def attention_is_faster(library, heads: int, width: int, positions: int, dtype: torch.dtype) -> bool:
    """Returns whether the library's causal attention, forward and backward, is faster than torch's at this shape:
    heads of `width`, `positions` per sequence."""

    def contest():
        qkv = torch.randn(2, positions, 3 * heads * width).to(dtype).requires_grad_()
        upstream = torch.ones(2, positions, heads * width, dtype=dtype)

        def passes(attention):
            torch.autograd.grad(attention(qkv, heads, 0.0), qkv, upstream)

        return lambda: passes(causal_attention), lambda: passes(NativeAttention(library))

    shape = f"{heads} heads of {width}, {positions} positions, {torch.get_num_threads()} threads"
    return faster(f"native causal attention, {dtype}, {shape}", contest)
