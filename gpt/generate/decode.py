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
from gpt.generate.step import CapturedStep, Results, Step, Window, memory_errors

GROWTH = 4  # of the steps in a launch, from one launch to the next


class Launch(NamedTuple):
    """Steps that are launched together and whose results are not read yet."""

    wait: Callable[[], Results]
    slots: list[Sequence | None]  # what each row held at the start; None for an idle row, or if its results are dropped
    lengths: np.ndarray  # (R,) positions that each row's cache held at the start


class Decoder:
    """R row slots over one static cache, R being `backend.slots(rows)`. A text does not depend on the texts in other
    rows, only on R: in a prefill and in a step, no row's arithmetic depends on another row. The ids in `banned` are
    never chosen; `stops` are the ids that end a text, apart from `eot`."""

    def __init__(
        self, backend: Backend, rows: int, eot: int, banned: Collection[int] = (), stops: Collection[int] = ()
    ):
        self.model = backend.model
        self.step = Step(backend, backend.slots(rows), eot, banned, stops)
        self.launcher: Step | CapturedStep = CapturedStep(self.step) if backend.captures else self.step
        self.capacity = self.model.config.block_size
        self.lengths = np.zeros(len(self.step), dtype=np.int64)  # (R,) positions of each row after all steps in flight
        self.ends = np.zeros_like(self.lengths)  # (R,) max_new_tokens of each row's text, 0 without a text
        self.reset(None)

    def reset(self, report: int | None) -> None:
        """Drops the texts of an earlier call, which may have been interrupted. `report` is that of `events`."""
        self.slots: list[Sequence | None] = [None] * len(self.step)  # an idle row continues with arbitrary tokens
        self.prompts: list[list[int] | None] = [None] * len(self.step)  # the prompt that each row's cache begins with
        self.in_flight: deque[Launch] = deque()
        self.lengths[:] = self.ends[:] = 0
        self.pace = 1  # the most steps of the next launch
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
                    if self.steps_left():
                        self.launch()
                    while self.in_flight and (len(self.in_flight) > self.launcher.lag or self.must_wait()):
                        yield from self.deliver(self.in_flight.popleft())
        finally:
            if training:
                self.model.train()

    def must_wait(self) -> bool:
        """Returns whether the next launch needs the results of all earlier ones: if a row is full, or no text needs
        another step. Also if only first tokens are in flight: a longer launch would delay them."""
        is_full, only_first = self.lengths.max() == self.capacity, self.step.launched[self.ends > 0].max(initial=0) == 1
        return is_full or only_first or self.steps_left() == 0

    def steps_left(self) -> int:
        """Returns the number of steps that the longest text still needs after those in flight; 0 without texts."""
        return max(0, int((self.ends - self.step.launched).max()))

    def fill_slots(self, waiting: Iterator[Sequence]) -> Events:
        """Starts the next `waiting` sequences in the free slots. A sequence with max_new_tokens 0 ends at once; its
        event is yielded."""
        started: dict[int, Sequence] = {}
        for slot, held in enumerate(self.slots):
            while held is None and slot not in started and (sequence := next(waiting, None)) is not None:
                if sequence.params.max_new_tokens == 0:
                    yield sequence, sequence.finish("length")
                else:
                    started[slot] = sequence
        if started:
            self.start(started)

    @torch.inference_mode()
    def start(self, started: dict[int, Sequence]) -> None:
        """Gives each slot to its sequence, slot -> sequence."""
        self.pace = 1
        self.fill_caches({slot: sequence.prompt for slot, sequence in started.items()})
        for slot, sequence in started.items():
            self.slots[slot], self.ends[slot] = sequence, sequence.params.max_new_tokens
            self.lengths[slot] = len(sequence.prompt) - 1
            self.step.set_text(slot, sequence.params, sequence.prompt, [])
        self.step.set_params({slot: sequence.params for slot, sequence in started.items()})
        streams = {slot: (text.params.seed or 0, text.prompt_id, text.sample) for slot, text in started.items()}
        self.step.set_streams(streams)
        self.step.set_windows([Window(slot, sequence.prompt, 0) for slot, sequence in started.items()])

    def fill_caches(self, prompts: dict[int, list[int]]) -> None:
        """Fills the cache of each slot, slot -> prompt, with its prompt except the last id, which the next step reads:
        by copying a row whose cache begins with the same prompt, if there is one, else by prefilling."""
        for slot, prompt in prompts.items():
            if self.prompts[slot] is not prompt:
                self.prompts[slot] = None
        sources = {id(prompt): row for row, prompt in enumerate(self.prompts) if prompt is not None}
        new, copies = {}, {}  # no row is both a source and the target of a copy
        for slot, prompt in prompts.items():
            if id(prompt) not in sources:
                sources[id(prompt)], new[slot] = slot, prompt[:-1]
            elif self.prompts[slot] is None:
                copies[slot] = sources[id(prompt)]
            self.prompts[slot] = prompt
        self.launcher.prefill(new)
        if copies:
            pairs = to_device(torch.tensor([list(copies), list(copies.values())]), self.step.device)
            self.step.cache.copy_rows(pairs[1], pairs[0], max(len(prompts[slot]) for slot in copies) - 1)

    @torch.inference_mode()
    def launch(self) -> None:
        """Launches the next steps: one after a text has begun, for an early first token, then more and more, up to
        `launcher.most`; but no more than a row has room for, nor than the longest text needs."""
        if self.lengths.max() == self.capacity:
            self.make_room()
        room = self.capacity - int(self.lengths.max())
        steps = launch_size(min(self.pace, room, self.steps_left()), self.launcher.most)
        self.pace = min(self.pace * GROWTH, self.launcher.most)
        self.step.draw_ahead(steps)
        self.step.repeats.reserve(self.step.launched, steps)
        self.in_flight.append(Launch(self.launcher.launch(steps), list(self.slots), self.lengths.copy()))
        self.lengths += steps
        self.step.launched += steps

    @torch.inference_mode()
    def make_room(self) -> None:
        """Shortens full rows. Learned positions cannot slide inside a cache, so the last S // 2 ids of the text, the
        newest id included, are prefilled again from position 0. Empties full rows that are idle."""
        windows = []
        for slot in np.flatnonzero(self.lengths == self.capacity).tolist():
            sequence = self.slots[slot]
            self.prompts[slot] = None
            if sequence is None:
                windows.append(Window(slot, [self.step.eot], 0))
            else:
                windows.append(Window(slot, sequence.window(max(1, self.capacity // 2)), len(sequence.ids)))
            self.lengths[slot] = len(windows[-1].ids) - 1
        self.launcher.prefill({slot: ids[:-1] for slot, ids, _ in windows})
        self.step.set_windows(windows)

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
                    self.slots[slot], self.ends[slot] = None, 0
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
        self.step.set_windows([Window(slot, sequence.window(length + 1), len(sequence.ids))])
        self.step.set_text(slot, sequence.params, sequence.prompt, sequence.ids)


def launch_size(limit: int, most: int) -> int:
    """Returns the number of steps of a launch, at most `limit` and `most`. It is one of three, because each size that
    occurs is captured. launch_size(15, 16) -> 4"""
    return next(size for size in (most, most // GROWTH, 1) if 0 < size <= limit)
