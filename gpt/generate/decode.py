"""Texts in row slots: which text a row holds, prefill, steps, sliding past the context, refilling.

Shapes: R row slots, S cache positions (block_size). Each text in progress (a Sequence) holds one slot. All slots
advance together by one token per step, and a slot whose text is finished takes the next waiting one."""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from gpt.device import to_device
from gpt.errors import NonFiniteError
from gpt.generate.backend import Backend
from gpt.generate.sampling import UNDECIDED
from gpt.generate.sequence import Sequence
from gpt.generate.step import CapturedStep, Report, Results, Step, out_of_memory

NO_MEMORY = "out of memory|can't allocate memory|not enough memory"  # torch's words, on GPUs and on CPUs


class Launch(NamedTuple):
    """Steps under way."""

    wait: Callable[[], Results]
    slots: list[Sequence | None]
    """the Sequence that each row held when they began; None also where the results no longer count"""
    lengths: np.ndarray
    """(R,) positions that each row's cache held when they began"""


class Decoder:
    """R row slots over one static cache, R being `backend.slots(rows)`. A text depends on its own prompt and on R
    alone: each row is prefilled by itself, and in the common step every row's arithmetic is its own."""

    def __init__(self, backend: Backend, rows: int, eot: int, banned=()):
        self.model = backend.model
        self.step = Step(backend, backend.slots(rows), eot, banned)
        self.launcher = CapturedStep(self.step) if backend.captures else self.step
        self.capacity = self.model.config.block_size
        self.slots: list[Sequence | None] = [None] * len(self.step)  # an idle row goes on with whatever it chooses
        self.prompts: list[list | None] = [None] * len(self.step)  # the prompt that a row's cache begins with
        self.lengths = np.zeros(len(self.step), dtype=np.int64)  # positions of each row, with all steps under way
        self.under_way: deque[Launch] = deque()

    def run(self, waiting: Iterable[Sequence], report: Report = Report()) -> Iterator[tuple[Sequence, str]]:  # noqa: B008
        """Generates the Sequences of `waiting`, taken as slots become free. Yields (sequence, piece of text) after each
        token; with the last one `sequence.finish_reason` is set. Raises NonFiniteError, and ResourceError where memory
        runs out."""
        waiting, training = iter(waiting), self.model.training
        self.empty(report)
        if training:  # eval() visits all modules, which takes milliseconds
            self.model.eval()
        try:
            while True:
                yield from self.fill_slots(waiting)
                if not any(self.slots):
                    return
                self.launch()
                while self.under_way and (len(self.under_way) > self.launcher.lag or self.must_wait()):
                    yield from self.deliver(self.under_way.popleft())
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not re.search(NO_MEMORY, str(error)):
                raise
            raise out_of_memory(self.model, len(self.step)) from None
        finally:
            if training:
                self.model.train()

    def empty(self, report: Report) -> None:
        """Drops what an earlier run, perhaps an interrupted one, left here."""
        self.slots = [None] * len(self.step)
        self.prompts = [None] * len(self.step)
        self.under_way.clear()
        self.step.report = report
        self.step.narrow = self.step.backend.narrow
        for row in range(len(self.step)):
            self.step.filters.set(row, None)
            self.set_length(row, 0)

    def set_length(self, row: int, tokens: int) -> None:
        self.step.cache.set_length(row, tokens)
        self.lengths[row] = tokens

    def must_wait(self) -> bool:
        """Returns whether the next launch needs the results of all before it: a row is full, or none has work."""
        return self.lengths.max() == self.capacity or not any(self.slots)

    def fill_slots(self, waiting: Iterator[Sequence]) -> Iterator[tuple[Sequence, str]]:
        """Starts the next waiting sequences in the free slots; one that asks for no token is finished at once."""
        for slot in range(len(self.slots)):
            while self.slots[slot] is None and (sequence := next(waiting, None)) is not None:
                if sequence.params.max_new_tokens == 0:
                    yield sequence, sequence.finish("length")
                else:
                    self.start(slot, sequence)

    @torch.inference_mode()
    def start(self, slot: int, sequence: Sequence) -> None:
        """Gives `slot` to `sequence`. All of its prompt but the last id, which the next step reads, goes into the
        cache: copied from a row that begins with the same prompt, if there is one."""
        source = next((row for row, prompt in enumerate(self.prompts) if prompt is sequence.prompt), None)
        ids = self.on_device(sequence.prompt)
        if source is None:
            self.step.prefill(slot, ids[:-1])
        else:
            self.step.copy_prompt(source, slot, len(ids) - 1)
        self.slots[slot], self.prompts[slot], self.lengths[slot] = sequence, sequence.prompt, len(ids) - 1
        self.step.start(slot, ids, sequence.params.sampling, sequence.params.ignore_eot)

    def on_device(self, ids: list[int]) -> torch.Tensor:
        return to_device(torch.tensor(ids), self.step.device)

    def launch(self) -> None:
        """Starts the next steps: as many as one launch may have, or one where a row is almost full."""
        if self.lengths.max() == self.capacity:
            self.make_room()
        room = self.capacity - self.lengths.max()
        steps = self.launcher.most if room >= self.launcher.most else 1
        for slot, sequence in enumerate(self.slots):
            if sequence is not None and sequence.params.sampling.temperature:
                self.step.draw_ahead(slot, (sequence.params.seed, sequence.prompt_id, sequence.sample), steps)
        lengths = self.lengths.copy()
        self.under_way.append(Launch(self.launcher.launch(steps), list(self.slots), lengths))
        self.lengths += steps
        self.step.launched += steps

    @torch.inference_mode()
    def make_room(self) -> None:
        """Shortens full rows. Learned positions cannot slide inside a cache, so the last S // 2 ids of the text, the
        one just chosen included, are prefilled anew from position 0. An idle row is emptied."""
        for slot in np.flatnonzero(self.lengths == self.capacity):
            sequence = self.slots[slot]
            self.prompts[slot] = None
            if sequence is None:
                self.set_length(slot, 0)
                continue
            kept = self.on_device(sequence.window(max(1, self.capacity // 2)))
            self.step.prefill(slot, kept[:-1])
            self.lengths[slot] = len(kept) - 1
            self.step.mark_seen(slot, kept)

    def deliver(self, launch: Launch) -> Iterator[tuple[Sequence, str]]:
        """Gives the tokens of a launch to its sequences; tokens chosen past a text's end are dropped."""
        for number, (ids, logprobs, likeliest) in enumerate(launch.wait()):
            for slot, sequence in enumerate(launch.slots):
                if sequence is None or sequence.finish_reason:
                    continue
                if ids[slot] == UNDECIDED:
                    self.repeat(slot, launch, number)
                    continue
                if ids[slot] < 0:
                    raise non_finite(sequence)
                piece = sequence.take(ids[slot], logprobs[slot], likeliest[slot])
                if sequence.finish_reason and self.slots[slot] is sequence:
                    self.slots[slot] = None
                yield sequence, piece

    @torch.inference_mode()
    def repeat(self, slot: int, launch: Launch, number: int) -> None:
        """Takes a row back to before step `number` of `launch`, which looked at too few tokens to choose one; from now
        on steps look at all tokens. The row's later steps no longer count: none of them prefilled its cache anew."""
        sequence = launch.slots[slot]
        self.step.narrow = False
        for later in (launch, *self.under_way):
            later.slots[slot] = None
        length = int(launch.lengths[slot]) + number
        self.lengths[slot] = length
        self.step.take_back(slot, self.on_device(sequence.window(length + 1)), turn=len(sequence.ids))


def non_finite(sequence: Sequence) -> NonFiniteError:
    return NonFiniteError(
        f"non-finite logits at token {len(sequence.ids) + 1}: prompt {sequence.prompt_id}; "
        "the weights are damaged, or too large for this precision (try --dtype fp32)"
    )
