"""Measures what whole examples in batches save: a step over examples that are sorted by length and padded to the next
multiple of 64 tokens, against the same step with every example padded to the context.

    python benchmarks/padding.py --n_layer 4 --n_embd 192 --json padding.json

The data are 1,000 examples of random ids, 20 to 400 tokens long, of which the second half is learned. Both ways take
the same examples in turn, a step of 16 with forward pass, backward pass and AdamW; each round begins with the other
one. Figures are tokens that count (no padding) per second."""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import project  # noqa: F401 (makes gpt importable)
import torch
from machine import open_record
from report import print_columns, reporting

from gpt.loss import inputs_and_targets
from gpt.model import GPT, ModelConfig
from gpt.text.example_stream import ExampleStream
from gpt.text.reader import TokenReader, read_masks
from gpt.text.shards import FIRST, TARGET, ShardWriter, open_dataset, write_manifest
from gpt.text.tokenizer import load_tokenizer, save_tokenizer
from gpt.train.optim import OptimConfig, make_optimizer

CONTEXT, EXAMPLES, BATCH = 512, 1000, 16
WAYS = {"multiples of 64": 64, f"the context, {CONTEXT}": CONTEXT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_layer", type=int, default=4)
    parser.add_argument("--n_embd", type=int, default=192)
    parser.add_argument("--micro_batch_size", type=int, default=4, help="examples in a forward pass")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    config = parser.parse_args(sys.argv[1:])
    record = open_record(config, "cpu", results=[])
    with reporting(config, record, print_table) as save, tempfile.TemporaryDirectory() as folder:
        write_examples(Path(folder))
        measure(config, {way: stream_of(Path(folder), padding) for way, padding in WAYS.items()}, record, save)


def write_examples(folder: Path) -> None:
    """Writes the random examples as shards into `folder`."""
    numbers, tokenizer = np.random.default_rng(0), load_tokenizer("byte")
    writer = ShardWriter(folder, "train", "uint16", 1 << 20, masks=True)
    for length in numbers.integers(20, 401, EXAMPLES):
        mask = np.where(np.arange(length) < length // 2, 0, TARGET).astype(np.uint8)
        mask[0] |= FIRST
        writer.write(numbers.integers(0, 256, length), documents=1, source_bytes=int(length), mask=mask)
    save_tokenizer(tokenizer, folder)
    write_manifest(folder, tokenizer.manifest_entry, "uint16", {"train": writer.close(), "val": []}, {"inputs": []})


def stream_of(folder: Path, padding: int) -> ExampleStream:
    """Returns the stream of the examples in `folder`, padded to multiples of `padding` tokens."""
    shards = open_dataset(folder).splits["train"]
    return ExampleStream("train", TokenReader(shards, 257), read_masks(shards), CONTEXT, seed=1, padding=padding)


def measure(config, streams, record, save):
    """Takes the rounds, and adds the speeds of each to the record."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(config.n_layer, max(1, config.n_embd // 64), config.n_embd, CONTEXT), 257)
    optimizer = make_optimizer(model, OptimConfig())
    for number in range(-1, config.rounds):  # the first round is not counted
        speeds, first = {}, (number + 1) * BATCH
        for way in list(streams)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            take_step(model, optimizer, streams[way].share(first, BATCH, 0, 1, config.micro_batch_size))
            speeds[way] = streams[way].tokens(first, BATCH) / (time.perf_counter() - started)
        if number >= 0:
            record["results"].append(speeds)
            save()


def take_step(model, optimizer, micro_batches):
    for part in micro_batches:
        model(*inputs_and_targets(torch.from_numpy(part))).sum().backward()
    optimizer.step(torch.zeros(()))  # no gradient is infinite
    optimizer.zero_grad()


def print_table(record) -> None:
    if not (results := record["results"]):
        return
    rows = [[f"padded to {way}", f"{statistics.median(r[way] for r in results):,.0f}"] for way in WAYS]
    short, whole = WAYS
    ratio = [r[short] / r[whole] for r in results]
    print_columns([["examples", "tokens/s that count"], *rows])
    print(f"ratio {statistics.median(ratio):.2f} ({min(ratio):.2f}-{max(ratio):.2f})")


if __name__ == "__main__":
    main()
