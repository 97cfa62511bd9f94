"""The model's forward pass by the native library (forward.cpp).

Shapes: R rows of the cache, T new tokens, V vocabulary."""

import ctypes
import weakref

import torch

from gpt.device import empty_together, lie_together

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
CHUNK = 64  # tokens of a prompt that go through the model at once: what lies between layers stays in the CPU's cache

Number, Pointer = ctypes.c_int64, ctypes.c_void_p


# ---- as forward.cpp declares them


class Matrix(ctypes.Structure):
    _fields_ = [(name, Pointer) for name in ("weight", "scale", "bias")]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("norm_1", "shift_1", "norm_2", "shift_2")),
        *((name, Matrix) for name in ("qkv", "proj", "fc", "out")),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *((name, Number) for name in ("kind", "layers", "heads", "width", "positions", "vocabulary")),
        ("layer", ctypes.POINTER(Layer)),
        ("token", Matrix),
        *((name, Pointer) for name in ("position", "norm", "shift")),
    ]


class Cache(ctypes.Structure):
    _fields_ = [
        *((name, Number) for name in ("is_half", "rows", "positions")),
        *((name, ctypes.POINTER(Pointer)) for name in ("keys", "values")),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        *((name, Number) for name in ("tokens", "outputs", "threads")),
        *((name, Pointer) for name in ("ids", "rows", "places", "which", "logits")),
    ]


# ---- the model


def supports(model):
    """Whether the library can run this GPT: on the CPU, all matrices float32, all bfloat16 or all int8."""
    weights = matrices(model)
    return (
        model.device.type == "cpu"
        and model.dtype in (torch.float32, torch.bfloat16)
        and weights[0].dtype in (model.dtype, torch.int8)
        and all(weight.dtype == weights[0].dtype and weight.is_contiguous() for weight in weights)
    )


def matrices(model):
    weights = [model.token.weight]
    for block in model.blocks:
        weights += [part.weight for part in (block.attn.qkv, block.attn.proj, block.mlp.fc, block.mlp.proj)]
    return weights


def move_together(tensors):
    """Move tensors of one type to a piece of memory that is fast to read, where there is one and they do not lie in one
    already."""
    places = None if lie_together(tensors) else empty_together([tensor.shape for tensor in tensors], tensors[0].dtype)
    if places:
        for tensor, place in zip(tensors, places, strict=True):
            tensor.data = place.copy_(tensor)


class NativeModel:
    """A GPT that `supports` accepts, run by a library from build.load_library. May move the model's matrices."""

    @torch.no_grad()
    def __init__(self, model, library):
        move_together(matrices(model))
        self.kept = []  # the tensors that the library reads
        self.steps = weakref.WeakKeyDictionary()  # cache -> the ids of its last step, the call, its logits
        self.config, self.vocab_size = model.config, model.vocab_size
        self.layers = (Layer * len(model.blocks))(*map(self.layer, model.blocks))
        sizes = KINDS[model.token.weight.dtype], len(model.blocks), model.config.n_head, model.config.n_embd
        norm = self.floats(model.ln_f.weight), self.floats(model.ln_f.bias)
        places = self.floats(model.position.weight)
        self.model = Model(
            *sizes, model.config.block_size, model.vocab_size, self.layers, self.matrix(model.token), places, *norm
        )
        self.run = library.gpt_forward
        self.run.restype, self.run.argtypes = Number, [Pointer, Pointer, Pointer]

    def decode(self, ids, cache):
        """Appends ids (R,), one per row, to the cache; returns the logits (R, V) after them, which the next call
        overwrites. Raises ValueError for an id or a position that does not exist."""
        ids, places = ids.contiguous(), cache.lengths
        begun, step, logits = self.steps.get(cache, (None, None, None))
        if begun != (len(ids), ids.data_ptr()):  # the same tensors at every step: what describes them is made once
            rows, logits = torch.arange(len(ids)), torch.empty(len(ids), self.vocab_size)
            begun, step = (len(ids), ids.data_ptr()), self.call(ids, rows, places, cache, logits, rows)
            self.steps[cache] = begun, step, logits
        step()
        cache.advance(1)
        return logits

    def prefill(self, ids, cache):
        """Reads ids (R, T) into the rows of a cache. Raises ValueError for an id or a position that does not exist."""
        for part in ids.split(CHUNK, dim=1):
            places = cache.lengths[:, None] + torch.arange(part.shape[1])
            rows = torch.arange(len(ids))[:, None].expand_as(part).contiguous()
            self.call(part.contiguous(), rows, places, cache)()
            cache.advance(part.shape[1])

    def call(self, ids, rows, places, cache, logits=None, which=None):
        """A function that runs tokens, each with its row and place in the cache, and fills `logits` with those of the
        tokens in `which`; every time anew, from what the tensors then hold."""
        tensors = [ids, rows, places, which, logits]
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        batch = Batch(ids.numel(), 0 if which is None else len(which), torch.get_num_threads(), *pointers)
        described = [ctypes.byref(part) for part in (self.model, describe(cache), batch)]

        def run():
            code = self.run(*described)
            if code < 0:
                raise MemoryError(f"{ids.numel()} tokens at once")
            if code > 0:
                id, row, place = [int(tensor.flatten()[code - 1]) for tensor in tensors[:3]]
                limits = f"vocabulary {self.vocab_size}, block_size {self.config.block_size}"
                raise ValueError(f"token {id} at position {place} of row {row}: {limits}")

        return run

    def layer(self, block):
        norms = (self.floats(value) for norm in (block.ln_1, block.ln_2) for value in (norm.weight, norm.bias))
        products = block.attn.qkv, block.attn.proj, block.mlp.fc, block.mlp.proj
        return Layer(*norms, *map(self.matrix, products))

    def matrix(self, module):
        bias, scale = getattr(module, "bias", None), getattr(module, "scale", None)
        weight = self.pointer(module.weight)
        return Matrix(weight, *[None if values is None else self.floats(values) for values in (scale, bias)])

    def floats(self, tensor):
        return self.pointer(tensor.detach().float().contiguous())

    def pointer(self, tensor):
        self.kept.append(tensor.detach())  # keeps the memory even if somebody gives the parameter another
        return tensor.data_ptr()


def describe(cache):
    """A KVCache, or one row of it, for the library."""
    keys, values = ((Pointer * len(every))(*(t.data_ptr() for t in every)) for every in (cache.keys, cache.values))
    rows, _, positions, _ = cache.keys[0].shape
    return Cache(cache.keys[0].dtype == torch.bfloat16, rows, positions, keys, values)
