"""Causal attention in plain torch: over whole sequences, and of new tokens over a cache.

Shapes: B batch rows, H heads, T new positions, S cache positions, D width of a head, C = H D."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def causal_attention(qkv: torch.Tensor, heads: int, dropout: float = 0.0) -> torch.Tensor:
    """Returns the attention (B, T, C) of each position to itself and the earlier positions; qkv (B, T, 3 C) holds
    queries, keys and values.

    torch chooses a fused kernel. On CUDA it takes the fastest safe one: the kernel of cuDNN on Hopper and newer GPUs
    from cuDNN 9.15.1 on (earlier versions read beyond the end of sequences); FlashAttention on other GPUs, and if
    results must repeat to the bit."""
    q, k, v = split_heads(qkv, heads)
    return merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout))


@dataclass
class LayerCache:
    """The part of a KVCache that belongs to one layer, during one forward pass."""

    keys: torch.Tensor
    """(B, H, S, D)"""
    values: torch.Tensor
    """(B, H, S, D)"""
    positions: torch.Tensor
    """(B, T), those of the new tokens"""
    is_empty: bool
    """whether the new tokens are the first of every row"""

    def append(self, qkv: torch.Tensor, heads: int) -> torch.Tensor:
        """Stores the keys and values of qkv (B, T, 3 C) at their positions; returns the queries (B, H, T, D)."""
        q, k, v = split_heads(qkv, heads)
        rows = torch.arange(len(self.positions), device=self.positions.device)[:, None]
        self.keys[rows, :, self.positions] = k.transpose(1, 2)
        self.values[rows, :, self.positions] = v.transpose(1, 2)
        return q


def cached_attention(qkv: torch.Tensor, heads: int, layer: LayerCache) -> torch.Tensor:
    """Appends the new keys and values of qkv (B, T, 3 C) to the cache. Returns the attention (B, T, C) of each new
    position to all positions of its row up to itself."""
    q = layer.append(qkv, heads)
    return merge_heads(masked_attention(q, layer.keys, layer.values, layer.positions))


def masked_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Returns the attention (B, H, T, D) of queries q (B, H, T, D), at `positions` (B, T), to the cached `keys` and
    `values` (B, H, S, D) up to their own positions.

    Uses two plain matrix products. torch's fused CPU kernel rounds differently in different threads, so a text would
    depend on its row; and for one query in bf16 it takes five times as long."""
    mask = torch.arange(keys.shape[2], device=q.device) <= positions[:, None, :, None]  # (B, 1, T, S)
    scores = (q * q.shape[-1] ** -0.5) @ keys.transpose(-2, -1)  # (B, H, T, S)
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1, dtype=torch.float32)
    return weights.to(q.dtype) @ values


def split_heads(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns queries, keys and values (3, B, H, T, D) of qkv (B, T, 3 C)."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """Returns x (B, H, T, D) as (B, T, C)."""
    return x.transpose(1, 2).flatten(2)
