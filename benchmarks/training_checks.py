"""Checks of training for prove_cuda.py. Each returns what it found in a few words, or raises CheckFailed."""

import short_spins  # noqa: F401 (before torch)

import hashlib
import itertools
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gauges import Clock
from proof import STEPS, Proof, expect, metrics
from torch.nn.attention import SDPBackend, sdpa_kernel
from trainers import ready_to_train

import train
from gpt.kernels.cuda_graph import CudaGraph
from gpt.model import GPT, ModelConfig
from gpt.train.graph import GraphedStep
from gpt.train.optim import OptimConfig
from gpt.train.runtime import MachineConfig

TOLERANCE = 0.05  # nats, between the validation loss of a run and that of the run in fp32
SMALL_MODELS = {  # (shape, sequences of a step), where launching a step's kernels takes longer than running them
    "demo": (ModelConfig(4, 4, 192, 128), 16),
    "shakespeare": (ModelConfig(6, 6, 384, 256, dropout=0.2), 64),
}


def final_loss(records: list[dict]) -> float:
    """Returns the last validation loss of a run."""
    return [record["val_loss"] for record in records if "val_loss" in record][-1]


def check_precisions(proof: Proof) -> str:
    """Checks that bf16, eager and compiled, ends near the loss of fp32; if thorough, fp16 too."""
    reference = final_loss(metrics(proof.model()))
    losses = [f"fp32 {reference:.3f}"]
    compile_settings = ("off", "on") if proof.device == "cuda" else ("off",)
    for dtype in ("bf16", "fp16") if proof.thorough else ("bf16",):
        for compiled in compile_settings:
            words = f"--dtype {dtype} --compile {compiled} --max_steps {STEPS}"
            loss = final_loss(proof.train(proof.runs / f"{dtype}-{compiled}", words))
            losses.append(f"{dtype} {'compiled' if compiled == 'on' else 'eager'} {loss:.3f}")
            print(f"      {losses[-1]}", flush=True)
            expect(abs(loss - reference) < TOLERANCE, f"the losses differ: {', '.join(losses)}")
    return ", ".join(losses)


def check_resume(proof: Proof) -> str:
    """Checks that a run killed and resumed equals an uninterrupted one to the bit; if thorough, compiled too."""
    words = "--deterministic --max_steps 120 --save_every 30 --log_every 1"
    for compiled in ("off", "on") if proof.thorough else ("off",):
        setting = f"{words} --compile {compiled}"
        straight, killed = (proof.runs / f"{name}-{compiled}" for name in ("straight", "killed"))
        proof.train(straight, setting)
        with open(killed.with_suffix(".log"), "w") as log:
            process = subprocess.Popen(proof.train_command(killed, setting), stdout=log, stderr=subprocess.STDOUT)
        while not (killed / "step-000000060").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        expect(process.wait() == -signal.SIGKILL, "the run ended before it could be killed")
        proof.train(killed, setting)
        expect(fingerprint(straight) == fingerprint(killed), f"compile {compiled}: the runs differ")
    return "weights, optimizer and losses are equal"


def fingerprint(out: Path) -> tuple:
    """Returns what must agree between two runs of 120 steps: hashes of weights and optimizer, and all losses."""
    step = out / "step-000000120"
    files = (step / "model.safetensors", step / "training/optimizer.safetensors")
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    keys = ("step", "loss", "grad_norm", "lr", "val_loss")
    return hashes, [[record.get(key) for key in keys] for record in metrics(out)]


def check_graph(proof: Proof) -> str:
    """Checks that steps replayed as a CUDA graph equal, to the bit, the same steps launched one by one (--profile
    launches them so), with evaluations, samples and checkpoints in between, and that they are no slower."""
    words = "--deterministic --compile off --log_every 1 --max_steps 120"
    words += " --save_every 40 --eval_every 30 --sample_every 9"
    every = itertools.product(("adamw", "muon"), ("fp32", "bf16", "fp16"))
    for optimizer, dtype in every if proof.thorough else (("muon", "bf16"), ("adamw", "fp16")):
        setting = f"{words} --optimizer {optimizer} --dtype {dtype}"
        captured, launched = (proof.runs / f"{optimizer}-{dtype}-{kind}" for kind in ("captured", "launched"))
        proof.train(captured, setting)
        proof.train(launched, f"{setting} --profile")
        expect(fingerprint(captured) == fingerprint(launched), f"{optimizer} {dtype}: a captured step differs")
        print(f"      {optimizer} {dtype}: equal", flush=True)
    times = []
    for name, (shape, sequences) in SMALL_MODELS.items():
        launched, captured = (step_milliseconds(proof.device, shape, sequences, graph) for graph in (False, True))
        times.append(f"{name} {captured:.2f} ms captured, {launched:.2f} launched")
        expect(captured < 1.05 * launched, f"a captured step is slower: {times[-1]}")
    return f"equal; a step in bf16: {'; '.join(times)}"


def step_milliseconds(device: str, shape: ModelConfig, sequences: int, captured: bool) -> float:
    """Returns the time of a training step with Muon in bf16, replayed as a CUDA graph or launched kernel by kernel."""
    settings = MachineConfig(device=device, dtype="bf16", compile="off")
    optim = OptimConfig(optimizer="muon")
    _, state, machine, _ = ready_to_train(GPT(shape, 257), sequences, sequences, settings, optim)

    def launched_step(batch, lr):
        return train.train_step(state, batch, lr, 1.0, machine)

    step = (
        GraphedStep(launched_step, CudaGraph(machine.device), state.optimizer.zero_grad) if captured else launched_step
    )
    batch = torch.randint(257, (sequences, shape.block_size + 1), device=device)
    duration = milliseconds(device, lambda: step(batch, 1e-3), calls=50)
    expect(not captured or step.captured, "the step was not captured")
    return duration


def milliseconds(device: str, function: Callable, calls: int = 20) -> float:
    """Returns the time of one call, out of many that the host launches without waiting for the device."""
    for _ in range(10):
        function()
    clock = Clock(device)
    for _ in range(calls):
        function()
    return 1000 * clock.seconds() / calls


def check_attention(_proof: Proof) -> str:
    """Checks that the kernel which torch chooses for training at head size 64 is the fastest one, and that the kernel
    it chooses for deterministic runs repeats to the bit."""
    x = torch.randn(16, 1024, 3, 12, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = x.permute(2, 0, 3, 1, 4)  # the strides that the model gives them

    def attend():
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(y, x, y)[0]

    chosen, times = SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True)), {}
    for kernel in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(kernel):
                times[kernel] = milliseconds("cuda", attend)
        except RuntimeError as error:  # this GPU or this torch lacks the kernel
            print(f"      {kernel.name}: {str(error).splitlines()[0]}", flush=True)
    torch.use_deterministic_algorithms(True)
    repeating = SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True))
    expect(torch.equal(attend(), attend()), f"{repeating.name} does not repeat to the bit")
    listed = ", ".join(f"{kernel.name} {time:.2f} ms" for kernel, time in times.items())
    expect(times[chosen] < 1.1 * min(times.values()), f"{chosen.name} is chosen: {listed}")
    return f"{chosen.name} is chosen, deterministic {repeating.name}; cuDNN {torch.backends.cudnn.version()}; {listed}"
