"""Texts in row slots: prefill, steps, sliding past the context, refilling; whatever runs the step.

Shapes: R row slots, S cache positions (block_size). Each text under way (a Sequence) holds one slot; all slots advance
together by one token a step, and a slot whose text is finished takes the next one that waits."""

import re
from collections import deque

import numpy as np
import torch

from gpt.errors import NonFiniteError
from gpt.sampling import UNDECIDED
from gpt.step import Rows, out_of_memory

NO_MEMORY = "out of memory|can't allocate memory|not enough memory"  # what torch says, on GPUs and on CPUs


class Launch:
    """Steps under way: where each row stood when they began, and which Sequence it held."""

    def __init__(self, wait, steps, slots, counts):
        self.wait, self.steps, self.slots, self.counts = wait, steps, list(slots), counts.copy()


class Decoder:
    """R row slots over one static cache; R is backend.slots(rows). What a row computes depends on its own text and on R
    alone: it is prefilled by itself, and in the common step every row's arithmetic is its own."""

    def __init__(self, backend, rows, eot, banned=()):
        self.backend, self.model = backend, backend.model
        self.rows = Rows(self.model, backend.slots(rows), eot, banned, backend.attention)
        self.launcher = backend.launcher(self.rows)
        self.cache = self.rows.cache
        self.slots = [None] * len(self.rows)  # the Sequence of each row; an idle row goes on with whatever it chooses
        self.begins_with = [None] * len(self.rows)  # the prompt that a row's cache begins with
        self.under_way = deque()  # Launches whose results were not fetched yet

    def run(self, waiting, reports=(False, 0)):
        """Generate the Sequences of the iterable `waiting`, taken as slots become free. Yields (sequence, piece of
        text) after each token; `sequence.finish_reason` is set with the last. `reports`: see Rows. Raises
        NonFiniteError, and ResourceError where memory runs out."""
        waiting, training = iter(waiting), self.model.training
        self.empty(reports)
        if training:  # to visit all modules takes milliseconds
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
            raise out_of_memory(self.model, len(self.rows)) from None
        finally:
            if training:
                self.model.train()

    def empty(self, reports):
        """Forget what an earlier run, perhaps an interrupted one, left here."""
        self.slots = [None] * len(self.rows)
        self.begins_with = [None] * len(self.rows)
        self.under_way.clear()
        self.rows.reports = reports
        self.launcher.backend = self.backend  # perhaps few candidates decide again
        for row in range(len(self.rows)):
            self.rows.filters.set(row, None)
            self.cache.keep(row, 0)  # an interrupt may have come between a step and the host's count of it

    def must_wait(self):
        """Whether the next launch needs the results of all before it: a row is to slide, or none has work."""
        return self.cache.counts.max() == self.model.config.block_size or not any(self.slots)

    def fill_slots(self, waiting):
        """Start the next waiting sequences in the free slots; one that asks for no token is finished at once."""
        for slot in range(len(self.slots)):
            while self.slots[slot] is None and (sequence := next(waiting, None)) is not None:
                if sequence.params.max_new_tokens == 0:
                    yield sequence, sequence.finish("length")
                else:
                    self.start(slot, sequence)

    @torch.inference_mode()
    def start(self, slot, sequence):
        """Give `slot` to `sequence`. All of its prompt but the last id, which the next step reads, goes into the cache:
        copied from a row that begins with it, if there is one."""
        source = next((row for row, prompt in enumerate(self.begins_with) if prompt is sequence.prompt), None)
        ids = self.on_device(sequence.prompt)
        if source is None:
            self.prefill(slot, ids[:-1])
        else:
            if source != slot:
                self.cache.copy_row(source, slot)
            self.cache.keep(slot, len(ids) - 1)
            self.clear_beyond(slot)
        self.slots[slot], self.begins_with[slot] = sequence, sequence.prompt
        self.rows.next[slot] = ids[-1]
        self.rows.begin(slot, sequence.params.sampling, sequence.params.ignore_eot)
        self.rows.mark_seen(slot, ids)

    def prefill(self, slot, ids):
        """Empty the row and read `ids` (T,) into it."""
        self.cache.keep(slot, 0)
        self.clear_beyond(slot)
        if len(ids):
            self.backend.prefill(ids[None], self.cache.row(slot))

    def clear_beyond(self, slot):
        if self.backend.reads_beyond:
            self.cache.clear_beyond(slot)

    def on_device(self, ids):
        """A list of ids as a tensor; the copy to a GPU waits its turn there, and nobody waits for it."""
        ids = torch.tensor(ids)
        return ids.pin_memory().to(self.rows.device, non_blocking=True) if self.rows.device.type == "cuda" else ids

    def launch(self):
        """Begin the next steps: as many as the launcher takes at once, or one where a row comes to the end of its
        cache."""
        capacity = self.model.config.block_size
        if self.cache.counts.max() == capacity:  # seldom
            self.make_room()
        room = capacity - self.cache.counts.max()
        steps = self.launcher.steps if room >= self.launcher.steps else 1
        for slot, sequence in enumerate(self.slots):
            if sequence is not None and sequence.params.sampling.temperature:
                self.rows.draw_ahead(slot, (sequence.params.seed, sequence.prompt_id, sequence.sample), steps)
        counts = self.cache.counts.copy()
        self.under_way.append(Launch(self.launcher.launch(steps), steps, self.slots, counts))
        self.cache.counts += steps
        self.rows.launched += steps

    @torch.inference_mode()
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
            kept = self.on_device(sequence.window(max(1, capacity // 2)))
            self.prefill(slot, kept[:-1])
            self.rows.mark_seen(slot, kept)

    def deliver(self, launch):
        """Give the tokens of a launch to the sequences it was for; those chosen past a text's end are dropped."""
        for step, (ids, logprobs, likeliest) in enumerate(launch.wait()):
            for slot, sequence in enumerate(launch.slots):
                if sequence is None or sequence.finish_reason:
                    continue
                if ids[slot] == UNDECIDED:
                    self.repeat(slot, launch, step)
                    continue
                if ids[slot] < 0:
                    raise non_finite(sequence)
                piece = sequence.take(ids[slot], logprobs[slot], likeliest[slot])
                if sequence.finish_reason and self.slots[slot] is sequence:
                    self.slots[slot] = None
                yield sequence, piece

    @torch.inference_mode()
    def repeat(self, slot, launch, step):
        """Take a row back to before `step` of `launch`, which looked at too few tokens to choose one; look at all of
        them from now on. What the row did since is dropped: nothing was read anew into its cache meanwhile."""
        sequence = launch.slots[slot]
        self.launcher.widen()
        for later in (launch, *self.under_way):
            later.slots[slot] = None
        held = launch.counts[slot] + step
        self.cache.lengths[slot] = int(held)
        self.cache.counts[slot] = held
        window = self.on_device(sequence.window(int(held) + 1))
        self.rows.next[slot] = window[-1]
        self.rows.rewind(slot, len(sequence.ids))
        self.rows.mark_seen(slot, window)


def non_finite(sequence):
    return NonFiniteError(
        f"non-finite logits at token {len(sequence.ids) + 1}: prompt {sequence.prompt_id}; "
        "the weights are damaged, or too large for this precision (try --dtype fp32)"
    )
