"""A GPU that computes nothing: torch's fake tensors have a shape, a type and a device, but no values. With them the
code for GPUs runs on any machine."""

import contextlib
import ctypes
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from graph_helpers import tensors_in
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
CUDA_TYPE, META_TYPE = 1, 14  # numbers of C++'s c10::DeviceType
OWN_MODULES = ("gpt.", "torch.nn.modules.")
FROM_PYTHON_NUMBERS = ("aten::lift_fresh", "prim::device")
COPIES = ("aten::_to_copy", "aten::copy_")
PRODUCTS = ("aten::linear", "aten::mm", "aten::addmm")


class FakeGpu(TorchDispatchMode):
    """A context in which operations run on tensors that `move` has put on the GPU. Raises an error for what a CUDA
    graph cannot hold: a value that the host reads, a shape that depends on values, a copy between host and device."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode()
        self.moved = {}  # id -> (what was moved, its replacement)
        self.operations = []  # (name, tensors that it returned)

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(self.without_checks())
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operation._schema.name
        has_fake_version = operation is not torch.ops.aten._fused_adamw_.tensor_lr
        results = tensors_in(result := operation(*args, **kwargs) if has_fake_version else None)
        if name not in FROM_PYTHON_NUMBERS:
            numbers = [tensor for tensor in tensors_in((args, kwargs)) if tensor.device != GPU]
            assert all(tensor.dim() == 0 for tensor in numbers), f"{name} reads memory of the host"
            assert not (numbers and name in COPIES), f"{name} copies from the host"
            assert all(tensor.device == GPU for tensor in results), f"{name} writes to the host"
        self.operations.append((name, results))
        return result

    @contextlib.contextmanager
    def without_checks(self):
        """A context for the compiler, which cannot run in the FakeGpu's own."""
        amp = torch.cuda.amp.common
        with (
            cuda_guard(),
            patch.object(torch.Tensor, "backward", backward),
            patch.object(amp, "amp_definitely_not_available", lambda: False),
            patch.object(torch.cuda, "is_bf16_supported", lambda *_: True),
            self.fake,
        ):
            yield

    def product_types(self):
        """Returns the types of the products of linear layers."""
        return {tensor.dtype for name, results in self.operations if name in PRODUCTS for tensor in results}

    def move(self, value):
        """Replaces all tensors and devices in `value` by those of the GPU: in place, but for a tensor, a device or a
        tuple. Returns the result."""
        if isinstance(value, torch.Tensor):
            return self.moved_tensor(value)
        if isinstance(value, torch.device):
            return GPU
        if type(value) is tuple:
            return tuple(map(self.move, value))
        if isinstance(value, list):
            value[:] = map(self.move, value)
        elif isinstance(value, dict):
            pairs = [(self.move(key), self.move(each)) for key, each in value.items()]
            value.clear()
            value.update(pairs)
        elif type(value).__module__.startswith(OWN_MODULES) and id(value) not in self.moved:
            self.moved[id(value)] = value, value
            self.move(getattr(value, "__dict__", {}))
        return value

    def moved_tensor(self, tensor):
        if isinstance(tensor, FakeTensor) or tensor.device == GPU:
            return tensor
        if id(tensor) not in self.moved:
            with self.fake:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            fake = torch.nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
            self.moved[id(tensor)] = tensor, fake
        return self.moved[id(tensor)][1]


class RunAtOnce:
    """Stands in for a CudaGraph: runs a function that shall be recorded."""

    def warm_up(self, function):
        return function()

    def capture(self, function):
        self.result = function()
        return self.result

    def replay(self):
        return self.result


@contextlib.contextmanager
def cuda_guard():
    """Gives CUDA a guard that does nothing, that of the device "meta", without which a CPU build of torch cannot index
    fake CUDA tensors. A CUDA build does so by itself."""
    if torch.backends.cuda.is_built():
        yield
        return
    try:
        library = ctypes.CDLL(next(map(str, Path(torch.__file__).parent.glob("lib/*c10.*"))))
        guards = (ctypes.c_void_p * (META_TYPE + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except ValueError:
        pytest.skip("this build of torch does not show the guards of its devices")
    guards[CUDA_TYPE] = guards[META_TYPE]
    yield
    guards[CUDA_TYPE] = None


def backward(loss):
    """Does what torch.Tensor.backward does, whose C++ needs a real GPU."""
    gradients = {loss.grad_fn: {0: torch.ones_like(loss)}}  # node -> number of its input -> gradient
    with torch.no_grad():
        for node in in_order(loss.grad_fn):
            given = gradients.pop(node)
            if hasattr(node, "variable"):
                parameter = node.variable
                parameter.grad = given[0] if parameter.grad is None else parameter.grad + given[0]
                continue
            call = node.apply if isinstance(node, BackwardCFunction) else node
            results = call(*(given.get(number) for number in range(max(given) + 1)))
            results = results if isinstance(results, tuple) else (results,)
            for (earlier, number), gradient in zip(node.next_functions, results, strict=False):
                if earlier is not None and gradient is not None:
                    wanted, slots = earlier._input_metadata[number], gradients.setdefault(earlier, {})
                    gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
                    slots[number] = slots[number] + gradient if number in slots else gradient


def in_order(last):
    """Returns the nodes of autograd's graph, each after all that use its result."""
    nodes = []

    def visit(node):
        if node is not None and node not in nodes:
            for earlier, _ in node.next_functions:
                visit(earlier)
            nodes.append(node)

    visit(last)
    return nodes[::-1]
