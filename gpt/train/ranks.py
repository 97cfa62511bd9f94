"""The processes of one run: what they sum, decide alike and share out, and how all end when one fails.

torchrun starts them; each computes its share of every step on its own device. They exchange tensors over one group
(gloo on CPUs, NCCL between GPUs) and what the hosts must agree on over another, always gloo, which waits for hours: for
rank 0, who alone writes, to save or to sample. Every rank makes the same exchanges in the same order."""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gpt.errors import Elsewhere, InputError, ResourceError, Stopped, code_and_reason

LONGEST_START = timedelta(minutes=5)  # between the first and the last rank to be there
LONGEST_STEP = timedelta(minutes=10)
LONGEST_WAIT = timedelta(hours=12)
FAILURE = "failure"  # the key in torchrun's store under which the first rank to fail says why
GRACE = 10.0  # seconds until a rank that does not notice that another one failed is ended
FIRST_WORDS = 1.0  # seconds by which the others outlive that one: torchrun ends all ranks when the first is gone


class Alone:
    """The only process of a run: nothing is exchanged. Ranks has the same methods for several."""

    rank, size, local_rank, local_size = 0, 1, 0, 1
    leads = True  # whether this is rank 0, who alone writes and speaks

    # ---- on the host

    def any(self, flag):
        """Whether `flag` is set on any rank. Also how the ranks wait for each other."""
        return bool(flag)

    def first(self, number):
        """Rank 0's number."""
        return number

    def least(self, number):
        """The smallest of the ranks' numbers."""
        return number

    def totals(self, *numbers):
        """The sum of each number over the ranks, in float64."""
        return numbers

    def check_same(self, **things):
        """Raise InputError, on all ranks, unless each of `things`, plain data, is the same on all."""

    # ---- on the device

    def mean(self, tensor):
        """The mean of `tensor` over the ranks, which may use its memory."""
        return tensor

    def share_gradients(self, model):
        """From now on gradients of `model` may be averaged over the ranks: see `forward`."""

    def forward(self, model, last):
        """What to call for the forward pass over a micro-batch. In the backward pass of the last one the gradients that
        have added up become their means over the ranks."""
        return model

    def spread(self, function, stack):
        """`function(stack)`, (N, ...) -> (N, ...), for a function that treats each of the N alone: every rank computes
        some of them, and all get the same results."""
        return function(stack)

    # ---- failures

    def cause(self, error):
        """The error to end with because of `error`: itself, or an Elsewhere if another rank failed before."""
        return error

    def on_failure_elsewhere(self, last_words):
        """Call `last_words(error)` if this process must be ended because another rank failed."""


ALONE = Alone()


class Ranks(Alone):
    """Process `rank` of `size`, the `local_rank`-th of `local_size` on this machine. Raises ResourceError if they do
    not all come together."""

    def __init__(self, rank, size, local_rank, local_size):
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.leads, self.parallel, self.failure, self.last_words = rank == 0, None, None, None
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            self.store, _, _ = next(dist.rendezvous("env://", timeout=LONGEST_START))  # torchrun's
            dist.init_process_group(backend, timeout=LONGEST_STEP, store=self.store, rank=rank, world_size=size)
            self.hosts = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ResourceError(f"rank {rank}: {size} processes did not meet ({reason}); see to the network") from None
        self.over = threading.Event()
        self.watcher = threading.Thread(target=self.watch, args=(self.store.clone(),), name="watch-ranks", daemon=True)
        self.watcher.start()

    # ---- on the host

    def any(self, flag):
        return self.greatest(float(bool(flag))) > 0

    def first(self, number):
        found = torch.tensor(number, dtype=torch.float64)
        dist.broadcast(found, src=0, group=self.hosts)
        return found.item()

    def least(self, number):
        return type(number)(-self.greatest(-number))

    def greatest(self, number):
        found = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.hosts)
        return found.item()

    def totals(self, *numbers):
        found = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(found, group=self.hosts)
        return found.tolist()

    def check_same(self, **things):
        for name, value in things.items():
            digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
            mine = torch.frombuffer(bytearray(digest), dtype=torch.int64)
            every = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(every, mine, group=self.hosts)
            for rank, other in enumerate(every):
                if not torch.equal(other, every[0]):
                    raise InputError(
                        f"rank {rank} disagrees with rank 0 on the {name}; start all with one command, "
                        "on the same files and version"
                    )

    # ---- on the device

    def mean(self, tensor):
        dist.all_reduce(tensor)
        return tensor / self.size

    def share_gradients(self, model):
        devices = [model.device] if model.device.type == "cuda" else None
        self.parallel = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def forward(self, model, last):
        assert self.parallel.module is model
        self.parallel.require_backward_grad_sync = last  # read in the forward pass
        return self.parallel

    def spread(self, function, stack):
        share = -(-len(stack) // self.size)
        mine = torch.arange(share, device=stack.device) + self.rank * share
        done = function(stack[mine.clamp(max=len(stack) - 1)]).contiguous()  # the last ranks may repeat the last one
        every = done.new_empty(self.size * share, *done.shape[1:])
        dist.all_gather(list(every.split(share)), done)
        return every[: len(stack)]

    # ---- failures

    def cause(self, error):
        if isinstance(error, Elsewhere):
            return error
        if isinstance(error, Stopped):  # agreed, nobody's failure
            return error if self.leads else Elsewhere(*code_and_reason(error))
        if self.failure is None:
            self.failure = json.dumps([self.rank, *code_and_reason(error)])
            with contextlib.suppress(RuntimeError):  # the store is gone
                self.failure = self.store.compare_set(FAILURE, "", self.failure).decode()
        rank, code, reason = json.loads(self.failure)
        if rank == self.rank:
            return error
        all_alike = (code, reason) == code_and_reason(error)
        return Elsewhere(code, reason if all_alike else f"rank {rank}: {reason}")

    def on_failure_elsewhere(self, last_words):
        self.last_words = last_words

    def leave(self):
        self.over.set()
        self.watcher.join(
            GRACE
        )  # the last reference to a group must not be a thread's that the interpreter has stopped
        if self.failure is None:  # else it would wait for the others
            dist.destroy_process_group()

    def watch(self, store):
        """End this process when another one has failed and this one does not see it: whoever waits for the others on a
        GPU notices nothing, not even SIGTERM."""
        with contextlib.suppress(RuntimeError):  # the store is gone
            while not self.over.wait(1.0):
                if store.check([FAILURE]) and not self.over.wait(GRACE):
                    self.end(*json.loads(store.get(FAILURE)))

    def end(self, rank, code, reason):
        if self.last_words is not None:
            self.last_words(Elsewhere(code, f"rank {rank}: {reason}"))
        os._exit(code)


def launched() -> tuple[int, ...]:
    """Returns (rank, number of ranks, rank and number of ranks on this machine), as torchrun gave them to this
    process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not all(name in os.environ for name in names):
        return 0, 1, 0, 1
    return tuple(int(os.environ[name]) for name in names)


@contextlib.contextmanager
def join() -> Iterator[Alone]:
    """Yields the Ranks that torchrun started, or Alone. Only rank 0 prints. The first rank to fail ends all of them
    with its exit code, and alone says why."""
    rank, size, local_rank, local_size = launched()
    if size == 1:
        yield ALONE
        return
    ranks = Ranks(rank, size, local_rank, local_size)
    try:
        with contextlib.nullcontext() if ranks.leads else silenced():
            yield ranks
    except (Exception, KeyboardInterrupt) as error:
        cause = ranks.cause(error)
        if ranks.failure and cause is not error:
            time.sleep(FIRST_WORDS)
        if cause is error:
            raise
        raise cause from None
    finally:
        ranks.leave()


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Drops what this process prints; the reason of a failure is told after this context."""
    null = open(os.devnull, "w")  # left open: loggers may keep it
    with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield
