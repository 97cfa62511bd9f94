"""One token for every row: the step that generation repeats, on the device alone, and the same step as CUDA graphs.

Shapes: R rows, S cache positions (block_size), V vocabulary, N likeliest tokens reported."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from gpt.device import GIB, free_memory, pinned_copy
from gpt.errors import ResourceError
from gpt.generate.backend import Backend
from gpt.generate.sampling import Filters, random_draws, top_logprobs
from gpt.kernels.cuda_graph import CudaGraph
from gpt.model import KVCache

DRAWS_AHEAD = 512  # positions whose random numbers are made at once: their 120 small operations cost as much as a step
WARM_UPS = 2  # steps before a capture: compilers and libraries set themselves up in them
TOKENS_PER_LAUNCH = 16  # of a CUDA graph, over all rows: with fewer the GPU waits, more are lost at the end of a text


class Report(NamedTuple):
    """What a step gives beside ids."""

    logprobs: bool = False
    top_logprobs: int = 0
    """the number N of likeliest tokens"""


class Chosen(NamedTuple):
    """What a step chose, on the device; None for what was not asked for."""

    ids: torch.Tensor
    """(R,); below 0 for a row without a choice: see sampling.choose"""
    logprobs: torch.Tensor | None
    """(R,)"""
    top_ids: torch.Tensor | None
    """(R, N)"""
    top_logprobs: torch.Tensor | None
    """(R, N)"""


Results = list[tuple[list, list, list]]  # of each step: ids, log-probabilities, [(id, log-probability)], by row


class Step:
    """The tensors of R rows, and the step that changes them: each row's cache, next id, random numbers and settings.
    All are filled in place, so that a captured step finds them where it left them."""

    most, lag = 1, 0  # steps in one launch; launches that may be under way when the results of one are read

    def __init__(self, backend: Backend, rows: int, eot: int, banned=()):
        model, device = backend.model, backend.model.device
        assert 0 <= eot < model.vocab_size
        self.backend, self.device, self.eot, self.vocab_size = backend, device, eot, model.vocab_size
        self.cache = new_cache(model, rows)
        self.next = torch.full((rows,), eot, device=device)  # (R,) chosen, not yet in the cache
        self.turns = torch.zeros_like(self.next)  # (R,) tokens chosen since the row's start
        self.draws = torch.zeros(rows, 2 * DRAWS_AHEAD, dtype=torch.int64, device=device)  # two blocks, used in turns
        self.drawn = np.zeros(rows, dtype=np.int64)  # draws made since each row's start
        self.launched = np.zeros(rows, dtype=np.int64)  # `turns` on the host, with all steps that are under way
        self.filters = Filters(rows, device)
        self.ignores_eot = torch.zeros(rows, dtype=torch.bool, device=device)  # (R,) rows that never choose `eot`
        self.banned = torch.tensor(banned, dtype=torch.int64, device=device) if len(banned) else None
        self.seen: torch.Tensor | None = None  # (R, V) tokens in each row's window, if a row has a repetition penalty
        self.report = Report()
        self.narrow = backend.narrow  # whether `choose` looks at few candidates and may leave a row undecided

    def __len__(self):
        return len(self.drawn)

    def run(self) -> Chosen:
        """Appends `next` to every row's cache and chooses the token after it."""
        logits = self.backend.decode(self.next, self.cache)  # (R, V)
        top = top_logprobs(logits, self.report.top_logprobs) if self.report.top_logprobs else (None, None)
        logprobs = logits.log_softmax(-1) if self.report.logprobs else None
        if self.seen is not None:
            self.seen.scatter_(1, self.next[:, None], True)
        ids = self.backend.choose(logits, self)  # sets `next` and counts `turns`; may change the logits
        chosen = None if logprobs is None else logprobs.gather(1, self.next[:, None])[:, 0]
        return Chosen(ids, chosen, *top)

    @torch.inference_mode()
    def launch(self, count: int) -> Callable[[], Results]:
        """Starts `count` steps. Returns a function that waits for them and returns their results."""
        chosen = [self.run() for _ in range(count)]
        return lambda: [on_host(each) for each in chosen]

    # ---- rows

    def start(self, row: int, ids: torch.Tensor, sampling, ignore_eot: bool) -> None:
        """Begins a text in a row whose cache holds all of its prompt's `ids` (T,) but the last."""
        self.next[row] = ids[-1]
        self.filters.set(row, sampling)
        self.ignores_eot[row] = ignore_eot
        if self.filters.penalizes and self.seen is None:
            self.seen = torch.zeros(len(self), self.vocab_size, dtype=torch.bool, device=self.device)
        self.mark_seen(row, ids)
        self.set_turn(row, 0)

    def prefill(self, row: int, ids: torch.Tensor) -> None:
        """Empties a row and reads `ids` (T,) into its cache."""
        cache = self.cache.empty_row(row)
        if self.backend.reads_beyond:
            self.cache.clear_beyond(row, 0)
        if len(ids):
            self.backend.prefill(ids[None], cache)

    def copy_prompt(self, source: int, target: int, tokens: int) -> None:
        """Fills a row's cache with the first `tokens` positions of another row, or of its own."""
        if source != target:
            self.cache.copy_row(source, target)
        self.cache.set_length(target, tokens)
        if self.backend.reads_beyond:
            self.cache.clear_beyond(target, tokens)

    def take_back(self, row: int, window: torch.Tensor, turn: int) -> None:
        """Takes a row back to before an earlier step, which had `window` (T,), its last id included, as its text."""
        self.cache.set_length(row, len(window) - 1)
        self.next[row] = window[-1]
        self.set_turn(row, turn)
        self.mark_seen(row, window)

    def mark_seen(self, row: int, ids: torch.Tensor) -> None:
        """Sets the tokens that the repetition penalty of a row is for to `ids` (T,)."""
        if self.seen is not None:
            self.seen[row] = False
            self.seen[row, ids] = True

    def set_turn(self, row: int, turn: int) -> None:
        self.turns[row] = turn
        self.launched[row] = turn
        self.drawn[row] = turn // DRAWS_AHEAD * DRAWS_AHEAD

    def draw_ahead(self, row: int, key: tuple, steps: int) -> None:
        """Makes the random numbers of a row's next `steps`; `key` is (seed, prompt id, sample)."""
        while self.drawn[row] < self.launched[row] + steps:
            start = int(self.drawn[row])
            place = start % self.draws.shape[1]
            self.draws[row, place : place + DRAWS_AHEAD] = random_draws(*key, start, DRAWS_AHEAD, self.device)
            self.drawn[row] += DRAWS_AHEAD


class CapturedStep:
    """Launches a Step as CUDA graphs, which it captures when they are first needed: one launch for `most` steps, whose
    results cross to the host while the next launch runs."""

    lag = 1

    def __init__(self, step: Step):
        self.step, self.most = step, max(1, TOKENS_PER_LAUNCH // len(step))
        self.graphs: dict[tuple, tuple[CudaGraph, list[Chosen]]] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(step.device)  # one for all graphs: libraries keep a workspace for each stream

    @torch.inference_mode()
    def launch(self, count: int) -> Callable[[], Results]:
        """As Step.launch."""
        step = self.step
        kind = (count, step.report, step.filters.kind, step.seen is None, step.narrow)
        with torch.cuda.device(step.device):  # streams and events belong to the current device
            if kind not in self.graphs:
                self.graphs[kind] = self.capture(count)
            graph, chosen = self.graphs[kind]
            graph.replay()
            copies = [Chosen(*[None if t is None else pinned_copy(t) for t in each]) for each in chosen]
            done = torch.cuda.Event()
            done.record()

        def wait():
            done.synchronize()
            return [on_host(each) for each in copies]

        return wait

    def capture(self, count: int) -> tuple[CudaGraph, list[Chosen]]:
        graph = CudaGraph(self.step.device, self.stream, self.pool)
        with Unchanged(self.step):
            for _ in range(WARM_UPS):
                self.step.cache.lengths.zero_()  # the first position: there is room, wherever the rows are
                graph.warm_up(self.step.run)
        return graph, graph.capture(lambda: [self.step.run() for _ in range(count)])


class Unchanged:
    """A context for steps at the first position whose results nobody reads: afterwards the rows are as before."""

    def __init__(self, step: Step):
        cache = step.cache
        self.changed = [cache.lengths, step.next, step.turns]
        self.changed += [buffer[:, :, :1] for buffer in (*cache.keys, *cache.values)]
        self.changed += [] if step.seen is None else [step.seen]

    def __enter__(self):
        self.kept = [tensor.clone() for tensor in self.changed]

    def __exit__(self, *_):
        for tensor, kept in zip(self.changed, self.kept, strict=True):
            tensor.copy_(kept)


def on_host(chosen: Chosen) -> tuple[list, list, list]:
    """Returns a step's results as lists by row; the likeliest tokens as (id, log-probability)."""
    ids, logprobs, top_ids, top_values = [None if tensor is None else tensor.tolist() for tensor in chosen]
    nothing = [None] * len(ids)
    if top_ids is None:
        return ids, logprobs or nothing, nothing
    return ids, logprobs or nothing, [list(zip(*row, strict=True)) for row in zip(top_ids, top_values, strict=True)]


# ---- memory


def new_cache(model, rows: int) -> KVCache:
    """Returns an empty KVCache. Raises ResourceError where memory does not suffice."""
    needed, free = rows * row_bytes(model), free_memory(model.device)
    if needed > free:
        raise out_of_memory(model, rows, f": their cache needs {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free")
    try:
        return KVCache(model.config, rows, model.dtype, model.device)
    except (RuntimeError, MemoryError):  # what torch.zeros raises without memory
        raise out_of_memory(model, rows) from None


def out_of_memory(model, rows: int, detail: str = "") -> ResourceError:
    context = model.config.block_size
    return ResourceError(f"out of memory: {rows} rows, context of {context} tokens{detail}; lower --rows")


def row_bytes(model) -> int:
    """Returns the bytes of one row's keys and values."""
    config = model.config
    return 2 * config.n_layer * config.block_size * config.n_embd * model.dtype.itemsize
