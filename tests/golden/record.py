"""Writes expected.json: what the runs beside this file generate, score and learn on. README.md says with which code."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import gpt

GOLDEN = Path(__file__).resolve().parent
PROMPTS = ("The gull cried", "The rain", "A child", "The child", "The boat", "Naïve", "the wind", "on the")
NEW_TOKENS = 40  # beyond the context of 32
SENTENCE = "The child saw the gull, and the boat lay still on the calm sea."
RESUMED_TO = 606
CLEAR = 0.02  # nats between the two likeliest tokens: far more than another rounding changes


def main():
    expected = {run: record(GOLDEN / run) for run in ("adamw", "muon")}
    text = json.dumps({"sentence": SENTENCE, "resumed_to": RESUMED_TO, "runs": expected}, indent=2, ensure_ascii=False)
    (GOLDEN / "expected.json").write_text(text + "\n", encoding="utf-8")


def record(run):
    """Returns what one run folder must give again."""
    steps = {folder.name: record_step(folder) for folder in sorted(run.glob("step-*"))}
    return {"best": (run / "best.txt").read_text().strip(), "steps": steps, "losses": resumed_losses(run)}


def record_step(folder):
    generator = gpt.load(str(folder), device="cpu", dtype="fp32", backend="eager")
    gap, prompt, text = max(greedy(generator, prompt) for prompt in PROMPTS)
    assert gap >= CLEAR, f"{folder}: no prompt with a clear text: {gap}"
    return {"prompt": prompt, "text": text, "smallest_gap": gap, "nats": generator.score(SENTENCE).nats}


def greedy(generator, prompt):
    """Returns the smallest gap between the log-probabilities of the two likeliest tokens, the prompt, and its text."""
    [[completion]] = generator.generate([prompt], max_new_tokens=NEW_TOKENS, temperature=0.0, top_logprobs=2)
    gaps = [first - second for (_, first), (_, second) in completion.top_logprobs]
    return round(min(gaps), 4), prompt, completion.text


def resumed_losses(run):
    """Returns the losses of the steps up to RESUMED_TO of a copy of the run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / run.name
        shutil.copytree(run, out)
        flags = ("--out", out, "--max_steps", RESUMED_TO, "--log_every", 1)
        command = [sys.executable, "train.py", out / "config.toml", *flags]
        subprocess.run(list(map(str, command)), check=True)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {str(line["step"]): line["loss"] for line in lines if line["step"] > 600}


if __name__ == "__main__":
    main()
