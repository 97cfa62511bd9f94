"""A training step as a CUDA graph: the host launches it as a whole. Of a small model's step it launches hundreds of
kernels otherwise, and the GPU is done with each before the next one comes."""

import torch

from gpt.errors import note

WARM_UPS = 3  # steps before one is captured: optimizers make their state in them, libraries set themselves up


class GraphedStep:
    """`step(batch, lr)`, of tensors, with the same results to the bit where float32 holds `lr` exactly: after the
    first steps it is captured by `graph`, a CudaGraph, and replayed. Whatever a step keeps for the next one must stay
    where it is in memory. If it cannot be captured, one note says so; `clear()` drops what a step has left that broke
    off."""

    def __init__(self, step, graph, clear):
        self.step, self.graph, self.clear = step, graph, clear
        self.taken, self.captured = 0, False
        self.batch = self.lr = None

    def __call__(self, batch, lr):
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

    def run(self):
        return self.step(self.batch, self.lr)

    def capture(self):
        try:
            self.graph.capture(self.run)
            self.captured = True
        except RuntimeError as error:  # of torch and CUDA; out of memory is one too
            self.clear()
            reason = str(error.__context__ or error).partition("\n")[0]  # ending the recording fails too
            note("warning", f"no CUDA graph, steps are launched one by one: {reason}")


class CudaGraph:
    """What a function launches on a GPU: recorded, then launched as a whole."""

    def __init__(self, device):
        self.stream, self.graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()

    def warm_up(self, function):
        """function(), run where it will be recorded: libraries keep a workspace for each stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def capture(self, function):
        """Record function(), which is not run. Raises RuntimeError where it waits for the GPU, or memory lacks; then
        the random numbers and the current stream are as before."""
        generator = torch.cuda.default_generators[self.stream.device.index]
        draws = generator.clone_state()
        recording = torch.cuda.graph(  # meanwhile another thread may fetch the next batch
            self.graph, stream=self.stream, capture_error_mode="thread_local"
        )
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), recording:
                self.result = function()
        except RuntimeError:
            generator.graphsafe_set_state(draws)  # its own would wait for the end of the recording
            raise

    def replay(self):
        """Launch what was recorded; its result, in the same memory each time."""
        self.graph.replay()
        return self.result
