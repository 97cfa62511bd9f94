"""The step that generation repeats, one token for every row on the device alone; and the same step as CUDA graphs.

Shapes: R rows, V vocabulary, T tokens of one text, N likeliest tokens that are reported."""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from gpt.device import GIB, free_memory, is_out_of_memory, pinned_copy, to_device, upload
from gpt.errors import ResourceError
from gpt.generate.backend import Backend
from gpt.generate.prefill import WARM_UPS, PaddedPrefill
from gpt.generate.repeats import Repeats
from gpt.generate.sampling import Filters, choose, draws_of_streams, likeliest, stream
from gpt.generate.sequence import GenerationParams
from gpt.kernels.cuda_graph import CudaGraph
from gpt.model import GPT, KVCache

DRAWS_AHEAD = 512  # positions whose random numbers are made at once: the 120 operations for them take as long as a step
# Per CUDA graph. Fewer let the GPU wait for the host; more are wasted at the end of a text, and take longer to capture.
TOKENS_PER_LAUNCH, STEPS_PER_LAUNCH = 16, 4  # tokens of all rows; steps


class Chosen(NamedTuple):
    """What a step chose, on the device. The log-probabilities are None if `Step.report` is None; the likeliest tokens
    also if it is 0."""

    ids: torch.Tensor  # (R,); below 0 for a row without a choice: see sampling.choose
    logprobs: torch.Tensor | None = None  # (R,)
    top_ids: torch.Tensor | None = None  # (R, N)
    top_logprobs: torch.Tensor | None = None  # (R, N)

    def apply(self, function: Callable[[torch.Tensor], Any]) -> list:
        """Returns function(tensor) for each of the tensors, or None where a tensor is None."""
        return [None if tensor is None else function(tensor) for tensor in self]


class Window(NamedTuple):
    """The ids that a row's next step sees: the last one is not in its cache yet."""

    row: int
    ids: list[int]
    turn: int  # tokens that are chosen since the start of the text


Results = list[tuple[list, list, list]]  # of each step: ids, log-probabilities, [(id, log-probability)], by row


class Step:
    """The tensors of R rows (each row's cache, next id, random numbers and settings) and the step that changes them.
    The tensors are changed in place, so that a captured step finds them at the same addresses."""

    most, lag = 1, 0
    """`most`: steps in one launch. `lag`: launches that may still run when the results of the oldest are read. A plain
    step runs at once, so 1 and 0."""

    def __init__(
        self, backend: Backend, rows: int, eot: int, banned: Collection[int] = (), stops: Collection[int] = ()
    ):
        model, device = backend.model, backend.model.device
        assert 0 <= eot < model.vocab_size
        self.backend, self.device, self.eot, self.vocab_size = backend, device, eot, model.vocab_size
        self.cache = new_cache(model, rows)
        self.next = torch.full((rows,), eot, device=device)  # (R,) ids that are chosen but not yet in the cache
        self.turns = torch.zeros_like(self.next)  # (R,) tokens chosen since the start of each row's text
        self.launched = np.zeros(rows, dtype=np.int64)  # `turns` after all steps in flight, on the host
        self.draws = torch.zeros(rows, 2 * DRAWS_AHEAD, dtype=torch.int64, device=device)  # two blocks, used in turn
        self.streams = torch.zeros(rows, 4, dtype=torch.int64, device=device)  # of random numbers: see sampling.stream
        self.stream_values = np.zeros((rows, 4), dtype=np.int64)  # `streams` on the host
        self.filters = Filters(rows, device)
        self.ignores_eot = torch.zeros(rows, dtype=torch.bool, device=device)  # (R,) rows that never choose a stop id
        self.ignoring = np.zeros(rows, dtype=bool)  # `ignores_eot` on the host
        self.stops = torch.tensor(stops, dtype=torch.int64, device=device) if len(stops) else None  # apart from `eot`
        self.banned = torch.tensor(banned, dtype=torch.int64, device=device) if len(banned) else None
        ban_mask = torch.zeros(self.vocab_size, dtype=torch.bool, device=device)
        self.ban_mask = None if self.banned is None else ban_mask.index_fill(0, self.banned, True)  # (V,)
        self.seen: torch.Tensor | None = None  # (R, V) tokens in each row's window, if a row has a repetition penalty
        self.repeats = Repeats(rows, model.vocab_size, device)  # for the settings that look at the whole text
        self.report: int | None = None  # the number N; None for ids alone
        self.narrow = backend.narrow  # whether `choose` looks at few candidates and may leave a row undecided

    def __len__(self) -> int:
        return len(self.launched)

    def choose_next(self) -> Chosen:
        """Appends the keys and values of `next` to each row's cache, and chooses the id after it."""
        logits = self.backend.decode(self.next, self.cache)  # (R, V)
        if not self.choice_is_plain():
            logits = logits.float()
        logprobs = None if self.report is None else logits.log_softmax(-1)
        if self.seen is not None:
            self.seen.scatter_(1, self.next[:, None], True)
        for part in self.repeats.used:
            part.discourage(logits)
        ids = self.choose(logits)
        for part in self.repeats.used:
            part.append(self.next)
        if logprobs is None:
            return Chosen(ids)
        logprobs_of_ids = logprobs.gather(1, self.next[:, None])[:, 0]
        if not self.report:
            return Chosen(ids, logprobs_of_ids)
        top_ids = likeliest(logprobs, self.report)
        return Chosen(ids, logprobs_of_ids, top_ids, logprobs.gather(1, top_ids))

    def choice_is_plain(self) -> bool:
        """Returns whether the logits go unchanged to the sampler kernel, which converts them to float32 by itself."""
        changed = self.filters.penalizes or self.repeats.used or self.stops is not None
        return not (self.backend.draws_ahead or changed or self.report is not None)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Chooses each row's next id from logits (R, V), which it changes in place. Copies the ids to `next`,
        increments `turns` and returns the ids (R,), negative where sampling.choose finds none."""
        if self.stops is not None:  # here, because the C++ sampler knows `eot` alone
            ignored = logits[:, self.stops].masked_fill(self.ignores_eot[:, None], torch.finfo(torch.float32).min)
            logits[:, self.stops] = ignored
        if self.backend.choose_step:
            return self.backend.choose_step(logits, self)
        # Not -inf, which would look like damaged weights.
        logits[:, self.eot].masked_fill_(self.ignores_eot, torch.finfo(torch.float32).min)
        draws = self.draws.gather(1, self.turns[:, None] % self.draws.shape[1])[:, 0]
        ids = choose(logits, self.filters, draws, self.seen, self.banned, self.narrow)
        self.turns += 1
        self.next.copy_(ids.clamp(min=0))
        return ids

    @torch.inference_mode()
    def launch(self, count: int) -> Callable[[], Results]:
        """Starts `count` steps. Returns a function that waits for them and returns their results."""
        chosen = [self.choose_next() for _ in range(count)]
        return lambda: [on_host(each) for each in chosen]

    # ---- rows

    def reset(self, report: int | None) -> None:
        """Empties all rows and makes them idle. `report` is the number of likeliest tokens to report; None reports no
        log-probabilities."""
        self.report, self.narrow = report, self.backend.narrow
        self.cache.lengths.zero_()
        self.filters.assign(dict.fromkeys(range(len(self))))
        for row in range(len(self)):
            self.repeats.begin(row, None)

    def prefill(self, texts: dict[int, list[int]]) -> None:
        """Fills the cache of each row, row -> ids, with the keys and values of its ids alone."""
        for row, ids in texts.items():
            cache = self.cache.empty_row(row)
            if ids:
                self.backend.prefill(to_device(torch.tensor(ids), self.device)[None], cache)

    def set_params(self, params: dict[int, GenerationParams]) -> None:
        """Sets the settings of rows, with few copies for all of them together. Does not wait for the device."""
        self.filters.assign({row: own.sampling for row, own in params.items()})
        self.filters.upload()
        ignoring = self.ignoring.copy()
        for row, own in params.items():
            self.ignoring[row] = own.ignore_eot
        if not np.array_equal(ignoring, self.ignoring):
            upload(self.ignores_eot, self.ignoring)
        if self.filters.penalizes and self.seen is None:
            self.seen = torch.zeros(len(self), self.vocab_size, dtype=torch.bool, device=self.device)

    def set_windows(self, windows: list[Window]) -> None:
        """Sets the windows of rows, with few copies for all of them together. Does not wait for the device. A row's
        cache must hold all ids of its window but the last, which the next step reads."""
        starts = [(row, ids[-1], turn, len(ids) - 1) for row, ids, turn in windows]
        rows, ids, turns, lengths = to_device(torch.tensor(starts).T.contiguous(), self.device)
        self.next[rows], self.turns[rows], self.cache.lengths[rows] = ids, turns, lengths
        self.cache.is_empty = False
        for row, _, turn, length in starts:
            self.launched[row] = turn
            if self.backend.reads_beyond:
                self.cache.clear_beyond(row, length)
        if self.seen is not None:
            pairs = torch.tensor([(row, token) for row, tokens, _ in windows for token in tokens])
            self.seen[rows] = False
            self.seen[tuple(to_device(pairs.T.contiguous(), self.device))] = True

    def set_text(self, row: int, params: GenerationParams, prompt: list[int], ids: list[int]) -> None:
        """Makes `prompt` and the chosen `ids` the text of a row, for the settings that look at all of it."""
        self.repeats.begin(row, params.sampling, prompt, ids)

    def set_streams(self, keys: dict[int, tuple[int, int | str, int]]) -> None:
        """Sets which random numbers rows get, by row: (seed, prompt id, sample)."""
        for row, key in keys.items():
            self.stream_values[row] = stream(*key)
        upload(self.streams, self.stream_values)

    def draw_ahead(self, steps: int) -> None:
        """Draws the next block of random numbers of all rows for which the first of them is needed in the next `steps`
        steps."""
        starts = -(-self.launched // DRAWS_AHEAD) * DRAWS_AHEAD
        due = (starts < self.launched + steps) & (self.filters.values["temperature"] > 0)
        if not self.backend.draws_ahead or not due.any():
            return
        pairs = torch.from_numpy(np.stack([due.nonzero()[0], starts[due]]))
        rows, first = to_device(pairs, self.device)
        columns = (first % self.draws.shape[1])[:, None] + torch.arange(DRAWS_AHEAD, device=self.device)
        self.draws[rows[:, None], columns] = draws_of_streams(self.streams[rows], first, DRAWS_AHEAD)


class CapturedStep:
    """Launches a Step as CUDA graphs of up to `most` steps, each captured when it is first needed. The results of a
    launch are copied to the host while the next launch runs."""

    lag = 1

    def __init__(self, step: Step):
        self.step, self.most = step, max(1, min(STEPS_PER_LAUNCH, TOKENS_PER_LAUNCH // len(step)))
        self.graphs: dict[tuple, CudaGraph[Chosen]] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(step.device)  # one for all graphs: libraries keep a workspace for each stream
        self.padded = PaddedPrefill(step.backend, step.cache, self.new_graph)

    def new_graph(self) -> CudaGraph:
        return CudaGraph(self.step.device, self.stream, self.pool)

    def prefill(self, texts: dict[int, list[int]]) -> None:
        """See Step.prefill. Several texts share a forward pass."""
        with torch.cuda.device(self.step.device):
            self.padded.fill(texts)

    @torch.inference_mode()
    def launch(self, count: int) -> Callable[[], Results]:
        """See Step.launch."""
        step = self.step
        # The sampler kernel reads all other settings from their tensors, so they need no graph of their own.
        filters = step.filters.kind if step.backend.draws_ahead else step.filters.penalizes
        kind = (count, step.report, filters, step.seen is None, step.narrow, step.repeats.kind)
        with torch.cuda.device(step.device):  # streams and events belong to the current device
            if kind not in self.graphs:
                self.graphs[kind] = self.capture(count)
            copies: list[Any] = self.graphs[kind].replay().apply(pinned_copy)
            done = torch.cuda.Event()
            done.record()

        def wait() -> Results:
            done.synchronize()
            steps: list[list[Any]] = [
                [None if copy is None else copy[number] for copy in copies] for number in range(count)
            ]
            return [on_host(Chosen(*fields)) for fields in steps]

        return wait

    def capture(self, count: int) -> CudaGraph[Chosen]:
        """Returns a graph of `count` steps, whose results are stacked: one copy brings those of all steps to the host.
        Every replay fills the same tensors."""
        graph: CudaGraph[Chosen] = self.new_graph()
        with unchanged(self.step):
            for _ in range(WARM_UPS):
                self.step.cache.lengths.zero_()  # a full row has no room for a step
                graph.warm_up(self.step.choose_next)
        graph.capture(lambda: stacked([self.step.choose_next() for _ in range(count)]))
        return graph


@contextlib.contextmanager
def unchanged(step: Step) -> Iterator[None]:
    """Returns a context for steps at position 0 whose results are not used; at its end, all that these steps change is
    restored."""
    cache = step.cache
    first = [buffer[:, :, :1] for buffer in (*cache.keys, *cache.values)]
    tensors = [cache.lengths, step.next, step.turns, *first, *([] if step.seen is None else [step.seen])]
    tensors += [tensor for part in step.repeats.used for tensor in part.tensors]
    copies = [tensor.clone() for tensor in tensors]
    yield
    for tensor, copy in zip(tensors, copies, strict=True):
        tensor.copy_(copy)


def stacked(steps: list[Chosen]) -> Chosen:
    """Returns the results of several steps as tensors with one more dimension, the first."""
    fields: list[Any] = [None if tensors[0] is None else torch.stack(tensors) for tensors in zip(*steps, strict=True)]
    return Chosen(*fields)


def on_host(chosen: Chosen) -> tuple[list, list, list]:
    """Returns the results of a step as lists by row: ids, log-probabilities, and the likeliest tokens as (id,
    log-probability)."""
    ids, logprobs, top_ids, top_logprobs = chosen.apply(torch.Tensor.tolist)
    nothing = [None] * len(ids)
    if top_ids is None:
        return ids, logprobs or nothing, nothing
    return ids, logprobs, [list(zip(*row, strict=True)) for row in zip(top_ids, top_logprobs, strict=True)]


# ---- memory


def new_cache(model: GPT, rows: int) -> KVCache:
    """Returns an empty KVCache. Raises ResourceError if memory does not suffice."""
    with memory_errors(model, rows):
        if rows * row_bytes(model) > free_memory(model.device):
            raise MemoryError
        return KVCache(model.config, rows, model.dtype, model.device)


@contextlib.contextmanager
def memory_errors(model: GPT, rows: int) -> Iterator[None]:
    """Turns errors that say that memory ran out into a ResourceError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        shape = f"{rows} rows, context of {model.config.block_size} tokens"
        needs = f"their cache needs {rows * row_bytes(model) / GIB:.1f} GiB"
        raise ResourceError(f"out of memory: {shape}: {needs}; lower --rows") from None


def row_bytes(model: GPT) -> int:
    """Returns the number of bytes that one row's keys and values take."""
    config = model.config
    return 2 * config.n_layer * config.block_size * config.n_embd * model.dtype.itemsize
