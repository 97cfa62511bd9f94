"""Measures the milliseconds of a decode step of a random model, without the text interface.

    python benchmarks/decode_steps.py
    python benchmarks/decode_steps.py --backend eager --dtype fp32 --rows 1 --contexts 32 --json eager.json
    python benchmarks/decode_steps.py --rows 1 --profile

For each number of rows, context and sampler it prints a line: a step, tokens/s of all rows in the steps alone, the time
to the first tokens, tokens/s with the prompts, and the seconds of the first call, which compiles and captures. Each is
the best of several runs, and the file --json is written after it. Then a greedy text is compared with the choices of
the same model without a cache; the exit code is 1 if they differ by more than rounding."""

import short_spins  # noqa: F401 (before torch)

import argparse
import math
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from machine import default_device, open_record
from report import reporting
from text_checks import NAMES, largest_gap
from weights import SIZES, VOCABULARY, enliven

from gpt.generate.backend import BACKENDS
from gpt.generate.decode import Decoder
from gpt.generate.sampling import SamplingParams
from gpt.generate.sequence import GenerationParams, Sequence
from gpt.model import GPT, ModelConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SAMPLERS = {"greedy": SamplingParams(temperature=0), "sampled": SamplingParams(temperature=1, top_k=50, top_p=0.95)}
HEADS = "rows  prompt sampler   ms a step     tok/s  first ms  tok/s in all  first call s"
LINE = "{:4} {:7} {:8} {:10.3f} {:9,.0f} {:9.1f} {:13,.0f} {:13.1f}"
EOT = VOCABULARY - 1
KERNELS = 16  # that --profile shows


def main() -> int:
    config = parse(sys.argv[1:])
    record = open_record(config, config.device, results=[])
    with reporting(config, record, print_end) as save:
        return measure_all(config, record, save)


def measure_all(config: argparse.Namespace, record: dict, save: Callable[[], None]) -> int:
    """Adds the figures of every number of rows, context and sampler to the record. Returns the exit code."""
    torch.manual_seed(0)
    layers, heads, width = SIZES[config.model]
    model = GPT(ModelConfig(n_layer=layers, n_head=heads, n_embd=width), VOCABULARY)
    enliven(model)
    backend = BACKENDS[config.backend](model.to(config.device, DTYPES[config.dtype]).eval())
    print(f"{config.model}, {config.backend}, {config.dtype}", HEADS, sep="\n", flush=True)
    for rows in config.rows:
        decoder = Decoder(backend, rows, EOT)
        for prompt in config.contexts:
            for name in SAMPLERS:
                record["results"].append(measure(decoder, rows, prompt, name, config))
                save()
        if config.profile:
            profile_steps(decoder, rows, config)
    gap, bound = greedy_gap(backend, config), 1e-3 if config.dtype == "fp32" else 0.5  # the logits' deviation is 2
    record |= {"greedy_gap": gap, "greedy": "pass" if gap < bound else "FAIL"}
    return int(not gap < bound)


def print_end(record: dict) -> None:
    """Prints the last line: the greedy text's gap, unless the program was stopped, and the speeds of greedy texts."""
    gap = f"gap {record['greedy_gap']:.1e}, {record['greedy']}" if "greedy" in record else "not compared"
    speeds = ", ".join(f"{r['speed']:,.0f} ({r['rows']})" for r in record["results"] if r["sampler"] == "greedy")
    print(f"greedy against uncached: {gap}; tok/s (rows) {speeds}")


def parse(words: list[str]) -> argparse.Namespace:
    """Returns the settings; --rows and --contexts become lists of numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backend", choices=NAMES, help="default: captured on a GPU, eager on a CPU")
    add("--dtype", choices=DTYPES, default="bf16", help="default %(default)s")
    add("--rows", default="1,8,64", help="texts side by side, separated by commas (default %(default)s)")
    add("--contexts", default="32,800", help="tokens of a prompt, separated by commas (default %(default)s)")
    add("--new_tokens", type=int, default=128, help="of each text; the middle half is timed (default %(default)s)")
    add("--model", choices=SIZES, default="gpt2", help="size of the model (default %(default)s)")
    add("--runs", type=int, default=4, help="runs of which the best counts (default %(default)s)")
    add("--profile", action="store_true", help="show which kernels take the time of a step, on a GPU")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if a GPU is found")
    add("--json", help="file for all figures")
    config = parser.parse_args(words)
    config.device = config.device or default_device()
    config.backend = config.backend or ("captured" if config.device == "cuda" else "eager")
    config.rows, config.contexts = ([int(part) for part in text.split(",")] for text in (config.rows, config.contexts))
    if config.new_tokens < 4:
        parser.error(f"--new_tokens {config.new_tokens}: the middle half needs 4 or more")
    if config.profile and config.device == "cpu":
        parser.error("--profile needs a GPU")
    return config


def generate(decoder: Decoder, rows: int, prompt: int, new: int, sampler: str) -> tuple[dict[int, float], list]:
    """Generates `rows` texts. Returns the seconds until the first token, and until each text has 1/4, 3/4 and all of
    its `new` tokens, by number of tokens; and the sequences."""
    params = GenerationParams(new, SAMPLERS[sampler], seed=1, ignore_eot=True)
    tokenizer = SimpleNamespace(eot=EOT, stops=(EOT,), decode_bytes=lambda ids: b"x")
    prompts = [[(7 * row + place) % EOT for place in range(prompt)] for row in range(rows)]
    sequences = [Sequence(row, row, ids, row, 0, params, tokenizer) for row, ids in enumerate(prompts)]
    marks, start = {1: math.nan}, time.perf_counter()
    marks |= dict.fromkeys((rows * count for count in (new // 4, 3 * new // 4, new)), math.nan)
    for number, _ in enumerate(decoder.events(sequences), 1):
        if number in marks:
            marks[number] = time.perf_counter() - start
    return marks, sequences


def measure(decoder: Decoder, rows: int, prompt: int, sampler: str, config: argparse.Namespace) -> dict:
    """Prints a line and returns its figures."""
    new = config.new_tokens
    first_call = generate(decoder, rows, prompt, new, sampler)[0][rows * new]
    runs = [generate(decoder, rows, prompt, new, sampler)[0] for _ in range(config.runs)]
    quarter, three = rows * (new // 4), rows * (3 * new // 4)
    step = min(marks[three] - marks[quarter] for marks in runs) / ((three - quarter) // rows)
    first, whole = (min(marks[number] for marks in runs) for number in (1, rows * new))
    result = {"rows": rows, "prompt": prompt, "sampler": sampler, "step_ms": 1e3 * step, "speed": rows / step}
    result |= {"first_ms": 1e3 * first, "whole_speed": rows * new / whole, "first_call": first_call}
    print(LINE.format(*result.values()), flush=True)
    return result


def greedy_gap(backend, config: argparse.Namespace) -> float:
    """Returns the largest distance of a greedy token's logit below the maximum of the uncached model."""
    _, [sequence] = generate(Decoder(backend, 1, EOT), 1, 32, config.new_tokens, "greedy")
    uncached = SimpleNamespace(model=backend.model, tokenizer=SimpleNamespace(eot=EOT, encode=list))
    return largest_gap(uncached, sequence.prompt, sequence.ids)


def profile_steps(decoder: Decoder, rows: int, config: argparse.Namespace) -> None:
    """Prints the kernels that take the most time, those of the prompts included, per new token of a text."""
    from torch.profiler import ProfilerActivity, profile

    new = config.new_tokens
    for sampler in SAMPLERS:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            generate(decoder, rows, config.contexts[0], new, sampler)
        kernels = sorted(profiler.key_averages(), key=lambda kernel: -kernel.device_time_total)
        total, count = (sum(getattr(each, name) for each in kernels) / new for name in ("device_time_total", "count"))
        print(f"{rows} rows, {sampler}: {total:.0f} us in {count:.0f} kernels")
        for each in kernels[:KERNELS]:
            print(f"{each.device_time_total / new:9.1f} us {each.count / new:6.1f} x  {each.key[:90]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
