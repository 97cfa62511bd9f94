"""Write a model for other programs:

    python -m gpt.export out/mine my-model --license mit
    python -m gpt.export out/mine my-model --dtype bf16
    python -m gpt.export out/mine --gguf my-model.gguf

CHECKPOINT is any model that sample.py reads. DIR becomes a Hugging Face folder: weights, tokenizer with its chat
template, settings for generation and a model card (README.md), without what only training needs. --gguf writes a file
for llama.cpp. Whatever is written is read back and compared before it gets its name."""

import os
import re
import shlex
import sys
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from gpt.checkpoint.read import candidates, first_valid, load_folder, load_stored, open_model, verified
from gpt.checkpoint.weights import StoredModel, all_finite, weights_of
from gpt.checkpoint.write import make_durable, write_model, writing_failed
from gpt.config import make_config, parse_flags, positional, refuse
from gpt.errors import InputError, IntegrityError, note
from gpt.files import is_folder, remove_tree, sync_folder
from gpt.model import GPT
from gpt.report.card import card_body, facts_of, front_matter
from gpt.report.gguf_file import KINDS, check_gguf_target, check_range, llama_tokenizer, write_gguf
from gpt.text.tokenizer import Tokenizer, check_engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CARD = "README.md"


@dataclass(frozen=True)
class ExportConfig:
    checkpoint: str = positional("CHECKPOINT")
    """step folder, run folder (its best, else its newest), Hugging Face GPT-2 folder, hub name such as gpt2, PEFT's
    adapter, or nanoGPT's ckpt.pt"""
    dir: str = positional("DIR", default="")
    """new or empty folder for the model; may be left out with --gguf"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """type of the weights in DIR; auto: that of CHECKPOINT, which is fp32 for runs of this program and for what is
    merged. bf16 and fp16 halve the size and round the weights"""
    license: str = ""
    """licence for the model card, by the hub's identifier: mit, apache-2.0, cc-by-4.0, …; without it, unknown"""
    gguf: str = ""
    """file for llama.cpp, x.gguf (needs the extra [export]); a GGUF file in its place is replaced"""
    type: Literal["f16", "f32", "q8_0"] = "f16"
    """type of the matrices in --gguf; vectors and positions are f32. q8_0: 8 bits and a scale for every 32 weights of a
    row; rows of another length stay f16"""

    def __post_init__(self) -> None:
        rules = [
            (self.dir or self.gguf, "nothing to write: give DIR, or --gguf FILE, or both"),
            (not self.gguf or self.gguf.endswith(".gguf"), f"--gguf {self.gguf}: its name must end in .gguf"),
            (
                re.fullmatch(r"([a-z0-9][a-z0-9.+-]*)?", self.license),
                f"license {self.license!r} must be an identifier of the hub, in lower case: mit, apache-2.0, other, …",
            ),
        ]
        refuse([problem for is_fine, problem in rules if not is_fine])


@dataclass(frozen=True)
class Source:
    """A model to export."""

    stored: StoredModel
    model: GPT
    """in fp32"""
    tokenizer: Tokenizer
    generation: dict[str, Any]
    """the content of generation_config.json"""


def main() -> None:
    flags = parse_flags(ExportConfig, sys.argv[1:], __doc__)
    config = make_config(ExportConfig, flags)
    check_flags(config, flags)
    source = first_valid(lambda: candidates(config.checkpoint), load_source)
    if config.gguf:  # what cannot be written is refused before anything is created
        llama, kind = llama_tokenizer(source.tokenizer), KINDS[config.type]
        check_range(source.model, kind[0])
    if config.dir:
        dtype = DTYPES.get(config.dtype) or stored_dtype(source.stored)
        write_folder(Path(config.dir), source, dtype, card_of(config, source))
    if config.gguf:
        write_gguf(Path(config.gguf), source.model, source.tokenizer, llama, kind, config.license)


def check_flags(config: ExportConfig, flags: Container[str]) -> None:
    """Raises InputError, before anything is loaded, for a flag without effect, and for a target that cannot be
    written."""
    folder, file = Path(os.path.abspath(config.dir)), Path(os.path.abspath(config.gguf))
    rules = [
        ("type" in flags and not config.gguf, "--type is for --gguf; give both"),
        ("dtype" in flags and not config.dir, "--dtype is for DIR; --type is that of --gguf"),
        (config.dir and config.gguf and file in (folder, *folder.parents), "DIR is at or below --gguf; give another"),
    ]
    refuse([problem for applies, problem in rules if applies])
    if config.dir:
        check_folder_target(Path(config.dir))
    if config.gguf:
        check_gguf_target(Path(config.gguf), config.dir)


def check_folder_target(folder: Path) -> None:
    """Raises InputError unless `folder` can be a new folder, or is an empty one. A link is neither: it would be
    replaced, and not the folder that it leads to."""
    if folder.name in ("", ".."):
        raise InputError(f"{folder}: no name of a folder; give a new folder")
    if os.path.islink(folder):
        what = "a link"
    elif is_folder(folder):
        what = "holds other files" if any(folder.iterdir()) else ""
    else:
        what = "a file" if os.path.exists(folder) else ""
    if what:
        raise InputError(f"{folder}: {what}; give a new folder")


def load_source(path: Path) -> Source:
    """Returns the model at `path`, one of `candidates`, in fp32. Verifies a folder with a manifest first."""
    stored = open_model(verified(path))
    return Source(stored, *load_stored(stored))


def stored_dtype(stored: StoredModel) -> torch.dtype:
    """Returns the type of a model's weights on disk; fp32 if that is fp64, or if an adapter is merged into them."""
    dtype = next(iter(stored.read().values())).dtype
    return torch.float32 if stored.deltas or dtype == torch.float64 else dtype


def card_of(config: ExportConfig, source: Source) -> str:
    """Returns the model card; its title is the name of DIR."""
    facts = facts_of(source.stored.path, source.model.config, source.tokenizer, config.checkpoint)
    title = Path(os.path.abspath(config.dir)).name
    return front_matter(facts, config.license) + "\n" + card_body(facts, title)


def write_folder(target: Path, source: Source, dtype: torch.dtype, card: str) -> None:
    """Writes the folder `target`, whole or not at all. Raises InputError if a weight is too large for `dtype`,
    IntegrityError if the files do not read back as they were written, ResourceError if writing fails."""
    weights = weights_of(source.model, dtype)
    if not all(map(all_finite, weights.values())):
        raise InputError(f"{target}: a weight is too large for fp16; use --dtype bf16 or fp32")
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    size = sum(value.nbytes for value in weights.values())
    # Without do_sample in its file, transformers is greedy: a model from elsewhere stays so.
    generation = {"do_sample": False} | source.generation
    try:
        temporary.mkdir(parents=True)
        try:
            write_model(temporary, weights, source.model, source.tokenizer, generation)
            weights.clear()  # the check loads the model once more
            (temporary / CARD).write_text(card, encoding="utf-8", newline="\n")
            make_durable(temporary)
            check_folder(temporary, source, dtype)
            put_in_place(temporary, target)
        finally:
            remove_tree(temporary)
    except (OSError, SafetensorError) as error:
        raise writing_failed(target, error, needs=size) from None
    name = next(name for name, known in DTYPES.items() if known == dtype)
    note(
        "info",
        f"{target}: {size / 1e6:,.1f} MB of weights in {name}; to the hub: hf upload NAME {shlex.quote(str(target))}",
    )


def put_in_place(folder: Path, target: Path) -> None:
    """Renames a folder to `target`, which does not exist or is an empty folder."""
    if target.is_dir():
        target.rmdir()  # not every system renames onto a folder
    os.rename(folder, target)
    sync_folder(target.parent)


def check_folder(folder: Path, source: Source, dtype: torch.dtype) -> None:
    """Raises IntegrityError unless the files in `folder` read back as the model and tokenizer that were written."""
    model, tokenizer, _ = load_folder(folder, dtype=dtype)
    written = dict(model.named_parameters())
    for name, parameter in source.model.named_parameters():
        if not torch.equal(written[name], parameter.to(dtype)):
            raise IntegrityError(f"{folder}: {name} does not read back as it was written; try another disk")
    check_engine(tokenizer, (folder / "tokenizer.json").read_text(encoding="utf-8"))
