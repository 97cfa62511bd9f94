"""A training step as a CUDA graph, for small models, whose steps launch hundreds of short kernels."""

from collections.abc import Callable

import torch

from gpt.errors import note
from gpt.kernels.cuda_graph import CudaGraph

WARM_UPS = 3  # steps before the capture, in which optimizers create their state and libraries initialise themselves


class GraphedStep:
    """Calls `step(batch, lr)` with tensors: runs the first WARM_UPS steps directly, then captures a step in `graph`, a
    CudaGraph, and replays it. The results are the same to the bit if float32 holds `lr` exactly. Tensors that a step
    keeps for the next one must stay at their addresses. If the capture fails, warns, calls `clear()` to drop what it
    left, and runs all further steps directly."""

    def __init__(self, step: Callable, graph: CudaGraph[torch.Tensor], clear: Callable[[], None]):
        self.step, self.graph, self.clear = step, graph, clear
        self.taken, self.captured = 0, False
        self.batch: torch.Tensor | None = None

    def __call__(self, batch: torch.Tensor, lr: float) -> torch.Tensor:
        if self.batch is None:
            self.batch, self.lr = torch.empty_like(batch), torch.empty((), device=batch.device)
        assert batch.shape == self.batch.shape, "a step is captured for batches of one shape"
        self.batch.copy_(batch)
        self.lr.fill_(lr)
        if self.taken == WARM_UPS:
            self.capture()
        self.taken += 1
        if self.captured:
            return self.graph.replay().clone()  # the next replay writes there again
        return self.graph.warm_up(self.run)

    def run(self) -> torch.Tensor:
        return self.step(self.batch, self.lr)

    def capture(self) -> None:
        try:
            self.graph.capture(self.run)
            self.captured = True
        except RuntimeError as error:  # from torch or CUDA, out of memory included
            self.clear()
            reason = str(error.__context__ or error).partition("\n")[0]  # the recording's end fails and hides the cause
            note("warning", f"no CUDA graph, steps are launched one by one: {reason}")
