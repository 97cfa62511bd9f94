"""Figures and tables of decode_speed.py, and what all programs share: file of figures, columns, ratios, progress."""

import argparse
import contextlib
import json
import math
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from weights import Whole

BYTES = {"fp32": 4, "f32": 4, "bf16": 2, "f16": 2, "fp16": 2, "int8": 1, "q8_0": 34 / 32}  # of a weight


@contextlib.contextmanager
def reporting(config: argparse.Namespace, record: dict, show: Callable[[dict], None]) -> Iterator[Callable[[], None]]:
    """Yields a function that writes all figures so far to the file --json. At the end of the block, also after an
    error, Ctrl-C or SIGTERM, writes them once more and calls show(record)."""

    def save() -> None:
        if config.json:
            with Whole(Path(config.json)) as unfinished:
                unfinished.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")

    def stop(number: int, _frame) -> None:
        record["stopped"] = signal.Signals(number).name
        sys.exit(128 + number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield save
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        save()
        show(record)


def rates(result: dict, config, record: dict, folder: Path) -> dict:
    """Returns the figures of a result's rounds: tokens/s of each, median seconds to the first token, tokens/s of the
    decode steps alone, and their share of the bandwidth where it is known."""
    rounds = result["rounds"]
    if not rounds:
        return {}
    batch, new = result["batch"], config.new_tokens
    steps = [(times["whole"] - times["first"]) / (new - 1) for times in rounds]  # seconds of a decode step
    figures = {
        "speeds": [batch * new / times["whole"] for times in rounds],
        "first": statistics.median(times["first"] for times in rounds),
        "decode_speed": batch / statistics.median(steps),
    }
    size = bytes_per_step(result["program"], folder, batch, config.prompt + new / 2)
    if size and record["bandwidth"]:
        bandwidth = nearest_bandwidth(record["bandwidth"], size)
        figures |= {"bytes_per_step": size, "share": size / statistics.median(steps) / 1e9 / bandwidth}
    return figures


def bytes_per_step(program: str, folder: Path, batch: int, context: float) -> float | None:
    """Returns the bytes of weights and cache that a decode step must read; None if the program's name has no precision.

    The position table does not count, and the token table counts once, as the head. The cache has 32 bits in fp32,
    else 16; llama.cpp's always has 16."""
    width = next((BYTES[word] for word in program.split(":") if word in BYTES), None)
    if width is None:
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers, channels = config["n_layer"], config["n_embd"]
    cache_width = 4 if width == 4 and not program.startswith("llamacpp") else 2
    weights = 12 * layers * channels**2 + config["vocab_size"] * channels
    return weights * width + batch * 2 * layers * channels * context * cache_width


def nearest_bandwidth(bandwidth: dict, size: float) -> float:
    """Returns the median GB/s that was measured with the buffer nearest to `size` bytes."""
    nearest = min(bandwidth, key=lambda megabytes: abs(math.log(float(megabytes) * 1e6 / size)))
    return statistics.median(bandwidth[nearest])


def ratios(ours: dict, theirs: dict) -> tuple[float, float, float]:
    """Returns median, least and greatest of our speed over theirs in the same round."""
    pairs = [a / b for a, b in zip(ours["speeds"], theirs["speeds"], strict=False)]
    return statistics.median(pairs), min(pairs), max(pairs)


def print_tables(record: dict) -> None:
    """Prints a table for each model and batch, the bandwidth, and which programs are absent."""
    for model, batch in dict.fromkeys((result["model"], result["batch"]) for result in record["results"]):
        chosen = [r for r in record["results"] if (r["model"], r["batch"]) == (model, batch)]
        print_table(f"{model}, batch {batch}", chosen)
    if record["bandwidth"]:
        print("\nread from memory, GB/s, median (least-greatest):")
        for megabytes, speeds in record["bandwidth"].items():
            print(f"  {megabytes:>5} MB  {statistics.median(speeds):6.1f} ({min(speeds):.1f}-{max(speeds):.1f})")
    for name, reason in record["absent"].items():
        print(f"absent: {name}: {reason}")


def print_table(title: str, results: Iterable[dict]) -> None:
    """Prints one line for each program that has figures: tokens/s of all texts together from prompt to end, of the
    decode steps alone, milliseconds to the first token, share of the measured bandwidth, greedy agreement, and for each
    of our programs how many times as fast it is."""
    results = [result for result in results if "speeds" in result]
    ours = [result for result in results if result["program"].startswith("ours")]
    print(f"\n{title}; tok/s median (least-greatest)\n")
    heads = ["program", "tok/s", "decode", "first ms", "share", "equal", "deficit"]
    lines = [[*heads, *(f"{result['program']} /" for result in ours)]]
    for result in sorted(results, key=lambda result: -statistics.median(result["speeds"])):
        speeds, agreement = result["speeds"], result["agreement"]
        line = [f"{result['program']}"]
        line += [f"{statistics.median(speeds):.1f} ({min(speeds):.1f}-{max(speeds):.1f})"]
        line += [f"{result['decode_speed']:.1f}", f"{1000 * result['first']:.1f}"]
        line += [f"{result['share']:.0%}" if "share" in result else ""]
        line += [f"{agreement['equal']:.0%}", f"{agreement['deficit']:.2g}"]
        lines.append([*line, *("{:.2f} ({:.2f}-{:.2f})".format(*ratios(mine, result)) for mine in ours)])
    print_columns(lines)


def show_so_far(print_table: Callable[..., None], *arguments) -> None:
    """Calls print_table(*arguments), whose output goes to stderr, as all progress does."""
    with contextlib.redirect_stdout(sys.stderr):
        print_table(*arguments)


def print_columns(lines: list[list[str]]) -> None:
    """Prints `lines` as a Markdown table; the first line holds the heads."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for number, line in enumerate(lines):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def tell(text: str) -> None:
    """Prints a line of progress to stderr."""
    print(text, file=sys.stderr, flush=True)
