"""Scores the snapshots of learning_curve.py on the whole validation split; its figures, table and plot."""

import contextlib
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from report import print_columns, tell

NANOGPT = "nanogpt"  # name among the programs
WINDOW = 64  # bytes of a window in which snapshots are scored
ROWS = 64  # windows scored side by side


def score(config, run: dict, stream: bytes, vocabulary: bytes | None) -> None:
    """Adds to each point of a run its loss over the bytes `stream`, and to the run the loss of its last weights in
    windows of the model's own context. `vocabulary` is nanoGPT's."""
    import torch

    torch.set_num_threads(config.threads)
    is_ours = run["program"] != NANOGPT
    ids = torch.tensor(list(stream if is_ours else stream.translate(ids_of(vocabulary))))
    load = our_losses if is_ours else nanogpt_losses
    with torch.no_grad():
        for point in run["points"]:
            losses, context = load(config, Path(run["folder"]) / f"{point['step']:06d}")
            point["loss"] = mean_loss(losses, ids, min(WINDOW, context))
        last = run["points"][-1]["loss"]
        run["own_context"], run["own_loss"] = context, last if context <= WINDOW else mean_loss(losses, ids, context)


def ids_of(vocabulary: bytes) -> bytes:
    """Returns the table for bytes.translate that maps bytes to ids: their places in the sorted vocabulary."""
    return bytes(max(vocabulary.find(byte), 0) for byte in range(256))


def our_losses(config, path: Path) -> tuple[Callable, int]:
    """Returns (losses(ids, targets) -> (B, T), context) of a snapshot of ours."""
    from gpt.checkpoint.weights import load_model, open_folder

    model = load_model(open_folder(path))
    return model, model.config.block_size


def nanogpt_losses(config, path: Path) -> tuple[Callable, int]:
    """Returns (losses(ids, targets) -> (B, T), context) of a snapshot of nanoGPT."""
    import torch
    from programs import nanogpt_module

    snapshot = torch.load(path.with_suffix(".pt"), weights_only=True)
    module = nanogpt_module(config.nanogpt)
    with contextlib.redirect_stdout(None):  # the model prints its size
        model = module.GPT(module.GPTConfig(**snapshot["model_args"])).eval()
    model.load_state_dict(snapshot["model"])

    def losses(ids, targets):
        logits, _ = model(ids, targets)
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")

    return losses, snapshot["model_args"]["block_size"]


def mean_loss(losses: Callable, ids, window: int) -> float:
    """Returns nats per target over all N - 1 targets of `ids` (N,), read in windows that do not overlap. A window sees
    nothing of the one before; the last one may be shorter. losses(ids, targets) -> (B, T)."""
    targets = len(ids) - 1
    whole = targets // window * window
    read, wanted = ids[:whole].view(-1, window).split(ROWS), ids[1 : whole + 1].view(-1, window).split(ROWS)
    rest = [(ids[None, whole:-1], ids[None, whole + 1 :])] if whole < targets else []
    batches = [*zip(read, wanted, strict=True), *rest] if whole else rest
    return sum(losses(*batch).double().sum().item() for batch in batches) / targets


# ---- figures


def summaries(runs: list[dict], programs: list[str], target: float) -> dict:
    """Returns the `summary` of each program that has run."""
    return {name: summary(runs, name, target) for name in programs if any(run["program"] == name for run in runs)}


def summary(runs: list[dict], program: str, target: float) -> dict:
    """Returns a program's medians over the seeds so far; None for a loss that most runs do not reach. Ratios are to
    nanoGPT's run with the same seed."""
    peers = {run["seed"]: run for run in runs if run["program"] == NANOGPT}
    by_seed = [figures_of(run, peers.get(run["seed"]), target) for run in runs if run["program"] == program]
    medians = {name: statistics.median(each[name] for each in by_seed if name in each) for name in by_seed[0]}
    return {name: value if math.isfinite(value) else None for name, value in medians.items()}


def figures_of(run: dict, peer: dict | None, target: float) -> dict:
    """Returns the figures of one run: seconds, losses, and comparisons with nanoGPT's run `peer`, if there is one."""
    points = run["points"]
    figures = {"wall": run["wall"], "final": points[-1]["loss"], "own_loss": run["own_loss"]}
    figures |= {"kept_seconds": run["kept_seconds"], "to_target": first_at(points, target)}
    if peer is not None and peer is not run:
        figures["to_peer_final"] = first_at(points, peer["points"][-1]["loss"])
        figures["at_peer_wall"] = loss_at(points, peer["wall"])
        figures["target_share"] = figures["to_target"] / peer["wall"]
        figures["peer_final_share"] = figures["to_peer_final"] / peer["wall"]
    return figures


def first_at(points: list[dict], loss: float) -> float:
    """Returns the seconds at the first point with this loss or a lower one; infinity if no point has it."""
    return next((point["seconds"] for point in points if point["loss"] <= loss), math.inf)


def loss_at(points: list[dict], seconds: float) -> float:
    """Returns the loss of the last point at or before `seconds`; infinity if no point is that early."""
    return next((point["loss"] for point in reversed(points) if point["seconds"] <= seconds), math.inf)


def print_summary(record: dict) -> None:
    """Prints one line of medians for each program."""
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
    print(f"\nmedians of {len(record['runs'])} runs; nats per byte of the whole validation split\n")
    lines = [["program", *columns.values()]]
    for program, figures in record["summary"].items():
        lines.append([program, *(cell(name, figures) for name in columns)])
    print_columns(lines)


def cell(name: str, figures: dict) -> str:
    """Returns a figure as text: "never" for a loss that was not reached, "" for a figure that does not apply."""
    if name not in figures:
        return ""
    if figures[name] is None:
        return "never"
    digits = 3 if name in ("final", "own_loss", "at_peer_wall") else 2
    return f"{figures[name]:.{digits}f}"


def plot(config, record: dict) -> None:
    """Draws the curves into the PNG file --plot; without matplotlib it prints a note."""
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
        for run in (run for run in record["runs"] if run["program"] == program):
            seconds, losses = ([point[name] for point in run["points"]] for name in ("seconds", "loss"))
            label = program if run["seed"] == 0 else None
            axes.plot(seconds, losses, color=f"C{number}", label=label, marker=".", markersize=3, linewidth=1)
    axes.axhline(config.target, color="gray", linewidth=0.8, linestyle=":")
    last = [run["points"][-1]["loss"] for run in record["runs"]]
    axes.set_ylim(min(last) - 0.05, max(last) + 1)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(config.plot)
