"""Functions recorded as CUDA graphs, on a GPU."""

import pytest
import torch

from gpt.kernels.cuda_graph import CudaGraph

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_replay_runs_what_was_recorded_on_what_the_tensors_then_hold():
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.arange(4.0, device=device)
    graph = CudaGraph(device)
    assert graph.warm_up(lambda: x * 2).tolist() == [0, 2, 4, 6]
    result = graph.capture(lambda: x.add_(1) * 2)
    assert x.tolist() == [0, 1, 2, 3]  # a recording runs nothing
    for turn in (1, 2):
        assert graph.replay() is result
        assert result.tolist() == [2 * (value + turn) for value in range(4)]


def test_a_function_that_waits_for_the_gpu_cannot_be_recorded_and_leaves_random_numbers_as_they_were():
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    expected = torch.rand(3, device=device)
    torch.manual_seed(0)
    with pytest.raises(RuntimeError):
        CudaGraph(device).capture(lambda: torch.rand(3, device=device).tolist())
    assert torch.equal(torch.rand(3, device=device), expected)
