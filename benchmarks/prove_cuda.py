"""Proves the CUDA paths in one run: python benchmarks/prove_cuda.py [--out DIR]

Makes a small corpus out of the Python library's sources and, on the GPU, checks training in every precision, compiled
and eager, bitwise resume with --deterministic, steps as a CUDA graph, the attention that torch chooses; of each way to
run the decode step (eager, captured, compiled; fp32, bf16, fp16, int8) its greedy text against the uncached model, that no text depends on its neighbours, that all draw the same texts, and flat memory;
then prints the table of benchmarks/decode_speed.py. A line for each check; exits 1 if one fails.
`--only graph,attention` runs some of them. The table needs gpt2's tokenizer: see TIKTOKEN_CACHE_DIR in the README."""

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from project import ROOT

import gpt
import train as script
from gpt.backend import make_backend
from gpt.decode import Decoder
from gpt.generate import GenerationParams
from gpt.graph import CudaGraph, GraphedStep
from gpt.model import GPT, ModelConfig
from gpt.sampling import SamplingParams
from gpt.sequence import Sequence

SHAPE = "--n_layer 4 --n_head 4 --n_embd 256 --block_size 256 --global_batch_size 16 --micro_batch_size 8 --dropout 0.1"


class CheckFailed(Exception):
    """What a check expected did not hold."""


def expect(holds, otherwise):
    if not holds:
        raise CheckFailed(otherwise)


def command(script, *words):
    return [sys.executable, str(ROOT / script), *" ".join(words).split()]


def train(data, out, *words):
    """Run train.py on the GPU; its loss log as a list of records."""
    line = command("train.py", f"tiny --data {data} --out {out} --device cuda", SHAPE, *words)
    made = subprocess.run(line, stderr=subprocess.PIPE, text=True)
    print(made.stderr, end="", file=sys.stderr)
    expect(made.returncode == 0, f"train.py exited with {made.returncode}")
    expect("no CUDA graph" not in made.stderr, "a step could not be captured")
    return read_metrics(out)


def read_metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def final_loss(records):
    return [record["val_loss"] for record in records if "val_loss" in record][-1]


def check_precisions(data, folder):
    """Every precision, eager and compiled, ends within 0.05 nats of fp32."""
    reference = final_loss(train(data, folder / "fp32", "--dtype fp32 --compile off --max_steps 200"))
    for dtype in ("bf16", "fp16"):
        for compiled in ("off", "on"):
            out = folder / f"{dtype}-{compiled}"
            loss = final_loss(train(data, out, f"--dtype {dtype} --compile {compiled} --max_steps 200"))
            expect(abs(loss - reference) < 0.05, f"{dtype}, compile {compiled}: {loss} against fp32 {reference}")
    return f"fp32 reaches {reference:.3f}"


def check_resume(data, folder):
    """Killed and resumed equals uninterrupted, to the bit."""
    words = "--deterministic --max_steps 120 --save_every 30 --log_every 1"
    for compiled in ("off", "on"):
        straight, killed = folder / f"straight-{compiled}", folder / f"killed-{compiled}"
        setting = f"{words} --compile {compiled}"
        train(data, straight, setting)
        process = subprocess.Popen(
            command("train.py", f"tiny --data {data} --out {killed} --device cuda", SHAPE, setting)
        )
        while not (killed / "step-000000060").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        expect(process.wait() == -signal.SIGKILL, "the run ended before it could be killed")
        train(data, killed, setting)
        expect(fingerprint(straight) == fingerprint(killed), f"compile {compiled}: the runs differ")
    return "equal weights, optimizer and losses"


def fingerprint(out):
    files = ("model.safetensors", "training/optimizer.safetensors")
    weights = [hashlib.sha256((out / "step-000000120" / name).read_bytes()).hexdigest() for name in files]
    losses = [
        [record.get(key) for key in ("step", "loss", "grad_norm", "lr", "val_loss")] for record in read_metrics(out)
    ]
    return weights, losses


def check_graph(data, folder):
    """Steps replayed as a CUDA graph are, to the bit, those launched one by one (as --profile launches them), with
    evaluations, samples and checkpoints between them; in two small models they are no slower."""
    words = (
        "--deterministic --compile off --log_every 1 --max_steps 120 --save_every 40 --eval_every 30 --sample_every 9"
    )
    for optimizer in ("adamw", "muon"):
        for dtype in ("fp32", "bf16", "fp16"):
            setting, out = f"{words} --optimizer {optimizer} --dtype {dtype}", folder / f"{optimizer}-{dtype}"
            train(data, out / "captured", setting)
            train(data, out / "plain", f"{setting} --profile")
            same = fingerprint(out / "captured") == fingerprint(out / "plain")
            expect(same, f"{optimizer} {dtype}: a captured step differs")
    found = []
    for name, shape, sequences in (
        ("demo", ModelConfig(4, 4, 192, 128), 16),
        ("shakespeare", ModelConfig(6, 6, 384, 256, dropout=0.2), 64),
    ):
        plain, captured = (milliseconds_of_steps(shape, sequences, graph) for graph in (None, CudaGraph("cuda")))
        expect(captured < 1.05 * plain, f"{name}: {captured:.2f} ms a step captured, {plain:.2f} launched one by one")
        found.append(f"{name} {captured:.2f} ms, launched one by one {plain:.2f}")
    return f"equal; a step in bf16: {'; '.join(found)}"


def milliseconds_of_steps(shape, sequences, graph):
    """The time of a step with Muon, of many that are under way at once."""
    machine = script.MachineConfig(device="cuda", dtype="bf16", compile="off")
    length, optim = script.LengthConfig(max_steps=1000), script.OptimConfig(optimizer="muon")
    batches = script.BatchConfig(global_batch_size=sequences, micro_batch_size=sequences)
    config = script.TrainConfig(data="none", model=shape, batch=batches, length=length, optim=optim, machine=machine)
    run, budget = script.Runtime(machine), script.Budget(length, sequences, shape.block_size, windows_per_epoch=1)
    state, _ = script.build(config, GPT(shape, 257), budget, script.Progress(), run, None)
    step = GraphedStep(
        lambda batch, lr: script.train_step(state, batch, lr, 1.0, run), graph, state.optimizer.zero_grad
    )
    batch = torch.randint(257, (sequences, shape.block_size + 1), device="cuda")
    found = milliseconds(lambda: step(batch, 1e-3), 50)
    expect(step.captured == (graph is not None), "the step was not captured")
    return found


def milliseconds(function, times=20):
    """The time of one call, of many that are under way at once."""
    for _ in range(10):
        function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        function()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / times


def check_attention(data, folder):
    """What torch chooses to train with at head size 64 is the fastest it has, and repeats to the bit where it must."""
    del data, folder
    from torch.nn.attention import SDPBackend, sdpa_kernel

    x = torch.randn(16, 1024, 3, 12, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = x.permute(2, 0, 3, 1, 4)  # as the model makes them

    def attend():
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(y, x, y)[0]

    chosen, times = SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True)), {}
    for kernel in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(kernel):
                times[kernel] = milliseconds(attend)
        except RuntimeError as error:
            print(f"      {kernel.name}: {str(error).splitlines()[0]}", flush=True)
    torch.use_deterministic_algorithms(True)
    try:
        repeating = SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True))
        expect(torch.equal(attend(), attend()), f"{repeating.name} does not repeat to the bit")
    finally:
        torch.use_deterministic_algorithms(False)
    listed = ", ".join(f"{kernel.name} {time:.2f} ms" for kernel, time in times.items())
    expect(times[chosen] < 1.1 * min(times.values()), f"{chosen.name} is chosen: {listed}")
    return f"{chosen.name} is chosen, deterministic {repeating.name}; cuDNN {torch.backends.cudnn.version()}; {listed}"


FORMS = [("fp32", "none"), ("bf16", "none"), ("fp16", "none"), ("fp32", "int8"), ("bf16", "int8")]
BACKENDS = ("eager", "captured", "compiled")
PROMPTS = ["def main", "import os\nimport sys\n\n", "class A:\n    " * 10]


def generators(folder, forms=FORMS):
    """(name, TextGenerator) of the model trained before, in each form, on each back end."""
    for dtype, quantize in forms:
        for backend in BACKENDS:
            made = gpt.load(folder / "fp32", device="cuda", dtype=dtype, quantize=quantize, backend=backend)
            yield f"{backend} {dtype}{' int8' * (quantize == 'int8')}", made


@torch.inference_mode()
def check_greedy(folder):
    """Every greedy token has nearly the largest logit of its own uncached model, also past the edge of the context: in
    fp32 within 1e-4."""
    found = {}
    for name, text in generators(folder):
        worst = 0.0
        for prompts in (PROMPTS[:1], PROMPTS):
            completions = text.generate(prompts, max_new_tokens=400, temperature=0, ignore_eot=True)
            for prompt, [completion] in zip(prompts, completions, strict=True):
                worst = max(worst, largest_gap(text, prompt, completion.ids))
        found[name] = worst
        print(f"      {name}: largest gap {worst:.1e}", flush=True)
    bad = [name for name, worst in found.items() if worst >= (1e-4 if " fp32" in name else 0.5)]
    expect(not bad, f"a chosen logit is too far below the maximum: {', '.join(bad)}")
    return f"{len(found)} back ends and forms"


def largest_gap(text, prompt, ids):
    """How far, at most, the logit of a chosen id lies below the largest of the uncached model."""
    window, worst = text.tokenizer.encode(prompt), 0.0
    for chosen in ids:
        logits = text.model.forward(torch.tensor([window], device="cuda"))[0]
        logits[text.tokenizer.eot] = -torch.inf
        worst = max(worst, (logits.max() - logits[chosen]).item())
        window.append(chosen)
        if len(window) > text.model.config.block_size:
            window = window[-(text.model.config.block_size // 2) :]
    return worst


def check_neighbours(folder):
    """A row's sampled text is the same bits whatever the other rows hold, and whenever it got its slot."""
    for name, text in generators(folder):
        settings = {"max_new_tokens": 300, "seed": 7, "rows": 4, "logprobs": True}
        [alone] = text.generate(["import"], **settings)
        first, *_ = text.generate(["import", "x = 1", "class B:\n    def f", "#" * 200], **settings)
        expect(alone == first, f"{name}: the text depends on its neighbours")
        many = [f"{word} = {number}" for number in range(10) for word in ("a", "total", "self.long_name_of_it")]
        late = text.generate([*many, "import"], [*range(100, 130), 1], **settings)[-1]
        expect(alone == late, f"{name}: the text depends on when it began")
    return "equal"


def check_same_texts(folder):
    """In fp32 all back ends draw the same texts, but for draws at the border of two tokens."""
    prompts = [f"def f{n}(x):\n" for n in range(20)]
    penalized = {"min_p": 0.02, "repetition_penalty": 1.2}
    for settings in ({}, {"top_k": 50}, {"top_p": 0.99, "temperature": 1.5}, penalized):
        texts = {
            name: text.generate(prompts, seed=3, max_new_tokens=100, rows=8, num_samples=2, **settings)
            for name, text in generators(folder, FORMS[:1])
        }
        reference = [completion.ids for found in texts["eager fp32"] for completion in found]
        for name, found in texts.items():
            same = sum(c.ids == ids for c, ids in zip((c for cs in found for c in cs), reference, strict=True))
            expect(same >= 36, f"{name}, {settings}: only {same} of 40 texts are the eager back end's")
    return "at least 36 of 40 texts in each of four settings"


def check_undecided(folder):
    """A flat distribution, which no few candidates decide, gives the eager back end's draws."""
    del folder
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=64), 8192).cuda().eval()
    tokenizer = SimpleNamespace(eot=0, decode_bytes=lambda ids: b"x")
    found = []
    for backend in ("eager", "captured"):
        params = GenerationParams(100, SamplingParams(top_p=0.98, temperature=1.0), seed=1, ignore_eot=True)
        decoder = Decoder(make_backend(backend, model), 4, 0)
        sequences = [Sequence(n, [1, 2, 3 + n], n, 0, params, tokenizer) for n in range(10)]
        for _ in decoder.run(sequences):
            pass
        found.append([sequence.ids for sequence in sequences])
    same = sum(a == b for a, b in zip(*found, strict=True))
    expect(same >= 8, f"only {same} of 10 texts agree")
    return f"{same} of 10 texts agree"


def check_memory(folder):
    """20,000 tokens in one stream take no more memory than the first thousand."""
    text = gpt.load(folder / "fp32", device="cuda", dtype="bf16", backend="captured")
    used = []
    for number, _ in enumerate(text.run(["import"], text.params(max_new_tokens=20_000, ignore_eot=True, seed=1))):
        if number % 1000 == 999:
            used.append(torch.cuda.memory_reserved())
    expect(max(used) <= used[0] * 1.05, f"memory grew from {used[0]} to {max(used)} bytes")
    return f"{max(used) / 2**20:.0f} MiB reserved"


def check_speed(folder):
    """The table of benchmarks/decode_speed.py; its failure fails this check."""
    del folder
    made = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "decode_speed.py"), "--minutes", "8"])
    expect(made.returncode == 0, f"benchmarks/decode_speed.py exited with {made.returncode}")
    return "see the table"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder to work in (default: a temporary one)")
    parser.add_argument("--only", default="", help="checks, with commas: those of texts need the --out of a full run")
    config = parser.parse_args()
    folder = config.out or Path(tempfile.mkdtemp())
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    data = folder / "data"
    if not data.exists():
        subprocess.run(command("data/prepare.py", f"--corpus stdlib --tokenizer byte --out {data}"), check=True)
    failed, training = 0, (check_precisions, check_resume, check_graph, check_attention)
    for check, arguments in (
        *((check, (data, folder)) for check in training),
        *((check, (folder,)) for check in (check_greedy, check_neighbours, check_same_texts, check_undecided)),
        *((check, (folder,)) for check in (check_memory, check_speed)),
    ):
        if config.only and check.__name__.removeprefix("check_") not in config.only.split(","):
            continue
        try:
            print(f"pass  {check.__name__}: {check(*arguments)}")
        except Exception as error:  # compilers raise what they like, and the other checks are to run
            failed += 1
            print(f"FAIL  {check.__name__}: {type(error).__name__}: {error}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
