"""Functions recorded as CUDA graphs, on a GPU; and what a fake GPU says of functions that cannot be recorded."""

import contextlib

import pytest
import torch
from fake_gpu_helpers import GPU, FakeGpu

from gpt.kernels.cuda_graph import CudaGraph

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NOT_FOR_A_GRAPH = {
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x.sum().item(),
    "if": lambda x: 1 if (x > 0).all() else 2,
    "copy to the host": lambda x: x.cpu(),
    "copy to the host in place": lambda x: torch.zeros(4).copy_(x, non_blocking=True),
    "number from the host": lambda x: torch.tensor(3.0, device=GPU),
    "list from the host": lambda x: torch.tensor([1, 2], device=GPU),
    "tensor of the host": lambda x: x + torch.ones(4),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "repeat": lambda x: x.repeat_interleave(x.long()),
}


@pytest.mark.parametrize("name", NOT_FOR_A_GRAPH)
def test_a_fake_gpu_refuses_what_a_graph_cannot_hold(name):
    gpu = FakeGpu()
    x = gpu.move(torch.ones(4))
    with gpu, pytest.raises((AssertionError, RuntimeError)):
        NOT_FOR_A_GRAPH[name](x)


def test_a_fake_gpu_computes_types_shapes_and_gradients_as_torch_does():
    def losses(weight, x):
        hidden = torch.nn.functional.linear(x, weight)
        hidden[:, 0] = 0.5  # a number is no copy
        return (hidden.view(2, 2, 3) * torch.tensor(2.0)).square().sum((1, 2)).unbind()

    gradients = []
    for gpu in (None, FakeGpu()):
        weight, x = torch.nn.Parameter(torch.ones(3, 5)), torch.ones(4, 5)
        move = gpu.move if gpu else lambda value: value
        weight, x = move(weight), move(x)
        with gpu or contextlib.nullcontext():
            first, second = losses(weight, x)
            (first * second).backward()
        gradients.append(weight.grad)
    assert gradients[1].device == GPU
    assert (gradients[1].shape, gradients[1].dtype) == (gradients[0].shape, gradients[0].dtype)


@NO_GPU
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


@NO_GPU
def test_a_function_that_waits_for_the_gpu_cannot_be_recorded_and_leaves_random_numbers_as_they_were():
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    expected = torch.rand(3, device=device)
    torch.manual_seed(0)
    with pytest.raises(RuntimeError):
        CudaGraph(device).capture(lambda: torch.rand(3, device=device).tolist())
    assert torch.equal(torch.rand(3, device=device), expected)
