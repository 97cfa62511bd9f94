"""Texts in row slots: which text a row holds, prefill, steps, sliding past the context, refilling slots.

Shapes: R row slots, S cache positions (block_size). Each text in progress (a Sequence) holds one slot. All slots
advance together by one token per step, and a slot whose text has ended takes the next waiting text."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from gpt.device import to_device
from gpt.errors import NonFiniteError
from gpt.generate.backend import Backend
from gpt.generate.sampling import UNDECIDED
from gpt.generate.sequence import Events, Sequence
from gpt.generate.step import CapturedStep, Results, Step, memory_errors


class Launch(NamedTuple):
    """Steps that are launched together and whose results are not read yet."""

    wait: Callable[[], Results]
    slots: list[Sequence | None]  # what each row held at the start; None for an idle row, or if its results are dropped
    lengths: np.ndarray  # (R,) positions that each row's cache held at the start


class Decoder:
    """R row slots over one static cache, R being `backend.slots(rows)`. A text does not depend on the texts in other
    rows, only on R: each row is prefilled by itself, and in a step no row's arithmetic depends on another row. The ids
    in `banned` are never chosen; `stops` are the ids that end a text, apart from `eot`."""

    def __init__(
        self, backend: Backend, rows: int, eot: int, banned: Collection[int] = (), stops: Collection[int] = ()
    ):
        self.model = backend.model
        self.step = Step(backend, backend.slots(rows), eot, banned, stops)
        self.launcher: Step | CapturedStep = CapturedStep(self.step) if backend.captures else self.step
        self.capacity = self.model.config.block_size
        self.lengths = np.zeros(len(self.step), dtype=np.int64)  # (R,) positions of each row after all steps in flight
        self.reset(None)

    def reset(self, report: int | None) -> None:
        """Drops the texts of an earlier call, which may have been interrupted. `report` is that of `events`."""
        self.slots: list[Sequence | None] = [None] * len(self.step)  # an idle row continues with arbitrary tokens
        self.prompts: list[list[int] | None] = [None] * len(self.step)  # the prompt that each row's cache begins with
        self.in_flight: deque[Launch] = deque()
        self.lengths[:] = 0
        self.step.reset(report)

    def events(self, sequences: Iterable[Sequence], report: int | None = None) -> Events:
        """Generates the sequences; each waits for a free slot. Yields an event after each token; at a sequence's last
        event its `finish_reason` is set. Unless `report` is None, sequences get the log-probability of each token and
        those of the `report` likeliest tokens. Raises NonFiniteError for logits that are not finite, ResourceError if
        memory runs out."""
        waiting, training = iter(sequences), self.model.training
        self.reset(report)
        if training:  # eval() visits all modules, which takes milliseconds
            self.model.eval()
        try:
            with memory_errors(self.model, len(self.step)):
                while True:
                    yield from self.fill_slots(waiting)
                    if not any(self.slots):
                        return
                    self.launch()
                    while self.in_flight and (len(self.in_flight) > self.launcher.lag or self.must_wait()):
                        yield from self.deliver(self.in_flight.popleft())
        finally:
            if training:
                self.model.train()

    def must_wait(self) -> bool:
        """Returns whether the next launch needs the results of all earlier ones: if a row is full, or no row holds a
        text."""
        return self.lengths.max() == self.capacity or not any(self.slots)

    def fill_slots(self, waiting: Iterator[Sequence]) -> Events:
        """Starts the next `waiting` sequences in the free slots. A sequence with max_new_tokens 0 ends at once; its
        event is yielded."""
        for slot in range(len(self.slots)):
            while self.slots[slot] is None and (sequence := next(waiting, None)) is not None:
                if sequence.params.max_new_tokens == 0:
                    yield sequence, sequence.finish("length")
                else:
                    self.start(slot, sequence)

    @torch.inference_mode()
    def start(self, slot: int, sequence: Sequence) -> None:
        """Gives `slot` to `sequence`. Fills the row's cache with the prompt except its last id, which the next step
        reads: by copying a row whose cache begins with the same prompt, if there is one, else by prefilling."""
        source = next((row for row, prompt in enumerate(self.prompts) if prompt is sequence.prompt), None)
        ids = self.on_device(sequence.prompt)
        if source is None:
            self.step.prefill(slot, ids[:-1])
        elif source != slot:
            self.step.cache.copy_row(source, slot)
        self.slots[slot], self.prompts[slot], self.lengths[slot] = sequence, sequence.prompt, len(ids) - 1
        self.step.set_params(slot, sequence.params)
        self.step.set_window(slot, ids, turn=0)
        self.step.set_text(slot, sequence.params, sequence.prompt, [])

    def on_device(self, ids: list[int]) -> torch.Tensor:
        return to_device(torch.tensor(ids), self.step.device)

    @torch.inference_mode()
    def launch(self) -> None:
        """Launches the next steps: `launcher.most` of them, or one step if a row is almost full."""
        if self.lengths.max() == self.capacity:
            self.make_room()
        room = self.capacity - self.lengths.max()
        steps = self.launcher.most if room >= self.launcher.most else 1
        for slot, sequence in enumerate(self.slots):
            if sequence is not None and sequence.params.sampling.temperature:
                assert sequence.params.seed is not None
                self.step.draw_ahead(slot, (sequence.params.seed, sequence.prompt_id, sequence.sample), steps)
        self.step.repeats.reserve(self.step.launched, steps)
        self.in_flight.append(Launch(self.launcher.launch(steps), list(self.slots), self.lengths.copy()))
        self.lengths += steps
        self.step.launched += steps

    @torch.inference_mode()
    def make_room(self) -> None:
        """Shortens full rows. Learned positions cannot slide inside a cache, so the last S // 2 ids of the text, the
        newest id included, are prefilled again from position 0. Empties full rows that are idle."""
        for slot in np.flatnonzero(self.lengths == self.capacity).tolist():
            sequence = self.slots[slot]
            self.prompts[slot] = None
            if sequence is None:
                self.step.cache.set_length(slot, 0)
                self.lengths[slot] = 0
                continue
            kept = self.on_device(sequence.window(max(1, self.capacity // 2)))
            self.step.prefill(slot, kept[:-1])
            self.step.set_window(slot, kept, turn=len(sequence.ids))
            self.lengths[slot] = len(kept) - 1

    def deliver(self, launch: Launch) -> Events:
        """Waits for a launch, appends its tokens to its sequences and yields their events. Drops tokens that were
        chosen after the end of a text. Raises NonFiniteError if logits are not finite."""
        for number, (ids, logprobs, likeliest) in enumerate(launch.wait()):
            for slot, sequence in enumerate(launch.slots):
                if sequence is None or sequence.finish_reason:
                    continue
                if ids[slot] == UNDECIDED:
                    self.repeat(slot, sequence, launch, number)
                    continue
                if ids[slot] < 0:
                    where = f"at token {len(sequence.ids) + 1}: prompt {sequence.prompt_id}"
                    advice = "the weights are damaged, or too large for this precision (try --dtype fp32)"
                    raise NonFiniteError(f"non-finite logits {where}; {advice}")
                piece = sequence.take(ids[slot], logprobs[slot], likeliest[slot])
                if sequence.finish_reason and self.slots[slot] is sequence:
                    self.slots[slot] = None
                yield sequence, piece

    @torch.inference_mode()
    def repeat(self, slot: int, sequence: Sequence, launch: Launch, number: int) -> None:
        """Takes a row back to its state before step `number` of `launch`, which left the row UNDECIDED: the CANDIDATES
        likeliest tokens were too few to choose from. Steps launched from now on look at all tokens. Discards the
        results of the row's later steps. The cache needs no repair: positions past the new length are overwritten, and
        make_room never runs while steps are in flight."""
        self.step.narrow = False
        for later in (launch, *self.in_flight):
            later.slots[slot] = None
        length = int(launch.lengths[slot]) + number
        self.lengths[slot] = length
        self.step.set_window(slot, self.on_device(sequence.window(length + 1)), turn=len(sequence.ids))
        self.step.set_text(slot, sequence.params, sequence.prompt, sequence.ids)
