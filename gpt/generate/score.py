"""Scores how well a model predicts a text: perplexity and bits per byte, over windows that overlap."""

import math
from dataclasses import dataclass

import torch

from gpt.errors import InputError
from gpt.model import GPT
from gpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    nats: float  # minus the log-probability of the whole text
    tokens: int
    bytes: int
    ids: list[int]
    logprobs: list[float]  # of each id given all ids before it in its window, in nats

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


@torch.inference_mode()
def score_text(model: GPT, tokenizer: Tokenizer, text: str, stride: int = 0) -> Score:
    """Returns the Score of `text`, predicted after an end-of-text. Windows of block_size tokens begin every `stride`
    tokens (0: half a window), so the model sees at least block_size - stride tokens before each token, except in the
    first window. A stride of block_size is fastest. Raises InputError if the text is empty or the stride is longer than
    a window."""
    ids, size = tokenizer.encode(text), model.config.block_size
    stride = stride or max(1, size // 2)
    if not ids:
        raise InputError("text is empty: nothing to score; give some")
    if not 1 <= stride <= size:
        raise InputError(f"stride {stride}: must be from 1 to the context, {size}")
    tokens = torch.tensor([tokenizer.eot, *ids])
    losses: list[float] = []
    training = model.training
    model.eval()
    try:
        for start in range(0, len(ids), stride):
            window = tokens[start : start + size + 1].to(model.device)[None]
            scored = len(losses) - start  # tokens of this window that earlier windows have scored
            losses += model.forward(window[:, :-1], window[:, 1:])[0, scored:].tolist()
            if len(losses) == len(ids):
                break
    finally:
        model.train(training)
    return Score(math.fsum(losses), len(ids), len(tokenizer.decode_bytes(ids)), ids, [-loss for loss in losses])
