"""The GPT-2 architecture (Radford et al. 2019), exactly: ModelConfig, Ops, KVCache, Attention, MLP, Block, GPT.

Shapes: B batch rows, T new tokens, S cache positions (block_size), C n_embd, H heads, D = C / H, V vocabulary."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpt.attention import LayerCache, cached_attention, causal_attention
from gpt.config import refuse
from gpt.loss import cross_entropy

VOCAB_MULTIPLE = 64  # the embedding is padded with zero rows to a multiple of it: odd sizes make matrix products slow
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

    def problems(self) -> list[str]:
        """Returns what is wrong with these values, in words."""
        sizes = {"n_layer": self.n_layer, "n_head": self.n_head, "n_embd": self.n_embd, "block_size": self.block_size}
        problems = [f"{name} {value} must be at least 1" for name, value in sizes.items() if value < 1]
        if self.n_head > 0 and self.n_embd % self.n_head:
            problems.append(f"n_head {self.n_head} must divide n_embd {self.n_embd}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout {self.dropout} must be at least 0 and below 1")
        return problems


def gelu(x: Tensor) -> Tensor:
    """Returns GELU of x in its tanh form."""
    return F.gelu(x, approximate="tanh")


def run_block(block: "Block", x: Tensor, ops: "Ops", layer: LayerCache | None) -> Tensor:
    """Returns the output (B, T, C) of a block for x (B, T, C)."""
    return block(x, ops, layer)


@dataclass(frozen=True)
class Ops:
    """The operations of a forward pass that have faster kernels. The defaults are the reference implementations in
    plain torch; gpt.kernels has faster ones for some machines."""

    attention: Callable[[Tensor, int, float], Tensor] = causal_attention
    """attention over whole sequences: qkv (B, T, 3 C), number of heads, dropout -> (B, T, C)"""
    cached_attention: Callable[[Tensor, int, LayerCache], Tensor] = cached_attention
    """attention of new tokens to all positions of their rows: qkv (B, T, 3 C), number of heads, cache of the layer ->
    (B, T, C); appends the new keys and values to the cache"""
    gelu: Callable[[Tensor], Tensor] = gelu
    block: Callable[..., Tensor] = run_block
    """a block of the model: see run_block; training may replace it to keep fewer activations"""


REFERENCE = Ops()


class KVCache:
    """Keys and values of all layers for `rows` rows of up to block_size positions each, and the length of each row.

    A forward pass appends T positions to every row. Rows are independent. Attention gives positions beyond a row's
    length the weight 0, so their values do not matter as long as they are finite: see `clear_beyond`."""

    def __init__(
        self, config: ModelConfig, rows: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ):
        shape = (rows, config.n_head, config.block_size, config.n_embd // config.n_head)
        # One tensor per layer, (B, H, S, D): the compiler would copy a tensor of all layers at every append.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # (B,)
        self.is_empty = True  # the next tokens are the first of every row: they attend only to each other

    def empty_row(self, index: int) -> "KVCache":
        """Empties a row and returns it as a KVCache of one row that shares this memory."""
        self.is_empty = False  # the caller fills the row
        self.set_length(index, 0)
        row = copy.copy(self)
        row.keys = [keys[index : index + 1] for keys in self.keys]
        row.values = [values[index : index + 1] for values in self.values]
        row.lengths, row.is_empty = self.lengths[index : index + 1], True
        return row

    def copy_rows(self, sources: Tensor, targets: Tensor, tokens: int) -> None:
        """Copies the first `tokens` positions of the rows `sources` (N,) to the rows `targets` (N,), of which none is a
        source."""
        for buffer in (*self.keys, *self.values):
            buffer[targets, :, :tokens] = buffer[sources, :, :tokens]

    def set_length(self, index: int, tokens: int) -> None:
        """Cuts a row to its first `tokens` positions."""
        self.lengths[index] = tokens

    def clear_beyond(self, index: int, tokens: int) -> None:
        """Sets a row's values from position `tokens` on to 0. Attention gives them the weight 0, and 0 times a nan or
        infinity of an earlier text would be nan."""
        for values in self.values:
            values[index, :, tokens:] = 0

    def layers(self, positions: Tensor) -> list[LayerCache]:
        """Returns the cache of each layer, for a forward pass over new tokens at `positions` (B, T)."""
        pairs = zip(self.keys, self.values, strict=True)
        return [LayerCache(keys, values, positions, self.is_empty) for keys, values in pairs]

    def advance(self, tokens: int) -> None:
        """Adds `tokens` to the length of every row."""
        self.lengths += tokens
        self.is_empty = False


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, ops: Ops, layer: LayerCache | None = None) -> Tensor:  # (B, T, C) -> (B, T, C)
        qkv = self.qkv(x)
        if layer is not None and not layer.is_empty:
            x = ops.cached_attention(qkv, self.n_head, layer)
        else:  # no earlier tokens
            if layer is not None:
                layer.append(qkv, self.n_head)
            x = ops.attention(qkv, self.n_head, self.drop.p if self.training else 0.0)
        return self.drop(self.proj(x))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, ops: Ops) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.drop(self.proj(ops.gelu(self.fc(x))))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, ops: Ops, layer: LayerCache | None = None) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x), ops, layer)
        return x + self.mlp(self.ln_2(x), ops)


class Embedding(nn.Embedding):
    """An embedding whose weight also serves as the head: GPT-2 ties them."""

    def reset_parameters(self) -> None:
        """Does nothing, because `initialize` sets the values. On the meta device, where load_model creates models,
        torch's own method would import torch's compiler, which takes seconds."""

    def logits(self, x: Tensor) -> Tensor:  # (..., C) -> (..., rows)
        return F.linear(x, self.weight)

    def losses(self, x: Tensor, targets: Tensor, vocab_size: int) -> Tensor:  # (N, C), (N,) -> (N,)
        return cross_entropy(x, self.weight, targets, vocab_size)


class GPT(nn.Module):
    """A decoder-only transformer. `vocab_size` comes from the tokenizer. Inside, the vocabulary is padded with rows
    that are zero and stay zero: no softmax includes them, they get no gradient and are never saved."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        refuse(config.problems())
        self.config, self.vocab_size = config, vocab_size
        self.token = Embedding(padded_vocabulary(vocab_size), config.n_embd)
        self.position = Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        initialize(self)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, cache: KVCache | None = None, ops: Ops = REFERENCE
    ) -> Tensor:
        """Returns for ids (B, T) the losses (B, T) in nats at targets (B, T), 0 where a target is IGNORED; without
        targets the logits (B, V) of the last position. Both are float32. With a cache, the T tokens continue its rows.
        Raises ValueError for a position past block_size: see `check_positions`."""
        x = self.hidden(ids, cache, ops)
        return self.head(x[:, -1]) if targets is None else self.losses(x, targets)

    def hidden(self, ids: Tensor, cache: KVCache | None = None, ops: Ops = REFERENCE) -> Tensor:
        """Returns the final hidden states (B, T, C), the input of the head, for ids (B, T). With a cache, appends the
        keys and values of `ids` to it, which is all that prefilling needs. Raises ValueError as `forward` does."""
        self.check_positions(ids.shape[1], cache)
        positions = torch.arange(ids.shape[1], device=ids.device)
        layers: list[LayerCache] | list[None] = [None] * len(self.blocks)
        if cache is not None:
            positions = cache.lengths[:, None] + positions  # (B, T)
            layers = cache.layers(positions)
        x = self.run_blocks(ids, positions, layers, ops)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.ln_f(x)

    def run_blocks(self, ids: Tensor, positions: Tensor, layers: Sequence[LayerCache] | list[None], ops: Ops) -> Tensor:
        """Returns the output (B, T, C) of the last block for ids (B, T) at `positions` (T,) or (B, T). `layers` are the
        caches of the layers, or None for each."""
        x = self.drop(self.token(ids) + self.position(positions))
        for block, layer in zip(self.blocks, layers, strict=True):
            x = ops.block(block, x, ops, layer)
        return x

    def check_positions(self, tokens: int, cache: KVCache | None) -> None:
        """Raises ValueError if a row would have more than block_size positions after `tokens` more. Reads the lengths
        of `cache` on a CPU only: on a GPU the host would have to wait for them, so the caller must count there."""
        earlier = 0
        if cache is not None and cache.lengths.device.type == "cpu" and not torch.compiler.is_compiling():
            earlier = int(cache.lengths.max())
        if earlier + tokens > self.config.block_size:
            raise ValueError(f"position {earlier + tokens} is past block_size {self.config.block_size}")

    def head(self, x: Tensor) -> Tensor:  # (..., C) -> logits (..., V), float32
        return self.token.logits(x)[..., : self.vocab_size].float()

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:  # (B, T, C), (B, T) -> (B, T)
        return self.token.losses(x.flatten(0, 1), targets.flatten(), self.vocab_size).view(targets.shape)

    def set_dropout(self, dropout: float) -> None:
        """Changes the share of activations that training drops."""
        self.config = replace(self.config, dropout=dropout)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout

    @torch.no_grad()
    def crop_context(self, block_size: int) -> None:
        """Shortens the context to its first `block_size` positions."""
        self.config = replace(self.config, block_size=block_size)
        self.position.weight = nn.Parameter(self.position.weight[:block_size].clone())

    @property
    def dtype(self) -> torch.dtype:
        """The type of the activations, and of the weights unless they are quantized."""
        return self.position.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.position.weight.device

    def num_parameters(self, trained: bool = False) -> int:
        """Returns the number of parameters of the architecture, or of those that are not frozen: without padding of the
        vocabulary, and with the tied head counted once."""
        sizes = {name: p.numel() for name, p in self.named_parameters() if p.requires_grad or not trained}
        if "token.weight" in sizes:
            sizes["token.weight"] = self.vocab_size * self.config.n_embd
        return sum(sizes.values())


@torch.no_grad()
def initialize(model: GPT) -> None:
    """Sets GPT-2's initial weights: normal with std 0.02, projections into the residual stream divided by
    sqrt(2 n_layer), biases 0, layer norms 1. Does nothing on the meta device. Raises ValueError for an unknown
    parameter."""
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


def padded_vocabulary(vocab_size: int) -> int:
    """Returns the number of embedding rows: `vocab_size` rounded up to a multiple of VOCAB_MULTIPLE."""
    return math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def hidden_parameters(config: ModelConfig) -> int:
    """Returns the number of weights in the matrices between embedding and head."""
    return 12 * config.n_layer * config.n_embd**2


def count_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Returns the number of weights in all matrices. Leaves out biases and layer norms, which are few."""
    return (vocab_size + config.block_size) * config.n_embd + hidden_parameters(config)


def total_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Returns the number of all parameters, as GPT.num_parameters does for a model."""
    return count_parameters(config, vocab_size) + (13 * config.n_layer + 2) * config.n_embd


def flops_per_token(config: ModelConfig, vocab_size: int, trained: float = 1.0) -> float:
    """Returns the FLOPs of training on one token, forward and backward: products with weights, and full attention. Only
    the share `trained` of the weights has gradients. Source: PaLM (Chowdhery et al. 2022), appendix B."""
    products = hidden_parameters(config) + vocab_size * config.n_embd
    return (4 + 2 * trained) * products + 12 * config.n_layer * config.n_embd * config.block_size
