"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): a block keeps its input alone, and computes the rest
once more in the backward pass."""

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpt.attention import LayerCache
from gpt.model import Block, Ops


def recomputed(block: Block, x: Tensor, ops: Ops, layer: LayerCache | None) -> Tensor:
    """Returns block(x, ops, layer), and makes its activations anew in the backward pass, with the same random numbers:
    the gradients are the same to the bit. To be the field `block` of Ops."""
    return checkpoint(block, x, ops, layer, use_reentrant=False)
