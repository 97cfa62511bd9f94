"""Prefill on a GPU: the prompts of several rows in one forward pass, padded to one of a few widths, as CUDA graphs.

A pass reads P texts of up to W tokens. Its shape depends on the length of a text alone (see `width_for`), so the
kernels, and with them the bits of a text, do not depend on the texts that are read in the same pass. Example with
W = 4, P = 3, S = 16, for texts of 3 and 4 tokens in rows 5 and 2:

    row   positions        tokens of the text that attend to each other
    5     0  1  2  15
    2     0  1  2  3
    5     15 15 15 15      (there is no third text: all is padding)

Padding is written to the last position, 15. No row holds a token there while texts are prefilled: a prompt without its
last token has at most S - 1 tokens, and a row that is full is emptied before its next step.

Shapes: R row slots, P texts and W tokens of a pass, S cache positions (block_size), C n_embd, H heads."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gpt.attention import LayerCache, split_heads
from gpt.device import upload
from gpt.generate.backend import Backend, no_cudnn_attention
from gpt.kernels.cuda_graph import CudaGraph
from gpt.model import KVCache

NARROWEST = 64  # tokens; each further width is four times the last
PASS_TOKENS = 1024  # of all texts: more gain little, and a text that starts alone pays for all of them
WARM_UPS = 2  # passes, or steps, before a capture: compilers and libraries initialise themselves in them


class PaddedPrefill:
    """Fills rows of `cache`. `new_graph` returns a CudaGraph; there is one for each width."""

    def __init__(self, backend: Backend, cache: KVCache, new_graph: Callable[[], CudaGraph[None]]):
        self.model, self.ops, self.cache, self.new_graph = backend.model, backend.ops, cache, new_graph
        self.graphs: dict[int, CudaGraph[None]] = {}  # by width
        self.inputs: dict[int, torch.Tensor] = {}  # by width: what `passes` yields, on the device

    def fill(self, texts: dict[int, list[int]]) -> None:
        """Writes the keys and values of each text, row -> ids, to its row, from position 0 on. Does not wait for the
        device."""
        for values in passes(texts, len(self.cache.lengths), self.model.config.block_size):
            width = values.shape[1] // 2
            if width not in self.inputs:
                self.inputs[width] = torch.zeros(values.shape, dtype=torch.int64, device=self.model.device)
            upload(self.inputs[width], values)
            if width not in self.graphs:
                self.graphs[width] = self.capture(width)
            self.graphs[width].replay()

    def capture(self, width: int) -> CudaGraph[None]:
        """Returns a graph of a pass. Its warm-ups read the real inputs, so all that they write is written again."""

        def run() -> None:
            self.run(self.inputs[width])

        graph = self.new_graph()
        with no_cudnn_attention(self.model.device):
            for _ in range(WARM_UPS):
                graph.warm_up(run)
            graph.capture(run)
        return graph

    def run(self, values: torch.Tensor) -> None:
        """Runs a pass on what `passes` yields. Reads no value on the host."""
        width = values.shape[1] // 2
        ids, positions, rows = values[:, :width], values[:, width:-1], values[:, -1]
        pairs = zip(self.cache.keys, self.cache.values, strict=True)
        layers = [RowsOfLayer(keys, held, positions, True, rows) for keys, held in pairs]
        self.model.run_blocks(ids, positions, layers, self.ops)


@dataclass
class RowsOfLayer(LayerCache):
    """P rows of a LayerCache of R rows. `keys` and `values` are (R, H, S, D)."""

    rows: torch.Tensor
    """(P,)"""

    def append(self, qkv: torch.Tensor, heads: int) -> torch.Tensor:
        """See LayerCache.append."""
        q, k, v = split_heads(qkv, heads)
        self.keys[self.rows[:, None], :, self.positions] = k.transpose(1, 2)
        self.values[self.rows[:, None], :, self.positions] = v.transpose(1, 2)
        return q


def passes(texts: dict[int, list[int]], rows: int, positions: int) -> Iterator[np.ndarray]:
    """Yields for each pass that reads `texts`, row -> ids, into a cache of `rows` rows and `positions` positions, what
    it reads: int64 (P, 2 W + 1), the ids, positions and row of each text."""
    by_width: dict[int, list[int]] = {}  # width -> rows
    for row, ids in texts.items():
        if ids:
            by_width.setdefault(width_for(len(ids), positions), []).append(row)
    for width, chosen in sorted(by_width.items()):
        size = max(1, min(rows, PASS_TOKENS // width))
        for first in range(0, len(chosen), size):
            values = np.zeros((size, 2 * width + 1), dtype=np.int64)
            values[:, width:-1] = positions - 1
            values[:, -1] = chosen[first]
            for place, row in enumerate(chosen[first : first + size]):
                ids = texts[row]
                values[place, : len(ids)] = ids
                values[place, width : width + len(ids)] = np.arange(len(ids))
                values[place, -1] = row
            yield values


def width_for(tokens: int, positions: int) -> int:
    """Returns the width of the pass that reads a text of this many tokens, in a context of `positions`."""
    width = NARROWEST
    while width < tokens:
        width *= 4
    return min(width, positions)
