"""Causal attention over whole sequences, in training and prefill.

Shapes: B batch rows, H heads, T positions, D width of a head, C = H D."""

import torch.nn.functional as F


def causal_attention(qkv, heads, dropout=0.0):
    """Attention of each position to itself and those before it: queries, keys and values (B, T, 3 C) -> (B, T, C). On
    CUDA torch knows the fastest fused kernel that is safe: cuDNN's on Hopper and its successor from cuDNN 9.15.1 on
    (earlier ones read beyond sequences), FlashAttention elsewhere and where results must repeat to the bit."""
    return merge_heads(F.scaled_dot_product_attention(*split_heads(qkv, heads), is_causal=True, dropout_p=dropout))


def split_heads(qkv, heads):
    """(B, T, 3 C) -> 3 x (B, H, T, D)"""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def merge_heads(x):
    """(B, H, T, D) -> (B, T, C)"""
    return x.transpose(1, 2).flatten(2)
