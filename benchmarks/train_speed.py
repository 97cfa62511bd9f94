"""Measures how fast models train: this project and other programs, in turn, from the same weights on the same tokens.

    python benchmarks/train_speed.py --nanogpt ../nanoGPT --json train.json
    python benchmarks/train_speed.py --impl ours:bf16,ours:bf16:muon,transformers:bf16 --batch 16
    python benchmarks/train_speed.py --device cuda --nanogpt ../nanoGPT --minutes 8

Each program runs in a process of its own, which is stopped while another program runs. At the first size, the losses of
its first steps must be those of our fp32 run with the same optimizer. Then every program takes a few steps in each
round; each round begins with another program. The file --json is written whenever a program has taken its steps, and
the table after every round. If a GPU cannot hold all programs at once, they run one after the other. Drawing the tokens
is not timed."""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import trainers
import weights
from machine import default_device, default_threads, hold_to_avx2, open_record
from report import print_columns, ratios, reporting, show_so_far, tell
from workers import Absent, Worker, guarded, in_turn

TOLERANCE = 0.02  # nats, between the losses of a program and of its reference
WARM_UP_STEPS = 3  # if the losses are not checked
UNTIMED = 2  # steps at the beginning of each round: until then, memory is taken from the system anew
STATE_BYTES = 16  # for each parameter: weight, gradient and two moments in fp32
DEFAULTS = {  # by device: --impl, what --nanogpt adds, --sizes, --block_size, --steps, --grad_clip
    "cpu": ("ours:bf16,ours:fp32,transformers:bf16,transformers:fp32", ("", ":bf16"), "gpt2", 256, 3, 1.0),
    "cuda": ("ours:bf16:compile", ("",), "gpt2,gpt2-medium,gpt2-large,gpt2-xl", 1024, 10, 0.0),
}
BATCHES = {"gpt2": "32", "gpt2-medium": "32", "gpt2-large": "16", "gpt2-xl": "8"}  # --batch on CUDA
CPU_BATCHES = "4,16"


def main() -> None:
    config = parse(sys.argv[1:])
    if config.isa == "avx2":
        hold_to_avx2(config.work)
    record = open_record(config, config.device, absent={}, peaks={}, results=[])
    with reporting(config, record, print_tables) as save:
        measure_all(config, record, save)


def measure_all(config, record, save):
    """Measures every size at every batch until the minutes are over; adds the figures to the record."""
    deadline = time.monotonic() + 60 * config.minutes if config.minutes else float("inf")
    for size in config.sizes:
        if time.monotonic() > deadline:
            break
        absent = {}  # programs that fail at this size
        folder = weights.fresh_weights(config.work, size, config.block_size)
        for names in together(config, folder, record):
            programs = []
            try:
                start_all(config, folder, names, absent, programs, deadline)
                for batch in config.batch or BATCHES[size].split(","):
                    measure(config, folder, int(batch), programs, absent, record, deadline, save)
            finally:
                record["absent"] |= {f"{size}: {name}": reason for name, reason in absent.items()}
                for program in programs:
                    program.close()


def parse(words: list[str]) -> argparse.Namespace:
    """Returns the settings; those that are not given depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    cpu, cuda = DEFAULTS["cpu"], DEFAULTS["cuda"]
    add(
        "--impl",
        help="programs, separated by commas. Options of ours: fp32 or bf16, compile, adamw or muon, by1 "
        f"(micro-batches of 1 sequence), and techniques to undo, see undone.py ({', '.join(sorted(trainers.UNDONE))}). "
        f"Options of transformers and nanogpt=PATH: bf16, compile. Default: on a CPU {cpu[0]}, on CUDA {cuda[0]}",
    )
    add("--nanogpt", metavar="PATH", help="adds this checkout: on a CPU in fp32 (its default) and in bf16")
    add("--sizes", help=f"separated by commas, out of {', '.join(weights.SIZES)}; on a CPU {cpu[2]}, on CUDA {cuda[2]}")
    add("--block_size", type=int, help=f"tokens of a sequence; on a CPU {cpu[3]}, on CUDA {cuda[3]}")
    add("--batch", help=f"sequences per step, separated by commas; on a CPU {CPU_BATCHES}, on CUDA by size: {BATCHES}")
    add("--steps", type=int, help=f"steps of a program in a round; on a CPU {cpu[4]}, on CUDA {cuda[4]}")
    add(
        "--grad_clip",
        type=float,
        help=f"on a CPU {cpu[5]}, as in nanoGPT's train.py; on CUDA {cuda[5]}, as in bench.py",
    )
    add("--check", type=int, default=20, help="steps whose losses are compared, 0 = none (default %(default)s)")
    add("--pairs", type=int, default=5, help="rounds; in each, every program runs once (default %(default)s)")
    add("--minutes", type=float, default=0, help="wait for nothing after this time; 0 = no limit")
    add("--threads", type=int, default=default_threads(), help="CPU threads (default %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if a GPU is found")
    add("--isa", choices=("avx2",), help="let every program use AVX2 at most")
    add("--work", type=Path, default=Path("out/benchmarks"), help="folder for weights and logs (default %(default)s)")
    add("--json", help="file for all figures")
    config = parser.parse_args(words)
    config.device = config.device or default_device()
    impl, added, sizes, *numbers = DEFAULTS[config.device]
    config.impl = (config.impl or impl).split(",")
    config.impl += [f"nanogpt={config.nanogpt}{form}" for form in added] if config.nanogpt else []
    config.sizes = (config.sizes or sizes).split(",")
    for name, number in zip(("block_size", "steps", "grad_clip"), numbers, strict=True):
        setattr(config, name, number if getattr(config, name) is None else getattr(config, name))
    batch = config.batch or (CPU_BATCHES if config.device == "cpu" else "")
    config.batch = batch.split(",") if batch else []
    return config


def together(config, folder: Path, record: dict) -> list[list[str]]:
    """Returns lists of the programs that are loaded at the same time: one list of all, or on a GPU without room for
    their states a list for each. `peak` measures a CPU in every round; on a GPU it is read from a table, once."""
    if config.device == "cpu":
        return [["peak", *config.impl]]
    import torch

    names = config.impl if record["peaks"] else ["peak", *config.impl]
    state = STATE_BYTES * parameters(folder)
    enough = len(config.impl) * state < 0.4 * torch.cuda.get_device_properties(0).total_memory
    return [names] if enough else [[name] for name in names]


def parameters(folder: Path) -> int:
    """Returns the number of parameters of the model in `folder`."""
    from gpt.checkpoint.weights import read_config
    from gpt.model import count_parameters

    return count_parameters(*read_config(folder))


# ---- measuring


def start_all(config, folder, names, absent, programs, deadline):
    """Adds a Worker for each name to `programs`, before it loads, so that the caller can close all of them. For each
    program that does not load, `absent` gets the reason."""
    for name in names:
        tell(f"loading {name}")
        programs.append(worker(config, folder, name, name, deadline))
        attempt(absent, programs[-1], lambda program: program.wait_loaded())


def worker(config, folder, name, spec, deadline):
    settings = (config.threads, config.device, config.grad_clip)
    return Worker(name, spec, folder, *settings, module="trainers", until=deadline)


def attempt(absent, program, action, *arguments):
    return guarded({"absent": absent}, program, action, *arguments)


def measure(config, folder, batch, programs, absent, record, deadline, save):
    """Checks every program at this batch, then runs the rounds; adds the figures to the record and saves it whenever a
    program has taken its steps."""
    results = {}
    for program in programs:
        if program.name != "peak" and program.name not in absent:
            result = {"size": size_of(folder), "batch": batch, "program": program.name, "version": program.version}
            result |= {"load_seconds": program.load_seconds, "rounds": [], "memory": 0}
            if attempt(absent, program, first_steps, config, folder, batch, result):
                results[program.name] = result
    if config.check and size_of(folder) == config.sizes[0]:
        check(config, folder, batch, programs, results, absent, deadline)
    record["results"] += results.values()
    for number in range(config.pairs):
        if time.monotonic() > deadline:
            break
        tell(f"{folder.name}, batch {batch}: round {number + 1} of {config.pairs}")
        for program in in_turn(programs, number):
            if program.name == "peak":
                attempt(absent, program, read_peak, record["peaks"])
            elif program.name in results:
                attempt(absent, program, one_round, config, results[program.name])
            add_rates(config, record)
            save()
        show_so_far(print_table, f"{folder.name}, batch {batch}", results.values())


def size_of(folder: Path) -> str:
    """Returns the size in the name of a folder: "gpt2-fresh-1024" -> "gpt2"."""
    return folder.name.partition("-fresh-")[0]


def first_steps(program, config, folder, batch, result):
    """Prepares a program, and takes the steps whose losses are compared, or some to warm up."""
    tell(f"{folder.name}, batch {batch}: first steps of {program.name}")
    _, begin = program.ask("begin", batch)
    checked = config.check if size_of(folder) == config.sizes[0] else 0
    steps = [program.ask("steps", number, 1)[1] for number in range(checked or WARM_UP_STEPS)]
    seconds, losses, _ = zip(*steps, strict=True)
    result["losses"] = [loss for [loss] in losses]
    result["start_seconds"] = max(0.0, begin + seconds[0] - statistics.median(seconds))


def check(config, folder, batch, programs, results, absent, deadline):
    """Compares losses with those of the reference; a program whose losses differ is removed from `results`."""
    references = {name: result["losses"] for name, result in results.items()}
    for name in sorted({reference_of(name) for name in results} - references.keys()):
        program = worker(config, folder, f"reference {name}", name, deadline)
        try:
            result = {}
            if attempt(absent, program, lambda program: program.wait_loaded()):
                attempt(absent, program, first_steps, config, folder, batch, result)
            references[name] = result.get("losses")
        finally:
            program.close()
    by_name = {program.name: program for program in programs}
    for name, result in list(results.items()):
        if not attempt(absent, by_name[name], compare, references[reference_of(name)], result):
            del results[name]


def reference_of(name: str) -> str:
    """Returns the program whose losses are the reference: ours in fp32, uncompiled, with the same optimizer."""
    return "ours:fp32:muon" if "muon" in name.split(":") else "ours:fp32"


def compare(program, expected, result):
    """Adds the largest difference of losses to the result. Raises Absent if it is too large."""
    if expected is None:
        raise Absent("no reference to compare it with")
    differences = [abs(a - b) for a, b in zip(result["losses"], expected, strict=True)]
    result["difference"] = max(differences, key=lambda difference: (math.isnan(difference), difference))
    difference, last = result["difference"], result["losses"][-1]
    tell(f"  {program.name}: losses differ by {difference:.4f} at most, the last is {last:.4f}")
    if not difference <= TOLERANCE:
        raise Absent(f"its loss differs by {difference:.4f}; at most {TOLERANCE} is allowed")


def one_round(program, config, result):
    """Adds the seconds of one round to the result."""
    seconds, losses, memory = program.ask("steps", len(result["losses"]), UNTIMED + config.steps, UNTIMED)[1]
    result["losses"] += losses
    result["rounds"].append(seconds)
    result["memory"] = max(memory, result["memory"])


def read_peak(program, peaks):
    """Adds the FLOP/s of each precision to `peaks`."""
    for name, flops in program.ask("products")[1].items():
        peaks.setdefault(name, []).append(flops)


# ---- the tables


def add_rates(config, record: dict) -> None:
    """Adds the speeds and the MFU of the rounds so far to the results of the record."""
    record["peak"] = max((statistics.median(flops) for flops in record["peaks"].values()), default=0.0)
    for result in record["results"]:
        folder = weights.fresh_weights(config.work, result["size"], config.block_size)
        tokens = result["batch"] * config.block_size * config.steps
        result["speeds"] = [tokens / seconds for seconds in result["rounds"]]
        if result["speeds"] and record["peak"]:
            result["mfu"] = statistics.median(result["speeds"]) * flops_of(folder) / record["peak"]


def print_tables(record: dict) -> None:
    """Prints a table for each size and batch, the peak, and which programs are absent."""
    for size, batch in dict.fromkeys((result["size"], result["batch"]) for result in record["results"]):
        chosen = [r for r in record["results"] if (r["size"], r["batch"]) == (size, batch)]
        print_table(f"{size}, {batch} sequences of {record['settings']['block_size']}", chosen)
    if record["peaks"]:
        speeds = ", ".join(f"{name} {statistics.median(flops) / 1e12:.2f}" for name, flops in record["peaks"].items())
        print(f"\nproducts, TFLOP/s: {speeds}; MFU is the share of the largest")
    for name, reason in record["absent"].items():
        print(f"absent: {name}: {reason}")


def flops_of(folder: Path) -> float:
    """Returns the FLOPs of training on one token with the model in `folder`."""
    from gpt.checkpoint.weights import read_config
    from gpt.model import flops_per_token

    return flops_per_token(*read_config(folder))


def print_table(title: str, results: Iterable[dict]) -> None:
    """Prints one line for each program that has taken a round: tokens/s, MFU, peak memory, seconds to start (with
    compiling, without reading the weights), the largest difference of losses, and for each of our programs how many
    times as fast it is."""
    results = [result for result in results if result["rounds"]]
    ours = [result for result in results if result["program"].startswith("ours")]
    print(f"\n{title}; tok/s median (least-greatest)\n")
    heads = ["program", "tok/s", "MFU", "GiB", "start s", "loss differs"]
    lines = [[*heads, *(f"{label(result['program'])} /" for result in ours)]]
    for result in sorted(results, key=lambda result: -statistics.median(result["speeds"])):
        speeds = result["speeds"]
        line = [label(result["program"]), f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f}-{max(speeds):,.0f})"]
        line += [f"{result['mfu']:.1%}" if "mfu" in result else "", f"{result['memory'] / 2**30:.1f}"]
        line += [f"{result['start_seconds']:.1f}"]
        line += [f"{result['difference']:.4f}" if "difference" in result else ""]
        lines.append([*line, *("{:.2f} ({:.2f}-{:.2f})".format(*ratios(mine, result)) for mine in ours)])
    print_columns(lines)


def label(name: str) -> str:
    """Returns a program's name without a path: "nanogpt=PATH:bf16" -> "nanogpt:bf16"."""
    kind, options = trainers.parts_of(name)
    return ":".join([kind, *options[kind == "nanogpt" :]])


if __name__ == "__main__":
    main()
