"""Row slots over a static key-value cache: prefill, decode step, sliding past the context, stopping.

Shapes: R row slots, S cache positions (block_size), V vocabulary. Each text under way (a Sequence) holds one slot; all
slots advance together by one token a step, and a slot whose text is finished takes the next one that waits."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from gpt.errors import NonFiniteError, ResourceError
from gpt.model import KVCache
from gpt.sampling import choose, random_draws
from gpt.stream import TextStream

DRAWS_AHEAD = 512  # positions whose random numbers are made at once: their 120 small operations cost as much as a step


@dataclass(frozen=True)
class Completion:
    text: str
    """without the prompt, the stop string and end-of-text"""
    ids: list[int]
    """all ids chosen but end-of-text, those of a stop string too"""
    finish_reason: str
    """why the text ends: "length", or "stop" for end-of-text and stop strings"""
    logprobs: list[float] | None
    """of `ids`, in nats; None unless asked for"""


class Sequence:
    """One text under way: its prompt, what was chosen so far, and whether it is finished."""

    def __init__(self, number, prompt, prompt_id, sample, params, tokenizer):
        self.number, self.prompt, self.prompt_id, self.sample = number, prompt, prompt_id, sample
        self.limit, self.tokenizer, self.stream = params.max_new_tokens, tokenizer, TextStream(params.stop)
        self.ids, self.logprobs, self.pieces = [], [] if params.logprobs else None, []
        self.finish_reason = None

    def take(self, chosen, logprob):
        """Append the id `chosen`; the piece of text that has become certain."""
        if chosen == self.tokenizer.eot:
            return self.finish("stop")
        self.ids.append(chosen)
        if self.logprobs is not None:
            self.logprobs.append(logprob)
        piece = self.stream.push(self.tokenizer.decode_bytes([chosen]))
        self.pieces.append(piece)
        if self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.ids) == self.limit:
            piece += self.finish("length")
        return piece

    def finish(self, reason):
        """End the text; the piece that was held back."""
        piece = self.stream.push(b"", final=True)
        self.pieces.append(piece)
        self.finish_reason = "stop" if self.stream.stopped else reason
        return piece

    def window(self, length):
        """The last `length` ids of prompt and text."""
        missing = length - len(self.ids)
        return self.prompt[-missing:] + self.ids if missing > 0 else self.ids[-length:]

    @property
    def completion(self):
        return Completion("".join(self.pieces), self.ids, self.finish_reason, self.logprobs)


class Decoder:
    """R row slots over one static cache; R is slot_count(rows). What a row computes depends on its own text and on R
    alone: it is prefilled by itself, and in the common step every row's arithmetic is its own."""

    def __init__(self, model, rows, params, banned=(), idle_id=0):
        device = model.token.weight.device
        self.model, self.params, self.device = model, params, device
        rows = slot_count(rows)
        self.cache = new_cache(model, rows)
        self.slots = [None] * rows  # the Sequence of each row; an idle row goes on with whatever it chooses
        self.begins_with = [None] * rows  # the prompt that a row's cache begins with
        self.next = torch.full((rows,), idle_id, device=device)  # (R,) chosen, not yet in the cache
        self.turns = torch.zeros_like(self.next)  # (R,) draws since the row's start
        self.draws = torch.zeros(rows, DRAWS_AHEAD, dtype=torch.int64, device=device)
        self.banned = torch.tensor(banned, dtype=torch.int64, device=device) if banned else None
        self.seen = None  # (R, V): the tokens in each row's window
        if params.sampling.repetition_penalty != 1:
            self.seen = torch.zeros(rows, model.vocab_size, dtype=torch.bool, device=device)

    def run(self, waiting):
        """Generate the Sequences of the iterable `waiting`, taken as slots become free. Yields (sequence, piece of
        text) after each token; `sequence.finish_reason` is set with the last. Raises NonFiniteError."""
        waiting, training = iter(waiting), self.model.training
        self.model.eval()
        try:
            while True:
                yield from self.fill_slots(waiting)
                if not any(self.slots):
                    return
                for slot, (chosen, logprob) in enumerate(zip(*self.step(), strict=True)):
                    sequence = self.slots[slot]
                    if sequence is None:
                        continue
                    if chosen < 0:
                        raise non_finite(sequence)
                    piece = sequence.take(chosen, logprob)
                    if sequence.finish_reason:
                        self.slots[slot] = None
                    yield sequence, piece
        finally:
            self.model.train(training)

    def fill_slots(self, waiting):
        """Start the next waiting sequences in the free slots; one that asks for no token is finished at once."""
        for slot in range(len(self.slots)):
            while self.slots[slot] is None and (sequence := next(waiting, None)) is not None:
                if sequence.limit == 0:
                    yield sequence, sequence.finish("length")
                else:
                    self.start(slot, sequence)

    @torch.inference_mode()
    def start(self, slot, sequence):
        """Give `slot` to `sequence`. All of its prompt but the last id, which the next step reads, goes into the cache:
        copied from a row that begins with it, if there is one."""
        source = next((row for row, prompt in enumerate(self.begins_with) if prompt is sequence.prompt), None)
        if source is None:
            self.prefill(slot, sequence.prompt[:-1])
        else:
            if source != slot:
                self.cache.copy_row(source, slot)
            self.cache.keep(slot, len(sequence.prompt) - 1)
        self.slots[slot], self.begins_with[slot] = sequence, sequence.prompt
        self.next[slot] = sequence.prompt[-1]
        self.turns[slot] = 0
        self.mark_seen(slot, sequence.prompt)

    def prefill(self, slot, ids):
        """Empty the row and read `ids` into it."""
        self.cache.keep(slot, 0)
        if len(ids):
            self.model.forward(torch.tensor([ids], device=self.device), cache=self.cache.row(slot))

    def mark_seen(self, slot, ids):
        if self.seen is not None:
            self.seen[slot] = False
            self.seen[slot, torch.tensor(ids, device=self.device)] = True

    @torch.inference_mode()
    def step(self):
        """Advance all rows by one token: its ids and its log-probabilities (None unless asked for), each R long."""
        self.make_room()
        self.draw_ahead()
        logits = self.model.forward(self.next[:, None], cache=self.cache)  # (R, V)
        if self.seen is not None:
            self.seen.scatter_(1, self.next[:, None], True)
        draws = self.draws.gather(1, self.turns[:, None] % DRAWS_AHEAD)[:, 0]
        ids = choose(logits, self.params.sampling, draws, self.seen, self.banned)
        self.turns += 1
        self.next = ids.clamp(min=0)
        if not self.params.logprobs:
            return ids.tolist(), [None] * len(self.slots)
        return ids.tolist(), logits.log_softmax(-1).gather(1, self.next[:, None])[:, 0].tolist()

    def make_room(self):
        """A row that holds S ids when another was chosen keeps the last S // 2 of its text, that one included. They are
        read afresh from position 0: learned positions cannot slide inside a cache. An idle row is emptied."""
        capacity = self.model.config.block_size
        for slot in np.flatnonzero(self.cache.counts == capacity):
            sequence = self.slots[slot]
            self.begins_with[slot] = None
            if sequence is None:
                self.cache.keep(slot, 0)
                continue
            kept = sequence.window(max(1, capacity // 2))
            self.prefill(slot, kept[:-1])
            self.mark_seen(slot, kept)

    def draw_ahead(self):
        for slot, sequence in enumerate(self.slots):
            if sequence is not None and len(sequence.ids) % DRAWS_AHEAD == 0 and self.params.sampling.temperature:
                key = (self.params.seed, sequence.prompt_id, sequence.sample, len(sequence.ids))
                self.draws[slot] = random_draws(*key, DRAWS_AHEAD, self.device)


def slot_count(rows):
    """The number of row slots for `rows`: above 4 a multiple of 4. In the 5th to 7th row, fp32 matrix products on a CPU
    round differently than in the others, and a text would depend on the slot that it got."""
    return rows if rows <= 4 else math.ceil(rows / 4) * 4


def new_cache(model, rows):
    try:
        return KVCache(model.config, rows, model.token.weight.dtype, model.token.weight.device)
    except RuntimeError:  # of torch.zeros: there is no memory
        context = model.config.block_size
        raise ResourceError(f"out of memory: cache of {rows} rows of {context} tokens; lower --rows") from None


def non_finite(sequence):
    return NonFiniteError(
        f"non-finite logits at token {len(sequence.ids) + 1}: prompt {sequence.prompt_id}; "
        "the weights are damaged, or too large for this precision (try --dtype fp32)"
    )
