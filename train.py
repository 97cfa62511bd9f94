"""Train a GPT-2: from scratch, resumed, or from another model's weights. One loop.

    python train.py                                 lists the presets
    python train.py shakespeare --data data/mine    trains on the shards in data/mine
    python train.py --init gpt2 --data data/mine    fine-tunes GPT-2 (preset finetune)

A run that was interrupted goes on when the same command is given again."""

import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from gpt import checkpoint as checkpoints
from gpt import interop, memory, resume
from gpt.budget import BatchConfig, Budget, LengthConfig, Progress
from gpt.config import find_preset, flatten, from_cli, list_presets, peek, refuse, to_toml
from gpt.corpus import Corpus, check_tokenizer
from gpt.data import Prefetch
from gpt.errors import InputError, ResourceError, Stopped, run_main
from gpt.generate import TextGenerator
from gpt.log import Log, Recorder, exit_record, start_wandb
from gpt.model import GPT, IGNORED, ModelConfig, flops_per_token
from gpt.optim import LossScaler, OptimConfig, clip_gradients, gated_step, learning_rate, make_adamw
from gpt.runtime import MachineConfig, Runtime, StopFlag, peak_flops, profiler, seed_step
from gpt.saver import Saver, sweep

PRESETS = Path(__file__).parent / "presets"
SAMPLE_TOKENS = 200


@dataclass(frozen=True)
class RhythmConfig:
    log_every: int = 10
    """steps between log lines"""
    eval_every: int = 250
    """steps between evaluations on the validation split; 0 = only before the first step and at the end"""
    eval_tokens: int = 10485760
    """tokens of the validation split to evaluate on; 0 = all"""
    save_every: int = 1000
    """steps between checkpoints; one is saved at the end, on a signal and at a new best anyway"""
    sample_every: int = 0
    """steps between printed samples of the model's text; 0 = none"""
    keep_last: int = 2
    """newest checkpoints to keep, beside the best"""
    keep_every: int = 0
    """also keep the weights of every checkpoint whose step is a multiple of this; 0 = none"""

    def problems(self):
        found = [f"{name} {value} must be 0 or more" for name, value in asdict(self).items() if value < 0]
        return found + [f"{name} must be at least 1" for name in ("log_every", "keep_last") if getattr(self, name) == 0]


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
    model: ModelConfig = field(default=ModelConfig())
    batch: BatchConfig = field(default=BatchConfig())
    length: LengthConfig = field(default=LengthConfig())
    optim: OptimConfig = field(default=OptimConfig())
    rhythm: RhythmConfig = field(default=RhythmConfig())
    machine: MachineConfig = field(default=MachineConfig())

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
    config = settings(sys.argv[1:])
    size, block_size = config.batch.global_batch_size, config.model.block_size
    corpus = Corpus(config.data, config.tokenizer, config.verify, block_size, size, config.seed)
    budget = Budget(config.length, size, block_size, corpus.windows.per_epoch)
    checkpoint = find_start(config, corpus)
    progress = Progress(**checkpoint.state["progress"]) if checkpoint else Progress()
    if budget.spent(progress):
        print(f"nothing to do: step {progress.step} of {budget.total_steps(progress)}")
        return
    run = Runtime(config.machine)
    memory.check_fits(config.model, corpus.tokenizer.vocab_size, run.device)
    model, base = load_model(config, corpus, checkpoint)
    progress.micro_batch_size = micro_batch_size(config, progress, model, run)
    make_run_folder(config)
    with exit_record(Path(config.out)), StopFlag() as stop:
        optimizer, scaler, record = prepare(model, config, budget, progress, run, checkpoint)
        log = start_log(config, progress, budget)
        flops = flops_per_token(config.model, model.vocab_size)
        recorder = Recorder(
            log,
            config.rhythm.log_every,
            progress,
            budget,
            scaler,
            corpus.windows,
            flops,
            peak_flops(run.device, run.dtype),
        )
        constant = {"config": flatten(config), "runtime": record, "base": base}
        saver = Saver(config.out, progress, model, optimizer, scaler, corpus, constant, log, config.rhythm)
        try:
            train(config, corpus, budget, progress, run, model, optimizer, scaler, log, recorder, saver, stop)
        finally:
            log.close()
            corpus.close()
    if stop:
        raise Stopped(f"signal at step {progress.step}: checkpoint saved in {config.out}; the same command continues")


def train(config, corpus, budget, progress, run, model, optimizer, scaler, log, recorder, saver, stop):
    """The loop: an optimizer step, then what is due after it."""
    rhythm, size, block_size = config.rhythm, config.batch.global_batch_size, config.model.block_size
    batches = Prefetch(corpus.windows, run.ready)
    corpus.verifier.start()
    if progress.step == 0 and corpus.has_validation():
        recorder.evaluated(*evaluate(model, corpus, rhythm.eval_tokens, progress.micro_batch_size, run))
    with profiler(Path(config.out) / "trace.json" if config.profile else None) as profile:
        while not (budget.spent(progress) or stop):
            started = time.perf_counter()
            lr = learning_rate(config.optim, progress.step, budget.total_steps(progress))
            batch = batches.take(progress.windows_seen, size)
            seed_step(config.seed, progress.step)
            numbers = train_step(
                model, optimizer, scaler, batch, lr, config.optim.grad_clip, progress.micro_batch_size, run
            )
            progress.advance(size, block_size)
            recorder.step(lr, numbers)
            progress.train_seconds += time.perf_counter() - started
            profile.step()
            corpus.verifier.check()
            ends = budget.spent(progress)
            if corpus.has_validation() and (ends or progress.due(rhythm.eval_every)):
                loss, bits = evaluate(model, corpus, rhythm.eval_tokens, progress.micro_batch_size, run)
                recorder.evaluated(loss, bits)
                if progress.evaluated(loss):
                    saver.save(is_best=True)
            if progress.due(rhythm.sample_every):
                log.say(sample(model, corpus.tokenizer, progress.step, config.seed))
            if progress.due(rhythm.save_every):
                recorder.read()
                saver.save()
    recorder.read()
    saver.save(is_last=True)
    batches.close()


def train_step(model, optimizer, scaler, batch, lr, grad_clip, micro_batch_size, run):
    """One optimizer step on `batch` (B, block_size + 1): gradients of the mean loss over all its targets, summed over
    micro-batches, clipped, applied only if finite. Returns loss, gradient norm and whether they are finite, (3,), still
    on the device."""
    ids, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    count = (targets != IGNORED).sum().clamp(min=1)
    loss = torch.zeros((), device=run.device)
    micro_batches = zip(ids.split(micro_batch_size), targets.split(micro_batch_size), strict=True)
    for micro_ids, micro_targets in micro_batches:
        with run.autocast():
            share = model(micro_ids, micro_targets).sum() / count
        (share * scaler.scale).backward()
        loss += share.detach()
    scaler.unscale(model.parameters())
    norm = clip_gradients(model.parameters(), grad_clip)
    finite = torch.isfinite(loss) & torch.isfinite(norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    gated_step(optimizer, finite)
    scaler.update(finite)
    optimizer.zero_grad(set_to_none=True)
    return torch.stack([loss, norm, finite.float()])


@torch.no_grad()
def evaluate(model, corpus, eval_tokens, batch_size, run):
    """(nats per token, bits per byte) on the validation set."""
    model.eval()
    nats = torch.zeros((), dtype=torch.float64)
    count = size = 0
    for ids, targets in corpus.validation(batch_size, eval_tokens):
        with run.autocast():
            losses = model(run.ready(ids), run.ready(targets))
        nats += losses.double().sum().cpu()
        counted = targets[targets != IGNORED]
        count += len(counted)
        size += int(corpus.byte_lengths[counted].sum())
    model.train()
    return nats.item() / count, nats.item() / math.log(2) / max(size, 1)


def sample(model, tokenizer, step, seed):
    """A text of the model's own, begun from nothing, to be printed."""
    [[completion]] = TextGenerator(model, tokenizer).generate([""], max_new_tokens=SAMPLE_TOKENS, seed=seed)
    return f"--- sample at step {step}\n{completion.text}\n---"


# ---- what a run starts from


def settings(argv):
    """The TrainConfig: defaults < the checkpoint's or base model's < preset < flags."""
    preset, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    init, path = peek(flags, "init"), peek(flags, "resume")
    preset = preset or ("finetune" if init else "")
    base, architecture = {}, {}
    if path not in ("", "auto"):
        base = resume.stored_settings(resume.open_checkpoint(Path(path))) | {"out": str(resume.run_folder(path))}
    elif preset:
        base = {"out": f"out/{Path(preset).stem}"}
    elif not {"-h", "--help"} & set(flags):
        print(list_presets(PRESETS), file=sys.stderr)
        raise InputError("no preset given: they are listed above; choose one, as in python train.py shakespeare")
    if init:
        architecture = asdict(interop.read_config(checkpoints.find_model(init))[0])
    config, given = from_cli(TrainConfig, flags, base | architecture, find_preset(preset, PRESETS), __doc__)
    if init:
        resume.check_architecture(config.model, given, architecture)
    return config


def find_start(config, corpus):
    """The Checkpoint that the run continues, or None; settings, tokenizer and data are compared with it."""
    checkpoint = resume.find_checkpoint(config.out, config.resume)
    if checkpoint is not None:
        check_tokenizer(str(checkpoint.path), checkpoint.manifest["tokenizer"], corpus.tokenizer)
        resume.check_settings(flatten(config), checkpoint, accept=config.resume != "auto")
        resume.check_dataset(checkpoint, corpus.record, accept=config.resume != "auto")
        print(f"info: continuing {checkpoint.path} at step {checkpoint.step}", file=sys.stderr)
    elif config.init:
        resume.check_base_is_elsewhere(config.init, config.out)
    else:
        print(f"info: starting from scratch in {config.out}", file=sys.stderr)
    return checkpoint


def load_model(config, corpus, checkpoint):
    """(GPT in fp32 on the CPU, record of the base model or None): the checkpoint's, the base's, or a new one."""
    base = checkpoint.state["base"] if checkpoint else None
    if checkpoint:
        model = interop.load_model(checkpoint.path)
    elif config.init:
        model, base = resume.load_base(config.init, config.model.block_size, corpus.tokenizer)
    else:
        torch.manual_seed(config.seed)
        model = GPT(config.model, corpus.tokenizer.vocab_size)
    model.set_dropout(config.model.dropout)
    return model, base


def prepare(model, config, budget, progress, run, checkpoint):
    """Put the model on its device, compiled if asked; returns its optimizer and loss scaler, as the checkpoint left
    them, and the record of the machine."""
    model.to(run.device).train()
    optimizer = make_adamw(model, config.optim)
    scaler = LossScaler(run.device, enabled=run.dtype == torch.float16)
    compiled = run.compiles(config.machine.compile, budget.total_steps(progress) - progress.step)
    record = run.record(compiled, progress.micro_batch_size)
    if checkpoint:
        if progress.step:  # a signal before the first step leaves no optimizer state
            checkpoints.load_optimizer(optimizer, model, checkpoint)
        scaler.load(checkpoint.state["scaler"])
        resume.check_runtime(checkpoint, record)
    if compiled:
        model.compile()
    needs = memory.estimate(config.model, model.vocab_size, progress.micro_batch_size, run.dtype)
    print(f"{model.num_parameters():,} parameters on {record['device']}, {record['precision']}", file=sys.stderr)
    print(memory.describe(needs), file=sys.stderr)
    return optimizer, scaler, record


def micro_batch_size(config, progress, model, run):
    """The given one, else the checkpoint's if it still divides the batch, else the largest that fits."""
    size = config.batch.global_batch_size
    if config.batch.micro_batch_size:
        return config.batch.micro_batch_size
    if progress.micro_batch_size and size % progress.micro_batch_size == 0:
        return progress.micro_batch_size
    return memory.choose_micro_batch(config.model, model.vocab_size, size, run.dtype, run.device)


def make_run_folder(config):
    """Create the run folder with its settings, and clear away what an interrupted save left there."""
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        sweep(out)
        values = {name: value for name, value in flatten(config).items() if name != "resume"}
        text = f"# python train.py {out}/config.toml --out NEW repeats this run\n" + to_toml(values)
        checkpoints.write_durably(out / "config.toml", text)
    except OSError as error:
        raise ResourceError(f"{out}: cannot be written ({error.strerror}); give another --out") from None


def start_log(config, progress, budget):
    run = None
    if config.wandb:
        run = start_wandb(config.wandb, progress.wandb_id or None, Path(config.out).name, config.out, flatten(config))
        progress.wandb_id = run.id if run else progress.wandb_id
    return Log(Path(config.out), progress.step, budget.total_steps(progress), run)


if __name__ == "__main__":
    run_main(main)
