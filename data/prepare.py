"""Text to token shards:  python data/prepare.py INPUT… --out data/mine

INPUT is files (text, CSV, JSON, JSONL, Parquet, HTML, Word, compressed or in zip and tar archives), folders of them,
globs, or - for stdin; --corpus adds a built-in text. Records with prompts and completions, or with messages, become
examples: only their answers are learned.
The result is a folder of shards with its tokenizer and a manifest, which `train.py --data` reads. The same input and
options give the same bytes, whatever the number of workers."""

import codecs
import contextlib
import itertools
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

if "gpt" not in sys.modules:  # this script works also where `gpt` is not installed
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from gpt.config import fields, make_config, parse_flags, positional, refuse, unescaped
from gpt.errors import InputError, ResourceError, note, printable, run_main, say
from gpt.files import remove_tree
from gpt.text.encode import batches_of, encode_batches, units_of
from gpt.text.examples import MESSAGES, chat_template, encode_example, shown_example
from gpt.text.fit import tokenizer_for, validation_share
from gpt.text.gather import GatheredInput, gather_input, training_sample, with_validation_share
from gpt.text.shards import MANIFEST, TARGET, ShardWriter, write_manifest, writing
from gpt.text.sources import Reading
from gpt.text.split import Part
from gpt.text.tokenizer import Tokenizer, load_tokenizer, save_tokenizer

STAGING = "prepare.tmp"  # folder inside the output folder; holds the new files until all are complete
OURS = re.compile(r"prepare\.tmp|dataset\.json|tokenizer(_config)?\.json|(train|val)_\d{6}\.(bin|mask)")
OPTIONS = ("split_on", "encoding", "errors", "keep_crlf", "allow_special")  # they change the ids; see also the field
SHOWN = 5  # files that a note names
MANY_ENDS = 10  # from so many typed <|endoftext|> on, a note says that they are ordinary text
SMALL_BYTES = 5_000_000  # with less text, a vocabulary of 50,000 is too large


@dataclass(frozen=True)
class PrepareConfig:
    out: str
    """folder for the shards; an earlier dataset in it is replaced"""
    inputs: tuple[str, ...] = positional("INPUT…", default=())
    """files, folders, globs, or - for stdin; a document is a file, a record (of CSV, JSON, JSONL, Parquet), or stdin as
    a whole"""
    corpus: Literal["", "stdlib", "docstrings", "shakespeare"] = ""
    """built-in text: stdlib (this Python's own sources), docstrings (examples: of a docstring there, its function),
    shakespeare (1.1 MB, downloaded)"""
    url: str = ""
    """another address for the corpus shakespeare; the file must be the same"""
    tokenizer: str = "auto"
    """auto (by the size of the text: byte below 100 KB, else bpe:N; never a download), gpt2 or another tiktoken name,
    byte, bpe:N (N ids, or fewer, trained on this text), x.tiktoken, or a folder with one (data, run, checkpoint,
    Hugging Face)"""
    val: tuple[str, ...] = ()
    """files or folders to validate on, instead of a part of the input"""
    val_fraction: float = 0.05
    """share of the input to validate on, more by default if that is less than a context; 0 = no validation split"""
    val_split: Literal["auto", "hash", "tail"] = "auto"
    """hash: documents by their hash; tail: the end of the text; auto: hash for 100 documents or more of similar size"""
    field: str = ""
    """the field of each record that is its text, also as a path a.b (default: the fields of examples, prompt and
    completion or messages for instance, else text, content, body, …, else the only field of text)"""
    split_on: str = ""
    """what ends a document in a text file: lines, or a string such as "<|endoftext|>" (\\n is a line break)"""
    encoding: str = "auto"
    """encoding of the input; auto decides for each file: UTF-8 if it is valid, else UTF-16 or a guess, which is told"""
    errors: Literal["strict", "replace", "skip"] = "strict"
    """text that is not in that encoding: stop, replace it by U+FFFD, or skip the document; skip also skips records
    that cannot be read"""
    keep_crlf: bool = False
    """keep CRLF and CR; otherwise they become line breaks (LF)"""
    allow_special: bool = False
    """read special tokens in the text, such as <|endoftext|>, as tokens; else they are ordinary text"""
    chat_template: Literal["ours", "base"] = "ours"
    """how messages are laid out: as this program does it, or by the chat template of the --tokenizer folder"""
    workers: int = 0
    """threads; 0 = one per core"""
    shard_tokens: int = 100_000_000
    """ids per shard file"""
    dtype: Literal["auto", "uint16", "uint32"] = "auto"
    """how ids are stored; auto: uint16 where they fit"""
    preview: int = 0
    """show this many examples as they will be read, and what of them is learned"""

    def __post_init__(self) -> None:
        checks = [
            (self.inputs or self.corpus, "no input: give files or folders, or --corpus stdlib|docstrings|shakespeare"),
            ([*self.inputs, *self.val].count("-") <= 1, "- (stdin) can be read only once"),
            (not self.url or self.corpus == "shakespeare", "--url has an effect only with --corpus shakespeare"),
            (not self.val or self.val_split == "auto", "--val_split has no effect with --val; give one of them"),
            (0 <= self.val_fraction < 1, f"--val_fraction {self.val_fraction:g} must be at least 0 and below 1"),
            (0 <= self.workers <= 1024, f"--workers {self.workers} must be from 0 (all cores) to 1024"),
            (1 <= self.shard_tokens < 1 << 31, f"--shard_tokens {self.shard_tokens} must be from 1 to 2147483647"),
            (self.preview >= 0, f"--preview {self.preview} must be 0 or more"),
            (is_encoding(self.encoding), f"--encoding {self.encoding} is not known to Python; try utf-8 or latin-1"),
            (self.split_on != "lines" or not self.keep_crlf, "--keep_crlf has no effect with --split_on lines"),
        ]
        refuse([problem for fine, problem in checks if not fine])

    @property
    def reading(self) -> Reading:
        separator = "\n" if self.split_on == "lines" else unescaped(self.split_on)
        return Reading(self.encoding, self.errors, self.field, self.keep_crlf, separator)


def is_encoding(name: str) -> bool:
    if name == "auto":
        return True
    try:
        " ".encode(name)
        codecs.getincrementaldecoder(name)
    except (LookupError, ValueError):
        return False
    return True


def main() -> None:
    os.umask(os.umask(0o022) | 0o022)  # no other user may write to the new files
    flags = parse_flags(PrepareConfig, sys.argv[1:], __doc__)
    prepare(make_config(PrepareConfig, flags), flags)


def prepare(config: PrepareConfig, typed: Container[str] = ()) -> None:
    """Makes the data folder `config.out`. `typed` are the settings given as flags. Creates nothing before all of the
    input has been read and checked."""
    began = time.monotonic()
    out = check_out(Path(config.out))
    by_text = config.tokenizer == "auto" or config.tokenizer.startswith("bpe:")  # the input must be read first
    tokenizer = None if by_text else load_tokenizer(config.tokenizer)
    if tokenizer:
        choose_dtype(config.dtype, tokenizer)
    data, name = gather(config, typed, existing_parent(out))
    if config.preview and data.holds == "text":
        raise InputError(f"--preview {config.preview}: the input is plain text, all of which is learned; leave it out")
    with contextlib.suppress(BrokenPipeError):  # the dataset is made whoever reads
        if config.tokenizer == "auto":
            size = readable(data.survey.bytes)
            say(f"tokenizer: {name}, which suits {size} of text (to fine-tune a model, give its own: --tokenizer gpt2)")
        tell_encodings(data)
        say(f"validation: {data.split.reason}")
    tokenizer = tokenizer or load_tokenizer(name, training_sample(data))
    tokenizer = with_template_of(data, tokenizer, config.chat_template)
    dtype = choose_dtype(config.dtype, tokenizer)
    with contextlib.suppress(BrokenPipeError):
        show_examples(data, tokenizer, config.preview)
    with staging(out) as folder:
        splits = write_shards(config, data, tokenizer, dtype, folder)
        write_manifest(folder, tokenizer.manifest_entry, dtype, splits, source_of(config, typed, data))
        publish(folder, out)
    with lost_lines_warn(out):
        summarise(config, data, tokenizer, splits, time.monotonic() - began)


def gather(config: PrepareConfig, typed: Container[str], spool_folder: Path) -> tuple[GatheredInput, str]:
    """Returns the input after its first pass, and the name of its tokenizer. Unless the share to validate on is typed,
    it grows until it holds a context."""
    data = gather_input(
        config.inputs,
        config.val,
        config.corpus,
        config.url,
        config.reading,
        config.val_split,
        config.val_fraction,
        spool_folder,
    )
    name = tokenizer_for(data.survey.bytes) if config.tokenizer == "auto" else config.tokenizer
    share = validation_share(config.val_fraction, data.survey.characters, name)
    if share > config.val_fraction and "val_fraction" not in typed and not config.val:
        data = with_validation_share(data, config.val_split, share)
    return data, name


# ---- before anything is created


def check_out(out: Path) -> Path:
    """Returns `out`. Raises InputError unless `out` is a new or empty folder, or holds nothing but the files of an
    earlier run of this script."""
    if not out.exists():
        return out
    if not out.is_dir():
        raise InputError(f"--out {out}: a file; give a folder")
    names = sorted(path.name for path in out.iterdir())
    foreign = [name for name in names if not OURS.fullmatch(name) or (name != STAGING and (out / name).is_dir())]
    marks = {MANIFEST, STAGING} & set(names)
    if foreign or (names and not marks):
        raise InputError(f"--out {out}: holds other files ({(foreign or names)[0]}); give a new folder")
    return out


def existing_parent(path: Path) -> Path:
    """Returns the nearest folder above `path` that exists. Temporary files go there, onto the disk of the result."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def choose_dtype(asked: str, tokenizer: Tokenizer) -> str:
    largest = tokenizer.vocab_size - 1
    fits = largest <= np.iinfo(np.uint16).max
    if asked == "uint16" and not fits:
        raise InputError(f"token id {largest} does not fit uint16: tokenizer {tokenizer.name}; use --dtype uint32")
    if asked == "auto":
        return "uint16" if fits else "uint32"
    return asked


def with_template_of(data: GatheredInput, tokenizer: Tokenizer, choice: str) -> Tokenizer:
    """Returns the tokenizer with the chat template that lays out the data: none for data without messages; for messages
    this program's, or the tokenizer's own if `choice` is "base". Prints a note if this program's takes the place of
    another one. Raises InputError for "base" without messages or without a template."""
    own, ours = tokenizer.additions.chat_template, chat_template(tokenizer)
    if choice == "base":
        if data.holds != MESSAGES or not own:
            what = f"tokenizer {tokenizer.name} has none" if data.holds == MESSAGES else "the input has no messages"
            raise InputError(f"--chat_template base: {what}; leave it out")
        check_ends(data, tokenizer)
        return tokenizer
    if data.holds == MESSAGES and own not in ("", ours):
        note(
            "info",
            f"tokenizer {tokenizer.name} has another chat template; a model that learns these messages gets this "
            "program's instead (--chat_template base keeps it)",
        )
    return tokenizer.with_chat_template(ours if data.holds == MESSAGES else "")


def check_ends(data: GatheredInput, tokenizer: Tokenizer) -> None:
    """Warns if the first example teaches no token that ends a text: a model would write on after its answer."""
    first = next(part for part in data.parts() if part.turns)
    ids, mask = encode_part(first, tokenizer)
    if not np.isin(ids[(mask & TARGET) != 0], tokenizer.stops).any():
        note(
            "warning",
            f"the chat template of {tokenizer.name} ends an answer with no token that ends a text: a model that learns "
            "it writes on after its answers",
        )


def encode_part(part: Part, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids and the mask of an example. Raises InputError, which names its place in the input, for one that
    the chat template cannot lay out."""
    try:
        return encode_example(part.turns, tokenizer)
    except InputError as error:
        raise InputError(f"{part.name}: {error}") from None


def show_examples(data: GatheredInput, tokenizer: Tokenizer, count: int) -> None:
    """Prints the first `count` training examples as they will be read: in two colours on a terminal, else in words."""
    in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if count and in_colour:
        say("learned text is green, the rest is gray")
    for number, part in enumerate(itertools.islice((part for part in data.parts() if part.split == "train"), count), 1):
        ids, mask = encode_part(part, tokenizer)
        learned = int((mask & TARGET).sum())
        say(f"example {number}, {printable(part.name)}: {len(ids):,} tokens, {learned:,} of them learned")
        say(shown_example(ids, mask, tokenizer, in_colour))


# ---- writing


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Yields the empty folder STAGING inside `out`. At the end removes it, and the folders that were created for it if
    they are empty. If publishing was interrupted, STAGING stays: it marks `out` as unfinished."""
    folder = out / STAGING
    created = [path for path in (out, *out.parents) if not path.exists()]
    try:
        with writing(folder):
            remove_tree(folder)
            folder.mkdir(parents=True)
        yield folder
    finally:
        published = {path.name for path in out.glob("*") if OURS.fullmatch(path.name)} - {STAGING}
        if MANIFEST in published or not published:
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # rmdir fails at the first folder that is not empty
            for path in created:
                path.rmdir()


def write_shards(
    config: PrepareConfig, data: GatheredInput, tokenizer: Tokenizer, dtype: str, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Writes tokenizer and shards to `folder`. Returns split -> entries of its shards for the manifest. Raises
    InputError if the input has changed since it was gathered."""
    with writing(folder / "tokenizer.json"):
        save_tokenizer(tokenizer, folder)
    names = ("train",) if data.split.rule == "none" else ("train", "val")
    masks = data.holds != "text"
    writers = {split: ShardWriter(folder, split, dtype, config.shard_tokens, masks) for split in names}
    added = [*tokenizer.additions.ordinary, *(tokenizer.special_tokens if config.allow_special else ())]
    units = (unit for parts in (data.parts(), data.val_parts()) for unit in units_of(parts, tokenizer.pattern, added))
    results = encode_batches(batches_of(units), tokenizer, config.workers or cores(), config.allow_special)
    bar = tqdm(total=data.count("bytes"), unit="B", unit_scale=True, disable=None)
    try:
        with contextlib.closing(results), bar:
            for split, ids, documents, source_bytes, mask in results:
                writers[split].write(ids, documents, source_bytes, mask=mask)
                bar.update(source_bytes)
        splits = {split: writer.close() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.discard()
    entries = [entry for shards in splits.values() for entry in shards]
    written = total(entries, "documents"), total(entries, "source_bytes")
    if written != (data.count("documents"), data.count("bytes")):
        raise InputError("the input changed while it was being read; run again")
    return splits


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total(entries: list[dict[str, Any]], key: str) -> int:
    return sum(entry[key] for entry in entries)


def publish(folder: Path, out: Path) -> None:
    """Moves the files of the complete staging folder `folder` to `out`, in place of an earlier dataset. Removes the old
    manifest first and moves the new one last, so that a mixture of old and new files never has a manifest."""
    with writing(out / MANIFEST):
        for path in sorted(out.iterdir(), key=lambda path: path.name != MANIFEST):
            if path != folder and OURS.fullmatch(path.name):
                path.unlink()
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
            os.replace(path, out / path.name)


def source_of(config: PrepareConfig, typed: Container[str], data: GatheredInput) -> dict[str, Any]:
    """Returns the manifest's entry on the origin of the text: names of the inputs, counts, the options that change the
    result, and the words of the command line that prepares the same text again."""
    counts = ("documents", "characters", "bytes", "empty_docs", "undecodable", "replaced")
    return {
        "inputs": list(map(printable, config.inputs)),
        "val": list(map(printable, config.val)),
        **data.origin,
        **{name: data.count(name) for name in counts},
        **({"holds": data.holds, "duplicates": data.count("duplicates")} if data.holds != "text" else {}),
        "split": {"rule": data.split.rule, "fraction": data.split.fraction, "cut": data.split.cut},
        "overlap": {"files": data.survey.repeated, "hash": 0}.get(data.split.rule),  # documents in both splits, or None
        "options": {name: getattr(config, name) for name in OPTIONS} | {"field": ", ".join(data.fields())},
        "encodings": {printable(name): encoding for name, encoding in data.encodings().items()},  # where not UTF-8
        "lost": {printable(name): lost.counts for name, lost in data.lost().items()},
        "recipe": recipe_of(config, typed),
    }


def recipe_of(config: PrepareConfig, typed: Container[str]) -> list[str]:
    """Returns the words of the command line, without those that do not depend on the text: folder, tokenizer, its
    dtype, and workers."""
    words = [*config.inputs]
    for name, field in fields(PrepareConfig).items():
        value = getattr(config, name)
        if name in ("inputs", "out", "tokenizer", "dtype", "workers", "preview") or (
            value == field.default and name not in typed
        ):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}", *(value if isinstance(value, tuple) else [str(value)])]
    return list(map(printable, words))


def tell_encodings(data: GatheredInput) -> None:
    """Prints the encodings that --encoding auto found where they are not UTF-8; the manifest has all of them."""
    lines = [f"note: {printable(name)}: not UTF-8, read as {code}" for name, code in data.encodings().items()]
    if lines:
        more = f" (and {len(lines) - SHOWN:,} more files)" if len(lines) > SHOWN else ""
        say("\n".join(lines[:SHOWN]) + f"{more}; --encoding names another one")


@contextlib.contextmanager
def lost_lines_warn(out: Path) -> Iterator[None]:
    """Returns a context in which a full stdout is a warning: the dataset in `out` is complete, so it is no failure."""
    try:
        yield
    except ResourceError as error:
        note("warning", f"{out}: is complete, but its summary is lost: {error}")


def summarise(
    config: PrepareConfig, data: GatheredInput, tokenizer: Tokenizer, splits: dict[str, Any], seconds: float
) -> None:
    out, size = printable(config.out), readable(data.count("bytes"))
    what, empty = ("documents", "empty") if data.holds == "text" else ("examples", "with nothing to learn")
    say(
        f"{what}: {data.count('documents'):,} ({data.count('empty_docs'):,} {empty} and {data.count('undecodable'):,} "
        f"unreadable ones skipped, {data.count('replaced'):,} characters replaced)"
    )
    for split, entries in splits.items():
        tokens = total(entries, "tokens")
        say(f"{split}: {tokens:,} tokens, {total(entries, 'source_bytes') / tokens:.3f} bytes per token")
    for text in notes(data, config.allow_special):
        say(f"note: {text}")
    if data.survey.repeated:
        say(f"note: {data.survey.repeated:,} training documents are also validation documents")
    if data.count("bytes") < SMALL_BYTES and tokenizer.vocab_size > 50_000:
        say(
            f"note: {size} is little text for {tokenizer.vocab_size:,} ids, except to fine-tune a model that has them; "
            "--tokenizer auto gives a better new model"
        )
    say(f"{out}: {size} of text in {seconds:.1f} s")
    command, data_folder = train_command(sys.argv[0]), printable(shlex.quote(config.out))
    if data.holds == "text":
        say(f"next: {command} PRESET --data {data_folder}   (without PRESET it lists them)")
    else:
        say(f"next: {command} --init MODEL --data {data_folder}   (a model with this tokenizer, {tokenizer.name})")


def train_command(program: str) -> str:
    """Returns the training command beside `program`, the path of this script or the name of an installed command."""
    if not program.endswith(".py"):
        return "gpt train"
    return f"python {shlex.quote(os.path.normpath(os.path.join(os.path.dirname(program), '..', 'train.py')))}"


def notes(data: GatheredInput, allow_special: bool) -> Iterator[str]:
    """Yields what a user should know of the text: what it lost, and documents that may be many texts. With
    `allow_special`, a typed <|endoftext|> divides them."""
    lost = [f"{printable(name)} ({lost})" for name, lost in data.lost().items()]
    if lost and data.reading.errors != "strict":
        more = f" and {len(lost) - SHOWN:,} more files" if len(lost) > SHOWN else ""
        yield f"text was lost in {', '.join(lost[:SHOWN])}{more}"
    if data.holds != "text":
        yield from notes_on_examples(data)
    elif (ends := data.count("typed_ends")) >= MANY_ENDS and not allow_special:
        yield (
            f'the text spells <|endoftext|> {ends:,} times, which is ordinary text; --split_on "<|endoftext|>" makes '
            "documents of what stands between, --allow_special reads it as the token"
        )
    for name, lines in (data.survey.list_like, data.val_survey.list_like):
        if lines and data.count("typed_ends") < MANY_ENDS:
            yield f"{printable(name)}: {lines:,} short lines in one document; if each is a text, use --split_on lines"


def notes_on_examples(data: GatheredInput) -> Iterator[str]:
    """Yields what a user should know of examples."""
    if spaces := data.count("space_ends"):
        yield (
            f"{spaces:,} prompts end in a space; most tokenizers join a space to the word behind it, so let the "
            "completion begin with it"
        )
    if duplicates := data.count("duplicates"):
        yield f"{duplicates:,} examples equal an earlier one; they stay"
    if data.holds == MESSAGES and (ends := data.count("typed_ends")):
        yield (
            f"the messages spell <|endoftext|> {ends:,} times, which is ordinary text here; in other programs the chat "
            "template refuses such messages"
        )


def readable(count: int) -> str:
    """Returns a number of bytes in words: 1,234 -> "1.2 KB"."""
    return f"{count / 1e3:.1f} KB" if count < 1e6 else f"{count / 1e6:,.1f} MB"


if __name__ == "__main__":
    run_main(main)
