"""CUDA graphs: a function's kernels are recorded once, and then launched all together.

The host needs some microseconds to launch a kernel. Where kernels are short, the GPU waits for the host; a graph needs
one launch for all. The functions recorded here read no values on the host and change tensors in place."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
Result = TypeVar("Result")


class CudaGraph(Generic[T]):
    """One recorded function. Graphs that never run at the same time may share a memory pool and a stream."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None, pool: Any = None):
        self.stream, self.pool = stream or torch.cuda.Stream(device), pool
        self.graph = torch.cuda.CUDAGraph()
        self.result: T  # of the recorded function

    def warm_up(self, function: Callable[[], Result]) -> Result:
        """Runs function() on the stream of the recording and returns its result. Libraries keep a workspace for each
        stream, so running it elsewhere would not prepare the recording."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def capture(self, function: Callable[[], T]) -> T:
        """Records function() without running it; returns its result, which every replay fills anew. Raises RuntimeError
        if the function waits for the GPU or memory runs out; the state of the random numbers and the current stream are
        then restored."""
        generator = torch.cuda.default_generators[self.stream.device.index]
        state = generator.clone_state()
        # "thread_local": another thread may fetch the next batch during the recording.
        recording = torch.cuda.graph(self.graph, self.pool, self.stream, capture_error_mode="thread_local")
        try:
            # The outer context restores the current stream if ending a failed recording raises.
            with torch.cuda.stream(torch.cuda.current_stream()), recording:
                self.result = function()
        except RuntimeError:
            generator.graphsafe_set_state(state)  # set_state would wait for the end of the recording
            raise
        return self.result

    def replay(self) -> T:
        """Launches the recorded kernels; returns the result, in the same memory each time."""
        self.graph.replay()
        return self.result
