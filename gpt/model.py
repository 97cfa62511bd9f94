"""The GPT-2 architecture (Radford et al. 2019), exactly: ModelConfig, KVCache, Attention, MLP, Block, GPT.

Shapes: B batch rows, T new tokens, S cache positions (block_size), C n_embd, H heads, D = C / H, V vocabulary."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt.attention import causal_attention, merge_heads, split_heads
from gpt.config import refuse
from gpt.loss import cross_entropy, losses_of

VOCAB_MULTIPLE = 64  # the embedding has zero rows up to this multiple: odd sizes are slow in matrix products
INIT_STD = 0.02


@dataclass(frozen=True)
class ModelConfig:
    n_layer: int = 12
    """transformer blocks"""
    n_head: int = 12
    """attention heads; must divide n_embd"""
    n_embd: int = 768
    """width of the residual stream"""
    block_size: int = 1024
    """context length in tokens"""
    dropout: float = 0.0
    """share of activations dropped in training: 0 to pretrain on much text, 0.1 or more on little"""

    def problems(self):
        """What is wrong with these values, in words; empty if nothing."""
        sizes = {"n_layer": self.n_layer, "n_head": self.n_head, "n_embd": self.n_embd, "block_size": self.block_size}
        found = [f"{name} {value} must be at least 1" for name, value in sizes.items() if value < 1]
        if self.n_head > 0 and self.n_embd % self.n_head:
            found.append(f"n_head {self.n_head} must divide n_embd {self.n_embd}")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout {self.dropout} must be at least 0 and below 1")
        return found


class KVCache:
    """Keys and values of all layers for `rows` rows of up to block_size positions each, and how many each row holds.

    A forward pass appends T positions to every row. Rows are independent, and attention gives positions beyond a row's
    length the weight 0, so what they hold does not matter as long as it is finite: see `clear_beyond`. `attention` is
    masked_attention, or another of its meaning for one new token a row."""

    def __init__(self, config, rows, dtype=torch.float32, device=None, attention=None):
        self.attention = attention or masked_attention
        shape = (rows, config.n_head, config.block_size, config.n_embd // config.n_head)
        # One tensor per layer, (B, H, S, D): the compiler would copy a tensor of all layers at every append.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # (B,)
        self.counts = np.zeros(rows, dtype=np.int64)  # the same on the host, so that nothing waits for the device

    def row(self, index):
        """A KVCache of one row, sharing this one's memory: to fill or refill a row on its own."""
        view = object.__new__(KVCache)
        view.attention = self.attention
        view.keys = [keys[index : index + 1] for keys in self.keys]
        view.values = [values[index : index + 1] for values in self.values]
        view.lengths, view.counts = self.lengths[index : index + 1], self.counts[index : index + 1]
        return view

    def copy_row(self, source, target):
        """Make row `target` hold what row `source` holds."""
        for buffer in (*self.keys, *self.values):
            buffer[target] = buffer[source]
        self.lengths[target] = self.lengths[source]
        self.counts[target] = self.counts[source]

    def keep(self, index, tokens):
        """Let a row hold only its first `tokens` positions."""
        self.lengths[index] = tokens
        self.counts[index] = tokens

    def clear_beyond(self, index):
        """Make 0 what a row's values are beyond its length. masked_attention gives them the weight 0, and 0 times a nan
        or infinity that was left there would be nan."""
        for values in self.values:
            values[index, :, int(self.counts[index]) :] = 0

    def append(self, layer, k, v, positions):
        """Store k and v (B, H, T, D) at `positions` (B, T) of `layer`."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.keys[layer][rows, :, positions] = k.transpose(1, 2)
        self.values[layer][rows, :, positions] = v.transpose(1, 2)

    def advance(self, tokens):
        self.lengths += tokens
        self.counts += tokens


class LayerCache:
    """One layer's part of a KVCache during one forward pass. `attention` is of q over the whole cache; None where the
    rows were empty, and the new tokens are all there is."""

    def __init__(self, cache, layer, positions, attention):
        self.cache, self.layer, self.positions, self.attention = cache, layer, positions, attention

    def attend(self, qkv, heads):
        """Append the keys and values of qkv (B, T, 3 C), then attention over all that each row holds: (B, T, C)."""
        q, k, v = split_heads(qkv, heads)
        self.cache.append(self.layer, k, v, self.positions)
        if self.attention is None:
            return causal_attention(qkv, heads)
        keys, values = self.cache.keys[self.layer], self.cache.values[self.layer]
        return merge_heads(self.attention(q, keys, values, self.positions))


def masked_attention(q, keys, values, positions):
    """Attention of q (B, H, T, D) at `positions` (B, T) over all cache positions up to its own: (B, H, T, D).

    Two plain products: in the rounding of torch's fused CPU kernel it matters which thread a row falls to, so a text
    would depend on its slot; and for one query in bf16 it takes five times as long."""
    mask = torch.arange(keys.shape[2], device=q.device) <= positions[:, None, :, None]  # (B, 1, T, S)
    scores = (q * q.shape[-1] ** -0.5) @ keys.transpose(-2, -1)  # (B, H, T, S)
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1, dtype=torch.float32)
    return weights.to(q.dtype) @ values


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.attend = causal_attention  # kernels may take its place, and that of `gelu` and `losses_of` below

    def forward(self, x, layer=None):  # (B, T, C) -> (B, T, C)
        qkv = self.qkv(x)
        if layer is None:
            x = self.attend(qkv, self.n_head, self.dropout if self.training else 0.0)
        else:
            x = layer.attend(qkv, self.n_head)
        return self.drop(self.proj(x))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.gelu = gelu

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        return self.drop(self.proj(self.gelu(self.fc(x))))


def gelu(x):
    """GELU by its approximation with tanh, as GPT-2 has it. Source: Hendrycks and Gimpel 2016, arXiv:1606.08415."""
    return F.gelu(x, approximate="tanh")


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, layer=None):  # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x), layer)
        return x + self.mlp(self.ln_2(x))


class Embedding(nn.Module):
    """A table of vectors, by row. Its values are left to `initialize`: nn.Embedding's own normal_, on the meta device
    where checkpoints are loaded, would import the compiler, which takes seconds."""

    fp8 = False  # whether logits are made of 8-bit numbers in training

    def __init__(self, rows, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))
        self.losses_of = losses_of

    def forward(self, ids):  # (...) -> (..., C)
        return F.embedding(ids, self.weight)

    def logits(self, x):  # (..., C) -> (..., rows): the table as the head
        return F.linear(x, self.weight)

    def losses(self, x, targets, vocab_size):  # (N, C), (N,) -> (N,)
        return cross_entropy(x, self.weight, targets, vocab_size, self.fp8, self.losses_of)


class GPT(nn.Module):
    """A decoder-only transformer. `vocab_size` comes from the tokenizer; inside it is padded with rows that are zero
    and stay zero: they take part in no softmax, get no gradient and are never saved."""

    def __init__(self, config, vocab_size):
        super().__init__()
        refuse(config.problems())
        self.config, self.vocab_size = config, vocab_size
        padded = math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.token = Embedding(padded, config.n_embd)  # the head too: GPT-2 ties them
        self.position = Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        initialize(self)

    def forward(self, ids, targets=None, cache=None):
        """ids (B, T) -> losses (B, T) in nats if there are targets (B, T), else logits (B, V) of the last position;
        both in float32. Losses at targets IGNORED are 0. With a cache, the T tokens continue its rows.
        Raises ValueError for a position past block_size."""
        x = self.ln_f(self.hidden(ids, cache))
        return self.head(x[:, -1]) if targets is None else self.losses(x, targets)

    def prefill(self, ids, cache):
        """Let the T tokens of ids (B, T) continue the rows of a cache; no logits are made."""
        self.hidden(ids, cache)

    def decode(self, ids, cache):
        """One more token for every row: ids (B,) -> logits (B, V) of the next one, in float32. Nothing is read on the
        host, so this can be compiled or captured; the caller keeps `cache.counts`, and them below block_size."""
        positions = cache.lengths[:, None]
        x = self.stack(ids[:, None], positions, self.layers_of(cache, positions, cache.attention))
        cache.lengths += 1
        return self.head(self.ln_f(x[:, -1]))

    def hidden(self, ids, cache=None):
        """ids (B, T) -> (B, T, C), what the last layer norm reads. Raises ValueError for a position past block_size."""
        held = 0 if cache is None else int(cache.counts.max())
        if held + ids.shape[1] > self.config.block_size:
            raise ValueError(f"position {held + ids.shape[1]} is past block_size {self.config.block_size}")
        positions = torch.arange(ids.shape[1], device=ids.device)
        if cache is None:
            return self.stack(ids, positions, [None] * len(self.blocks))
        positions = cache.lengths[:, None] + positions  # (B, T)
        x = self.stack(ids, positions, self.layers_of(cache, positions, masked_attention if held else None))
        cache.advance(ids.shape[1])
        return x

    def stack(self, ids, positions, layers):
        x = self.drop(self.token(ids) + self.position(positions))
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, layer)
        return x

    def layers_of(self, cache, positions, attention):
        return [LayerCache(cache, index, positions, attention) for index in range(len(self.blocks))]

    def head(self, x):  # (..., C) -> logits (..., V), float32
        return self.token.logits(x)[..., : self.vocab_size].float()

    def losses(self, x, targets):  # (B, T, C), (B, T) -> (B, T)
        return self.token.losses(x.flatten(0, 1), targets.flatten(), self.vocab_size).view(targets.shape)

    def set_dropout(self, dropout):
        """Change the share of activations that training drops."""
        self.config = replace(self.config, dropout=dropout)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            elif isinstance(module, Attention):
                module.dropout = dropout

    @torch.no_grad()
    def crop_context(self, block_size):
        """Shorten the context to its first `block_size` positions."""
        self.config = replace(self.config, block_size=block_size)
        shorter = Embedding(block_size, self.config.n_embd)
        shorter.weight = nn.Parameter(self.position.weight[:block_size].clone())
        self.position = shorter

    @property
    def dtype(self):
        """Of the activations; that of the weights too, unless they are quantized."""
        return self.position.weight.dtype

    @property
    def device(self):
        return self.position.weight.device

    def num_parameters(self):
        """Parameters of the architecture: the padding is not counted, the tied head once."""
        padding = (len(self.token.weight) - self.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding


@torch.no_grad()
def initialize(model):
    """GPT-2's initialisation: normal with std 0.02, projections into the residual stream divided by sqrt(2 n_layer),
    biases 0, layer norms 1; nothing on the meta device. Raises ValueError for a parameter it does not know."""
    if model.token.weight.is_meta:
        return
    projection_std = INIT_STD / math.sqrt(2 * model.config.n_layer)
    for name, parameter in model.named_parameters():
        match name.split(".")[-2:]:
            case ["token" | "position" | "qkv" | "fc", "weight"]:
                parameter.normal_(std=INIT_STD)
            case ["proj", "weight"]:
                parameter.normal_(std=projection_std)
            case ["ln_1" | "ln_2" | "ln_f", "weight"]:
                parameter.fill_(1.0)
            case [_, "bias"]:
                parameter.zero_()
            case _:
                raise ValueError(f"no initialisation for parameter {name}")
    model.token.weight[model.vocab_size :] = 0


def flops_per_token(config, vocab_size):
    """FLOPs of training on one token, forward and backward: products with weights, and full attention. Source: PaLM
    (Chowdhery et al. 2022), appendix B."""
    products = 12 * config.n_layer * config.n_embd**2 + vocab_size * config.n_embd
    return 6 * products + 12 * config.n_layer * config.n_embd * config.block_size
