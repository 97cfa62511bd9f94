"""Measures how fast texts are generated: this project and other programs, in turn, on the same random weights.

    python benchmarks/decode_speed.py --json decode.json
    python benchmarks/decode_speed.py --impl ours:int8,openvino:int8,llamacpp:f16,nanogpt=../nanoGPT --batch 1
    python benchmarks/decode_speed.py --ablation

Each program runs in a process of its own, which is stopped while another program runs. First the greedy text of each
program is checked; then every program generates once in each round, and each round begins with another program. The
file --json is written whenever a program has generated, and the table after every round. On a GPU, the default is our
own back ends on four sizes and batch 1, 8, 64."""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import weights
from machine import default_device, default_threads, hold_to_avx2, open_record
from reference import Reference
from report import print_table, print_tables, rates, reporting, show_so_far, tell
from workers import Absent, Worker, guarded, in_turn

PEERS = (
    "transformers:fp32,transformers:bf16,ctranslate2:fp32,ctranslate2:int8,openvino:bf16,openvino:int8,"
    "llamacpp:f32,llamacpp:f16,llamacpp:q8_0,bandwidth"
)
CPU_LADDER = (
    "ours:fp32:eager,ours:bf16:eager,ours:int8:eager,ours:bf16:compiled,ours:int8:compiled,"
    "ours:fp32:native,ours:bf16:native,ours:int8:native,bandwidth"
)
CUDA_LADDER = "ours:bf16:eager,ours:bf16:compiled,ours:bf16:captured,ours:int8:captured,bandwidth"
DEFAULTS = {  # by device: --impl, --ablation, --batch, --model
    "cpu": (f"ours:int8,ours:bf16,ours:fp32,{PEERS}", CPU_LADDER, "1,8", "gpt2"),
    "cuda": (CUDA_LADDER, CUDA_LADDER, "1,8,64", "gpt2,gpt2-medium,gpt2-large,gpt2-xl"),
}
MEGABYTES = {"cpu": (60, 125, 250, 500, 2000), "cuda": (500, 1000, 2000, 4000)}  # of buffers; on CUDA far beyond L2
CHECKED_TOKENS = 16
EXACT = {"fp32", "f32"}  # options that mean fp32 throughout


def main() -> None:
    config = parse(sys.argv[1:])
    if config.isa == "avx2":
        hold_to_avx2(config.work)
    record = open_record(config, config.device, absent={}, bandwidth={}, results=[])
    with reporting(config, record, print_tables) as save:
        measure_all(config, record, save)


def measure_all(config, record, save):
    """Measures every model at every batch until the minutes are over; adds the figures to the record."""
    deadline = time.monotonic() + 60 * config.minutes if config.minutes else float("inf")
    for model in config.model:
        if time.monotonic() > deadline:
            break
        folder = weights.make_weights(config.work, model)
        programs = []
        try:
            start_all(config, folder, record, programs, deadline)
            for batch in config.batch:
                measure(config, folder, batch, programs, record, deadline, save)
        finally:
            for program in programs:
                program.close()


def parse(words: list[str]) -> argparse.Namespace:
    """Returns the settings; those that are not given depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--impl",
        help="programs, separated by commas. nanogpt=PATH is a checkout; bandwidth measures the memory. "
        f"Default: on a CPU {DEFAULTS['cpu'][0]}, on CUDA {CUDA_LADDER}",
    )
    add("--ablation", action="store_true", help="compare our own back ends and precisions")
    add(
        "--model",
        help=f"sizes, separated by commas, out of {', '.join(weights.SIZES)}; on a CPU gpt2, on CUDA all but tiny",
    )
    add("--batch", help="texts side by side, separated by commas; on a CPU 1,8, on CUDA 1,8,64")
    add("--prompt", type=int, default=32, help="tokens of each prompt (default %(default)s)")
    add("--new_tokens", type=int, default=128, help="new tokens for each prompt, 2 or more (default %(default)s)")
    add("--pairs", type=int, default=5, help="rounds; in each, every program runs once (default %(default)s)")
    add("--minutes", type=float, default=0, help="wait for nothing after this time; 0 = no limit")
    add("--threads", type=int, default=default_threads(), help="CPU threads (default %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if a GPU is found")
    add("--isa", choices=("avx2",), help="let every program use AVX2 at most; llama.cpp must be built so")
    add("--work", type=Path, default=Path("out/benchmarks"), help="folder for weights and logs (default %(default)s)")
    add("--optimum_cli", default="optimum-cli", help="the program that converts for OpenVINO (default %(default)s)")
    add("--json", help="file for all figures")
    config = parser.parse_args(words)
    if config.new_tokens < 2:
        parser.error(f"--new_tokens {config.new_tokens}: the time of a decode step needs 2 or more")
    config.device = config.device or default_device()
    impl, ladder, batch, model = DEFAULTS[config.device]
    config.impl = (ladder if config.ablation else config.impl or impl).split(",")
    config.batch = [int(part) for part in (config.batch or batch).split(",")]
    config.model = (config.model or model).split(",")
    return config


# ---- measuring


def start_all(config, folder, record, programs, deadline):
    """Adds a Worker for each program to `programs`, before it loads, so that the caller can close all of them. For each
    program that does not load, the record gets the reason; a program that it lists as absent is not loaded again."""
    for name in config.impl:
        if name in record["absent"]:
            continue
        spec = f"{name}:{config.optimum_cli}" if name.startswith("openvino") else name
        tell(f"loading {name}")
        programs.append(Worker(name, spec, folder, config.threads, config.device, until=deadline))
        guarded(record, programs[-1], lambda program: program.wait_loaded())


def measure(config, folder, batch, programs, record, deadline, save):
    """Checks every program at this batch, then runs the rounds; adds the figures to the record and saves it whenever a
    program has generated."""
    results = checked(config, folder, batch, programs, record)
    record["results"] += results.values()
    for number in range(config.pairs):
        if time.monotonic() > deadline:
            break
        tell(f"{folder.name}, batch {batch}: round {number + 1} of {config.pairs}")
        for program in in_turn(programs, number):
            if program.name == "bandwidth":
                guarded(record, program, read_memory, MEGABYTES[config.device], record["bandwidth"])
            elif program.name in results:
                guarded(record, program, one_round, folder, batch, config, results[program.name]["rounds"])
            for result in results.values():
                result |= rates(result, config, record, folder)
            save()
        show_so_far(print_table, f"{folder.name}, batch {batch}", results.values())


def checked(config, folder, batch, programs, record):
    """Returns results, still without figures, for the programs whose greedy text is this model's."""
    prompts = weights.prompts_of(folder, batch, config.prompt)
    reference, results = Reference(folder, config.device), {}
    for program in programs:
        if program.name != "bandwidth" and program.name not in record["absent"]:
            result = {"model": folder.name, "batch": batch, "program": program.name, "version": program.version}
            result |= {"load_seconds": program.load_seconds, "rounds": []}
            if guarded(record, program, check, prompts, reference, result):
                results[program.name] = result
    return results


def check(program, prompts, reference, result):
    """Adds the agreement of the greedy text with the reference to the result. Raises Absent if they disagree."""
    seconds, texts = program.ask("generate", prompts, CHECKED_TOKENS, True)
    agreement = reference.agreement(prompts, texts)
    result |= {"first_call_seconds": seconds, "agreement": dataclasses.asdict(agreement)}
    if not agreement.fine(is_exact(program.name)):
        raise Absent(f"its greedy text is not this model's: {agreement}")
    program.ask("generate", prompts, 2 * CHECKED_TOKENS, False)  # warm up


def is_exact(name: str) -> bool:
    """Returns whether a program computes in fp32 throughout."""
    return name.startswith("nanogpt=") or bool(EXACT & set(name.split(":")))


def one_round(program, folder, batch, config, rounds):
    """Adds the seconds of texts of one token and of whole texts to `rounds`. Every prompt is new to the program: some
    programs keep what they have read for the next call."""
    seeds = (2 * len(rounds) + 1, 2 * len(rounds) + 2)
    ones, wholes = (weights.prompts_of(folder, batch, config.prompt, seed) for seed in seeds)
    first, _ = program.ask("generate", ones, 1, False)
    whole, texts = program.ask("generate", wholes, config.new_tokens, False)
    lengths = {len(text) for text in texts}
    if lengths != {config.new_tokens}:
        raise Absent(f"texts of {lengths} tokens instead of {config.new_tokens}")
    rounds.append({"first": first, "whole": whole})


def read_memory(program, sizes, bandwidth):
    """Adds the GB/s of reading buffers of these sizes to `bandwidth`."""
    for megabytes in sizes:
        bandwidth.setdefault(str(megabytes), []).append(program.ask("read", megabytes)[1])


if __name__ == "__main__":
    main()
