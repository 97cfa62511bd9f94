"""Proves the CUDA paths in one run: python benchmarks/prove_cuda.py [--out DIR]

Makes a small corpus out of the Python library's sources and, on the GPU, checks training in every precision, compiled
and eager, bitwise resume with --deterministic, cached against uncached greedy text, and text that does not depend on
its neighbours. Prints a line per check and exits 1 if one fails."""

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import gpt

ROOT = Path(__file__).resolve().parents[1]
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
    made = subprocess.run(command("train.py", f"tiny --data {data} --out {out} --device cuda", SHAPE, *words))
    expect(made.returncode == 0, f"train.py exited with {made.returncode}")
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


@torch.inference_mode()
def check_greedy(folder):
    """In fp32 every token chosen with the cache has a logit within 1e-4 of the uncached maximum, also past the edge of
    the context."""
    text = gpt.load(folder / "fp32", device="cuda", dtype="fp32")
    prompts = ["def main", "import os\nimport sys\n\n", "class A:\n    " * 10]
    found = text.generate(prompts, max_new_tokens=400, temperature=0, ignore_eot=True)
    worst = 0.0
    for prompt, [completion] in zip(prompts, found, strict=True):
        ids = text.tokenizer.encode(prompt)
        window = list(ids)
        for chosen in completion.ids:
            logits = text.model.forward(torch.tensor([window], device="cuda"))[0]
            logits[text.tokenizer.eot] = -torch.inf
            worst = max(worst, (logits.max() - logits[chosen]).item())
            window.append(chosen)
            if len(window) > text.model.config.block_size:
                window = window[-(text.model.config.block_size // 2) :]
    expect(worst < 1e-4, f"a chosen logit is {worst} below the maximum")
    return f"largest gap {worst:.1e}"


def check_neighbours(folder):
    """A row's sampled text is the same whatever the other rows hold."""
    for dtype in ("fp32", "bf16", "fp16"):
        text = gpt.load(folder / "fp32", device="cuda", dtype=dtype)
        settings = {"max_new_tokens": 300, "seed": 7, "rows": 4}
        [alone] = text.generate(["import"], **settings)
        first, *_ = text.generate(["import", "x = 1", "class B:\n    def f", "#" * 200], **settings)
        expect(alone == first, f"{dtype}: the text depends on its neighbours")
    return "equal in fp32, bf16 and fp16"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder to work in (default: a temporary one)")
    folder = parser.parse_args().out or Path(tempfile.mkdtemp())
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    data = folder / "data"
    subprocess.run(command("data/prepare.py", f"--corpus stdlib --tokenizer byte --out {data}"), check=True)
    failed = 0
    for check, arguments in (
        (check_precisions, (data, folder)),
        (check_resume, (data, folder)),
        (check_greedy, (folder,)),
        (check_neighbours, (folder,)),
    ):
        try:
            print(f"pass  {check.__name__}: {check(*arguments)}")
        except (CheckFailed, gpt.Error, RuntimeError) as error:
            failed += 1
            print(f"FAIL  {check.__name__}: {error}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
