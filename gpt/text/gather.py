"""Gathers the input of data/prepare.py: reads all of it once, counts and checks it, and decides how to split it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt.errors import InputError, note
from gpt.text.corpora import SHAKESPEARE, built_in
from gpt.text.kinds import RECORDS
from gpt.text.sources import LeftOut, Reading, TextSource, find_sources, read_pieces
from gpt.text.split import Lost, Part, Split, Survey, choose_split, chosen_by_hash, divide, survey_documents

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

    def fields(self) -> list[str]:
        """Returns the fields of the records that are their texts or their examples."""
        sources = self.sources + self.val_sources
        return sorted(
            {name for source in sources for name in (source.form.fields if source.form else [source.field])} - {""}
        )

    @property
    def holds(self) -> str:
        """What the input holds: text, or a kind of examples."""
        return self.sources[0].holds if self.sources else "text"

    def lost(self) -> dict[str, Lost]:
        """Returns what --errors replace or skip took from each file, by its name."""
        return self.val_survey.lost | self.survey.lost

    def encodings(self) -> dict[str, str]:
        """Returns the encodings that --encoding auto found, by name of the file; UTF-8 is left out."""
        return {name: encoding for name, encoding in self.reading.decided.items() if encoding != "utf-8"}


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
    sources, left_out = find_sources(inputs, spool_folder, reading)
    val_sources, val_left_out = find_sources(val, spool_folder, reading)
    tell_findings(sources + val_sources, left_out + val_left_out, reading)
    origin: dict[str, Any] = {"files_passed_over": sum(entry.count for entry in left_out + val_left_out)}
    if corpus:
        more, about = built_in(corpus, url or SHAKESPEARE, spool_folder)
        sources, origin = sources + more, origin | about
    check_sources(sources + val_sources, reading)
    skip = reading.errors == "skip"
    val_survey = survey_documents(read_pieces(val_sources, reading), 0, keep_digests=True, skip_nuls=skip)
    survey = survey_documents(read_pieces(sources, reading), val_fraction, val_survey.digests, skip_nuls=skip)
    require_documents(named(sources) or f"--corpus {corpus}", survey)
    if val_sources:
        require_documents(named(val_sources), val_survey)
    split = choose_split(val_split, val_fraction, survey, has_files=bool(val_sources))
    return GatheredInput(reading, sources, val_sources, survey, val_survey, split, origin)


def tell_findings(sources: list[TextSource], left_out: list[LeftOut], reading: Reading) -> None:
    """Prints what was left out of folders and archives, and which fields were taken for the text. Raises InputError if
    `--field` has no meaning for any source."""
    for entry in left_out:
        advice = "if they hold text, name them or a glob (those in archives when they are unpacked)"
        note("info", f"{entry.name}: left out {entry}; {advice}")
    records = [source for source in sources if source.kind in RECORDS]
    if reading.field and not records:
        raise InputError(
            f"--field {reading.field}: {named(sources) or 'the corpus'} has no fields, a document there is a file; "
            "leave --field out"
        )
    for form in dict.fromkeys(source.form for source in records if source.form):
        files = [source for source in records if source.form == form]
        note("info", f"{named(files)}: {form.description}; --field reads one field as plain text instead")
    for field in dict.fromkeys(source.field for source in records if not source.form):
        if field != "text" and not reading.field:
            files = [source for source in records if source.field == field]
            note("info", f"{named(files)}: the text is the field {field!r}; choose another one with --field")


def check_sources(sources: list[TextSource], reading: Reading) -> None:
    """Raises InputError if the sources do not all hold text, or all examples of one kind, or if --split_on has no
    effect on them."""
    first = {source.holds: source for source in reversed(sources)}
    if len(first) > 1:
        kinds = ", ".join(f"{source.name} ({kind})" for kind, source in first.items())
        raise InputError(f"the input mixes kinds of data: {kinds}; prepare one kind at a time, or give --field")
    if reading.split_on and not any(source.kind == "text" for source in sources):
        raise InputError("--split_on: there is no text file in the input to split; leave it out")


def with_validation_share(data: GatheredInput, val_split: str, fraction: float) -> GatheredInput:
    """Returns `data` with `fraction` of the input to validate on, instead of a smaller share. Reads the input again,
    because the hash of a document decides which side it falls on."""
    skip = data.reading.errors == "skip"
    survey = survey_documents(read_pieces(data.sources, data.reading), fraction, skip_nuls=skip)
    split = choose_split(val_split, fraction, survey, has_files=False)
    reason = f"{split.reason} (more than {data.split.fraction:g}: one context)"
    return replace(data, survey=survey, split=replace(split, reason=reason))


def require_documents(names: str, survey: Survey) -> None:
    if not survey.documents:
        raise InputError(
            f"{names}: no documents; {survey.empty_docs} were empty or white space, {survey.undecodable} unreadable"
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
