"""Gathers the input of data/prepare.py: reads all of it once, counts and checks it, and decides how to split it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.errors import InputError
from gpt.text.corpora import SHAKESPEARE, shakespeare, standard_library
from gpt.text.sources import Reading, TextSource, find_sources, read_pieces
from gpt.text.split import Part, Split, Survey, choose_split, chosen_by_hash, divide, survey_documents

TRAINING_BYTES = 1 << 26  # bytes of text that a bpe:N tokenizer is trained on


@dataclass(frozen=True)
class GatheredInput:
    """The input after the first pass: its sources, their counts, and how they are split."""

    reading: Reading
    sources: list[TextSource]
    val_sources: list[TextSource]
    survey: Survey
    val_survey: Survey
    split: Split
    origin: dict[str, Any]  # for the manifest: the built-in corpus, and how many files were passed over

    def parts(self) -> Iterator[Part]:
        """Yields the parts of the input, for both splits; if --val gives files, for training alone."""
        return divide(read_pieces(self.sources, self.reading), self.split, self.survey)

    def val_parts(self) -> Iterator[Part]:
        """Yields the parts of the files given with --val."""
        for part in divide(read_pieces(self.val_sources, self.reading), self.split, self.val_survey):
            yield part._replace(split="val")

    def count(self, name: str) -> int:
        """Returns a count, such as count("documents"), summed over both surveys."""
        return getattr(self.survey, name) + getattr(self.val_survey, name)


def gather_input(
    inputs: Iterable[str],
    val: Iterable[str],
    corpus: str,
    url: str,
    reading: Reading,
    val_split: str,
    val_fraction: float,
    spool_folder: Path,
) -> GatheredInput:
    """Reads all of the input once and returns its GatheredInput. `spool_folder` is for temporary copies of stdin and
    downloads; the other arguments are the values of these names in PrepareConfig. Raises InputError if the input cannot
    be read, or if there is nothing to train or validate on."""
    sources, skipped = find_sources(inputs, spool_folder)
    val_sources, val_skipped = find_sources(val, spool_folder)
    origin: dict[str, Any] = {"files_passed_over": skipped + val_skipped}
    if corpus:
        more, about = standard_library() if corpus == "stdlib" else shakespeare(url or SHAKESPEARE, spool_folder)
        sources, origin = sources + more, origin | about
    val_survey = survey_documents(read_pieces(val_sources, reading), fraction=0, keep_digests=True)
    survey = survey_documents(read_pieces(sources, reading), val_fraction, others=val_survey.digests)
    require_documents(named(sources) or f"--corpus {corpus}", survey)
    if val_sources:
        require_documents(named(val_sources), val_survey)
    split = choose_split(val_split, val_fraction, survey, has_files=bool(val_sources))
    return GatheredInput(reading, sources, val_sources, survey, val_survey, split, origin)


def require_documents(names: str, survey: Survey) -> None:
    if not survey.documents:
        raise InputError(
            f"{names}: no documents; {survey.empty_docs} were empty or white space, {survey.undecodable} not decodable"
        )


def named(sources: list[TextSource]) -> str:
    names = [source.name for source in sources]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def training_sample(data: GatheredInput) -> Iterator[str]:
    """Yields texts of the training split, about TRAINING_BYTES of them at most, chosen by hash, to train a tokenizer
    on."""
    share = TRAINING_BYTES / max(data.survey.bytes, 1)
    for part in data.parts():
        if part.split == "train" and (share >= 1 or chosen_by_hash(part.text, share, b"tokenizer")):
            yield part.text
