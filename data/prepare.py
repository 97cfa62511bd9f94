"""Text to token shards:  python data/prepare.py INPUT… --out data/mine

INPUT is files, folders (their .txt .md .py .jsonl, .gz too), globs, or - for stdin; --corpus adds a built-in text.
The result is a folder of shards with its tokenizer and a manifest, which `train.py --data` reads. The same input and
options give the same bytes, whatever the number of workers."""

import codecs
import contextlib
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

if "gpt" not in sys.modules:  # this script works also where `gpt` is not installed
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from gpt.config import make_config, parse_flags, positional, refuse
from gpt.errors import InputError, printable, run_main, say
from gpt.text.encode import batches, encoded, units
from gpt.text.gather import gather, training_sample
from gpt.text.shards import MANIFEST, ShardWriter, write_manifest, writing
from gpt.text.sources import Reading
from gpt.text.tokenizer import load_tokenizer, save_tokenizer

STAGING = "prepare.tmp"  # inside the output folder until everything in it is complete
OURS = re.compile(r"prepare\.tmp|dataset\.json|tokenizer(_config)?\.json|(train|val)_\d{6}\.bin")
SMALL_BYTES = 5_000_000  # of text, for which a vocabulary of 50,000 is too large


@dataclass(frozen=True)
class PrepareConfig:
    out: str
    """folder for the shards; an earlier dataset in it is replaced"""
    inputs: tuple[str, ...] = positional("INPUT…", default=())
    """files, folders, globs, or - for stdin; a document is a file, a line of JSONL, or stdin as a whole"""
    corpus: Literal["", "stdlib", "shakespeare"] = ""
    """built-in text: stdlib (this Python's own sources), shakespeare (1.1 MB, downloaded)"""
    url: str = ""
    """another address for the corpus shakespeare; the file must be the same"""
    tokenizer: str = "gpt2"
    """gpt2 or another tiktoken name, byte, bpe:N (N ids trained on this text), x.tiktoken, or a folder with one (data,
    run, checkpoint, Hugging Face)"""
    val: tuple[str, ...] = ()
    """files or folders to validate on, instead of a part of the input"""
    val_fraction: float = 0.05
    """share of the input to validate on; 0 = no validation split"""
    val_split: Literal["auto", "hash", "tail"] = "auto"
    """hash: documents by their hash; tail: the end of the text; auto: hash for 100 documents or more of similar size"""
    field: str = "text"
    """the string of each JSONL object that is its text"""
    encoding: str = "utf-8"
    """encoding of the input"""
    errors: Literal["strict", "replace", "skip"] = "strict"
    """text that is not in that encoding: stop, replace it by U+FFFD, or skip the document"""
    workers: int = 0
    """processes; 0 = one per core; Windows takes at most 61"""
    shard_tokens: int = 100_000_000
    """ids per shard file"""
    dtype: Literal["auto", "uint16", "uint32"] = "auto"
    """how ids are stored; auto: uint16 where they fit"""

    def __post_init__(self):
        problems = []
        if not self.inputs and not self.corpus:
            problems.append("no input: give files or folders, or a built-in text with --corpus stdlib|shakespeare")
        if [*self.inputs, *self.val].count("-") > 1:
            problems.append("- (stdin) can be read only once")
        if self.url and self.corpus != "shakespeare":
            problems.append("--url has an effect only with --corpus shakespeare")
        if self.val and self.val_split != "auto":
            problems.append("--val names the validation text, so --val_split has no effect; give one of them")
        if not 0 <= self.val_fraction < 1:
            problems.append(f"--val_fraction {self.val_fraction:g} must be at least 0 and below 1")
        if not 0 <= self.workers <= 1024:
            problems.append(f"--workers {self.workers} must be from 0 (all cores) to 1024")
        if not 1 <= self.shard_tokens < 1 << 31:
            problems.append(f"--shard_tokens {self.shard_tokens} must be from 1 to 2147483647")
        try:
            " ".encode(self.encoding)
            codecs.getincrementaldecoder(self.encoding)
        except (LookupError, ValueError):
            problems.append(f"--encoding {self.encoding} is not known to Python; utf-8 and latin-1 are common")
        refuse(problems)

    @property
    def reading(self):
        return Reading(self.encoding, self.errors, self.field)


def main():
    os.umask(os.umask(0o022) | 0o022)  # nothing we write is for others to change
    prepare(make_config(PrepareConfig, parse_flags(PrepareConfig, sys.argv[1:], __doc__)))


def prepare(config):
    """Make the data folder `config.out`. Nothing is created before all of the input has been read and found good."""
    began = time.monotonic()
    out = check_out(Path(config.out))
    tokenizer = None if config.tokenizer.startswith("bpe:") else load_tokenizer(config.tokenizer)
    if tokenizer:
        choose_dtype(config.dtype, tokenizer)
    corpus = gather(config, spool_folder=existing_parent(out))
    if tokenizer is None:
        tokenizer = load_tokenizer(config.tokenizer, training_sample(corpus))
    dtype = choose_dtype(config.dtype, tokenizer)
    say(f"validation: {corpus.split.reason}")
    with staging(out) as folder:
        splits = write_shards(config, corpus, tokenizer, dtype, folder)
        write_manifest(folder, tokenizer.record, dtype, splits, source_of(config, corpus))
        publish(folder, out)
    summarise(config, corpus, tokenizer, splits, time.monotonic() - began)


# ---- before anything is created


def check_out(out):
    """`out`, if shards can go there: a new or empty folder, or one with an earlier dataset. Raises InputError else."""
    if not out.exists():
        return out
    if not out.is_dir():
        raise InputError(f"--out {out}: a file; give a folder")
    names = sorted(path.name for path in out.iterdir())
    foreign = [name for name in names if not OURS.fullmatch(name)]
    begun = {MANIFEST, STAGING} & set(names)
    if foreign or (names and not begun):
        raise InputError(f"--out {out}: holds other files ({(foreign or names)[0]}); give a new folder")
    return out


def existing_parent(path):
    """The nearest folder above `path` that exists: temporary files lie there, beside the result."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def choose_dtype(asked, tokenizer):
    largest = tokenizer.vocab_size - 1
    if asked == "uint16" and largest > np.iinfo(np.uint16).max:
        raise InputError(f"token id {largest} does not fit uint16: tokenizer {tokenizer.name}; use --dtype uint32")
    if asked == "auto":
        return "uint16" if largest <= np.iinfo(np.uint16).max else "uint32"
    return asked


# ---- writing


@contextlib.contextmanager
def staging(out):
    """An empty folder inside `out` to write in. Removed at the end, together with the folders that were made for it and
    have stayed empty; where publishing was cut short it stays, as the sign that `out` is unfinished."""
    folder = out / STAGING
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        make_empty(folder)
        yield folder
    finally:
        others = {path.name for path in out.glob("*") if OURS.fullmatch(path.name)} - {STAGING}
        if MANIFEST in others or not others:
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # of the first that is not empty
            for path in made:
                path.rmdir()


def make_empty(folder):
    with writing(folder):
        if os.path.lexists(folder):
            remove(folder)
        folder.mkdir(parents=True)


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_shards(config, corpus, tokenizer, dtype, folder):
    """Write tokenizer and shards to `folder`; returns split -> the manifest's entries."""
    with writing(folder / "tokenizer.json"):
        save_tokenizer(tokenizer, folder)
    names = ("train",) if corpus.split.rule == "none" else ("train", "val")
    writers = {split: ShardWriter(folder, split, dtype, config.shard_tokens) for split in names}
    work = batches(units(corpus.all_parts(), tokenizer.pattern))
    results = encoded(work, tokenizer, folder, worker_count(config.workers, corpus))
    total = corpus.survey.bytes + corpus.val_survey.bytes
    try:
        with contextlib.closing(results), tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
            for result in results:
                for split, (ids, documents, source_bytes) in result.items():
                    writers[split].write(ids, documents, source_bytes)
                    bar.update(source_bytes)
        splits = {split: writer.close() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.discard()
    check_complete(splits, corpus, total)
    return splits


def worker_count(asked, corpus):
    """How many processes: those asked for, else as many as are worth their start, one per core and per 4 MiB of text;
    on Windows, which cannot wait for more, at most 61."""
    count = asked or max(1, min(cores(), (corpus.survey.bytes + corpus.val_survey.bytes) >> 22))
    return min(count, 61) if sys.platform == "win32" else count


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_complete(splits, corpus, total):
    entries = [entry for shards in splits.values() for entry in shards]
    documents = sum(entry["documents"] for entry in entries)
    if documents != corpus.survey.documents + corpus.val_survey.documents or total != tally(entries, "source_bytes"):
        raise InputError("the input changed while it was being read; run again")


def tally(entries, key):
    return sum(entry[key] for entry in entries)


def publish(folder, out):
    """Put what is in the staging folder, complete by now, in the place of an earlier dataset, whose manifest goes first
    as the new one comes last: no mixture of the two ever looks valid."""
    with writing(out / MANIFEST):
        for path in sorted(out.iterdir(), key=lambda path: path.name != MANIFEST):
            if path != folder and OURS.fullmatch(path.name):
                remove(path)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
            os.replace(path, out / path.name)


def source_of(config, corpus):
    """What the manifest says of the text's origin: names, counts and the options that shape the result."""
    counts = {
        key: getattr(corpus.survey, key) + getattr(corpus.val_survey, key)
        for key in ("documents", "characters", "bytes", "empty_docs", "undecodable", "replaced")
    }
    split = {"rule": corpus.split.rule, "fraction": corpus.split.fraction, "cut": corpus.split.cut}
    overlap = {"files": corpus.survey.repeated, "hash": 0}.get(corpus.split.rule)  # documents in both splits
    options = {"field": config.field, "encoding": config.encoding, "errors": config.errors}
    names = {"inputs": list(map(printable, config.inputs)), "val": list(map(printable, config.val))}
    return names | corpus.said | counts | {"split": split, "overlap": overlap, "options": options}


def summarise(config, corpus, tokenizer, splits, seconds):
    counts, out = source_of(config, corpus), printable(config.out)
    say(
        f"documents: {counts['documents']:,} ({counts['empty_docs']:,} empty and {counts['undecodable']:,} undecodable "
        f"ones skipped, {counts['replaced']:,} characters replaced)"
    )
    for split, entries in splits.items():
        tokens = tally(entries, "tokens")
        say(f"{split}: {tokens:,} tokens, {tally(entries, 'source_bytes') / tokens:.3f} bytes per token")
    if corpus.survey.repeated:
        say(f"note: {corpus.survey.repeated:,} training documents are also validation documents")
    if counts["bytes"] < SMALL_BYTES and tokenizer.vocab_size > 50_000:
        say(
            f"note: {counts['bytes'] / 1e6:.1f} MB is little text for {tokenizer.vocab_size:,} ids; "
            "--tokenizer bpe:2048 or byte gives a better model"
        )
    say(f"{out}: {counts['bytes'] / 1e6:,.1f} MB of text in {seconds:.1f} s")
    say(f"next: python train.py PRESET --data {out}   (without PRESET it lists them)")


if __name__ == "__main__":
    run_main(main)
