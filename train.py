"""Train a GPT-2: from scratch, resumed, or from another model's weights. One loop.

    python train.py                                 lists the presets
    python train.py shakespeare --data data/mine    trains on the shards in data/mine
    python train.py --init gpt2 --data data/mine    fine-tunes GPT-2 (preset finetune)

A run that was interrupted goes on when the same command is given again. Under torchrun every process (rank) computes
its share of each step, and rank 0 writes."""

import contextlib
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from gpt.checkpoint import folder as checkpoints
from gpt.checkpoint import weights as interop
from gpt.config import (
    GROUP,
    check_preset_comes_first,
    find_preset,
    flatten,
    from_cli,
    list_presets,
    peek,
    read_toml,
    refuse,
)
from gpt.errors import InputError, ResourceError, Stopped, note, run_main, say, tell, unheard
from gpt.files import step_folders
from gpt.generate.generator import TextGenerator
from gpt.generate.sampling import SamplingParams
from gpt.kernels.cuda_graph import CudaGraph
from gpt.loss import IGNORED
from gpt.model import GPT, REFERENCE, ModelConfig, flops_per_token
from gpt.report.plot import RunPicture
from gpt.text.corpus import Corpus, check_tokenizer
from gpt.text.windows import Prefetch
from gpt.train import memory, resume
from gpt.train.budget import BatchConfig, Budget, LengthConfig, Progress, RhythmConfig
from gpt.train.graph import GraphedStep
from gpt.train.log import Log, NoLog, Recorder, exit_record, start_wandb
from gpt.train.metrics_file import logged_evaluation
from gpt.train.optim import LossScaler, OptimConfig, clip_gradients, gated_step, learning_rate, make_optimizer
from gpt.train.ranks import join
from gpt.train.runtime import MachineConfig, Runtime, StopFlag, launched, profiler, seed_step
from gpt.train.saver import NoSaver, Saver, run_folder
from gpt.train.state import State, load_optimizer

PRESETS = Path(__file__).parent / "presets"
SAMPLE_TOKENS = 200


@dataclass(frozen=True)
class TrainConfig:
    data: str = ""
    """folder of token shards, made by data/prepare.py"""
    out: str = ""
    """run folder for checkpoints, metrics and settings (default: out/PRESET)"""
    init: str = ""
    """start from the weights of this checkpoint, GPT-2 folder or hub name (gpt2, gpt2-medium, org/name): fine-tuning"""
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
    model: ModelConfig = field(default=ModelConfig(), metadata=GROUP)
    batch: BatchConfig = field(default=BatchConfig(), metadata=GROUP)
    length: LengthConfig = field(default=LengthConfig(), metadata=GROUP)
    optim: OptimConfig = field(default=OptimConfig(), metadata=GROUP)
    rhythm: RhythmConfig = field(default=RhythmConfig(), metadata=GROUP)
    machine: MachineConfig = field(default=MachineConfig(), metadata=GROUP)

    def __post_init__(self):
        groups = (self.model, self.batch, self.length, self.optim, self.rhythm, self.machine)
        found = [problem for group in groups for problem in group.problems()]
        if not self.data:
            found.append("data is not given; make a folder with data/prepare.py and pass --data FOLDER")
        if self.optim.warmup_steps >= 1 and 0 < self.length.max_steps < self.optim.warmup_steps:
            found.append(f"warmup_steps {self.optim.warmup_steps:g} is more than max_steps {self.length.max_steps}")
        if self.seed < 0:
            found.append(f"seed {self.seed} must be 0 or more")
        refuse(found)


def main():
    os.umask(os.umask(0o022) | 0o022)  # nobody else may write to what a run leaves
    with join(*launched()) as ranks:
        follow(*settings(sys.argv[1:]), ranks)


def follow(config, base, ranks):
    """A run from its start, or from where it was left, to its end."""
    refuse(config.batch.problems_on(ranks.size))
    size, block_size = config.batch.global_batch_size, config.model.block_size
    verify = config.verify if ranks.leads else "size"
    corpus = Corpus(config.data, config.tokenizer, verify, block_size, size, config.seed)
    budget = Budget(config.length, size, block_size, corpus.windows.per_epoch)
    newest = step_folders(config.out)[:1]
    checkpoint = find_start(config, base, corpus)
    progress = Progress(**checkpoint.state["progress"]) if checkpoint else Progress()
    if checkpoint and progress.evaluated_step != progress.step:  # perhaps made up for after the checkpoint was saved
        progress.evaluated_if(logged_evaluation(Path(config.out), progress.step))
    ranks.check_same(settings=flatten(config), data=corpus.record, checkpoint=asdict(progress))
    evaluates = corpus.has_validation() and progress.evaluation_due(0, always=True)  # a signal cut the last one short
    if budget.spent(progress) and not (checkpoint and evaluates):
        why = " (patience)" if budget.tired(progress) else ""
        (Path(config.out) / "exit.json").unlink(missing_ok=True)
        with unheard(sys.stdout):
            say(f"nothing to do: step {progress.step} of {budget.total_steps(progress)}{why}")
        return
    run = Runtime(config.machine, ranks)
    memory.check_fits(config.model, corpus.tokenizer.vocab_size, run.device, config.optim.optimizer)
    model, origin = load_model(config, base, corpus, checkpoint)
    with (
        run_folder(config.out, flatten(config), newest, ranks) as out,
        exit_record(out, ranks),
        StopFlag() as stop,
        memory_errors(progress, block_size),
    ):
        state, record = build(config, model, budget, progress, run, checkpoint)
        step = stepper(config, state, run, record["compile"])
        constant = {"config": flatten(config), "runtime": record, "base": origin}
        log = start_log(config, progress, budget) if ranks.leads else NoLog()
        saver = (
            Saver(out, state, corpus, constant, log, config.rhythm, asdict(SamplingParams()))
            if ranks.leads
            else NoSaver()
        )
        try:
            train(config, corpus, budget, run, state, step, log, saver, stop)
        finally:
            log.close()
            corpus.close()
        if ranks.any(stop):  # here all wait until the last checkpoint is there
            raise Stopped(f"signal at step {progress.step}: checkpoint saved in {out}; the same command continues")


def train(config, corpus, budget, run, state, step, log, saver, stop):
    """The loop: what is due at this step, then the next optimizer step, `step(batch, lr)`."""
    rhythm, size, progress, ranks = config.rhythm, config.batch.global_batch_size, state.progress, run.ranks
    batches = Prefetch(corpus.windows, run.ready, ranks.rank, ranks.size)
    recorder = Recorder(log, rhythm.log_every, progress, budget, state.scaler, corpus.windows, run, state.model)
    corpus.verifier.start()
    with profiler(Path(config.out) / "trace.json" if config.profile and ranks.leads else None) as profile:
        while True:
            always = budget.spent(progress) or (config.init and progress.step == 0)  # the base model of a fine-tune
            if corpus.has_validation() and progress.evaluation_due(rhythm.eval_every, always):
                losses = evaluate(state, corpus, rhythm.eval_tokens, run, stop)
                recorder.read(always=True)
                if losses and recorder.evaluated(*losses):
                    saver.save()
            if progress.due(rhythm.save_every):
                recorder.read()
                saver.save()
            if budget.spent(progress) or ranks.any(stop):
                break
            started = time.perf_counter()
            lr = learning_rate(config.optim, progress.step, budget.total_steps(progress))  # which float32 holds
            batch = batches.take(progress.windows_seen, size)
            seed_step(config.seed, progress.step, ranks.rank)
            numbers = step(batch, lr)
            progress.advance(size, config.model.block_size)
            recorder.step(lr, numbers)
            elapsed = time.perf_counter() - started
            progress.train_seconds += ranks.first(elapsed) if config.length.max_minutes else elapsed
            profile.step()
            corpus.verifier.check()
            if ranks.leads and progress.due(rhythm.sample_every):
                log.say(sample(state.model, corpus.tokenizer, progress.step, config.seed))
    recorder.read()
    saver.save(is_last=True)
    batches.close()


def stepper(config, state, run, compiled):
    """`train_step` as a function of batch and learning rate; a CUDA graph where launching it takes much of its time."""

    def step(batch, lr):
        return train_step(state, batch, lr, config.optim.grad_clip, run)

    tokens = state.progress.micro_batch_size * config.model.block_size
    flops = tokens * flops_per_token(config.model, state.model.vocab_size)
    if compiled or config.profile or not run.captures(flops, config.model.n_layer):
        return step  # a profile is of kernels by their operations
    return GraphedStep(step, CudaGraph(run.device), state.optimizer.zero_grad)


def train_step(state, batch, lr, grad_clip, run):
    """One optimizer step on `batch` (B, block_size + 1) at `lr`, a number or a tensor: gradients of the mean loss over
    all its targets, summed over micro-batches, clipped, applied only if finite. Returns loss, gradient norm and whether
    they are finite, (3,), still on the device. The host reads nothing of it on a GPU: it may be captured."""
    parameters = list(state.model.parameters())
    loss = accumulate(state, batch, run)
    state.scaler.unscale(parameters)
    norm = clip_gradients(parameters, grad_clip)
    finite = torch.isfinite(loss) & torch.isfinite(norm)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    gated_step(state.optimizer, finite)
    state.scaler.update(finite)
    state.optimizer.zero_grad()
    return torch.stack([loss, norm, finite.float()])


def accumulate(state, batch, run):
    """Add up the gradients of all micro-batches; returns the mean loss over the targets of the whole batch, of which
    `batch` is this rank's share: it is divided by the ranks' mean count, and gradients and loss are means over them."""
    ids, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    ranks, micro_batch_size = run.ranks, state.progress.micro_batch_size
    count = ranks.mean((targets != IGNORED).sum()).clamp(min=1 / ranks.size)
    loss = torch.zeros((), device=run.device)
    pieces = list(zip(ids.split(micro_batch_size), targets.split(micro_batch_size), strict=True))
    with run.autocast():  # around all of them: weights, but the head's, are cast once
        for number, (some_ids, some_targets) in enumerate(pieces, 1):
            forward = ranks.forward(state.model, last=number == len(pieces))
            share = forward(some_ids, some_targets, ops=state.ops).sum() / count
            with run.autocast(enabled=False):
                (share * state.scaler.scale).backward()
            loss += share.detach()
    return ranks.mean(loss)


@torch.no_grad()
def evaluate(state, corpus, eval_tokens, run, stop):
    """(nats per token, bits per byte) on the validation set, or None if a signal asks to stop meanwhile."""
    model, batch_size = state.model, state.progress.micro_batch_size
    model.eval()
    ranks, sums, count, size = run.ranks, [], 0, 0
    for ids, targets in corpus.validation(batch_size, eval_tokens, ranks.rank, ranks.size):
        with run.autocast():
            sums.append(model(run.ready(ids), run.ready(targets), ops=state.ops).sum())
        counted = targets[targets != IGNORED]
        count += len(counted)
        size += int(corpus.byte_lengths[counted].sum())
        if stopped := ranks.any(stop):
            break
    model.train()
    nats, count, size = ranks.totals(torch.stack(sums).cpu().double().sum().item(), count, size)
    return None if stopped else (nats / count, nats / math.log(2) / max(size, 1))


def sample(model, tokenizer, step, seed):
    """A text of the model's own, begun from nothing, to be printed."""
    [[completion]] = TextGenerator(model, tokenizer).generate([""], max_new_tokens=SAMPLE_TOKENS, seed=seed)
    return f"--- sample at step {step}\n{completion.text}\n---"


# ---- what a run starts from


def settings(argv):
    """(TrainConfig, folder of the base model or None). Defaults < the checkpoint's or base model's < preset < flags."""
    preset, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    path = peek(flags, "resume")
    preset = find_preset(preset or ("finetune" if peek(flags, "init") else ""), PRESETS)
    values = {}
    if path not in ("", "auto"):
        checkpoint = resume.found_or_own(resume.open_checkpoint, path, peek(flags, "out"))
        values = checkpoint.state["config"] | {"out": str(resume.run_folder(path))}
    elif preset:
        values = {"out": f"out/{preset.stem}"}
    elif not {"-h", "--help"} & set(flags):
        check_preset_comes_first(TrainConfig, flags)
        tell(list_presets(PRESETS))
        raise InputError("no preset given: they are listed above; choose one, as in python train.py demo")
    init = peek(flags, "init") or (read_toml(preset, TrainConfig).get("init") if preset else None)
    base = resume.found_or_own(checkpoints.find_model, init, peek(flags, "out") or values["out"]) if init else None
    if isinstance(base, checkpoints.Checkpoint):  # the base is gone, the run that was begun with it is not
        values, base = {name: base.state["config"][name] for name in resume.ARCHITECTURE} | values, None
    architecture = asdict(interop.read_config(base)[0]) if base else {}
    config, given = from_cli(TrainConfig, flags, values | architecture, preset, __doc__, "train.py PRESET")
    if base:
        resume.check_architecture(config.model, given, architecture)
        resume.check_base_is_elsewhere(base, config.out)
    return config, base


def find_start(config, base, corpus):
    """The Checkpoint that the run continues, or None; settings, tokenizer and data are compared with it."""
    checkpoint = resume.find_checkpoint(config.out, config.resume)
    if checkpoint is None:
        if not base:
            note("info", f"starting from scratch in {config.out}")
        return None
    accept = config.resume != "auto" and resume.run_folder(config.resume).resolve() == checkpoint.path.resolve().parent
    check_tokenizer(str(checkpoint.path), checkpoint.manifest["tokenizer"], corpus.tokenizer)
    resume.check_settings(flatten(config), checkpoint, accept)
    resume.check_dataset(checkpoint, corpus.record, accept)
    note("info", f"continuing {checkpoint.path} at step {checkpoint.step}")
    return checkpoint


def load_model(config, base, corpus, checkpoint):
    """(GPT in fp32 on the CPU, record of the base model or None): the checkpoint's, the base's, or a new one."""
    if checkpoint:
        model, origin = interop.load_model(checkpoint.path), checkpoint.state["base"]
    elif base:
        model, origin = resume.load_base(base, config.init, config.model.block_size, corpus.tokenizer)
    else:
        torch.manual_seed(config.seed)
        model, origin = GPT(config.model, corpus.tokenizer.vocab_size), None
    model.set_dropout(config.model.dropout)
    return model, origin


def build(config, model, budget, progress, run, checkpoint):
    """(State on the device, compiled if asked; record of the machine): new, or as the checkpoint left it."""
    model.to(run.device).train()
    progress.micro_batch_size = micro_batch_size(config, progress, model, run)
    optimizer = make_optimizer(model, config.optim, muon_dtype(run), run.ranks)
    scaler = LossScaler(run.device, enabled=run.dtype == torch.float16)
    before = checkpoint.state["runtime"] if checkpoint else None
    flops = flops_per_token(config.model, model.vocab_size) * config.model.block_size
    flops *= config.batch.global_batch_size / run.ranks.size * budget.total_steps(progress)
    compiled = run.compiles(config.machine.compile, flops, before)
    ops = run.native_attention(config.machine.kernels, config.model, compiled, flops, before)
    record = run.record(compiled, ops is not None, progress.micro_batch_size)
    if checkpoint:
        if checkpoint.step > 0:  # before the first step the optimizer holds nothing yet
            load_optimizer(optimizer, model, checkpoint)
        scaler.load(checkpoint.state["scaler"])
        resume.check_runtime(before, record)
    state = State(model, optimizer, scaler, progress, ops or REFERENCE)
    size, kind = progress.micro_batch_size, config.optim.optimizer
    needs = memory.estimate(config.model, model.vocab_size, size, run.dtype, run.device, kind)
    kernels = ", C++ attention" if ops else ""
    note("info", f"{model.num_parameters():,} parameters on {record['device']}, {record['precision']}{kernels}")
    note("info", memory.describe(needs))
    run.ranks.share_gradients(model)
    if compiled:
        torch.use_deterministic_algorithms(run.deterministic)  # for the compiler too
        model.compile()
    if compiled or run.ranks.size > 1:  # DDP orders its buckets anew after the first step, and with them its sums
        warm_up(state, config.model.block_size, run)
    return state, record


def micro_batch_size(config, progress, model, run):
    """The given one, else the checkpoint's if it still divides this rank's share of the batch, else the largest that
    fits on all ranks."""
    size = config.batch.global_batch_size // run.ranks.size
    if config.batch.micro_batch_size:
        return config.batch.micro_batch_size
    if progress.micro_batch_size and size % progress.micro_batch_size == 0:
        return progress.micro_batch_size
    fits = memory.choose_micro_batch(config.model, model.vocab_size, size, run.dtype, run.device, run.sharers())
    return run.ranks.least(fits)


def muon_dtype(run):
    return torch.bfloat16 if run.dtype == torch.bfloat16 else torch.float32


def warm_up(state, block_size, run):
    """Compile before the clock of the first step starts."""
    batch = torch.zeros(state.progress.micro_batch_size, block_size + 1, dtype=torch.int64, device=run.device)
    accumulate(state, batch, run)
    state.optimizer.zero_grad()


@contextlib.contextmanager
def memory_errors(progress, block_size):
    try:
        yield
    except torch.OutOfMemoryError:
        sizes = f"micro_batch_size {progress.micro_batch_size}, block_size {block_size}"
        raise ResourceError(f"out of GPU memory: {sizes}; lower --micro_batch_size") from None


# ---- where it goes


def start_log(config, progress, budget):
    run = None
    if config.wandb:
        run = start_wandb(config.wandb, progress.wandb_id or None, Path(config.out).name, config.out, flatten(config))
        progress.wandb_id = run.id if run else progress.wandb_id
    begins = progress.step == 0 and progress.evaluated_step is None
    out = Path(config.out)
    return Log(out, -1 if begins else progress.step, budget.total_steps(progress), RunPicture(out), run)


if __name__ == "__main__":
    run_main(main, quiet_pipe=False)
