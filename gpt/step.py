"""One token for every row: the step that all back ends run, on the device alone, and how it is launched.

Shapes: R row slots, S cache positions (block_size), V vocabulary, N likeliest tokens reported."""

import numpy as np
import torch

from gpt.errors import ResourceError
from gpt.memory import GIB, free_memory
from gpt.model import KVCache
from gpt.sampling import Filters, random_draws, top_logprobs

DRAWS_AHEAD = 512  # positions whose random numbers are made at once: their 120 small operations cost as much as a step
WARM_UPS = 2  # steps run before a graph is captured: compilers and libraries set themselves up in them


class Rows:
    """What a step reads and writes: the cache and, for each of R rows, the next id, the random numbers, the settings.
    Everything is filled in place, so that a captured step finds it where it was."""

    def __init__(self, model, rows, eot, banned=(), attention=None):
        assert 0 <= eot < model.vocab_size
        device = model.device
        self.model, self.device, self.eot = model, device, eot
        self.cache = new_cache(model, rows, attention)
        self.next = torch.full((rows,), eot, device=device)  # (R,) chosen, not yet in the cache
        self.turns = torch.zeros_like(self.next)  # (R,) tokens chosen since the row's start
        self.draws = torch.zeros(rows, 2 * DRAWS_AHEAD, dtype=torch.int64, device=device)  # two blocks, by turns
        self.drawn = np.zeros(rows, dtype=np.int64)  # draws made since each row's start
        self.launched = np.zeros(rows, dtype=np.int64)  # `turns` on the host, with all steps that are under way
        self.filters = Filters(rows, device)
        self.goes_on = torch.zeros(rows, dtype=torch.bool, device=device)  # (R,) where end-of-text is never chosen
        self.banned = torch.tensor(banned, dtype=torch.int64, device=device) if len(banned) else None
        self.seen = None  # (R, V) the tokens in each row's window, where a row has a repetition penalty
        self.reports = (False, 0)  # what a step gives beside ids: log-probabilities of them, and of the N likeliest

    def __len__(self):
        return len(self.drawn)

    def step(self, backend):
        """Append `next` to every row's cache and choose the token that follows: ids (R,), their log-probabilities (R,)
        or None, and the N likeliest (R, N) with theirs or None."""
        logits = backend.decode(self.next, self.cache)  # (R, V)
        report = [None, None, None]
        wants_logprobs, likeliest = self.reports
        if likeliest:
            report[1:] = top_logprobs(logits, likeliest)
        logprobs = logits.log_softmax(-1) if wants_logprobs else None
        if self.seen is not None:
            self.seen.scatter_(1, self.next[:, None], True)
        ids = backend.take(self, logits) if backend.take else self.take(logits, backend)
        if wants_logprobs:
            report[0] = logprobs.gather(1, self.next[:, None])[:, 0]
        return ids, *report

    def take(self, logits, backend):
        """Choose `next` from logits (R, V), which it changes: ids (R,), or what stands for none."""
        # Not -inf, which would look like damaged weights.
        logits[:, self.eot].masked_fill_(self.goes_on, torch.finfo(torch.float32).min)
        draws = self.draws.gather(1, self.turns[:, None] % self.draws.shape[1])[:, 0]
        ids = backend.choose(logits, self.filters, draws, self.seen, self.banned, backend.narrow)
        self.turns += 1
        self.next.copy_(ids.clamp(min=0))
        return ids

    def begin(self, row, params, eot_is_ignored):
        """Give a row its settings; its draws begin anew."""
        self.filters.set(row, params)
        self.goes_on[row] = eot_is_ignored
        self.rewind(row, 0)
        if self.filters.penalizes and self.seen is None:
            self.seen = torch.zeros(len(self), self.model.vocab_size, dtype=torch.bool, device=self.device)

    def rewind(self, row, turn):
        """Let a row's next draw be the one of `turn`."""
        self.turns[row] = turn
        self.launched[row] = turn
        self.drawn[row] = turn // DRAWS_AHEAD * DRAWS_AHEAD

    def draw_ahead(self, row, key, steps):
        """Make the draws of a row's next `steps`; `key` is (seed, prompt id, sample)."""
        while self.drawn[row] < self.launched[row] + steps:
            start = int(self.drawn[row])
            place = start % self.draws.shape[1]
            self.draws[row, place : place + DRAWS_AHEAD] = random_draws(*key, start, DRAWS_AHEAD, self.device)
            self.drawn[row] += DRAWS_AHEAD

    def mark_seen(self, row, ids):
        """Let `ids` (T,) be the tokens that the repetition penalty of a row is for."""
        if self.seen is not None:
            self.seen[row] = False
            self.seen[row, ids] = True


def new_cache(model, rows, attention=None):
    """A KVCache for `rows` rows; `attention` as there. Raises ResourceError if there is no memory for it."""
    needed, free = rows * row_bytes(model), free_memory(model.device)
    if needed > free:
        raise out_of_memory(model, rows, f": their cache needs {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free")
    try:
        return KVCache(model.config, rows, model.dtype, model.device, attention)
    except (RuntimeError, MemoryError):  # of torch.zeros: there is no memory
        raise out_of_memory(model, rows) from None


def out_of_memory(model, rows, detail=""):
    context = model.config.block_size
    return ResourceError(f"out of memory: {rows} rows, context of {context} tokens{detail}; lower --rows")


def row_bytes(model):
    """Bytes that one row's keys and values take."""
    config = model.config
    return 2 * config.n_layer * config.block_size * config.n_embd * model.dtype.itemsize


class Launcher:
    """Runs steps one after another. Results of a launch are fetched when `lag` further launches are under way."""

    def __init__(self, rows, backend, steps=1, lag=0):
        self.rows, self.backend, self.steps, self.lag = rows, backend, steps, lag

    def launch(self, steps):
        """Begin `steps` steps; a function that waits for their results: for each step its ids, log-probabilities and
        likeliest tokens, as lists by row."""
        with torch.inference_mode():
            results = [self.rows.step(self.backend) for _ in range(steps)]
        return lambda: [on_host(result) for result in results]

    def widen(self):
        """From now on look at all tokens: see sampling.choose."""
        self.backend = self.backend.wide()


class GraphLauncher(Launcher):
    """Replays steps as CUDA graphs, captured when they are first needed: the host hands over one launch for them all,
    and their results cross to it while the next launch runs."""

    def __init__(self, rows, backend, steps, lag=1):
        super().__init__(rows, backend, steps, lag)
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(rows.device)  # one for all: libraries keep a workspace for each

    def launch(self, steps):
        with torch.inference_mode(), torch.cuda.device(self.rows.device):  # streams and events are the current device's
            return self.replay(steps)

    def replay(self, steps):
        rows = self.rows
        kind = (steps, rows.reports, rows.filters.kind, rows.seen is None, self.backend.narrow)
        if kind not in self.graphs:
            self.graphs[kind] = self.capture(steps)
        graph, results = self.graphs[kind]
        graph.replay()
        copies = [[None if t is None else pinned_copy(t) for t in result] for result in results]
        done = torch.cuda.Event()
        done.record()

        def wait():
            done.synchronize()
            return [on_host(copy) for copy in copies]

        return wait

    def capture(self, steps):
        """(graph, its results): `steps` steps recorded, not run."""
        with Unchanged(self.rows):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UPS):
                    self.rows.cache.lengths.zero_()  # at the first position, wherever the rows are: there is room
                    self.rows.step(self.backend)
            torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # In training another thread may fetch the next batch meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            results = [self.rows.step(self.backend) for _ in range(steps)]
        return graph, results


class Unchanged:
    """A context in which steps are run at the first position for no result: afterwards the rows are as before."""

    def __init__(self, rows):
        cache = rows.cache
        self.changed = [cache.lengths, rows.next, rows.turns]
        self.changed += [buffer[:, :, :1] for buffer in (*cache.keys, *cache.values)]
        self.changed += [] if rows.seen is None else [rows.seen]

    def __enter__(self):
        self.kept = [tensor.clone() for tensor in self.changed]

    def __exit__(self, *_):
        for tensor, kept in zip(self.changed, self.kept, strict=True):
            tensor.copy_(kept)


def pinned_copy(tensor):
    """A copy on the host that is under way: it may be read once the stream has come to it."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def on_host(result):
    """A step's results as lists by row; the likeliest tokens as (id, log-probability)."""
    ids, logprobs, top_ids, top_values = [None if tensor is None else tensor.tolist() for tensor in result]
    nothing = [None] * len(ids)
    top = (
        nothing
        if top_ids is None
        else [list(zip(*pair, strict=True)) for pair in zip(top_ids, top_values, strict=True)]
    )
    return ids, logprobs or nothing, top
