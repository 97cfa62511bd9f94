"""A training step as a CUDA graph: the step of a small model is hundreds of short kernels, which the host launches more
slowly than the GPU runs them."""

from collections.abc import Callable

import torch

from gpt.errors import note
from gpt.kernels.cuda_graph import CudaGraph

WARM_UPS = 3  # steps before the capture: optimizers make their state in them, libraries set themselves up


class GraphedStep:
    """Runs `step(batch, lr)`, on tensors: the first steps as they are, then captured by `graph`, a CudaGraph, and
    replayed. The results are the same to the bit where float32 holds `lr` exactly. All that a step keeps for the next
    one must stay at its address. If a capture fails, a note says so, steps go on uncaptured, and `clear()` drops what
    the failed one left."""

    def __init__(self, step: Callable, graph: CudaGraph, clear: Callable[[], None]):
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
        except RuntimeError as error:  # of torch and CUDA; out of memory is one too
            self.clear()
            reason = str(error.__context__ or error).partition("\n")[0]  # ending the recording fails, too
            note("warning", f"no CUDA graph, steps are launched one by one: {reason}")
