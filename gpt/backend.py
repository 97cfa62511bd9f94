"""What runs the model while it generates: plain torch, compiled, native kernels or CUDA graphs, all of one meaning."""

import functools
import math
import subprocess
from dataclasses import dataclass, replace
from typing import Any

import torch

from gpt.errors import InputError, note
from gpt.kernels import build
from gpt.kernels.choosing import NativeChoice
from gpt.kernels.native import NativeModel, supports
from gpt.memory import count_parameters
from gpt.runtime import has_compiler
from gpt.sampling import choose
from gpt.step import GraphLauncher, Launcher

NAMES = ("auto", "eager", "compiled", "native", "captured")
BUILD_PAYS = 4e10  # steps times parameters from which it pays to wait the seconds that building the kernels takes
COMPILE_PAYS = 200_000  # steps from which compiling for a GPU, a minute or so, costs less than it saves
TOKENS_PER_LAUNCH = 16  # over all rows: more are lost at the end of every text, with fewer a GPU waits for the host
MOST_SHAPES = 64  # for which one process compiles a function: numbers of rows, kinds of settings


@dataclass(frozen=True)
class Backend:
    name: str
    model: Any
    """a gpt.model.GPT"""
    prefill: Any
    """(ids (1, T), a cache of one row): as GPT.prefill"""
    decode: Any
    """(ids (R,), cache) -> logits (R, V): as GPT.decode"""
    choose: Any
    """as sampling.choose"""
    attention: Any = None
    """as model.masked_attention, for one new token a row; None is that"""
    reads_beyond: bool = True
    """whether `decode` reads the cache beyond a row's length too, if with the weight 0"""
    narrow: bool = False
    """handed to `choose`: whether it may leave a row undecided"""
    take: Any = None
    """(Rows, logits (R, V)): in place of Rows.take, of the same meaning; None is that"""

    def slots(self, rows):
        """The number of row slots for `rows`. Above 4 a multiple of 4, but for native code: in the 5th to 7th row fp32
        matrix products of a CPU library round differently than in the others, and a text would depend on its slot."""
        return rows if rows <= 4 or self.name == "native" else math.ceil(rows / 4) * 4

    def launcher(self, rows):
        """What launches the steps of `rows`, a step.Rows."""
        if self.model.device.type != "cuda" or self.name == "eager":
            return Launcher(rows, self)
        return GraphLauncher(rows, self, steps=max(1, TOKENS_PER_LAUNCH // len(rows)))

    def wide(self):
        return replace(self, narrow=False)


def pick_backend(name, model, steps):
    """The name of the back end that `name` stands for: "auto" goes by device and number of decode steps. Raises
    InputError for one that cannot run here."""
    device = model.device.type
    if name == "auto" and device == "cpu":
        work = steps * count_parameters(model.config, model.vocab_size)
        return "native" if supports(model) and library(wait=work >= BUILD_PAYS) else "eager"
    if name == "auto" and device == "cuda":
        return "compiled" if steps >= COMPILE_PAYS and has_compiler() else "captured"
    if name == "captured" and device != "cuda":
        raise InputError(f"backend captured: CUDA graphs need a CUDA device, the model is on {device}; use auto")
    if name == "native" and not (supports(model) and library(wait=True)):
        raise InputError("backend native: needs a CPU, fp32, bf16 or int8 weights and a C++ compiler; use auto")
    return "eager" if name == "auto" else name


def make_backend(name, model):
    """The Backend of a name that pick_backend gave."""
    return {"eager": eager, "captured": captured, "compiled": compiled, "native": native}[name](model)


def eager(model):
    return Backend("eager", model, prefill_on_gpu(model), model.decode, choose)


def captured(model):
    attention = triton_attention(model.device)
    reads_beyond = attention is None
    return Backend("captured", model, prefill_on_gpu(model), model.decode, choose, attention, reads_beyond, narrow=True)


def compiled(model):
    """The step compiled; on a GPU its kernels are then captured too."""
    on_gpu = model.device.type == "cuda"
    # On a CPU `choose` decides on the host how much to sort.
    chooser, attention = (compile_static(choose), triton_attention(model.device)) if on_gpu else (choose, None)
    decode, reads_beyond = compile_static(model.decode), attention is None
    return Backend("compiled", model, prefill_on_gpu(model), decode, chooser, attention, reads_beyond, narrow=on_gpu)


@functools.cache
def triton_attention(device):
    """Returns the Triton kernel for attention, or None with a note where Triton is missing or cannot compile: its first
    launch needs a C compiler and Python's headers."""
    try:
        from gpt.kernels.attention import decode_attention

        q, cached = (torch.zeros(1, 1, length, 16, device=device) for length in (1, 8))
        decode_attention(q, cached, cached, torch.zeros(1, 1, dtype=torch.int64, device=device))
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        note("info", f"no Triton kernel for attention: {str(error).partition(chr(10))[0]}; plain torch is used")
        return None
    return decode_attention


def prefill_on_gpu(model):
    """Returns GPT.prefill without cuDNN's attention, which builds a plan, for up to a second, at every new length."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def prefill(ids, cache):
        with sdpa_kernel(others):
            model.prefill(ids, cache)

    return prefill if model.device.type == "cuda" else model.prefill


def compile_static(function):
    """`function` compiled for the shapes it is called with. More of them than MOST_SHAPES are an error: torch would go
    on uncompiled, at a tenth of the speed, with a warning at most."""
    quick = torch.compile(function, dynamic=False, fullgraph=True)

    def call(*arguments):
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES, fail_on_recompile_limit_hit=True):
            return quick(*arguments)

    return call


def native(model):
    kernels = NativeModel(model, build.load_library())
    choice = NativeChoice(build.load_library())
    made = kernels.prefill, kernels.decode, choice.choose
    return Backend("native", model, *made, reads_beyond=False, take=choice.take)


def library(wait):
    """Returns the compiled kernels, or None if they cannot be had. If they are missing, `wait` builds them first;
    otherwise starts a build for the next program and returns None."""
    kernels = build.build_now() if wait else build.load_library()
    if kernels is None and not wait and build.start_background_build():
        note("info", "the C++ kernels are being built in the background; until then --backend eager runs the model")
    return kernels
