"""The processes (ranks) of one run: what they sum, decide alike and share, and how all end when one fails.

torchrun starts them; each computes its share of every step on its own device:

    for each optimizer step:
        forward and backward over this rank's share of the batch   # its own micro-batches
        all-reduce the gradients to their mean over the ranks      # DistributedDataParallel, in the last micro-batch
        every rank makes the same update                           # so weights stay equal without a broadcast

Tensors travel over one process group (gloo on CPUs, NCCL between GPUs). Values on which the hosts must agree travel
over a second group, always gloo. It waits for hours, because rank 0, which alone writes, may save or sample meanwhile.
Every rank makes the same exchanges in the same order."""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gpt.errors import Elsewhere, InputError, ResourceError, Stopped, code_and_reason

START_LIMIT = timedelta(minutes=5)  # between the first and the last rank to arrive
STEP_LIMIT = timedelta(minutes=10)
HOST_LIMIT = timedelta(hours=12)
FAILURE = "failure"  # key in torchrun's store under which the first rank to fail writes why
GRACE = 10.0  # seconds that a rank has to notice the failure of another rank, before it is ended
STAY_SECONDS = 1.0  # seconds that the others stay after the first failed rank: torchrun ends all when the first is gone


class Ranks:
    """This process as rank `rank` of the `size` processes of a run, number `local_rank` of the `local_size` on this
    machine, both from 0. A process alone exchanges nothing. Raises ResourceError if not all processes join within
    START_LIMIT."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1):
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.leads = rank == 0  # rank 0 alone writes and prints
        self.failure: str | None = None
        self.on_failure: Callable[[Exception], None] | None = None
        if size == 1:
            return
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            self.store, _, _ = next(dist.rendezvous("env://", timeout=START_LIMIT))  # torchrun's
            dist.init_process_group(backend, timeout=STEP_LIMIT, store=self.store, rank=rank, world_size=size)
            self.hosts = dist.new_group(backend="gloo", timeout=HOST_LIMIT)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ResourceError(f"rank {rank}: {size} processes did not meet ({reason}); see to the network") from None
        self.over = threading.Event()
        self.watcher = threading.Thread(target=self.watch, args=(self.store.clone(),), name="watch-ranks", daemon=True)
        self.watcher.start()

    # ---- on the host

    def reduced(self, operation: dist.ReduceOp.RedOpType, *numbers: float) -> list[float]:
        """Returns each of `numbers` reduced over the ranks by `operation`, in float64."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(tensor, operation, group=self.hosts)
        return tensor.tolist()

    def any(self, flag: Any) -> bool:
        """Returns whether `flag` is set on any rank. Each rank waits until all ranks have called it."""
        return self.reduced(dist.ReduceOp.MAX, bool(flag)) != [0.0]

    def least(self, number: int) -> int:
        """Returns the smallest `number` of all ranks."""
        return int(self.reduced(dist.ReduceOp.MIN, number)[0])

    def totals(self, *numbers: float) -> list[float]:
        """Returns the sum of each of `numbers` over the ranks."""
        return self.reduced(dist.ReduceOp.SUM, *numbers)

    def first(self, number: float) -> float:
        """Returns the `number` of rank 0."""
        tensor = torch.tensor(number, dtype=torch.float64)
        if self.size > 1:
            dist.broadcast(tensor, src=0, group=self.hosts)
        return tensor.item()

    def check_same(self, **values: Any) -> None:
        """Raises InputError, on all ranks, unless each of `values` (JSON data) is the same on all ranks."""
        for name, value in values.items() if self.size > 1 else ():
            digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
            mine = torch.frombuffer(bytearray(digest), dtype=torch.int64)
            digests = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(digests, mine, group=self.hosts)
            for rank, other in enumerate(digests):
                if not torch.equal(other, digests[0]):
                    raise InputError(
                        f"rank {rank} disagrees with rank 0 on the {name}; start all with one command, "
                        "on the same files and version"
                    )

    # ---- on the device

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the mean of `tensor` over the ranks. May overwrite it."""
        if self.size == 1:
            return tensor
        dist.all_reduce(tensor)
        return tensor / self.size

    def share_gradients(self, model: torch.nn.Module) -> None:
        """Prepares `model` for `forward`, which averages its gradients over the ranks."""
        if self.size > 1:
            devices = [model.device] if model.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def forward(self, model: torch.nn.Module, last: bool) -> torch.nn.Module:
        """Returns the module to call for the forward pass over a micro-batch. In the backward pass of the `last`
        micro-batch, the accumulated gradients become their means over the ranks."""
        if self.size == 1:
            return model
        assert self.parallel.module is model
        self.parallel.require_backward_grad_sync = last  # DDP reads it in the forward pass
        return self.parallel

    def spread(self, function: Callable[[torch.Tensor], torch.Tensor], stack: torch.Tensor) -> torch.Tensor:
        """Returns function(stack), (N, ...) -> (N, ...), for a function that treats each of the N items by itself:
        every rank computes a share of the items, and an all-gather gives all ranks the same results."""
        if self.size == 1:
            return function(stack)
        share = -(-len(stack) // self.size)
        mine = torch.arange(share, device=stack.device) + self.rank * share
        results = function(stack[mine.clamp(max=len(stack) - 1)]).contiguous()  # the last ranks may repeat an item
        gathered = results.new_empty(self.size * share, *results.shape[1:])
        dist.all_gather(list(gathered.split(share)), results)
        return gathered[: len(stack)]

    # ---- failures

    def cause(self, error: BaseException) -> BaseException:
        """Returns the error with which this process ends because of `error`: `error` itself, or Elsewhere if another
        rank failed before. Stopped stays Stopped on rank 0 alone."""
        if self.size == 1 or isinstance(error, Elsewhere):
            return error
        if isinstance(error, Stopped):  # all ranks agreed to stop; none failed
            return error if self.leads else Elsewhere(*code_and_reason(error))
        if self.failure is None:
            self.failure = json.dumps([self.rank, *code_and_reason(error)])
            with contextlib.suppress(RuntimeError):  # the store is gone
                self.failure = self.store.compare_set(FAILURE, "", self.failure).decode()
        rank, code, reason = json.loads(self.failure)
        if rank == self.rank:
            return error
        same = (code, reason) == code_and_reason(error)
        return Elsewhere(code, reason if same else f"rank {rank}: {reason}")

    def leave(self) -> None:
        """Ends the part of this process in the run: stops the watcher, and leaves the process group unless a rank
        failed."""
        self.over.set()
        self.watcher.join(GRACE)  # the interpreter must not stop a thread that holds the last reference to a group
        if self.failure is None:  # otherwise it would wait for the others
            dist.destroy_process_group()

    def watch(self, store: dist.Store) -> None:
        """Ends this process if another rank has failed and this one still runs GRACE seconds later: a process that
        waits for others on a GPU notices nothing, not even SIGTERM."""
        with contextlib.suppress(RuntimeError):  # the store is gone
            while not self.over.wait(1.0):
                if store.check([FAILURE]) and not self.over.wait(GRACE):
                    rank, code, reason = json.loads(store.get(FAILURE))
                    if self.on_failure is not None:
                        self.on_failure(Elsewhere(code, f"rank {rank}: {reason}"))
                    os._exit(code)


def launched() -> tuple[int, ...]:
    """Returns (rank, number of ranks, rank and number of ranks on this machine), as torchrun gave them to this
    process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not all(name in os.environ for name in names):
        return 0, 1, 0, 1
    return tuple(int(os.environ[name]) for name in names)


@contextlib.contextmanager
def join() -> Iterator[Ranks]:
    """Yields the Ranks of this process, which is alone unless torchrun started it. Only rank 0 prints. The first rank
    that fails ends all ranks with its exit code; it alone says why."""
    ranks = Ranks(*launched())
    if ranks.size == 1:
        yield ranks
        return
    try:
        with contextlib.nullcontext() if ranks.leads else silenced():
            yield ranks
    except (Exception, KeyboardInterrupt) as error:
        cause = ranks.cause(error)
        if cause is error:
            raise
        if ranks.failure:
            time.sleep(STAY_SECONDS)
        raise cause from None
    finally:
        ranks.leave()


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Drops what this process prints until the context ends. The reason of a failure is printed after that."""
    null = open(os.devnull, "w")  # left open: loggers may keep it
    with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield
