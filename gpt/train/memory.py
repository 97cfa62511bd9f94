"""What a training step needs in memory, estimated before it runs, and the micro-batch that fits."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from gpt.checkpoint.adapters import SIZES
from gpt.device import GIB, free_memory, total_memory
from gpt.errors import InputError, ResourceError
from gpt.loss import frozen_rows
from gpt.model import ModelConfig, count_parameters, hidden_parameters, padded_vocabulary
from gpt.train.budget import Progress
from gpt.train.freeze import matches, split_patterns
from gpt.train.lora import OURS, LoraConfig

MIB = 1024**2
MUON_BYTES = 18  # of working memory of Muon's step, per weight between embedding and head
USABLE = 0.6  # share of the free memory that a chosen micro-batch may fill
# Tokens of a chosen micro-batch, by kind of device: more gain nothing. On CUDA twice as many would have more than 2^31
# logits of GPT-2's vocabulary, which kernels then address with 64-bit integers.
MOST_TOKENS = {"cpu": 4096, "cuda": 32_768}
MOST_TOKENS_OF_EXAMPLES = {"cpu": 1024, "cuda": 32_768}  # the fewer in a micro-batch, the less padding they need


@dataclass(frozen=True)
class Method:
    """How a model is trained, as far as its memory depends on it: settings of train.py."""

    optimizer: str = "adamw"
    freeze: str = ""
    lora: LoraConfig = field(default=LoraConfig())
    checkpoint_activations: bool = False

    def freezes_head(self) -> bool:
        """Returns whether the embedding, which is also the head, is frozen."""
        return bool(self.lora.lora_rank) or matches("token.weight", split_patterns(self.freeze))


def estimate(
    model_config: ModelConfig,
    vocab_size: int,
    micro_batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    method: Method = Method(),
) -> dict[str, int]:
    """Returns the number of bytes of weights (fp32), gradients, optimizer state and activations in training.
    Activations are those of one micro-batch in `dtype` at their peak in the backward pass, or Muon's working memory
    after it, if that is more. Layers below all trained parameters count as if gradients passed through them."""
    adapters = method.lora.count_parameters(model_config)
    hidden, others = count_trained(model_config, vocab_size, method.freeze)
    trained = adapters or hidden + others
    by_muon = hidden if method.optimizer == "muon" else 0
    kept = kept_for_backward(model_config, vocab_size, micro_batch_size, dtype, device, method)
    passing = extra_for_backward(model_config, vocab_size, micro_batch_size, dtype, device, method)
    return {
        "weights": 4 * (count_parameters(model_config, vocab_size) + adapters),
        "gradients": 4 * trained,
        "optimizer": 8 * trained - 4 * by_muon,
        "activations": max(kept + passing, MUON_BYTES * by_muon),
    }


def count_trained(config: ModelConfig, vocab_size: int, patterns: str) -> tuple[int, int]:
    """Returns the number of weights that the patterns of --freeze leave in the matrices between embedding and head, and
    in the embeddings. Leaves out biases and layer norms, which are few."""
    sizes = {"token": vocab_size * config.n_embd, "position": config.block_size * config.n_embd}
    others = sum(size for name, size in sizes.items() if not matches(f"{name}.weight", split_patterns(patterns)))
    if not patterns:
        return hidden_parameters(config), others
    names = [f"blocks.{layer}.{ours}.weight" for layer in range(config.n_layer) for ours in OURS.values()]
    weights = [math.prod(SIZES[kind]) * config.n_embd**2 for kind in OURS] * config.n_layer
    left = [n for n, name in zip(weights, names, strict=True) if not matches(name, split_patterns(patterns))]
    return sum(left), others


def kept_for_backward(
    config: ModelConfig,
    vocab_size: int,
    micro_batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    method: Method = Method(),
) -> int:
    """Returns the number of bytes that the forward pass over a micro-batch keeps for the backward pass."""
    c, width = config.n_embd, torch.finfo(dtype).bits // 8
    per_layer = 4 * c if method.checkpoint_activations else layer_bytes(config, dtype, device, method.lora)
    logits = 0 if method.freezes_head() else width * padded_vocabulary(vocab_size)
    per_token = config.n_layer * per_layer + (width + 4) * c + logits  # layers, last layer norm, logits
    copied = count_parameters(config, vocab_size)
    if method.lora.lora_rank and method.checkpoint_activations:  # autocast keeps no copies of frozen weights
        copied = max(vocab_size * c, hidden_parameters(config) // config.n_layer)
    copies = 0 if dtype == torch.float32 else width * copied  # of weights, by autocast
    return micro_batch_size * config.block_size * per_token + copies


def layer_bytes(config: ModelConfig, dtype: torch.dtype, device: torch.device, lora: LoraConfig) -> int:
    """Returns the number of bytes per token that the forward pass of one layer makes for its backward pass."""
    c, width = config.n_embd, torch.finfo(dtype).bits // 8
    mask = 1 if device.type == "cuda" else width  # bytes of an element that dropout drops or not
    targets = lora.kinds or list(SIZES)
    inputs = sum(SIZES[kind][0] for kind in targets if kind != "attn.c_proj")
    per_layer = (inputs + 5) * width * c + 2 * 4 * c  # inputs of products and of GELU; of layer norms, in fp32
    if keeps_scores(config, device):  # q, k, v in fp32, some twice; scores, the mask of dropout, and both multiplied
        per_layer += 4 * 4 * c + 3 * 4 * config.n_head * config.block_size
    else:
        per_layer += 3 * width * c
    if config.dropout:
        per_layer += 2 * c * mask
    if lora.lora_dropout:
        per_layer += sum(SIZES[kind][0] for kind in targets) * c * mask
    return per_layer + len(lora.kinds) * lora.lora_rank * width


def extra_for_backward(
    config: ModelConfig,
    vocab_size: int,
    micro_batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    method: Method = Method(),
) -> int:
    """Returns the number of bytes that the backward pass needs in addition at its peak: the gradients of one layer's
    attention and, with checkpointed activations, all activations of one layer, as far as they need more than the
    logits, whose memory is free by then."""
    tokens, gradients = micro_batch_size * config.block_size, 0
    if keeps_scores(config, device):
        gradients = 4 * config.n_head * config.block_size * tokens
    logits = torch.finfo(dtype).bits // 8 * padded_vocabulary(vocab_size)
    of_layer = 0
    if method.checkpoint_activations:
        of_layer = layer_bytes(config, dtype, device, method.lora) * tokens
    if method.freezes_head():  # the logits of some rows exist at a time, in the forward pass
        return max(gradients + of_layer, logits * min(tokens, frozen_rows(device)))
    return max(0, gradients + of_layer - logits * tokens) if method.checkpoint_activations else gradients


def keeps_scores(config: ModelConfig, device: torch.device) -> bool:
    """Returns whether attention keeps its T x T matrices: torch's fused kernels support dropout on CUDA only."""
    return config.dropout > 0 and device.type != "cuda"


def check_fits(model_config: ModelConfig, vocab_size: int, device: torch.device, method: Method = Method()) -> None:
    """Raises InputError if weights, gradients and optimizer state alone do not fit on the device. Allocates nothing."""
    needs = sum(estimate(model_config, vocab_size, 0, torch.float32, device, method).values())
    if needs > total_memory(device):
        advice = "" if method.lora.lora_rank else ", or fine-tune one with --lora_rank"
        raise InputError(
            f"a model of n_layer {model_config.n_layer}, n_embd {model_config.n_embd} needs {needs:,} bytes to train: "
            f"{device} has {total_memory(device):,}; choose a smaller model{advice}"
        )


def choose_micro_batch(
    model_config: ModelConfig,
    vocab_size: int,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    sharers: int = 1,
    method: Method = Method(),
    examples: bool = False,
) -> int:
    """Returns the largest divisor of `batch_size` with which a step fits into USABLE of the free memory, which
    `sharers` processes share; 1 if none does. A micro-batch of several sequences has at most MOST_TOKENS tokens, or
    MOST_TOKENS_OF_EXAMPLES if the sequences are `examples`."""
    most = (MOST_TOKENS_OF_EXAMPLES if examples else MOST_TOKENS).get(device.type, math.inf)
    room = USABLE * free_memory(device) / sharers
    divisors = [n for n in range(batch_size, 0, -1) if batch_size % n == 0]
    for size in divisors:
        too_many = size * model_config.block_size > most
        if not too_many and sum(estimate(model_config, vocab_size, size, dtype, device, method).values()) <= room:
            return size
    return 1


def less_if_short(
    model_config: ModelConfig,
    vocab_size: int,
    micro_batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    method: Method,
    sharers: int = 1,
) -> int:
    """Returns the bytes that a step needs with checkpointed activations, if one without them needs more than is free
    beside the weights, which are on the device already, and more than with them; else 0."""
    needs = estimate(model_config, vocab_size, micro_batch_size, dtype, device, method)
    cheaper = replace(method, checkpoint_activations=True)
    less = sum(estimate(model_config, vocab_size, micro_batch_size, dtype, device, cheaper).values())
    total, free = sum(needs.values()), free_memory(device) / sharers
    return less if total > max(less, free + needs["weights"]) else 0


@contextlib.contextmanager
def out_of_memory_errors(progress: Progress, block_size: int, method: Method) -> Iterator[None]:
    """Turns torch's error about GPU memory into a ResourceError that names the sizes, and what needs less memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        sizes = f"micro_batch_size {progress.micro_batch_size}, block_size {block_size}"
        others = "" if method.checkpoint_activations else ", or give --checkpoint_activations"
        raise ResourceError(f"out of GPU memory: {sizes}; lower --micro_batch_size{others}") from None


def memory_line(needs: dict[str, int], less: int = 0) -> str:
    """Returns the memory line: "memory: weights 0.5 + gradients 0.5 + optimizer 0.9 + activations 2.1 = 4.0 GiB
    (estimated)", in MiB below 1 GiB. `less`: what would be needed with checkpointed activations, to recommend them."""
    total = sum(needs.values())
    unit, name = (GIB, "GiB") if total >= GIB else (MIB, "MiB")
    parts = " + ".join(f"{part} {size / unit:.1f}" for part, size in needs.items())
    advice = f"; more than is free: --checkpoint_activations needs {less / unit:.1f} {name}" if less else ""
    return f"memory: {parts} = {total / unit:.1f} {name} (estimated){advice}"
