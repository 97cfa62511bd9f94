"""Scores the snapshots of learning_curve.py on the whole validation split; its figures, table and plot."""

import contextlib
import json
import math
import statistics
from pathlib import Path

from report import print_columns, tell

NANOGPT = "nanogpt"  # its name among the programs
WINDOW = 64  # bytes that the scorer lets a model read at once
ROWS = 64  # windows that it reads side by side


def score(config, one, stream, vocabulary):
    """Add to each point of a run its loss over the bytes `stream`, and to the run that of its last weights in windows
    of the model's own context."""
    import torch

    torch.set_num_threads(config.threads)
    is_ours = one["program"] != NANOGPT
    ids = torch.tensor(list(stream if is_ours else stream.translate(ids_of(vocabulary))))
    load = our_losses if is_ours else nanogpt_losses
    with torch.no_grad():
        for point in one["points"]:
            losses, context = load(config, Path(one["folder"]) / f"{point['step']:06d}")
            point["loss"] = mean_loss(losses, ids, min(WINDOW, context))
        last = one["points"][-1]["loss"]
        one["own_context"], one["own_loss"] = context, last if context <= WINDOW else mean_loss(losses, ids, context)


def ids_of(vocabulary):
    """The table of bytes.translate that makes ids of bytes: their places in the sorted vocabulary."""
    return bytes(max(vocabulary.find(byte), 0) for byte in range(256))


def our_losses(config, path):
    """(losses(ids, targets) -> (B, T) of a snapshot of ours, its context)."""
    from gpt.interop import load_model

    model = load_model(path)
    return model, model.config.block_size


def nanogpt_losses(config, path):
    import torch
    from programs import nanogpt_module

    kept = torch.load(path.with_suffix(".pt"), weights_only=True)
    module = nanogpt_module(config.nanogpt)
    with contextlib.redirect_stdout(None):  # it prints its size
        model = module.GPT(module.GPTConfig(**kept["model_args"])).eval()
    model.load_state_dict(kept["model"])

    def losses(ids, targets):
        logits, _ = model(ids, targets)
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")

    return losses, kept["model_args"]["block_size"]


def mean_loss(losses, ids, window):
    """Nats per target over all of `ids` (N,), whose N - 1 targets are read in windows that do not overlap; each begins
    with nothing before it, and the last may be shorter. losses(ids, targets) -> (B, T)."""
    targets = len(ids) - 1
    whole = targets // window * window
    read, wanted = ids[:whole].view(-1, window).split(ROWS), ids[1 : whole + 1].view(-1, window).split(ROWS)
    rest = [(ids[None, whole:-1], ids[None, whole + 1 :])] if whole < targets else []
    batches = [*zip(read, wanted, strict=True), *rest] if whole else rest
    return sum(losses(*batch).double().sum().item() for batch in batches) / targets


# ---- figures


def summary(runs, program, target):
    """Medians over the seeds, None for what most runs do not reach; ratios are to nanoGPT's run of the same seed."""
    peers = {one["seed"]: one for one in runs if one["program"] == NANOGPT}
    found = []
    for one in (one for one in runs if one["program"] == program):
        figures = {"wall": one["wall"], "final": one["points"][-1]["loss"], "own_loss": one["own_loss"]}
        figures |= {"kept_seconds": one["kept_seconds"], "to_target": first_at(one["points"], target)}
        if program != NANOGPT and one["seed"] in peers:
            peer = peers[one["seed"]]
            figures["to_peer_final"] = first_at(one["points"], peer["points"][-1]["loss"])
            figures["at_peer_wall"] = loss_at(one["points"], peer["wall"])
            figures["target_share"] = figures["to_target"] / peer["wall"]
            figures["peer_final_share"] = figures["to_peer_final"] / peer["wall"]
        found.append(figures)
    medians = {name: statistics.median(figures[name] for figures in found) for name in found[0]}
    return {name: value if math.isfinite(value) else None for name, value in medians.items()}


def first_at(points, loss):
    """Seconds at the first point with this loss or a lower one; infinity if there is none."""
    return next((point["seconds"] for point in points if point["loss"] <= loss), math.inf)


def loss_at(points, seconds):
    """The loss of the last point that is not later; infinity if there is none."""
    return next((point["loss"] for point in reversed(points) if point["seconds"] <= seconds), math.inf)


def print_summary(record):
    target = record["settings"]["target"]
    columns = {
        "final": "final loss",
        "own_loss": "own context",
        "wall": "wall, s",
        "to_target": f"s to {target}",
        "target_share": "/ nanoGPT's wall",
        "to_peer_final": "s to nanoGPT's final",
        "peer_final_share": "/ nanoGPT's wall",
        "at_peer_wall": "loss at nanoGPT's wall",
        "kept_seconds": "s keeping weights",
    }
    print(f"\nmedian of {record['settings']['seeds']}; nats per byte of the whole validation split\n")
    lines = [["program", *columns.values()]]
    for program, found in record["summary"].items():
        cells = ["" if name not in found else "never" if found[name] is None else cell(name, found) for name in columns]
        lines.append([program, *cells])
    print_columns(lines)
    print(json.dumps(record["machine"]))


def cell(name, found):
    digits = 3 if name in ("final", "own_loss", "at_peer_wall") else 2
    return f"{found[name]:.{digits}f}"


def plot(config, record):
    """The curves as a PNG; a note if there is no matplotlib."""
    if not config.plot:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        tell("no plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="wall time, s", ylabel="validation loss, nats per byte")
    for number, program in enumerate(record["summary"]):
        for one in (one for one in record["runs"] if one["program"] == program):
            seconds, losses = ([point[name] for point in one["points"]] for name in ("seconds", "loss"))
            label = program if one["seed"] == 0 else None
            axes.plot(seconds, losses, color=f"C{number}", label=label, marker=".", markersize=3, linewidth=1)
    axes.axhline(config.target, color="gray", linewidth=0.8, linestyle=":")
    last = [one["points"][-1]["loss"] for one in record["runs"]]
    axes.set_ylim(min(last) - 0.05, max(last) + 1)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(config.plot)
