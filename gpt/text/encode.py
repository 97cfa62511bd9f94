"""Text to ids: long documents cut where the tokenizer cuts anyway, batches, and worker processes. The ids do not depend
on the number of workers."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
from collections import deque
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from gpt.errors import InputError, ResourceError
from gpt.text.huggingface import pattern_name
from gpt.text.tokenizer import load_tokenizer

CHUNK_CHARACTERS = 1 << 16  # larger ones gain little speed, and memory that the allocator never gives back
# Where each pattern surely begins a new piece, whatever stands around. gpt2: no piece has white space after anything
# else. cl100k and o200k: the same for a space; a newline may follow punctuation in one piece, but nothing except more
# newlines (or "/") follows a newline.
CUTS = {
    "gpt2": re.compile(r"(?<=\S)(?=[ \n])"),
    "cl100k": re.compile(r"(?<=\S)(?= )|(?<=\n)(?=[^\W_])"),
    "o200k": re.compile(r"(?<=\S)(?= )|(?<=\n)(?=[^\W_])"),
}


class Unit(NamedTuple):
    """Text to be encoded by itself; `starts`: an end-of-text id goes before it."""

    split: str
    name: str
    text: str
    starts: bool


class Encoded(NamedTuple):
    """What a batch adds to one split."""

    ids: np.ndarray  # uint32 (tokens,)
    documents: int
    source_bytes: int


def units(parts, pattern, size=CHUNK_CHARACTERS):
    """The parts as Units of about `size` characters; encoding these gives the ids of encoding each document whole.

    A document without a sure place to cut, or of an unknown pattern, stays whole."""
    cuts = CUTS.get(pattern_name(pattern))
    held, length, starts, cut = [], 0, False, None  # cut: the last sure place in the joined `held`
    for part in parts:
        starts = starts or part.starts
        if cuts and not part.ends:
            place = last_cut(cuts, held[-1][-1:] if held else "", part.text)
            cut = cut if place is None else length + place
        held.append(part.text)
        length += len(part.text)
        if part.ends:
            yield Unit(part.split, part.name, "".join(held), starts)
            held, length, starts, cut = [], 0, False, None
        elif cut and length >= size:
            whole = "".join(held)
            yield Unit(part.split, part.name, whole[:cut], starts)
            held, length, starts, cut = [whole[cut:]], length - cut, False, None


def last_cut(cuts, before, text):
    """The last sure place in `text`, which follows the character `before`, or None; 0 is between the two. Searched from
    the end."""
    joint = before + text
    width = 1 << 10
    while True:
        start = max(0, len(joint) - width)
        places = [match.start() for match in cuts.finditer(joint, start + 1)]
        if places:
            return places[-1] - len(before)
        if start == 0:
            return None
        width <<= 4


def batches(units, size=CHUNK_CHARACTERS):
    """Lists of units with at least `size` characters together, the last one excepted."""
    batch, length = [], 0
    for unit in units:
        batch.append(unit)
        length += len(unit.text)
        if length >= size:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def encode_batch(tokenizer, batch):
    """Split -> Encoded of a list of units."""
    splits = sorted({unit.split for unit in batch})
    return {split: encode_units(tokenizer, [unit for unit in batch if unit.split == split]) for split in splits}


def encode_units(tokenizer, units):
    """Raises InputError naming the document that cannot be encoded."""
    ids = []
    for unit in units:
        if unit.starts:
            ids.append(tokenizer.eot)
        try:
            ids.extend(tokenizer.encode(unit.text))
        except InputError as error:
            raise InputError(f"{unit.name}: {error}") from None
    source_bytes = sum(len(unit.text.encode("utf-8")) for unit in units)
    return Encoded(np.array(ids, np.uint32), sum(unit.starts for unit in units), source_bytes)


# ---- workers


def encoded(batches, tokenizer, folder, workers):
    """What `encode_batch` makes of each batch, in order. Several workers load the tokenizer from `folder`; at most
    three batches per worker are under way. Raises ResourceError when a worker dies."""
    if workers == 1:
        yield from (encode_batch(tokenizer, batch) for batch in batches)
        return
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    under_way = deque()
    try:
        for batch in batches:
            under_way.append(submit(pool, str(folder), batch))
            if len(under_way) >= 3 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise ResourceError(
            f"a tokenizer worker died: one of {workers} (killed, or out of memory?); run again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def submit(pool, folder, batch):
    """Hand a batch to the pool. The first call starts the processes: they must not see the terminal's Ctrl-C, which the
    parent answers for all, not even before they have run a line."""
    with signals_ignored():
        return pool.submit(work, folder, batch)


@contextlib.contextmanager
def signals_ignored():
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def start_worker():
    """Runs first in a worker: leave Ctrl-C to the parent, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def work(folder, batch):
    return encode_batch(worker_tokenizer(folder), batch)


@functools.cache
def worker_tokenizer(folder):
    return load_tokenizer(folder)
