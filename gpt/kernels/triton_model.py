"""The decode step of a GPT on a GPU, in about five kernels a layer where plain torch launches thirteen.

With few rows a step does hardly more than read all weights once. Here each program multiplies some rows of a weight,
element by element, with all rows of the batch, and does the layer norm before the product, and bias, GELU or residual
after it, too. With more rows cuBLAS multiplies, and only what stands between its products is done here.

The residual stream is in fp32 throughout. No row's arithmetic depends on another row.

Shapes: R rows, N outputs, K inputs, C width of the residual stream, V vocabulary."""

# mypy: allow-untyped-defs

from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from gpt.attention import LayerCache
from gpt.kernels.triton_attention import begin, decode_attention, launch_options, new_counters
from gpt.model import GPT, Block, KVCache

FEW_ROWS, FEW_INT8_ROWS = 1, 8  # up to so many rows the products are made here: cuBLAS reads no 8-bit weights


@triton.jit
def weight_tile(weight, n, N, K, start, BK: tl.constexpr):
    """Loads the inputs from `start` to start + BK of the outputs n (BN,) of a weight (N, K); 0 beyond its edges."""
    k = start + tl.arange(0, BK)
    mask = (n < N)[:, None] & (k < K)[None, :]
    return tl.load(weight + n.to(tl.int64)[:, None] * K + k[None, :], mask=mask, other=0.0)


@triton.jit
def input_tile(x, row, R, K, start, BK: tl.constexpr):
    """Loads the columns from `start` to start + BK of the rows (RB,) of x (R, K) as float32; 0 beyond its edges."""
    k = start + tl.arange(0, BK)
    mask = (row < R)[:, None] & (k < K)[None, :]
    return tl.load(x + row[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def vector_tile(x, K, start, BK: tl.constexpr):
    """Loads the elements from `start` to start + BK of x (K,) as float32 (1, BK); 0 beyond its end."""
    k = start + tl.arange(0, BK)
    return tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)[None, :]


@triton.jit
def moments(x, row, R, K, EPS: tl.constexpr, RB: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr):
    """Returns the mean and the reciprocal standard deviation (RB,) of rows of x (R, K)."""
    total = tl.zeros((RB, BK), tl.float32)
    for tile in tl.static_range(TILES):
        total += input_tile(x, row, R, K, tile * BK, BK)
    mean = tl.sum(total, axis=1) / K
    squares = tl.zeros((RB, BK), tl.float32)
    for tile in tl.static_range(TILES):
        inside = (tile * BK + tl.arange(0, BK) < K)[None, :]
        difference = tl.where(inside, input_tile(x, row, R, K, tile * BK, BK) - mean[:, None], 0.0)
        squares += difference * difference
    return mean, tl.rsqrt(tl.sum(squares, axis=1) / K + EPS)


@triton.jit
def multiply(
    x, w, weight, n, row, gain, shift, R, N, K,
    EPS: tl.constexpr, NORM: tl.constexpr, RB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Returns the product (RB, BN) of the rows of x and the outputs n of the weight. The tile w holds the first
    inputs of the weight, which are loaded already."""
    if NORM:
        mean, deviation = moments(x, row, R, K, EPS, RB, BK, TILES)
    sums = tl.zeros((RB, BN, BK), tl.float32)
    for tile in tl.static_range(TILES):
        w = w if tile == 0 else weight_tile(weight, n, N, K, tile * BK, BK)
        value = input_tile(x, row, R, K, tile * BK, BK)
        if NORM:
            value = (value - mean[:, None]) * deviation[:, None]
            value = value * vector_tile(gain, K, tile * BK, BK) + vector_tile(shift, K, tile * BK, BK)
        sums += w.to(tl.float32)[None, :, :] * value[:, None, :]
    return tl.sum(sums, axis=2)


@triton.jit
def gelu(x):
    """Returns x * (1 + tanh(u)) / 2 = x * sigmoid(2 u), with u = sqrt(2 / pi) * (x + 0.044715 x^3)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def linear(
    x, weight, scale, bias, gain, shift, residual, out, R, N, K,
    EPS: tl.constexpr, NORM: tl.constexpr, GELU: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, RB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Computes BN outputs of all rows: out (R, N) = x (R, K) @ weight (N, K).T. NORM: x is normalized first, with gain
    and shift (K,). SCALE: the weight is int8, with scale (N,). BIAS, GELU and RESIDUAL (R, N) follow the product, in
    this order."""
    first, row = tl.program_id(0) * BN, tl.arange(0, RB)
    n = first + tl.arange(0, BN)
    w = weight_tile(weight, n, N, K, 0, BK)  # weights can be read while the last kernel still writes x
    begin(PDL)
    result = multiply(x, w, weight, n, row, gain, shift, R, N, K, EPS, NORM, RB, BN, BK, TILES)
    if SCALE:
        result *= vector_tile(scale, N, first, BN)
    if BIAS:
        result += vector_tile(bias, N, first, BN)
    if GELU:
        result = gelu(result)
    offset, mask = row[:, None] * N + n[None, :], (row < R)[:, None] & (n < N)[None, :]
    if RESIDUAL:
        result += tl.load(residual + offset, mask=mask, other=0.0)
    tl.store(out + offset, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def add_norm(x, y, gain, shift, out, K, EPS: tl.constexpr, ADD: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr):
    """Computes one row: adds y (R, K) to x (R, K), in place, if ADD; out (R, K) becomes the layer norm of x."""
    k = tl.arange(0, WIDTH)
    inside, place = k < K, tl.program_id(0) * K + k
    begin(PDL)
    value = tl.load(x + place, mask=inside, other=0.0)
    if ADD:
        value += tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + place, value, mask=inside)
    difference = tl.where(inside, value - tl.sum(value, axis=0) / K, 0.0)
    normal = difference * tl.rsqrt(tl.sum(difference * difference, axis=0) / K + EPS)
    normal *= tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
    normal += tl.load(shift + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, normal.to(out.dtype.element_ty), mask=inside)


class TritonModel:
    """Runs the decode step of a GPT on a GPU. Reads the GPT's parameters anew at each call."""

    def __init__(self, model: GPT):
        self.model, self.blocks = model, cast(list[Block], list(model.blocks))
        self.few = FEW_INT8_ROWS if model.token.weight.dtype == torch.int8 else FEW_ROWS
        # Programmatic dependent launch: a kernel starts, and reads weights, while the last one ends.
        self.pdl = model.device.type == "cuda" and torch.cuda.get_device_capability(model.device) >= (9, 0)

    def decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Appends the keys and values of ids (R,) to the cache; returns the logits (R, V) in the model's precision."""
        positions = cache.lengths[:, None]
        x = (self.model.token(ids) + self.model.position(cache.lengths)).float()
        counters = new_counters(len(ids) * self.model.config.n_head, x.device)
        step = self.few_rows if len(ids) <= self.few else self.many_rows
        logits = step(x, cache.layers(positions), counters)
        cache.advance(1)
        return logits[:, : self.model.vocab_size]

    def few_rows(self, x: Tensor, layers: list[LayerCache], counters: Tensor) -> Tensor:  # (R, C) -> (R, padded V)
        dtype = self.model.dtype
        for block, layer in zip(self.blocks, layers, strict=True):
            qkv = self.product(x, block.attn.qkv, dtype, norm=block.ln_1)
            attended = self.attention(block, qkv, layer, counters)
            x = self.product(attended, block.attn.proj, torch.float32, residual=x)
            hidden = self.product(x, block.mlp.fc, dtype, norm=block.ln_2, gelu=True)
            x = self.product(hidden, block.mlp.proj, torch.float32, residual=x)
        return self.product(x, self.model.token, dtype, norm=self.model.ln_f)

    def many_rows(self, x: Tensor, layers: list[LayerCache], counters: Tensor) -> Tensor:  # (R, C) -> (R, padded V)
        y = None  # what the last product adds to x
        for block, layer in zip(self.blocks, layers, strict=True):
            qkv = block.attn.qkv(self.norm(x, y, block.ln_1))
            y = block.attn.proj(self.attention(block, qkv, layer, counters))
            y = block.mlp.proj(gelu_product(self.norm(x, y, block.ln_2), block.mlp.fc))
        return self.model.token.logits(self.norm(x, y, self.model.ln_f))

    def attention(self, block: Block, qkv: Tensor, layer: LayerCache, counters: Tensor) -> Tensor:
        """Returns the attention (R, C) for qkv (R, 3 C); appends to the cache of the layer."""
        return decode_attention(qkv[:, None], block.attn.n_head, layer, counters, self.pdl)[:, 0]

    def product(
        self,
        x: Tensor,
        module: Any,
        dtype: torch.dtype,
        norm: nn.LayerNorm | None = None,
        gelu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Returns x (R, K) times the weight of `module`, its bias included, as (R, N) in `dtype`."""
        (rows, inputs), outputs = x.shape, len(module.weight)
        scale, bias = getattr(module, "scale", None), getattr(module, "bias", None)
        out = torch.empty(rows, outputs, dtype=dtype, device=x.device)
        BN, BK, warps = tile_of(rows, outputs)
        linear[(triton.cdiv(outputs, BN),)](
            x, module.weight, scale, bias, norm and norm.weight, norm and norm.bias, residual, out,
            rows, outputs, inputs, EPS=norm.eps if norm else 0.0, NORM=norm is not None, GELU=gelu,
            SCALE=scale is not None, BIAS=bias is not None, RESIDUAL=residual is not None,
            RB=1 << (rows - 1).bit_length(), BN=BN, BK=BK, TILES=triton.cdiv(inputs, BK), num_warps=warps,
            **launch_options(self.pdl),
        )  # fmt: skip
        return out

    def norm(self, x: Tensor, y: Tensor | None, norm: nn.LayerNorm) -> Tensor:
        """Adds y (R, C) to x (R, C) in place, if there is one; returns the layer norm (R, C) of x."""
        out = torch.empty(x.shape, dtype=self.model.dtype, device=x.device)
        width = x.shape[1]
        add_norm[(len(x),)](
            x, y, norm.weight, norm.bias, out, width, EPS=norm.eps, ADD=y is not None,
            WIDTH=1 << (width - 1).bit_length(), **launch_options(self.pdl),
        )  # fmt: skip
        return out


def tile_of(rows: int, outputs: int) -> tuple[int, int, int]:
    """Returns how the kernel `linear` divides a product: outputs of a program, inputs at once, warps. Measured on an
    H100 with GPT-2's shapes: see benchmarks/README.md."""
    if rows == 1:
        return (16, 256, 4) if outputs > 8192 else (4, 1024, 4)
    return 4, 256, 4


def gelu_product(x: Tensor, module: Any) -> Tensor:  # (R, K) -> (R, N)
    """Returns GELU of a linear layer. cuBLAS does both in one kernel."""
    if isinstance(module, nn.Linear) and x.is_cuda:
        return torch._addmm_activation(module.bias, x, module.weight.t(), use_gelu=True)
    return F.gelu(module(x), approximate="tanh")
