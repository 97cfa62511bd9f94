"""Text to ids, in batches and several threads. The ids do not depend on the number of threads.

A long document is cut into chunks, so that memory stays small, where the tokenizer's pattern begins a new piece anyway.
Tokens never cross pieces, so the ids of the chunks are those of the whole. In GPT-2's pattern a space joins the piece
of the word behind it, and only white space can stand before a space or a newline in one piece:

    the document             "to be, or\\n  not"
    pieces of the pattern    "to" " be" "," " or" "\\n " " not"
    sure places              "to| be,| or|\\n  not"     before a space or newline, behind anything but white space

A cut right after "\\n" would be wrong: the piece there is "\\n "."""

import itertools
import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from gpt.errors import InputError
from gpt.text.examples import Turns, encode_example
from gpt.text.huggingface import pattern_name
from gpt.text.split import Part
from gpt.text.tokenizer import Tokenizer

CHUNK_CHARACTERS = 1 << 16  # larger chunks gain little speed, and take memory that the allocator never returns
# Text up to its last sure place. cl100k and o200k: before a space as in gpt2; a newline may follow punctuation in one
# piece, but nothing except more newlines (or "/") follows a newline.
UP_TO_CUT = {
    "gpt2": re.compile(r"(?s:.*)(?<=\S)(?=[ \n])"),
    "cl100k": re.compile(r"(?s:.*)(?:(?<=\S)(?= )|(?<=\n)(?=[^\W_]))"),
    "o200k": re.compile(r"(?s:.*)(?:(?<=\S)(?= )|(?<=\n)(?=[^\W_]))"),
}


class Unit(NamedTuple):
    """Text to be encoded by itself. If it `starts` a document, an end-of-text id goes before it. If there are `turns`,
    it is an example."""

    split: str
    name: str
    text: str
    starts: bool
    turns: Turns = ()


class Encoded(NamedTuple):
    """The ids that a batch adds to a split, the documents that begin in them, and the bytes of text that they stand
    for. Examples have a mask: see gpt/text/examples.py."""

    split: str
    ids: np.ndarray  # uint32 (tokens,)
    documents: int
    source_bytes: int
    mask: np.ndarray | None = None  # uint8 (tokens,)


def units_of(
    parts: Iterable[Part], pattern: str, added: Iterable[str] = (), size: int = CHUNK_CHARACTERS
) -> Iterator[Unit]:
    """Yields `parts` as Units of about `size` characters. Encoding the Units gives the ids of encoding each document
    whole, or each side of a document that the split divides. `added`: the added tokens that a text may become.

    A document stays whole if it has no sure place to cut, if its pattern is unknown, or if a cut could divide an added
    token."""
    up_to_cut, previous = UP_TO_CUT.get(pattern_name(pattern) or ""), None
    if up_to_cut and any(map(up_to_cut.match, added)):
        up_to_cut = None
    for (split, document, name, turns), stretch in itertools.groupby(parts, key=lambda part: (*part[:3], part.turns)):
        starts = document != previous
        if turns:
            yield Unit(split, name, "".join(part.text for part in stretch), starts, turns)
            continue
        for text in chunks_of((part.text for part in stretch), up_to_cut, size):
            yield Unit(split, name, text, starts)
            starts = False
        previous = document


def chunks_of(texts: Iterable[str], up_to_cut: re.Pattern[str] | None, size: int) -> Iterator[str]:
    """Yields the joined `texts` in chunks of about `size` characters. The last text is not cut: nothing follows it that
    would need the memory."""
    chunk = ""
    for text, following in itertools.pairwise(itertools.chain(texts, [""])):
        start = len(chunk)
        chunk += text
        if up_to_cut and following and len(chunk) >= size and (match := up_to_cut.match(chunk, start)):
            yield chunk[: match.end()]
            chunk = chunk[match.end() :]
    yield chunk


def batches_of(units: Iterable[Unit], size: int = CHUNK_CHARACTERS) -> Iterator[list[Unit]]:
    """Yields lists of units with at least `size` characters together; only the last list may have fewer."""
    batch: list[Unit] = []
    length = 0
    for unit in units:
        batch.append(unit)
        length += len(unit.text)
        if length >= size:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def encode_batches(
    batches: Iterable[list[Unit]], tokenizer: Tokenizer, workers: int, allow_special: bool = False
) -> Generator[Encoded, None, None]:
    """Yields the Encoded of each batch and split, in order, from `workers` threads. At most three batches per thread
    are under way. Threads are enough: tiktoken releases Python's lock while it encodes. `allow_special`: see
    Tokenizer.encode."""
    pool = ThreadPoolExecutor(workers)
    under_way: deque[Future[list[Encoded]]] = deque()
    try:
        for batch in batches:
            under_way.append(pool.submit(encode_batch, tokenizer, batch, allow_special))
            if len(under_way) >= 3 * workers:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure, do not encode what is still queued


def encode_batch(tokenizer: Tokenizer, batch: list[Unit], allow_special: bool) -> list[Encoded]:
    """Returns the Encoded of a batch for each split that it holds."""
    splits = sorted({unit.split for unit in batch})
    units = {split: [unit for unit in batch if unit.split == split] for split in splits}
    return [encode_units(tokenizer, split, units[split], allow_special) for split in splits]


def encode_units(tokenizer: Tokenizer, split: str, units: list[Unit], allow_special: bool) -> Encoded:
    """Returns the Encoded of units of one split. If a document cannot be encoded, raises InputError, which names it."""
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for unit in units:
        try:
            if unit.turns:
                example, mask = encode_example(unit.turns, tokenizer)
                ids.append(example)
                masks.append(mask)
                continue
            if unit.starts:
                ids.append(np.array([tokenizer.eot], np.uint32))
            ids.append(tokenizer.encode_to_numpy(unit.text, allow_special))
        except InputError as error:
            raise InputError(f"{unit.name}: {error}") from None
    source_bytes = sum(len(unit.text.encode("utf-8")) for unit in units)
    documents, whole_mask = sum(unit.starts for unit in units), np.concatenate(masks) if masks else None
    return Encoded(split, np.concatenate(ids), documents, source_bytes, whole_mask)
