"""A stand-in for CudaGraph on a CPU, and generators that use it."""

import contextlib
from types import SimpleNamespace

import torch
from generation_helpers import generator_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt.generate import sampling, step
from gpt.generate.backend import Backend
from gpt.generate.generator import weight_versions
from gpt.model import GPT


def tensors_in(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def shares_memory(tensor, other):
    return tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class Recorded(TorchDispatchMode):
    """Does on a CPU what a CudaGraph does on a GPU: keeps the operations of a function with the memory they work on,
    and runs them again without Python. A value that the host reads is an error, as it is there, but for `reads`."""

    def __init__(self, reads=0):
        super().__init__()
        self.reads, self.operations = reads, []
        self.before = []  # (tensor, its value before an operation of the recording has changed it)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            self.reads -= 1
            if self.reads < 0:
                raise RuntimeError("the host waits\nin a recording")
        kwargs = kwargs or {}
        given = zip(operation._schema.arguments, args, strict=False)
        changed = [value for argument, value in given if argument.is_write]
        changed += [
            kwargs[argument.name]
            for argument in operation._schema.arguments
            if argument.is_write and argument.name in kwargs
        ]
        self.before += [(tensor.detach(), tensor.detach().clone()) for tensor in tensors_in(changed)]
        result = operation(*args, **kwargs)
        self.operations.append((operation, args, kwargs, result))
        return result

    def warm_up(self, function):
        return function()

    def capture(self, function):
        """Records a run of `function`, and takes back what it changed: a GPU runs nothing then."""
        draws = torch.get_rng_state()
        try:
            with self:
                self.result = function()
        finally:
            for tensor, value in reversed(self.before):
                tensor.copy_(value)
            self.before.clear()
            torch.set_rng_state(draws)
        return self.result

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, results in self.operations:
            again = tensors_in(operation(*args, **kwargs))
            for tensor, value in zip(tensors_in(results), again, strict=True):
                if not shares_memory(tensor, value):  # else a view, or changed in place
                    tensor.copy_(value)
        return self.result


def capture_on_cpu(monkeypatch):
    """Makes a CapturedStep run on a CPU, with stand-ins for what a GPU does."""
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(step, "CudaGraph", lambda *_: Recorded())
    monkeypatch.setattr(step, "pinned_copy", torch.clone)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    read_nothing(monkeypatch)


def read_nothing(monkeypatch):
    """Makes a step on a CPU read no result on the host, as on a GPU."""
    monkeypatch.setattr(sampling, "host_can_read", lambda _: False)
    monkeypatch.setattr(GPT, "check_positions", lambda *_: None)


def captured_generator(model, captures=True):
    """Returns a TextGenerator of plain torch's back end whose steps and prefills are captured."""
    generator = generator_of(model)
    backend = Backend(generator.model)
    backend.captures = captures
    generator.backends, generator.versions = {"eager": backend}, weight_versions(generator.model)
    return generator


def row_of(cache, row, length):
    """Returns the first `length` keys and values of a row, of all layers in one tensor."""
    return torch.cat([buffer[row, :, :length] for buffer in (*cache.keys, *cache.values)])
