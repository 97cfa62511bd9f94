"""Prepares a run for its loop: puts model and optimizer on the device, compiles the model or uses C++ kernels if that
saves time, locks the run folder, and opens log and checkpoints."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gpt.config import flatten
from gpt.errors import InputError, Stopped, note
from gpt.kernels.cuda_graph import CudaGraph
from gpt.model import GPT, flops_per_token
from gpt.text.corpus import Corpus
from gpt.text.windows import Prefetch
from gpt.train import memory
from gpt.train.budget import Budget, SampleTimes
from gpt.train.graph import GraphedStep
from gpt.train.log import Recorder, exit_record, start_log, tell_best, tell_end
from gpt.train.optim import LossScaler, make_optimizer
from gpt.train.ranks import Ranks
from gpt.train.recompute import recomputed
from gpt.train.runtime import Runtime, StopFlag, check_runtime, profiler
from gpt.train.saver import Saver, locked_run_folder
from gpt.train.slot import Slot
from gpt.train.start import Start, first_model
from gpt.train.state import State, load_optimizer

TrainStep = Callable[[State, Any, Any, float, Runtime], torch.Tensor]
Accumulate = Callable[[State, Any, Runtime], torch.Tensor]


@dataclass
class Run:
    """Everything that the loop of a run uses."""

    config: Any
    """the TrainConfig"""
    machine: Runtime
    corpus: Corpus
    budget: Budget
    state: State
    step: Callable[[Any, float], torch.Tensor]
    """step(batch, lr): one optimizer step; returns loss, gradient norm and whether they are finite, (3,)"""
    recorder: Recorder
    saver: Saver
    stop: StopFlag
    samples: SampleTimes = field(default_factory=lambda: SampleTimes(0))

    @property
    def ranks(self) -> Ranks:
        return self.machine.ranks

    def evaluation_due(self) -> bool:
        """Returns whether to evaluate at this step: every eval_every steps, at the last step, and before the first step
        of a fine-tune; but only if there is a validation set and this step is not evaluated yet."""
        progress = self.state.progress
        always = self.budget.spent(progress) or (self.config.init and progress.step == 0)
        return self.corpus.has_validation() and progress.evaluation_due(self.config.rhythm.eval_every, always)

    def batches(self) -> Prefetch:
        place = self.ranks.rank, self.ranks.size, self.state.progress.micro_batch_size
        return Prefetch(self.corpus.training, self.machine.ready, *place)

    def profiler(self) -> contextlib.AbstractContextManager[Callable[[], object]]:
        """Returns a context that gives a function to call after each step. With `config.profile` it profiles some steps
        on rank 0."""
        asked = self.config.profile and self.ranks.leads
        return profiler(Path(self.config.out) / "trace.json" if asked else None)

    def count_seconds(self, seconds: float) -> None:
        """Adds the time of a step, and the time that reading its numbers waited, to the run's train_seconds. If
        time limits the run, every rank adds the time that rank 0 measured, so that all stop at the same step."""
        seconds, self.recorder.waited = seconds + self.recorder.waited, 0.0
        limited = self.config.length.max_minutes or self.budget.follows_slot()
        self.state.progress.train_seconds += self.ranks.first(seconds) if limited else seconds
        if self.budget.follows_slot():
            self.budget.slot_seconds = self.ranks.first(self.stop.slot.seconds_left())

    def is_complete(self) -> bool:
        """Returns whether a limit has ended the run, and its last evaluation is made."""
        return self.budget.spent(self.state.progress) and not self.evaluation_due()


@contextlib.contextmanager
def open_run(
    start: Start, ranks: Ranks, train_step: TrainStep, accumulate: Accumulate, sampling: dict, draw: Callable
) -> Iterator[Run]:
    """Opens the Run that begins at `start`; closes it afterwards. `train_step` and `accumulate` are those of train.py,
    `sampling` the defaults of generation to store in checkpoints; `draw(out)` returns a function that draws the loss
    curves of the run folder `out`. Raises Stopped if a signal ended the loop."""
    config, progress, corpus = start.config, start.progress, start.corpus
    machine = Runtime(config.machine, ranks, start.checkpoint)
    if config.machine.kernels == "on":
        machine.check_kernels(config.model)
    memory.check_fits(config.model, corpus.tokenizer.vocab_size, machine.device, method_of(config))
    model, origin = first_model(start)
    with (
        locked_run_folder(config.out, flatten(config), start.newest, ranks) as (out, check_in_place),
        exit_record(out, ranks, check_in_place),
        StopFlag() as stop,
        memory.out_of_memory_errors(progress, config.model.block_size, method_of(config)),
    ):
        state, record = build_state(start, model, machine, accumulate)
        step = stepper(config, state, machine, record["compile"], corpus.training.one_shape, train_step)
        log = start_log(config, progress, start.budget, draw) if ranks.leads else None
        recorder = Recorder(log, config.rhythm.log_every, state, start.budget, corpus.training, machine)
        stop.slot = Slot(config.length.stop_after_minutes, 12 * model.num_parameters())  # weights and two moments, fp32
        constant = {"config": flatten(config), "asked": start.asked, "runtime": record, "base": origin}
        saver = Saver(out, state, corpus, recorder, constant, sampling, config.rhythm, check_in_place, stop.slot)
        with contextlib.closing(corpus), contextlib.closing(log) if log else contextlib.nullcontext():
            samples = SampleTimes(config.rhythm.sample_every)
            run = Run(config, machine, corpus, start.budget, state, step, recorder, saver, stop, samples)
            yield run
        tell_why(run, out)


def tell_why(run: Run, out: Path) -> None:
    """Prints why the loop of a run has ended. Raises Stopped if a signal, or the end of the slot, stopped it."""
    progress, stop, length = run.state.progress, run.stop, run.config.length
    stopped = stop.signal is not None or (stop.slot.is_over and not run.is_complete())
    if not run.ranks.any(stopped):  # also waits until rank 0 has saved the last checkpoint
        tell_end(run.budget.reason(progress), progress, out, run.corpus.has_messages)
        return
    tell_best(progress, out)
    by_signal = run.ranks.any(stop.signal is not None)  # the slots of other ranks may end earlier than that of this one
    why = "signal" if by_signal else f"stop_after_minutes {length.stop_after_minutes:g}"
    raise Stopped(f"{why} at step {progress.step}: checkpoint saved in {out}; the same command continues")


def build_state(start: Start, model: GPT, machine: Runtime, accumulate: Accumulate) -> tuple[State, dict[str, Any]]:
    """Returns (State on the device, record of the machine), new or as the checkpoint left it. Compiles the model if
    Runtime.compiles says so."""
    config, progress, checkpoint = start.config, start.progress, start.checkpoint
    model.to(machine.device).train()
    progress.micro_batch_size = micro_batch_size(start, model, machine)
    optimizer = make_optimizer(model, config.optim, muon_dtype(machine.dtype), machine.ranks)
    scaler = LossScaler(machine.device, enabled=machine.dtype == torch.float16)
    flops = flops_of_run(start, model, machine)
    compiled = machine.compiles(config.machine.compile, flops)
    ops = machine.ops(config.machine.kernels, config.model, compiled, flops)
    if config.machine.checkpoint_activations:
        ops = replace(ops, block=recomputed)
    record = machine.record(compiled, ops, progress.micro_batch_size)
    if checkpoint:
        if checkpoint.step > 0:  # before the first step the optimizer holds nothing
            load_optimizer(optimizer, model, checkpoint)
        scaler.load(checkpoint.state["scaler"])
        check_runtime(checkpoint.state["runtime"], record)
    state = State(model, optimizer, scaler, progress, ops)
    tell_sizes(config, state, machine, record)
    machine.ranks.share_gradients(model)
    if compiled:
        torch.use_deterministic_algorithms(machine.deterministic)  # for the compiler too
        model.compile()
    if compiled or machine.ranks.size > 1:  # after its first step DDP orders its buckets anew, and with them its sums
        with compiler_errors() if compiled else contextlib.nullcontext():
            warm_up(state, config.model.block_size, machine, accumulate)
    return state, record


@contextlib.contextmanager
def compiler_errors() -> Iterator[None]:
    """Turns an error of the compiler that torch.compile calls into an InputError."""
    from torch._dynamo.exc import BackendCompilerFailed  # takes seconds to import, and the run compiles anyway

    try:
        yield
    except BackendCompilerFailed as error:
        cause = error.inner_exception
        if not isinstance(cause, (OSError, RuntimeError, subprocess.CalledProcessError)):
            raise
        reason = str(cause).strip().partition("\n")[0]
        raise InputError(f"compile on: the compiler failed ({reason}); use --compile off") from None


def flops_of_run(start: Start, model: GPT, machine: Runtime) -> float:
    """Returns the FLOPs of this rank's share of the run."""
    config = start.config
    steps = start.budget.total_steps(start.progress)
    tokens = config.batch.global_batch_size * start.budget.mean_tokens * steps
    return tokens * flops_per_token(config.model, model.vocab_size) / machine.ranks.size


def micro_batch_size(start: Start, model: GPT, machine: Runtime) -> int:
    """Returns the micro-batch size in the settings if it is set; else that of the checkpoint if it divides this rank's
    share of the batch; else the largest that fits on all ranks."""
    config, progress = start.config, start.progress
    size = config.batch.global_batch_size // machine.ranks.size
    if config.batch.micro_batch_size:
        return config.batch.micro_batch_size
    if progress.micro_batch_size and size % progress.micro_batch_size == 0:
        return progress.micro_batch_size
    place, examples = (machine.dtype, machine.device, machine.sharers()), start.corpus.dataset.has_examples
    fits = memory.choose_micro_batch(config.model, model.vocab_size, size, *place, method_of(config), examples)
    return machine.ranks.least(fits)


def method_of(config: Any) -> memory.Method:
    """Returns how a run with these settings trains its model, as far as its memory depends on it."""
    optim = config.optim
    return memory.Method(optim.optimizer, optim.freeze, config.lora, config.machine.checkpoint_activations)


def muon_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the precision of Muon's products for a run in `dtype`: bf16 or fp32, because the range of fp16 is too
    small."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def tell_sizes(config: Any, state: State, machine: Runtime, record: dict[str, Any]) -> None:
    """Prints the size of the model, the machine, and the memory that a step needs."""
    model, size = state.model, state.progress.micro_batch_size
    parameters, trained = model.num_parameters(), model.num_parameters(trained=True)
    kernels = ", C++ kernels" if record["kernels"] else ""
    share = f", {trained:,} of them trained," if trained < parameters else ""
    note("info", f"{parameters:,} parameters{share} on {record['device']}, {record['precision']}{kernels}")
    place = config.model, model.vocab_size, size, machine.dtype, machine.device, method_of(config)
    note("info", memory.memory_line(memory.estimate(*place), memory.less_if_short(*place, machine.sharers())))


def warm_up(state: State, block_size: int, machine: Runtime, accumulate: Accumulate) -> None:
    """Runs a forward and a backward pass over ids that are all 0, before the first step: it compiles the model, and DDP
    learns the order in which gradients arrive, by which it then orders its buckets. Changes no weights."""
    batch = torch.zeros(state.progress.micro_batch_size, block_size + 1, dtype=torch.int64, device=machine.device)
    accumulate(state, batch, machine)
    state.optimizer.zero_grad()


def stepper(
    config: Any, state: State, machine: Runtime, compiled: bool, one_shape: bool, train_step: TrainStep
) -> Callable[[Any, Any], torch.Tensor]:
    """Returns `train_step` as a function of batch and learning rate. The function replays a CUDA graph if launching
    kernels takes much of a step's time; `one_shape`: all batches have the same shape, which that needs."""

    def step(batch: Any, lr: Any) -> torch.Tensor:
        return train_step(state, batch, lr, config.optim.grad_clip, machine)

    tokens = state.progress.micro_batch_size * config.model.block_size
    flops = tokens * flops_per_token(config.model, state.model.vocab_size)
    if compiled or config.profile or config.machine.checkpoint_activations:
        # A profile shows kernels by the operations that launched them. Checkpointed activations read the state of the
        # random numbers, which a captured graph does not have.
        return step
    if not (one_shape and machine.captures(flops, config.model.n_layer)):
        return step
    return GraphedStep(step, CudaGraph(machine.device), state.optimizer.zero_grad)
