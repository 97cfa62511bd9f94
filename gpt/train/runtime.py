"""The machine of one training process: its device, precision, threads and determinism, seeds and signals."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch

from gpt.checkpoint.read import Checkpoint
from gpt.device import (
    COMPILERS,
    DTYPES,
    can_compile,
    device_name,
    has_compiler,
    pick_device,
    pinned_copy,
    set_precision,
    set_threads,
    to_device,
)
from gpt.errors import InputError, ResourceError, note, tell
from gpt.kernels.select import NATIVE_OPS, can_build, faster_kernels, native_kernels, native_names, pick_dtype
from gpt.model import REFERENCE, ModelConfig, Ops
from gpt.text.windows import mix
from gpt.train.cost import KERNELS_PAY, compiling_pays, launches_matter
from gpt.train.ranks import Ranks
from gpt.train.slot import Slot

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class MachineConfig:
    device: str = "auto"
    """auto (CUDA, else Apple's MPS, else CPU), cpu, cuda, cuda:1, mps"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """precision of the products; auto is bf16 or, on older GPUs, fp16, and on a CPU what a short measurement finds
    faster. Saved weights are fp32"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto is on for CUDA runs long enough to pay for it, off elsewhere"""
    kernels: Literal["auto", "on", "off"] = "auto"
    """C++ for attention and, in fp32, GELU on a CPU, built once by the system's compiler; auto uses each where a
    measurement finds it faster and it is built, or the run is long enough to wait some seconds for it. They round
    otherwise than torch, so a run that is continued goes on as it began"""
    deterministic: bool = False
    """bit-exact repetition on CUDA too, slower there (on CPU it always holds, with the same kernels)"""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch"""
    checkpoint_activations: bool = False
    """keep only the inputs of blocks and compute the rest once more in the backward pass: much less memory, a third
    slower, the same results"""

    def problems(self) -> list[str]:
        """Returns what is wrong with these values, in words; empty if nothing is."""
        problems = [f"threads {self.threads} must be 0 or more"] if self.threads < 0 else []
        if self.kernels == self.compile == "on":
            problems.append("kernels on and compile on exclude each other: the compiler makes its own")
        return problems


class Runtime:
    """Device, precision and determinism of one training process, set up once. `ranks` are the processes of the run
    (None: this process alone).

    A run that continues `checkpoint` on the same device keeps the precision, compilation and kernels that it began with
    unless settings name others."""

    def __init__(self, config: MachineConfig, ranks: Ranks | None = None, checkpoint: Checkpoint | None = None):
        self.ranks = ranks or Ranks()
        self.device = own_device(pick_device(config.device), self.ranks)
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # for kernels and streams that get no device
        set_threads(config.threads)
        record = checkpoint.state["runtime"] if checkpoint else {}
        same_device = self.ranks.first(record.get("device") == device_name(self.device))  # rank 0 wrote the record
        self.before = record if same_device else None
        self.dtype = self.agreed_dtype(config.dtype)
        if config.compile == "on" and not can_compile(self.device):
            language = COMPILERS[self.device.type]
            raise InputError(f"compile on: no {language} compiler found; install one or use --compile off")
        self.deterministic = config.deterministic or self.device.type == "cpu"
        if self.device.type == "cpu":
            keep_freed_memory()
        set_precision(self.dtype)
        if self.deterministic:
            be_deterministic()

    def agreed_dtype(self, name: str) -> torch.dtype:
        """Returns the precision called `name`; "auto" is the precision that the run began with or, for a new run, the
        choice of rank 0."""
        if name != "auto":
            return DTYPES[name]
        if self.before:
            return getattr(torch, self.before["precision"])
        dtypes = list(DTYPES.values())
        choice = dtypes.index(pick_dtype(name, self.device)) if self.ranks.leads else 0
        return dtypes[int(self.ranks.first(choice))]

    def autocast(self, enabled: bool = True) -> contextlib.AbstractContextManager:
        """Returns an autocast context: matrix products run in the Runtime's precision, weights stay fp32. Casts of the
        weights are cached until the outermost context ends. `enabled=False`, inside such a context, turns it off for
        the backward pass and keeps the cached casts."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def ready(self, array: np.ndarray) -> torch.Tensor:
        """Returns an int64 array as a tensor on the device. The copy to a GPU is asynchronous."""
        return to_device(torch.from_numpy(array), self.device)

    def fetch(self, tensor: torch.Tensor) -> Callable[[], list]:
        """Returns a function that returns `tensor` as nested lists. On a GPU the copy starts now, and that function
        waits for the copy alone, not for work that is launched later."""
        if self.device.type != "cuda":
            return tensor.tolist
        host, done = pinned_copy(tensor), torch.cuda.Event()
        done.record()

        def wait() -> list:
            done.synchronize()
            return host.tolist()

        return wait

    def compiles(self, setting: str, flops: float) -> bool:
        """Returns whether to compile a run of `flops` FLOPs. `setting` is "auto", "on" or "off"."""
        if setting != "auto":
            return setting == "on"
        if self.before:
            return self.before["compile"]
        pays = self.device.type == "cuda" and has_compiler() and compiling_pays(flops, self.device)
        return bool(self.ranks.first(pays))

    def ops(self, setting: str, config: ModelConfig, compiled: bool, flops: float) -> Ops:
        """Returns the Ops of a run of `flops` FLOPs; all ranks agree. With `setting` "on" they use the C++; with "auto"
        they use what of it is faster, if it is built or the run is long enough to wait for the build. Raises InputError
        if `setting` is "on" and this run cannot use the C++, ResourceError if it cannot be built."""
        if setting == "on":
            self.check_kernels(config, compiled)
        names = [] if setting == "off" or self.no_kernels(config, compiled) else native_names(config, self.dtype)
        if setting == "auto" and self.before:
            began = self.before["kernels"]  # older checkpoints hold true for all of them, or false
            names = [name for name in names if (began if isinstance(began, bool) else name in began)]
        kernels = native_kernels(names, wait=setting == "on" or self.before is not None or flops >= KERNELS_PAY)
        if setting == "auto" and not self.before:
            fast = faster_kernels(kernels, config, self.dtype) if self.ranks.leads else []
            fast = [name for name in NATIVE_OPS if self.ranks.first(name in fast)]
            kernels = {name: kernel for name, kernel in kernels.items() if name in fast}
        if self.ranks.least(int(bool(kernels))):
            return Ops(**kernels)
        if setting == "on":
            raise ResourceError("kernels on: the C++ library could not be built; use auto")
        return REFERENCE

    def no_kernels(self, config: ModelConfig, compiled: bool) -> str:
        """Returns why the C++ computes nothing in a run of this model; "" if it computes something."""
        if self.device.type != "cpu":
            return f"the C++ runs on a CPU, not on {self.device.type}"
        if self.dtype not in (torch.float32, torch.bfloat16):
            return f"the C++ computes fp32 and bf16, not {str(self.dtype).removeprefix('torch.')}"
        if compiled:
            return "the run is compiled, and the compiler makes its own"
        if not native_names(config, self.dtype):
            return "in bf16 the C++ needs dropout 0 and heads of an even width (n_embd / n_head)"
        return "" if can_build() else "no C++ compiler found"

    def check_kernels(self, config: ModelConfig, compiled: bool = False) -> None:
        """Raises InputError if the C++ computes nothing in a run of this model."""
        reason = self.no_kernels(config, compiled)
        if reason:
            raise InputError(f"kernels on: {reason}; use auto")

    def captures(self, flops: float, layers: int) -> bool:
        """Returns whether to capture uncompiled steps, with micro-batches of `flops` FLOPs in `layers` layers, as a
        CUDA graph. A capture does not change results, so checkpoints do not record it."""
        return self.device.type == "cuda" and self.ranks.size == 1 and launches_matter(flops, layers, self.device)

    def record(self, compiled: bool, ops: Ops, micro_batch_size: int) -> dict[str, Any]:
        """Returns name -> value of what must stay the same for a run to repeat to the bit. "kernels" are the fields of
        `ops` that are not torch's."""
        return {
            "torch": torch.__version__,
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "precision": str(self.dtype).removeprefix("torch."),
            "compile": compiled,
            "kernels": [name for name in NATIVE_OPS if getattr(ops, name) is not getattr(REFERENCE, name)],
            "micro_batch_size": micro_batch_size,
            "deterministic": self.deterministic,
            "world_size": self.ranks.size,
        }

    def sharers(self) -> int:
        """Returns how many processes of the run share the device's memory."""
        return self.ranks.local_size if self.device.type == "cpu" else 1


def check_runtime(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Warns, in one line, if the machine of a run differs from that of its checkpoint, so that the run will not repeat
    to the bit. Both arguments come from Runtime.record; for "kernels" older checkpoints hold whether there were any."""
    if isinstance(before.get("kernels"), bool):
        now = now | {"kernels": bool(now["kernels"])}
    changed = [f"{name} {before[name]} -> {value}" for name, value in now.items() if before.get(name, value) != value]
    if changed:
        note("warning", f"not bitwise the same run any more: {', '.join(changed)}")


def own_device(device: torch.device, ranks: Ranks) -> torch.device:
    """Returns the device of this process: each process on a machine has a GPU of its own. Raises InputError if there
    are fewer GPUs than processes, or if `device` is one that several processes cannot share."""
    if ranks.size == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise InputError(f"device {device}: {ranks.size} processes cannot share it; use --device cuda or cpu")
    if ranks.local_size > torch.cuda.device_count():
        raise InputError(
            f"device cuda: {ranks.local_size} processes on this machine, {torch.cuda.device_count()} GPUs; "
            "start one for each"
        )
    return torch.device("cuda", ranks.local_rank)


def keep_freed_memory() -> None:
    """Makes glibc reuse the memory of freed tensors. By default it returns large blocks to the system, which hands out
    new pages one by one, zeroed; on a CPU this takes up to a fifth of a training step."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def be_deterministic() -> None:
    """Makes torch repeat results to the bit, or raise an error if it cannot."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when CUDA starts
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms would import the compiler: a second
    switches: Any = torch.utils.deterministic
    switches.fill_uninitialized_memory = False  # it would write NaN over every new tensor first


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Sets all of torch's generators from (seed, step, rank), so that no generator state need be saved."""
    torch.manual_seed(int(mix(seed, step, rank)[0] >> np.uint64(1)))


class StopFlag:
    """A context that notes the first SIGTERM or Ctrl-C in `signal`; the loop reads it between steps. A second Ctrl-C
    interrupts at once. It is set too when the `slot` of the command is over."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.slot = Slot(0)

    def __enter__(self) -> Self:
        self.previous = {s: signal.signal(s, self.handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, _frame: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __bool__(self) -> bool:
        return self.signal is not None or self.slot.over()


@contextlib.contextmanager
def profiler(trace_path: Path | None) -> Iterator[Callable[[], object]]:
    """Yields a function to call after each training step. Profiles steps 4 to 6 into a Chrome trace at `trace_path`,
    and prints a table of where the time went. If `trace_path` is None, nothing is profiled."""
    if trace_path is None:
        yield lambda: None
        return

    def report(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(trace_path))
        tell(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))

    schedule = torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=report) as profile:
        yield profile.step
