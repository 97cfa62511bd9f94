"""Train a GPT-2: from scratch, resumed, or from another model's weights.

    python train.py                                 lists the presets
    python train.py shakespeare --data data/mine    trains on these shards
    python train.py --init gpt2 --data data/mine    fine-tunes GPT-2

A run that was interrupted continues when the same command is given again. Under torchrun every process (rank) computes
its share of each step, and rank 0 writes."""

import gpt.kernels.waiting  # noqa: F401 (before torch)

import contextlib
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gpt.checkpoint.read import find_model_folder, load_stored, open_model
from gpt.checkpoint.weights import StoredModel
from gpt.config import positional, refuse
from gpt.device import pick_device
from gpt.errors import run_main, tell
from gpt.generate.generator import TextGenerator, sample_line
from gpt.generate.sampling import SamplingParams
from gpt.loss import IGNORED, inputs_and_targets
from gpt.model import ModelConfig
from gpt.report.plot import RunPicture
from gpt.report.report import REPORT, report_errors, write_report
from gpt.train.budget import BY_THE_CLOCK, BatchConfig, LengthConfig, RhythmConfig
from gpt.train.finetune import problems_by_size
from gpt.train.lora import LoraConfig, merged
from gpt.train.optim import OptimConfig, clip_gradients, gated_step, learning_rate
from gpt.train.ranks import join
from gpt.train.runtime import MachineConfig, Runtime, seed_step
from gpt.train.setup import Run, open_run
from gpt.train.start import Start, find_start, read_settings
from gpt.train.state import State

PRESETS = Path(__file__).parent / "presets"
SAMPLE_TOKENS, LINE_TOKENS, REPORT_PROMPTS = 200, 60, 3

Batch = Tensor | list[Tensor]
"""windows: ids (B, block_size + 1); examples: a list of micro-batches (b, T + 1), see gpt/text/example_stream.py"""


@dataclass(frozen=True)
class TrainConfig:
    data: str = ""
    """folder of token shards, made by data/prepare.py"""
    out: str = ""
    """run folder for checkpoints, metrics and settings (default: out/PRESET)"""
    init: str = ""
    """fine-tune this model: a run, GPT-2 folder, hub name (gpt2, gpt2-medium, org/name), PEFT's adapter, ckpt.pt"""
    resume: str = "auto"
    """auto continues the run in --out if there is one; a run or step folder continues that; "" never continues"""
    tokenizer: str = ""
    """tokenizer of data that does not name its own (shards made by other programs)"""
    seed: int = 1337
    """of the initial weights, the order of the data and dropout"""
    verify: Literal["full", "size"] = "full"
    """full checks the sha256 of all shards in the background; size only their sizes"""
    wandb: str = ""
    """project on Weights & Biases to log to; "" = off"""
    profile: bool = False
    """write a profiler trace of steps 4 to 6 to the run folder, and print where the time went"""
    model: ModelConfig = field(default=ModelConfig())
    batch: BatchConfig = field(default=BatchConfig())
    length: LengthConfig = field(default=LengthConfig())
    optim: OptimConfig = field(default=OptimConfig())
    lora: LoraConfig = field(default=LoraConfig())
    rhythm: RhythmConfig = field(default=RhythmConfig())
    machine: MachineConfig = field(default=MachineConfig())

    def __post_init__(self) -> None:
        groups = (self.model, self.batch, self.length, self.optim, self.lora, self.rhythm, self.machine)
        problems = [problem for group in groups for problem in group.problems()]
        problems += self.lora.conflicts(self.model, self.init, self.optim.optimizer, self.optim.freeze)
        if not self.data:
            problems.append("data is not given; make a folder with data/prepare.py and pass --data FOLDER")
        if self.optim.warmup_steps >= 1 and 0 < self.length.max_steps < self.optim.warmup_steps:
            problems.append(f"warmup_steps {self.optim.warmup_steps:g} is more than max_steps {self.length.max_steps}")
        if self.seed < 0:
            problems.append(f"seed {self.seed} must be 0 or more")
        refuse(problems + problems_by_size(self.optim, self.length, bool(self.init)))


@dataclass(frozen=True)
class CommandLine(TrainConfig):
    """The settings of a run and the preset: what the command line accepts."""

    preset: str = positional("PRESET", default="")
    """a name in presets/ or a .toml file; without one the presets are listed (default with --init: finetune)"""


def main() -> None:
    os.umask(os.umask(0o022) | 0o022)  # no other user may write to the files of a run
    with join() as ranks:
        config, base, typed = read_settings(CommandLine, TrainConfig, sys.argv[1:], PRESETS, __doc__)
        start = find_start(config, base, typed, ranks)
        held_out = start.corpus.held_out(REPORT_PROMPTS, LINE_TOKENS)
        if finished := start.is_finished():
            start.say_finished()
        else:
            with open_run(start, ranks, train_step, accumulate, asdict(SamplingParams()), RunPicture) as run:
                train(run)
        if ranks.leads and not (finished and (Path(start.config.out) / REPORT).exists()):
            report(start, held_out)


def train(run: Run) -> None:
    """Trains until a limit ends the run or a signal stops it, then saves a last checkpoint. Evaluates, saves and prints
    samples before an optimizer step, logs after it, each as often as the settings say."""
    config, progress, ranks = run.config, run.state.progress, run.ranks
    size, rhythm = config.batch.global_batch_size, config.rhythm
    run.corpus.verifier.start()
    if ranks.leads and progress.step == 0:
        run.corpus.tell_first_example()
    with contextlib.closing(run.batches()) as batches, run.profiler() as profiled:
        while True:
            if run.evaluation_due() and run.recorder.evaluated(evaluate(run)):
                run.saver.save()
            if progress.due(rhythm.save_every):
                run.saver.save()
            if ranks.leads and run.samples.due(progress):
                tell(sample(run))
            if run.budget.spent(progress) or ranks.any(run.stop):
                break
            started = time.perf_counter()
            lr = learning_rate(config.optim, progress.step, run.budget.total_steps(progress))
            batch = batches.take(progress.windows_seen, size)  # windows_seen is all that resuming needs
            seed_step(config.seed, progress.step, ranks.rank)
            numbers = run.step(batch, lr)
            seconds = time.perf_counter() - started
            progress.advance(size, run.corpus.training.tokens(progress.windows_seen, size))
            run.recorder.step(lr, numbers, seconds)
            run.count_seconds(seconds)
            profiled()
            run.corpus.verifier.check()
    run.saver.save(is_last=True)


def train_step(state: State, batch: Batch, lr: float | Tensor, grad_clip: float, machine: Runtime) -> Tensor:
    """Takes one optimizer step at learning rate `lr` on `batch`, this rank's share of the global batch. Clips the
    gradients of the mean loss to the norm `grad_clip` (0: does not clip), and applies them only if loss and norm are
    finite.

    Returns (3,), on the device: the loss, the gradient norm before clipping, and 1 if both are finite, else 0. On a GPU
    the host reads no value, so the step can be captured as a CUDA graph."""
    parameters = list(state.model.parameters())
    loss = accumulate(state, batch, machine)
    state.scaler.unscale(parameters)
    norm = clip_gradients(parameters, grad_clip)
    finite = torch.isfinite(loss) & torch.isfinite(norm)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    gated_step(state.optimizer, finite)
    state.scaler.update(finite)
    state.optimizer.zero_grad()
    return torch.stack([loss, norm, finite.float()])


def accumulate(state: State, batch: Batch, machine: Runtime) -> Tensor:
    """Adds up the gradients of all micro-batches, times the loss scale. Returns the mean loss over all targets of the
    global batch, of which `batch` is this rank's share. Each rank divides its sum of losses by the mean number of
    targets per rank; the mean of these quotients over the ranks is the mean loss."""
    parts = batch if isinstance(batch, list) else batch.split(state.progress.micro_batch_size)
    ranks, micro_batches = machine.ranks, [inputs_and_targets(tokens) for tokens in parts]
    counts = torch.stack([(targets != IGNORED).sum() for _, targets in micro_batches])
    count = ranks.mean(counts.sum()).clamp(min=1 / ranks.size)  # no target on any rank: loss 0
    loss = torch.zeros((), device=machine.device)
    with machine.autocast():  # one context for all micro-batches: it casts the weights once, except those of the head
        for number, (micro_ids, micro_targets) in enumerate(micro_batches, 1):
            forward = ranks.forward(state.model, last=number == len(micro_batches))
            share = forward(micro_ids, micro_targets, ops=state.ops).sum() / count
            with machine.autocast(enabled=False):
                (share * state.scaler.scale).backward()
            loss += share.detach()
    return ranks.mean(loss)


@torch.no_grad()
def evaluate(run: Run) -> tuple[float, float] | None:
    """Returns the mean loss on the validation set, as (nats per token, bits per byte), or None if a signal asks to
    stop."""
    model, machine, ranks, corpus = run.state.model, run.machine, run.ranks, run.corpus
    batch_size, sums, stopped = run.state.progress.micro_batch_size, [], False
    targets_seen = bytes_seen = 0
    model.eval()
    for tokens in corpus.validation(batch_size, run.config.rhythm.eval_tokens, ranks.rank, ranks.size):
        with machine.autocast():
            sums.append(model(*inputs_and_targets(machine.ready(tokens)), ops=run.state.ops).sum())
        counted = tokens[:, 1:][tokens[:, 1:] >= 0]
        targets_seen += len(counted)
        bytes_seen += int(corpus.byte_lengths[counted].sum())
        if stopped := ranks.any(run.stop):
            break
    model.train()
    nats = torch.stack(sums).cpu().double().sum().item()
    nats, total_targets, total_bytes = ranks.totals(nats, targets_seen, bytes_seen)
    return None if stopped else (nats / total_targets, nats / math.log(2) / max(total_bytes, 1))


def sample(run: Run) -> str:
    """Returns a text that the model generates from an empty prompt, or after the prompt of an example: up to
    SAMPLE_TOKENS tokens between a heading and an end line or, where sample_every is left out, one line."""
    step, model, tokenizer, seed = run.state.progress.step, run.state.model, run.corpus.tokenizer, run.config.seed
    prompt = run.corpus.sample_prompt()
    if run.samples.every == BY_THE_CLOCK:
        heading = f"sample at step {step}, {run.samples.seconds():.0f} s: "
        return heading + sample_line(model, tokenizer, prompt, LINE_TOKENS, seed, width=79 - len(heading))
    generator = TextGenerator(merged(model), tokenizer)
    [completion] = generator.continue_ids([prompt], max_new_tokens=SAMPLE_TOKENS, seed=seed)
    return f"--- sample at step {step}\n{completion.text}\n---"


def report(start: Start, held_out: list[tuple[list[int], list[int]]]) -> None:
    """Writes report.md into the run folder. In it the base model, if there is one, and the best checkpoint continue the
    held-out prompts, each of which comes with the ids that follow it in the data."""
    out, tokenizer, device = Path(start.config.out), start.corpus.tokenizer, pick_device(start.config.machine.device)
    prompts = [prompt for prompt, _ in held_out]

    def texts(stored: StoredModel) -> list[str]:
        model, _, _ = load_stored(stored, device=device)
        generator = TextGenerator(model, tokenizer, backend="eager")
        completions = generator.continue_ids(prompts, max_new_tokens=LINE_TOKENS, temperature=0.0)
        return [completion.text for completion in completions]

    with report_errors(out):
        answers: dict[str, list[str]] = {}
        if held_out:
            base = start.first_base()
            answers["the prompt"] = [tokenizer.decode(prompt) for prompt in prompts]
            if base:
                answers["before"] = texts(base)
            answers["after" if base else "the model"] = texts(open_model(find_model_folder(out)))
            answers["in the data"] = [tokenizer.decode(following) for _, following in held_out]
        write_report(out, answers, start.corpus)


if __name__ == "__main__":
    run_main(main, quiet_pipe=False)
