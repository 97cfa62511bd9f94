"""The input as a whole: read once from end to end, counted, found good, and divided."""

from collections.abc import Iterable
from dataclasses import dataclass

from gpt.errors import InputError
from gpt.text.corpora import corpus_sources
from gpt.text.sources import Reading, expand, read
from gpt.text.split import Split, Survey, choose_split, chosen_by_hash, parts, survey

TRAINING_BYTES = 1 << 26  # of text that a bpe:N tokenizer is trained on


@dataclass(frozen=True)
class Corpus:
    """The input, read once: what it holds, and how it divides."""

    reading: Reading
    train_sources: list
    val_sources: list
    survey: Survey
    val_survey: Survey
    split: Split
    said: dict  # about the built-in corpus and the files passed over, for the manifest

    def train_parts(self):
        """Parts of the input: of both splits, unless validation has files of its own."""
        return parts(read(self.train_sources, self.reading), self.split, self.survey)

    def all_parts(self):
        yield from self.train_parts()
        for part in parts(read(self.val_sources, self.reading), self.split, self.val_survey):
            yield part._replace(split="val")


def gather(config, spool_folder):
    """The Corpus, after one pass over all of it. Raises InputError where there is nothing to train or validate on."""
    sources, skipped = expand(config.inputs, spool_folder)
    val_sources, val_skipped = expand(config.val, spool_folder)
    said = {"files_passed_over": skipped + val_skipped}
    if config.corpus:
        more, about = corpus_sources(config.corpus, config.url, spool_folder)
        sources, said = sources + more, said | about
    val_survey = survey(read(val_sources, config.reading), fraction=0, keep_digests=True)
    found = survey(read(sources, config.reading), config.val_fraction, others=val_survey.digests)
    require_documents(named(sources) or f"--corpus {config.corpus}", found)
    if val_sources:
        require_documents(named(val_sources), val_survey)
    split = choose_split(config.val_split, config.val_fraction, found, bool(config.val))
    return Corpus(config.reading, sources, val_sources, found, val_survey, split, said)


def require_documents(names, counted):
    if not counted.documents:
        raise InputError(
            f"{names}: no documents; {counted.empty_docs} were empty or white space, "
            f"{counted.undecodable} not decodable"
        )


def named(sources):
    names = [source.name for source in sources]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def training_sample(corpus) -> Iterable[str]:
    """Texts of the training split to train a tokenizer on, at most about TRAINING_BYTES, chosen by their hash."""
    share = TRAINING_BYTES / max(corpus.survey.bytes, 1)
    for part in corpus.train_parts():
        if part.split == "train" and (share >= 1 or chosen_by_hash(part.text, share, b"tokenizer")):
            yield part.text
