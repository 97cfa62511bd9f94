"""Run folders for tests of the report."""

import json

from gpt.config import to_toml
from gpt.report.metrics import read_histories

FAST = [  # evaluated every 20 steps of 100 tokens
    {"step": 0, "tokens": 0, "val_loss": 5.0},
    {"step": 10, "tokens": 1000, "loss": 4.0, "train_seconds": 10.0},
    {"step": 20, "tokens": 2000, "loss": 3.5, "train_seconds": 20.0, "val_loss": 3.6},
    {"step": 30, "tokens": 3000, "loss": 3.1, "train_seconds": 30.0},
    {"step": 40, "tokens": 4000, "loss": 3.0, "train_seconds": 41.5, "val_loss": 3.2},
    {"step": 60, "tokens": 6000, "loss": 2.9, "train_seconds": 1060.0, "val_loss": 3.3},
]


SLOW = [
    {"step": 0, "tokens": 0, "val_loss": 5.1},
    {"step": 10, "tokens": 2000, "loss": 4.2, "train_seconds": 30.0, "val_loss": 4.1},
    {"step": 20, "tokens": 4000, "loss": 3.6, "train_seconds": 61.5, "val_loss": 3.4},
]


def make_run(folder, records, **settings):
    """Makes a run folder with these metrics (records, or the bytes of the file) and settings; returns its path."""
    folder.mkdir(parents=True)
    text = records if isinstance(records, bytes) else "".join(json.dumps(r) + "\n" for r in records).encode()
    (folder / "metrics.jsonl").write_bytes(text)
    if settings:
        (folder / "config.toml").write_text("# a comment\n" + to_toml(settings), encoding="utf-8")
    return folder


def history_of(folder, records):
    """Returns the History of a new run folder with these metrics."""
    [history] = read_histories([make_run(folder, records)])
    return history
