"""For tests of shards: shards and datasets made on the spot, and training runs on them."""

import struct

import numpy as np
from training_helpers import train_here

from gpt.text.shards import ShardWriter, write_manifest

RECORD = {"name": "test", "identity": "0" * 64, "vocab_size": 50257, "eot": 50256}


def ids_of(count, below=50257, seed=0):
    return np.random.default_rng(seed).integers(0, below, count)


def write(folder, split="train", ids=None, dtype="uint16", shard_tokens=1000, pieces=1):
    """The manifest's entries of `ids` written in several pieces."""
    writer = ShardWriter(folder, split, dtype, shard_tokens)
    for piece in np.array_split(ids_of(2500) if ids is None else ids, pieces):
        writer.write(piece, documents=1, source_bytes=len(piece))
    return writer.close()


def dataset(folder, dtype="uint16", **splits):
    """A folder with a manifest; split name -> ids."""
    folder.mkdir(exist_ok=True)
    entries = {split: write(folder, split, ids, dtype) for split, ids in splits.items()}
    write_manifest(folder, RECORD, dtype, entries, {"inputs": []})
    return folder


def llm_c(path, ids, dtype="<u2", magic=20240520, version=1, tokens=None, order="<"):
    """A shard as llm.c's data scripts write it, made with struct alone."""
    count = len(ids) if tokens is None else tokens
    header = struct.pack(f"{order}3i", magic, version, count) + bytes(253 * 4)
    path.write_bytes(header + np.asarray(ids).astype(dtype).tobytes())
    return path


def run_tiny(data, *flags):
    """A training run on `data` in its folder's neighbour `out`."""
    return train_here(
        "tiny", "--data", data, "--out", data.parent / "out", "--threads", "1", "--warmup_steps", "0", *flags
    )


def refused(data, *flags):
    """Code and last line of a training run that must fail and create nothing."""
    out = data.parent / "out"
    run = run_tiny(data, *flags)
    assert not out.exists()
    assert "Traceback" not in run.stderr
    return run.code, run.last
