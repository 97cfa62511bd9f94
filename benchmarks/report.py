"""Figures of decode_speed.py: rates, shares of the memory's bandwidth, ratios round by round, and the tables."""

import json
import math
import statistics
import sys

BYTES = {"fp32": 4, "f32": 4, "bf16": 2, "f16": 2, "fp16": 2, "int8": 1, "q8_0": 34 / 32}


def rates(result, config, record, folder):
    """What a result says beside its rounds: medians of tokens/s, seconds to the first token, share of bandwidth."""
    rounds = result["rounds"]
    if not rounds:
        return {}
    batch, new = result["batch"], config.new_tokens
    speeds = [batch * new / one["whole"] for one in rounds]
    steps = [(one["whole"] - one["first"]) / (new - 1) for one in rounds]  # seconds of a decode step
    found = {"speeds": speeds, "first": statistics.median(one["first"] for one in rounds)}
    found["decode_speed"] = batch / statistics.median(steps)
    read = bytes_per_step(result["program"], folder, batch, config.prompt + new / 2)
    if read and record["bandwidth"]:
        bandwidth = nearest_bandwidth(record["bandwidth"], read)
        found |= {"bytes_per_step": read, "share": read / statistics.median(steps) / 1e9 / bandwidth}
    return found


def bytes_per_step(program, folder, batch, context):
    """Bytes of weights and cache that a step must read, or None where the precision is not in the program's name. The
    position table is left out, the token table counts once, as the head. The cache is in fp32 in fp32, else in 16
    bits; llama.cpp's is always in F16."""
    width = next((BYTES[word] for word in program.split(":") if word in BYTES), None)
    if width is None:
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers, channels = config["n_layer"], config["n_embd"]
    cache_width = 4 if width == 4 and not program.startswith("llamacpp") else 2
    weights = 12 * layers * channels**2 + config["vocab_size"] * channels
    return weights * width + batch * 2 * layers * channels * context * cache_width


def nearest_bandwidth(bandwidth, size):
    """GB/s, the median of what was measured with the buffer nearest to `size` bytes."""
    nearest = min(bandwidth, key=lambda megabytes: abs(math.log(float(megabytes) * 1e6 / size)))
    return statistics.median(bandwidth[nearest])


def ratios(ours, theirs):
    """Median, least and greatest of our speed over theirs in the same round."""
    pairs = [a / b for a, b in zip(ours["speeds"], theirs["speeds"], strict=False)]
    return statistics.median(pairs), min(pairs), max(pairs)


def print_tables(record):
    for model, batch in dict.fromkeys((result["model"], result["batch"]) for result in record["results"]):
        chosen = [r for r in record["results"] if (r["model"], r["batch"]) == (model, batch) and "speeds" in r]
        print_table(f"{model}, batch {batch}", chosen)
    if record["bandwidth"]:
        print("\nread from memory, GB/s, median (least-greatest):")
        for megabytes, found in record["bandwidth"].items():
            print(f"  {megabytes:>5} MB  {statistics.median(found):6.1f} ({min(found):.1f}-{max(found):.1f})")
    for name, reason in record["absent"].items():
        print(f"absent: {name}: {reason}")
    print(json.dumps(record["machine"]))


def print_table(title, results):
    """One line a program: tokens/s of all texts together from prompt to end, of the decode steps alone, milliseconds to
    the first token, share of measured bandwidth, greedy agreement, and what each of ours is times as fast."""
    ours = [result for result in results if result["program"].startswith("ours")]
    print(f"\n{title}; tok/s median (least-greatest)\n")
    heads = ["program", "tok/s", "decode", "first ms", "share", "equal", "deficit"]
    lines = [[*heads, *(f"{result['program']} /" for result in ours)]]
    for result in sorted(results, key=lambda found: -statistics.median(found["speeds"])):
        speeds, agreement = result["speeds"], result["agreement"]
        line = [f"{result['program']}"]
        line += [f"{statistics.median(speeds):.1f} ({min(speeds):.1f}-{max(speeds):.1f})"]
        line += [f"{result['decode_speed']:.1f}", f"{1000 * result['first']:.1f}"]
        line += [f"{result['share']:.0%}" if "share" in result else ""]
        line += [f"{agreement['equal']:.0%}", f"{agreement['deficit']:.2g}"]
        lines.append([*line, *("{:.2f} ({:.2f}-{:.2f})".format(*ratios(mine, result)) for mine in ours)])
    print_columns(lines)


def print_columns(lines):
    """A Markdown table of `lines`, the first of which are the heads."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for number, line in enumerate(lines):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def tell(text):
    print(text, file=sys.stderr, flush=True)
