"""The programs whose training is compared. Each takes the same steps on the same tokens from the same weights.

`begin(batch)` starts anew: it loads the weights, makes an optimizer, and compiles if asked. `steps(first, count)` takes
the optimizer steps numbered from `first` and returns the time they took, without the time to draw the tokens."""

import contextlib
import importlib
import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import programs
from gauges import Clock, peak_memory, release, reset_peak

FORMS = {"fp32", "bf16", "compile", "eager", "adamw", "muon", "by1"}
UNDONE = {"no-casts", "no-determinism", "no-drop", "no-fused", "no-graph", "no-kernels"}
UNDONE |= {"no-loss", "no-padding", "no-pages"}
WORDS = FORMS | UNDONE  # what may follow a program's name
LR, WARMUP_STEPS = 6e-4, 10
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1
PADDED_TO = 64  # multiple for the vocabulary of other programs, as nanoGPT pads it; our model pads by itself


def tokens(vocab_size: int, number: int, rows: int, length: int) -> np.ndarray:
    """Returns the ids (rows, length + 1) of batch `number`, int64. Half of them are drawn by Zipf's frequencies, half
    repeat one of the eight ids before: a model learns both within a few steps."""
    draw, shape = np.random.default_rng(number), (rows, length + 1)
    ids = (vocab_size ** draw.random(shape)).astype(np.int64) - 1
    sources = np.maximum(np.arange(length + 1) - draw.integers(1, 9, shape), 0)
    return np.where(draw.random(shape) < 0.5, np.take_along_axis(ids, sources, 1), ids)


def learning_rate(number: int) -> float:
    """Returns the learning rate of step `number`: a linear warm-up, then constant."""
    return LR * min(1.0, (number + 1) / WARMUP_STEPS)


class Trainer:
    """Tokens, clock and memory, the same for all programs. A subclass defines:

    `fresh()`              returns a model in fp32 with the weights of `folder`
    `build(model, batch)`  prepares steps on `batch` sequences
    `step(ids, lr)`        takes one step and returns the loss, a number or a tensor
    `forget()`             drops the model and the optimizer"""

    def __init__(self, folder, options, device, grad_clip):
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.folder, self.options, self.device, self.grad_clip = folder, options, device, grad_clip
        self.vocab_size, self.block_size = stored["vocab_size"], stored["n_positions"]
        self.batch = 0

    def begin(self, batch: int) -> float:
        """Prepares steps on `batch` sequences; returns the seconds that it took after the weights were read. On CUDA
        and if compiled, they include a first forward and backward pass."""
        self.forget()
        model = self.fresh()
        release(self.device)
        reset_peak(self.device)
        start = time.perf_counter()
        self.batch = batch
        self.build(model, batch)
        return time.perf_counter() - start

    def steps(self, first: int, count: int, untimed: int = 0) -> tuple[float, list[float], int]:
        """Takes `count` steps, numbered from `first`; returns (seconds, loss of each step, peak memory in bytes since
        `begin`). The seconds leave out the first `untimed` steps, which allocate the memory that the last call has
        released."""
        import torch

        batches = [
            torch.from_numpy(tokens(self.vocab_size, number, self.batch, self.block_size)).to(self.device)
            for number in range(first, first + count)
        ]
        losses = [self.step(ids, learning_rate(number)) for number, ids in enumerate(batches[:untimed], first)]
        clock = Clock(self.device)
        losses += [
            self.step(ids, learning_rate(number)) for number, ids in enumerate(batches[untimed:], first + untimed)
        ]
        seconds = clock.seconds()
        losses, memory = [float(loss) for loss in losses], peak_memory(self.device)
        release(self.device)
        return seconds, losses, memory


class Ours(Trainer):
    """This project's training step, as train.py makes it. Options: fp32 or bf16, compile, adamw or muon, by1
    (micro-batches of 1 sequence, whatever train.py would choose), and techniques to undo."""

    def __init__(self, folder, options, threads, device, grad_clip):
        import short_spins  # noqa: F401 (before torch)

        import gpt

        super().__init__(folder, options, device, grad_clip)
        self.threads, self.version = threads, gpt.__version__
        undone = sorted(set(options) & UNDONE)
        assert "no-casts" not in undone or "by1" in options, "no-casts changes something only with by1"
        assert "no-fused" not in undone or "muon" not in options, "no-fused is for AdamW only"
        for name in undone:
            getattr(importlib.import_module("undone"), name.removeprefix("no-"))()

    def forget(self):
        self.take_step = None

    def fresh(self):
        from gpt.checkpoint.weights import load_model, open_folder

        return load_model(open_folder(self.folder))

    def build(self, model, batch):
        import train
        from gpt.train import setup
        from gpt.train.optim import OptimConfig
        from gpt.train.runtime import MachineConfig

        options = set(self.options)
        machine = MachineConfig(
            device=self.device,
            dtype=next(iter(options & {"fp32", "bf16"}), "auto"),
            compile="on" if "compile" in options else "off",
            threads=self.threads,
        )
        optim = OptimConfig(
            optimizer="muon" if "muon" in options else "adamw",
            lr=LR,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=WEIGHT_DECAY,
            grad_clip=self.grad_clip,
        )
        ready = ready_to_train(model, batch, int("by1" in options), machine, optim)
        self.take_step = setup.stepper(*ready, True, train.train_step)

    def step(self, ids, lr):
        return self.take_step(ids, lr)[0]


def ready_to_train(model, sequences, micro_batch_size, machine, optim):
    """Returns what train.py makes before its first step, as its `stepper` takes it: (TrainConfig, State, Runtime,
    whether the model is compiled). `micro_batch_size` 0 lets it choose."""
    import train
    from gpt.train import setup
    from gpt.train.budget import BatchConfig, Budget, LengthConfig, Progress
    from gpt.train.runtime import Runtime
    from gpt.train.start import Start

    length = LengthConfig(max_steps=1_000_000)
    config = train.TrainConfig(
        data="none",
        model=model.config,
        batch=BatchConfig(global_batch_size=sequences, micro_batch_size=micro_batch_size),
        length=length,
        optim=optim,
        machine=machine,
    )
    runtime = Runtime(machine)
    budget = Budget(length, sequences, model.config.block_size, windows_per_epoch=1)
    windows = SimpleNamespace(dataset=SimpleNamespace(has_examples=False))
    start = Start(
        config, base=None, corpus=windows, budget=budget, checkpoint=None, progress=Progress(), newest=[], asked={}
    )
    state, record = setup.build_state(start, model, runtime, train.accumulate)
    return config, state, runtime, record["compile"]


class Peer(Trainer):
    """The usual training step with the model of another program. A subclass defines `optimizer_of(model)` and
    `loss(ids, targets)`. The micro-batch is the whole batch; on CUDA the largest half, quarter, … of it that fits."""

    def __init__(self, folder, options, threads, device, grad_clip):
        import torch

        super().__init__(folder, options, device, grad_clip)
        assert not set(options) & (UNDONE | {"by1", "muon"}), f"{options}: only ours has such options"
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.torch = torch

    def forget(self):
        self.model = self.called = self.optimizer = None

    def build(self, model, batch):
        self.model, self.micro_batch = model.to(self.device).train(), batch
        self.optimizer = self.optimizer_of(self.model)
        self.called = self.torch.compile(self.model) if self.compiles() else self.model
        if self.compiles() or self.device == "cuda":
            self.find_micro_batch()

    def find_micro_batch(self):
        """Compiles, and halves the micro-batch until a forward and a backward pass fit into memory."""
        ids = self.torch.zeros(self.batch, self.block_size + 1, dtype=self.torch.int64, device=self.device)
        while True:
            with contextlib.suppress(self.torch.OutOfMemoryError):
                self.accumulate(ids)
                self.optimizer.zero_grad()
                return
            self.optimizer.zero_grad()
            assert self.micro_batch > 1, "out of memory with one sequence"
            self.micro_batch //= 2
            self.torch._dynamo.reset()
            self.torch.cuda.empty_cache()

    def compiles(self):
        return "compile" in self.options

    def autocasts(self):
        return "bf16" in self.options

    def autocast(self):
        return self.torch.autocast(self.device, self.torch.bfloat16) if self.autocasts() else contextlib.nullcontext()

    def accumulate(self, ids):
        """Computes the gradients of the mean loss; returns this loss, a tensor."""
        parts = ids.split(self.micro_batch)
        mean = 0.0
        for part in parts:
            with self.autocast():
                loss = self.loss(part[:, :-1].contiguous(), part[:, 1:].contiguous()) * len(part) / len(ids)
            loss.backward()
            mean += loss.detach()
        return mean

    def step(self, ids, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.accumulate(ids)
        if self.grad_clip:
            self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


class NanoGPT(Peer):
    """nanoGPT's model and optimizer in the training step of its train.py: on a CPU in fp32 and uncompiled, as its
    README says; on CUDA in bf16 and compiled, as its bench.py does. Options: the path of a checkout; fp32 or bf16,
    compile or eager."""

    def __init__(self, folder, options, threads, device, grad_clip):
        super().__init__(folder, options[1:], threads, device, grad_clip)
        self.module, self.version = programs.nanogpt_module(options[0]), "checkout"

    def fresh(self):
        return programs.nanogpt_model(self.module, self.folder, PADDED_TO)

    def compiles(self):
        return super().compiles() or (self.device == "cuda" and "eager" not in self.options)

    def autocasts(self):
        return super().autocasts() or (self.device == "cuda" and "fp32" not in self.options)

    def optimizer_of(self, model):
        return model.configure_optimizers(WEIGHT_DECAY, LR, BETAS, self.device)

    def loss(self, ids, targets):
        return self.called(ids, targets)[1]

    def step(self, ids, lr):
        return super().step(ids, lr).item()  # nanoGPT reads the loss of every step


class Transformers(Peer):
    """transformers' GPT2LMHeadModel with a padded vocabulary and fused AdamW, the default of its Trainer. Options: fp32
    or bf16 (autocast), compile."""

    def __init__(self, folder, options, threads, device, grad_clip):
        super().__init__(folder, options, threads, device, grad_clip)
        import transformers

        self.models, self.version = transformers.AutoModelForCausalLM, transformers.__version__

    def fresh(self):
        model = self.models.from_pretrained(self.folder, dtype=self.torch.float32)
        padded = math.ceil(self.vocab_size / PADDED_TO) * PADDED_TO
        model.resize_token_embeddings(padded, mean_resizing=False)
        with self.torch.no_grad():
            model.transformer.wte.weight[self.vocab_size :] = 0
        return model

    def optimizer_of(self, model):
        parameters = list(model.parameters())
        matrices = {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY}
        vectors = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}
        return self.torch.optim.AdamW([matrices, vectors], lr=LR, betas=BETAS, fused=True)

    def loss(self, ids, targets):
        logits = self.called(input_ids=ids, use_cache=False).logits
        return self.torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Peak:
    """Measures the FLOP/s of the device. It stands among the programs, so that every round measures it."""

    def __init__(self, _folder, _options, threads, device, _grad_clip):
        import torch

        torch.set_num_threads(threads)
        self.device, self.version = torch.device(device), torch.__version__

    def products(self) -> dict[str, float]:
        """Returns FLOP/s in {"fp32", "bf16"}: of square matrix products on a CPU, from the data sheet on CUDA; 0.0 if
        unknown."""
        from gpt.device import DTYPES
        from gpt.train.cost import peak_flops

        return {name: peak_flops(self.device, DTYPES[name]) for name in ("fp32", "bf16")}


# ---- names


TRAINERS = {"ours": Ours, "nanogpt": NanoGPT, "transformers": Transformers, "peak": Peak}


def parts_of(name: str) -> tuple[str, list[str]]:
    """Splits a name into its kind and options: "nanogpt=C:/PATH:bf16" -> ("nanogpt", ["C:/PATH", "bf16"])."""
    words = []
    while (head := name.rpartition(":"))[2] in WORDS and head[0]:
        name, words = head[0], [head[2], *words]
    kind, _, path = name.partition("=")
    return kind, [path, *words] if path else words


def load(name: str, folder: Path, threads: int, device: str, grad_clip: float = 1.0):
    """Returns the program that `name` stands for: "ours:bf16:compile", "transformers:fp32", "nanogpt=PATH:bf16"."""
    kind, options = parts_of(name)
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # otherwise an earlier run has compiled for this one
    return TRAINERS[kind](folder, options, threads, device, grad_clip)
