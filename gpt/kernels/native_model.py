"""The model's forward pass on a CPU, by the native library (model.cpp).

Shapes: R rows of the cache, T new tokens of each, V vocabulary."""

import ctypes
import weakref
from typing import cast

import torch
from torch import Tensor

from gpt.device import empty_together, lie_together
from gpt.kernels.structures import Number, Pointer, address, numbers, pointers
from gpt.model import GPT, Block, Embedding, KVCache

KINDS = {  # (type of the matrices, type of the activations and the cache) -> number of the C++ function
    (torch.float32, torch.float32): 0,
    (torch.bfloat16, torch.bfloat16): 1,
    (torch.int8, torch.float32): 2,
    (torch.int8, torch.bfloat16): 3,
    (torch.float16, torch.float16): 4,
    (torch.int8, torch.float16): 5,
}
CHUNK = 96  # tokens of a prompt in one call; a multiple of 3 and 4, the tokens of a tile, so that all tiles are full


class Matrix(ctypes.Structure):
    _fields_ = pointers("weight scale bias")


class Layer(ctypes.Structure):
    _fields_ = [
        *pointers("norm_1 shift_1 norm_2 shift_2"),
        *((name, Matrix) for name in ("qkv", "proj", "fc", "out")),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *numbers("kind layers heads width positions vocabulary"),
        ("layer", ctypes.POINTER(Layer)),
        ("token", Matrix),
        *pointers("position norm shift"),
    ]


class Cache(ctypes.Structure):
    _fields_ = [*numbers("rows capacity"), *((name, ctypes.POINTER(Pointer)) for name in ("keys", "values"))]


class Batch(ctypes.Structure):
    _fields_ = numbers("tokens outputs threads") + pointers("ids rows positions wanted logits")


def supports(model: GPT) -> bool:
    """Returns whether the library can run `model`: it must be on the CPU, with contiguous matrices of one type, and its
    types must be in KINDS."""
    weights = matrices(model)
    return (
        model.device.type == "cpu"
        and (weights[0].dtype, model.dtype) in KINDS
        and all(weight.dtype == weights[0].dtype and weight.is_contiguous() for weight in weights)
    )


def matrices(model: GPT) -> list[torch.Tensor]:
    layers = [layer for block in model.blocks for layer in linear_layers(cast(Block, block))]
    return [model.token.weight, *(layer.weight for layer in layers)]


def linear_layers(block: Block) -> list[torch.nn.Linear]:
    return [block.attn.qkv, block.attn.proj, block.mlp.fc, block.mlp.proj]


def move_together(tensors: list[torch.Tensor]) -> None:
    """Moves tensors of one type into one block of memory with large pages. Does nothing if the system has no such pages
    or the tensors share a block already."""
    targets = None if lie_together(tensors) else empty_together([tensor.shape for tensor in tensors], tensors[0].dtype)
    if targets:
        for tensor, target in zip(tensors, targets, strict=True):
            tensor.data = target.copy_(tensor)


class NativeModel:
    """A GPT that `supports` accepts, run by the library. May move the model's matrices: see `move_together`."""

    @torch.no_grad()
    def __init__(self, model: GPT, library: ctypes.CDLL):
        move_together(matrices(model))
        self.tensors: list[torch.Tensor] = []  # the library reads their memory, even after the model got other weights
        # Each cache's description, the numbers of its rows, and their logits.
        self.caches: weakref.WeakKeyDictionary[KVCache, tuple[Cache, Tensor, Tensor]] = weakref.WeakKeyDictionary()
        self.config, self.vocab_size, self.dtype = model.config, model.vocab_size, model.dtype
        layers = (Layer * len(model.blocks))(*(self.layer(cast(Block, block)) for block in model.blocks))
        self.model = Model(
            *(KINDS[model.token.weight.dtype, model.dtype], len(layers), model.config.n_head, model.config.n_embd),
            *(model.config.block_size, model.vocab_size, layers, self.matrix(model.token)),
            *map(self.floats, (model.position.weight, model.ln_f.weight, model.ln_f.bias)),
        )
        self.function = library.gpt_forward
        self.function.restype, self.function.argtypes = Number, [Pointer, Pointer, Pointer]

    def decode(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Appends the keys and values of ids (R,), one id per row, to the cache; returns the logits (R, V) of the next
        token, which the next call overwrites. Raises ValueError for an id outside the vocabulary or a position beyond
        block_size, MemoryError if memory does not suffice."""
        if cache not in self.caches:  # describing a cache of many layers takes as long as a step of a small model
            rows = torch.arange(len(ids))
            self.caches[cache] = self.describe(cache), rows, torch.empty(len(ids), self.vocab_size)
        described, rows, logits = self.caches[cache]
        self.run(described, ids.contiguous(), rows, cache.lengths, wanted=rows, logits=logits)
        cache.advance(1)
        return logits

    def prefill(self, ids: torch.Tensor, cache: KVCache) -> None:
        """Appends ids (R, T) to the rows of a cache. Raises ValueError for an id outside the vocabulary or a position
        beyond block_size, MemoryError if memory does not suffice."""
        described = self.describe(cache)
        for part in ids.split(CHUNK, dim=1):
            positions = cache.lengths[:, None] + torch.arange(part.shape[1])
            rows = torch.arange(len(ids))[:, None].expand_as(part).contiguous()
            self.run(described, part.contiguous(), rows, positions)
            cache.advance(part.shape[1])

    def run(
        self,
        cache: Cache,
        ids: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        wanted: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
    ) -> None:
        """Runs the model on all `ids`, each at its row in `rows` and its position in `positions`, tensors of the same
        shape. Fills `logits` (W, V) with the logits of the tokens numbered `wanted` (W,)."""
        outputs = 0 if wanted is None else len(wanted)
        arguments = map(address, (ids, rows, positions, wanted, logits))
        batch = Batch(ids.numel(), outputs, torch.get_num_threads(), *arguments)
        code = self.function(*map(ctypes.byref, (self.model, cache, batch)))
        if code < 0:
            raise MemoryError(f"{ids.numel()} tokens at once")
        if code > 0:
            id, row, position = (int(tensor.flatten()[code - 1]) for tensor in (ids, rows, positions))
            limits = f"vocabulary {self.vocab_size}, block_size {self.config.block_size}"
            raise ValueError(f"token {id} at position {position} of row {row}: {limits}")

    # ---- descriptions for the library

    def describe(self, cache: KVCache) -> Cache:
        assert cache.keys[0].dtype == self.dtype
        rows, _, capacity, _ = cache.keys[0].shape
        keys, values = ((Pointer * len(tensors))(*map(address, tensors)) for tensors in (cache.keys, cache.values))
        return Cache(rows, capacity, keys, values)

    def layer(self, block: Block) -> Layer:
        norms = (block.ln_1.weight, block.ln_1.bias, block.ln_2.weight, block.ln_2.bias)
        return Layer(*map(self.floats, norms), *map(self.matrix, linear_layers(block)))

    def matrix(self, module: torch.nn.Linear | Embedding) -> Matrix:
        vectors = (getattr(module, name, None) for name in ("scale", "bias"))
        return Matrix(self.pointer(module.weight), *map(self.floats, vectors))

    def floats(self, tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else self.pointer(tensor.detach().float().contiguous())

    def pointer(self, tensor: torch.Tensor) -> int:
        self.tensors.append(tensor.detach())
        return tensor.data_ptr()
