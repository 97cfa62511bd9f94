"""Runs all checks and timings that need a GPU in one call of at most 9 minutes, the most important ones first.

    python benchmarks/gpu_run.py --nanogpt ../nanoGPT
    python benchmarks/gpu_run.py --only triton_sampler,captured-bf16
    python benchmarks/gpu_run.py --carried FOLDER
    python benchmarks/gpu_run.py --device cpu

Each step runs in a process group of its own, under a time limit. Timings run alone. Checks run side by side, because
they need no quiet. When a step ends, the last lines of its output are printed. The folder --out gets each step's whole
output, the figures as JSON, and gpu_run.json with the table. The table is printed last, also after Ctrl-C or SIGTERM.
The exit code is 1 if a step failed or exceeded its limit.

A machine without a network finds what it lacks in the folder --carried: wheels in FOLDER/wheels, those of dependencies
too, and GPT-2's tokenizer in FOLDER/tiktoken_cache. To fill the folder elsewhere, see benchmarks/README.md. Packages
that the machine has in any version stay as they are. Without the tokenizer's files, there or in TIKTOKEN_CACHE_DIR, the
step `text` is left out."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from carried import CACHE, find_tokenizer, install_wheels, missing
from machine import default_device, open_record
from project import ROOT
from report import reporting
from steps import Step, print_steps, run_steps
from text_checks import SPEED

PROOFS = {  # groups of prove_cuda.py's checks
    "cuda": ("precisions", "graph,attention", "greedy,undecided", "neighbours,same_texts", "resume,memory"),
    "cpu": ("greedy,graph", "undecided,attention,memory"),
}
DECODE = {"cuda": "", "cpu": "--model tiny --rows 1,3 --contexts 8 --new_tokens 8 --runs 1"}
TRAIN = {
    "cuda": "--sizes gpt2 --batch 32 --check 3 --pairs 3 --minutes 2.4 --impl ours:bf16:compile,ours:bf16",
    "cpu": "--sizes tiny --block_size 16 --batch 2 --steps 1 --check 0 --pairs 1 --impl ours:bf16",
}


def main() -> int:
    config = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="gpt-gpu-", ignore_cleanup_errors=True) as work:
        if config.carried:
            install_wheels(config.carried, Path(work, "site"))
        record = open_record(config, config.device, missing=missing(), steps=[])
        print(f"not found: {', '.join(record['missing']) or 'nothing'}; figures: {config.out}", flush=True)
        groups = [[step for step in group if step.name in config.only] for group in plan(config, Path(work))]
        with reporting(config, record, print_steps) as save:
            return run_steps(groups, config.minutes, config.out, record, save)


def parse(words: list[str]) -> argparse.Namespace:
    """Returns the settings; makes the folder --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=9, help="time for all steps (default %(default)s)")
    add("--out", type=Path, help="folder for outputs and figures (default: $OUT if set, else a new temporary one)")
    add("--only", help="steps, separated by commas (default: all)")
    add("--nanogpt", metavar="PATH", help="a checkout of nanoGPT to compare training with")
    add("--carried", type=Path, metavar="FOLDER", help="where missing packages and tokenizer files are, see above")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the program out (default %(default)s)")
    config = parser.parse_args(words)
    if config.device == "cuda" and default_device() != "cuda":
        parser.error("torch finds no GPU; --device cpu tries the program out")
    config.out = Path(config.out or os.environ.get("OUT") or tempfile.mkdtemp(prefix="gpt-gpu-run-"))
    config.out.mkdir(parents=True, exist_ok=True)
    config.json = config.out / "gpu_run.json"
    find_tokenizer(config.carried)
    names = [step.name for group in plan(config, Path()) for step in group]
    config.only = config.only.split(",") if config.only else names
    for name in config.only:
        if name not in names:
            parser.error(f"--only {name}: no such step; choose from {', '.join(names)}")
    return config


# ---- steps


def plan(config: argparse.Namespace, work: Path) -> list[list[Step]]:
    """Returns groups of steps, the most important ones first. The steps of a group run side by side."""

    def program(name: str, limit: float, script: str, words: str, *more) -> Step:
        words = f"{words} --device {config.device}"
        return Step(name, limit, [sys.executable, "-u", ROOT / f"benchmarks/{script}.py", *words.split(), *more])

    def decode(backend: str, dtype: str, rows: str) -> list[Step]:
        name, backend = f"{backend}-{dtype}", backend if config.device == "cuda" else "eager"
        words = f"--backend {backend} --dtype {dtype} --rows {rows} {DECODE[config.device]}"
        return [program(name, 60, "decode_steps", words, "--json", config.out / f"{name}.json")]

    kept = ("--work", work, "--json")
    nanogpt = ["--nanogpt", config.nanogpt] if config.nanogpt else []
    train = program("train", 160, "train_speed", TRAIN[config.device], *nanogpt, *kept, config.out / "train.json")
    text = program("text", 100, "decode_speed", SPEED[config.device], *kept, config.out / "text.json")
    proofs = [
        program(f"proof{number}", 150, "prove_cuda", f"--minutes 2.4 --only {checks}", "--out", work / str(number))
        for number, checks in enumerate(PROOFS[config.device], 1)
    ]
    later = [("eager", "bf16", "1,64"), ("compiled", "bf16", "1,64"), ("captured", "fp16", "1,64")]
    groups = [tests(config.device), decode("captured", "bf16", "1,8,64"), [train], proofs]
    groups += [decode(*form) for form in [*later, ("captured", "fp32", "1,64")]]
    return groups + [[text]] * (config.device == "cpu" or CACHE in os.environ)


def tests(device: str) -> list[Step]:
    """Returns a step for each file of tests that a GPU runs as a whole. A CPU only collects them: Triton's interpreter
    takes minutes."""
    options = f"-q -p no:cacheprovider -o pythonpath={ROOT} {'--collect-only' if device == 'cpu' else '--tb=short'}"
    kernels = ("attention", "model", "sampler")  # test_triton_ahead.py needs no GPU
    files = [(ROOT / f"tests/kernels/test_triton_{name}.py", "") for name in kernels]
    files.append((ROOT / "tests/generate/test_prefill.py", "-k on_a_gpu"))
    pytest = [sys.executable, "-u", "-m", "pytest", *options.split()]
    return [Step(path.stem.removeprefix("test_"), 110, [*pytest, path, *words.split()]) for path, words in files]


if __name__ == "__main__":
    sys.exit(main())
