"""Prefill on a GPU: the prompts of several rows in one forward pass, in chunks of a fixed shape, as CUDA graphs.

A pass reads one chunk of W tokens for each of P rows. Its shape depends on the length of the text alone (see WIDTHS),
so the kernels, and with them the bits of a text, do not depend on the texts that are read in the same pass. Example
with W = 4, P = 2, S = 16, for texts of 6 and 3 tokens in rows 5 and 2:

    pass   row   positions        tokens of the text that attend to
    1      5     0  1  2  3       each other                            (the first chunk reads nothing from the cache)
           2     0  1  2  15      each other
    2      5     4  5  15 15      all positions up to their own
           5     15 15 15 15      (no text is left: the chunk is padding)

Padding is written to the last position, 15. No row holds a token there while texts are prefilled: a prompt without its
last token has at most S - 1 tokens, and a row that is full is emptied before its next step.

Shapes: R row slots, P rows and W tokens of a pass, S cache positions (block_size), C n_embd, H heads."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from gpt.attention import LayerCache, masked_attention, merge_heads, split_heads
from gpt.device import upload
from gpt.generate.backend import Backend, no_cudnn_attention
from gpt.kernels.cuda_graph import CudaGraph
from gpt.model import KVCache, Ops

WIDTHS = (64, 256)  # tokens of a chunk: the first width that holds the whole text, else the last one
PASS_TOKENS = 512  # of all rows: more rows gain little, and a text that starts alone pays for all of them
WARM_UPS = 2  # passes, or steps, before a capture: compilers and libraries initialise themselves in them


class Pass(NamedTuple):
    """One chunk for each of P rows."""

    width: int
    is_first: bool  # whether the chunks begin at position 0
    values: np.ndarray  # (P, 2 W + 2) int64: ids, positions, row, end of the text in this chunk


class ChunkedPrefill:
    """Fills rows of `cache`. `new_graph` returns a CudaGraph; there is one for each width and kind of chunk."""

    def __init__(self, backend: Backend, cache: KVCache, new_graph: Callable[[], CudaGraph[None]]):
        self.model, self.cache, self.new_graph = backend.model, cache, new_graph
        self.ops = Ops(attention=backend.ops.attention, cached_attention=rows_attention)
        self.graphs: dict[tuple[int, bool], CudaGraph[None]] = {}  # by width and is_first
        self.inputs: dict[int, torch.Tensor] = {}  # by width: Pass.values on the device

    def fill(self, texts: dict[int, list[int]]) -> None:
        """Writes the keys and values of each text, row -> ids, to its row, from position 0 on. Does not wait for the
        device."""
        rows, positions = len(self.cache.lengths), self.model.config.block_size
        for width, is_first, values in passes(texts, rows, positions):
            if width not in self.inputs:
                self.inputs[width] = torch.zeros(values.shape, dtype=torch.int64, device=self.model.device)
            upload(self.inputs[width], values)
            if (width, is_first) not in self.graphs:
                self.graphs[width, is_first] = self.capture(width, is_first)
            self.graphs[width, is_first].replay()

    def capture(self, width: int, is_first: bool) -> CudaGraph[None]:
        """Returns a graph of a pass. Its warm-ups read the real inputs, so all that they write is written again."""

        def run() -> None:
            self.run(self.inputs[width], is_first)

        graph = self.new_graph()
        with no_cudnn_attention(self.model.device):
            for _ in range(WARM_UPS):
                graph.warm_up(run)
            graph.capture(run)
        return graph

    def run(self, values: torch.Tensor, is_first: bool) -> None:
        """Runs a pass on `values` (P, 2 W + 2): see Pass. Reads no value on the host."""
        width = values.shape[1] // 2 - 1
        ids, positions = values[:, :width], values[:, width : 2 * width]
        rows, ends = values[:, -2], values[:, -1]
        beyond = torch.arange(self.model.config.block_size, device=values.device) >= ends[:, None]  # (P, S)
        pairs = zip(self.cache.keys, self.cache.values, strict=True)
        layers = [RowsOfLayer(*pair, positions, is_first, rows, beyond[:, None, :, None]) for pair in pairs]
        self.model.run_blocks(ids, positions, layers, self.ops)


@dataclass
class RowsOfLayer(LayerCache):
    """P rows of a LayerCache of R rows. `keys` and `values` are (R, H, S, D)."""

    rows: torch.Tensor
    """(P,)"""
    beyond: torch.Tensor
    """(P, 1, S, 1) bool, the positions at and beyond the end of the text"""

    def append(self, qkv: torch.Tensor, heads: int) -> torch.Tensor:
        """See LayerCache.append."""
        q, k, v = split_heads(qkv, heads)
        self.keys[self.rows[:, None], :, self.positions] = k.transpose(1, 2)
        self.values[self.rows[:, None], :, self.positions] = v.transpose(1, 2)
        return q


def rows_attention(qkv: torch.Tensor, heads: int, layer: Any) -> torch.Tensor:
    """Appends the new keys and values of qkv (P, W, 3 C) to a RowsOfLayer. Returns the attention (P, W, C) of each new
    position to all positions of its row up to itself."""
    q = layer.append(qkv, heads)
    keys, values = layer.keys[layer.rows], layer.values[layer.rows]
    # The weight of positions beyond the end is 0, and 0 times a nan or infinity of an earlier text would be nan.
    values = values.masked_fill(layer.beyond, 0)
    return merge_heads(masked_attention(q, keys, values, layer.positions))


# ---- passes


def passes(texts: dict[int, list[int]], rows: int, positions: int) -> Iterator[Pass]:
    """Yields the passes that read `texts`, row -> ids, into a cache of `rows` rows and `positions` positions, each
    text's chunks in order."""
    for width in WIDTHS:
        chosen = {row: ids for row, ids in texts.items() if ids and width_for(len(ids)) == width}
        longest = max(map(len, chosen.values()), default=0)
        for start in range(0, longest, width):
            chunks = [(row, ids[start : start + width]) for row, ids in chosen.items() if len(ids) > start]
            size = min(rows, PASS_TOKENS // width)
            for first in range(0, len(chunks), size):
                values = pass_values(chunks[first : first + size], start, (size, width), positions)
                yield Pass(width, start == 0, values)


def width_for(tokens: int) -> int:
    """Returns the width of the chunks for a text of this many tokens."""
    return next((width for width in WIDTHS if tokens <= width), WIDTHS[-1])


def pass_values(chunks: list[tuple[int, list[int]]], start: int, shape: tuple[int, int], positions: int) -> np.ndarray:
    """Returns Pass.values of the shape (P, W) for up to P chunks (row, ids) that begin at position `start`."""
    size, width = shape
    values = np.zeros((size, 2 * width + 2), dtype=np.int64)
    values[:, width : 2 * width] = positions - 1
    values[:, -2] = chunks[0][0]
    for place, (row, ids) in enumerate(chunks):
        end = start + len(ids)
        values[place, : len(ids)] = ids
        values[place, width : width + len(ids)] = np.arange(start, end)
        values[place, -2:] = row, end
    return values
