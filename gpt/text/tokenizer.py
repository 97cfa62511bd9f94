"""Text to ids and back: tiktoken encodings by name, file or folder; their identity; training and storing them."""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from gpt.errors import InputError, IntegrityError, note
from gpt.files import read_pointer, step_folders
from gpt.text.added_tokens import END_OF_TEXT, Additions, matcher
from gpt.text.foreign import has_tokenizer, models_within
from gpt.text.huggingface import (
    BYTE_OF,
    GPT2_PATTERNS,
    Vocabulary,
    by_id,
    pattern_name,
    read_folder,
    to_huggingface,
    unspelled,
)
from gpt.text.rank_files import named_encoding, read_rank_file

ROLES_WITH_IDS = ("bos_token", "eos_token", "pad_token")
# Texts that patterns treat differently: letters, digits, contractions, every white space, marks, and how a text ends.
PROBES = (
    "The quick brown fox's dog didn't; WE'LL we've I'm you'd they're IT'S naïve Straße ſ's DŽungla",
    "1 12 123 1234 12345678901234567890 3.14 0x1F ²³ ½ Ⅻ ٣٤٥ x2y 1st",
    "a b  c   d\te\t\tf\ng\n\nh\r\ni\r\rj\x0bk\x0cl\x85m\xa0n\u1680o\u2003\u2003p\u2028q\u2029r\u202fs\u205ft\u3000u",
    "v \n w \n \n  x \t\n\n\n y   \r\n  z",
    '(x)! ...\n\n--- [y]{z} /path/to//file.\n/ <tag>\n\t"q" `r` $5 50% a_b __c__ #d @e -> => != ^^ \\n ~',
    "你好，世界。\n日本語テキスト 한국어 텍스트 русский текст ελληνικά עברית العربية हिन्दी ไทย",
    "e\u0301 n\u0303o a\u0308\u0323 👩‍👩‍👧‍👦 🇫🇷 ☃️ 😀😀 \ufffd\u200b\u200d\ufeff\x00\x01\x7f",
    f"{END_OF_TEXT} <|fim_prefix|> trailing  ",
    "\n\n  ",
)


@dataclass(frozen=True)
class Tokenizer:
    """A tiktoken Encoding with the id that stands before each document, and what a Hugging Face folder adds."""

    name: str
    encoding: tiktoken.Encoding
    eot: int
    additions: Additions = field(default_factory=Additions)

    @property
    def vocab_size(self) -> int:
        """Number of ids, including end-of-text and unused ids."""
        return self.encoding.n_vocab

    @functools.cached_property
    def identity(self) -> str:
        """sha256 (hex) of the behaviour: the (bytes, id) list, the special tokens, the ids of the probe texts. The
        spelling of the pattern is not part of it: tiktoken has changed that of gpt2 twice."""
        parts = [f"{rank} {token.hex()}" for token, rank in by_id(self.encoding._mergeable_ranks)]
        parts += [f"{rank} special {text}" for text, rank in by_id(self.encoding._special_tokens)]
        parts += [f"{rank} ordinary {text}" for text, rank in by_id(self.additions.ordinary)]
        parts += [f"hidden {text}" for text in sorted(self.additions.hidden)]
        parts += [" ".join(map(str, self.encode(probe))) for probe in PROBES]
        return hashlib.sha256("\n".join(parts).encode("utf-8")).hexdigest()

    @property
    def manifest_entry(self) -> dict[str, Any]:
        """The entry for the tokenizer in the manifests of shards and checkpoints."""
        return {"name": self.name, "identity": self.identity, "vocab_size": self.vocab_size, "eot": self.eot}

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids that end a text; end-of-text is the first."""
        return self.eot, *self.additions.stops

    @property
    def role_ids(self) -> dict[str, Any]:
        """Returns the ids that Hugging Face's settings name: "bos_token_id", "pad_token_id", and "eos_token_id", a list
        of the ids that end a text, that of the eos token first."""
        ids = self.special_tokens | self.additions.ordinary
        bos, eos, pad = (ids.get(self.additions.roles.get(role, ""), self.eot) for role in ROLES_WITH_IDS)
        stops = sorted(self.stops, key=lambda rank: rank != eos)
        return {"bos_token_id": bos, "eos_token_id": stops, "pad_token_id": pad}

    def with_roles_of(self, other: "Tokenizer") -> "Tokenizer":
        """Returns this tokenizer with the roles, the stop ids and the beginning of `other`, which has the same ids, and
        with its chat template where this one has none."""
        template = self.additions.chat_template or other.additions.chat_template
        return replace(self, additions=replace(other.additions, chat_template=template))

    def with_chat_template(self, template: str) -> "Tokenizer":
        """Returns this tokenizer with another chat template, "" for none."""
        same = template == self.additions.chat_template
        return self if same else replace(self, additions=replace(self.additions, chat_template=template))

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens that a text may hold, text -> id."""
        others = self.additions.ordinary.keys() | self.additions.hidden
        return {text: rank for text, rank in self.encoding._special_tokens.items() if text not in others}

    @functools.cached_property
    def matchers(self) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
        """Patterns that find special tokens and ordinary added tokens."""
        return matcher(self.special_tokens), matcher(self.additions.ordinary)

    @property
    def pattern(self) -> str:
        return self.encoding._pat_str

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Returns the ids of `text`, in which `<|endoftext|>` is ordinary text unless `allow_special`; lone surrogates
        become U+FFFD. Raises InputError for a text that the tokenizer cannot split."""
        return self.encode_to_numpy(text, allow_special).tolist()

    def encode_prompt(self, text: str, allow_special: bool = False) -> list[int]:
        """Returns the ids that a model continues: those of `encode`, after end-of-text if the tokenizer puts it before
        each text or if there are no others."""
        ids = self.encode(text, allow_special)
        return [self.eot, *ids] if self.additions.begins or not ids else ids

    def encode_to_numpy(self, text: str, allow_special: bool = False) -> np.ndarray:
        """Returns the ids as `encode` does, uint32 (tokens,). Several threads can encode at the same time."""
        special, ordinary = self.matchers
        pieces = [text]
        for pattern in (special if allow_special else None, ordinary):
            if pattern:
                found = (pattern.split(piece) if index % 2 == 0 else [piece] for index, piece in enumerate(pieces))
                pieces = list(itertools.chain.from_iterable(found))
        ids = self.special_tokens | self.additions.ordinary
        encoded = [
            np.array([ids[piece]], np.uint32) if index % 2 else self.encode_plain(piece)
            for index, piece in enumerate(pieces)  # text, token, text, token, …, text
        ]
        return np.concatenate(encoded) if len(encoded) > 1 else encoded[0]

    def encode_plain(self, text: str) -> np.ndarray:
        """Returns the ids of a text without added tokens."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self.encode_plain(repaired)
        except BaseException as error:  # ValueError, or tiktoken's PanicException, which derives from BaseException
            if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                raise
            reason = str(error).splitlines()[0][-80:]
            raise InputError(
                f"the tokenizer cannot split this text ({reason}): {len(text)} characters from {text[:20]!r}; "
                "break its longest run of white space"
            ) from None

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Returns the bytes of `ids`. Raises InputError for an id that the vocabulary lacks."""
        try:
            return self.encoding.decode_bytes(ids)
        except (KeyError, OverflowError) as error:
            raise InputError(f"tokenizer {self.name}: {error} is not in its vocabulary of {self.vocab_size}") from None

    def decode(self, ids: list[int]) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self) -> np.ndarray:
        """Returns the number of bytes of text that each id stands for, int64 (vocab_size,); 0 for special and unused
        ids."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        ranks = self.encoding._mergeable_ranks
        ordinary = self.additions.ordinary
        lengths[list(ordinary.values())] = [len(text.encode("utf-8", "replace")) for text in ordinary]
        lengths[list(ranks.values())] = list(map(len, ranks))
        return lengths

    @functools.cached_property
    def huggingface_files(self) -> tuple[str, dict[str, Any]]:
        """The text of `tokenizer.json` and the settings for `tokenizer_config.json`."""
        ranks, special_tokens = self.encoding._mergeable_ranks, self.encoding._special_tokens
        [end_of_text] = [text for text, rank in special_tokens.items() if rank == self.eot]
        vocabulary = Vocabulary(self.name, ranks, self.pattern, special_tokens, end_of_text, self.additions)
        stored, config = to_huggingface(vocabulary)
        return json.dumps(stored, ensure_ascii=False, indent=1), config


# ---- loading


def load_tokenizer(source: str | Path, training_text: Iterable[str] | None = None) -> Tokenizer:
    """Returns the Tokenizer that `source` names: a tiktoken name, "byte", "bpe:N" (trained on `training_text`), a
    `.tiktoken` rank file with its JSON beside it, or a data, run, checkpoint or Hugging Face folder.

    Raises InputError for another name, and for a tokenizer that is not supported or whose files are missing;
    IntegrityError for a damaged file."""
    source = str(source)
    if source == "byte":
        ranks = {bytes([byte]): byte for byte in range(256)}
        return tokenizer_from(Vocabulary("byte", ranks, GPT2_PATTERNS[0], {END_OF_TEXT: 256}), source)
    if source in tiktoken.list_encoding_names():
        return named_tokenizer(source)
    if source.startswith("bpe:"):
        return trained_tokenizer(source, training_text)
    if source.endswith(".tiktoken"):
        return tokenizer_from(read_rank_file(Path(source)), source)
    if Path(source).is_dir():
        return tokenizer_from(read_folder(folder_within(Path(source))), source)
    raise InputError(f"no tokenizer named {source}; choices: {', '.join(choices())}, x.tiktoken, or a folder with one")


def folder_within(folder: Path) -> Path:
    """Returns the folder whose tokenizer is that of the model at `folder`: the best step folder of a run folder, else
    the newest; the newest checkpoint of a Trainer's output folder, and the snapshot of the hub's cache, if they have
    one; any other folder itself."""
    steps = [read_pointer(folder, "best"), *step_folders(folder)]
    return next(filter(None, [*steps, *filter(has_tokenizer, models_within(folder)[:1])]), folder)


def choices() -> list[str]:
    return ["byte", "bpe:N", *tiktoken.list_encoding_names()]


def tokenizer_from(vocabulary: Vocabulary, source: str) -> Tokenizer:
    """Returns the Tokenizer of a Vocabulary. Raises InputError, which names `source`, if tiktoken would not accept
    it."""
    check_vocabulary(vocabulary, source)
    try:
        encoding = tiktoken.Encoding(
            vocabulary.name,
            pat_str=vocabulary.pattern,
            mergeable_ranks=vocabulary.ranks,
            special_tokens=vocabulary.special_tokens,
        )
    except ValueError as error:
        raise InputError(f"{source}: pattern not understood ({error}); correct it") from None
    eot = vocabulary.special_tokens[vocabulary.end_of_text]
    return Tokenizer(vocabulary.name, encoding, eot, vocabulary.additions)


def check_vocabulary(vocabulary: Vocabulary, source: str) -> None:
    ids = [*vocabulary.ranks.values(), *vocabulary.special_tokens.values()]
    if not all(type(rank) is int and 0 <= rank < 1 << 31 for rank in ids):
        raise InputError(f"{source}: an id is not a whole number from 0 to 2^31 - 1; correct it")
    if len(set(ids)) < len(ids):
        raise InputError(f"{source}: an id is given to two tokens; correct it")
    absent = [byte for byte in range(256) if bytes([byte]) not in vocabulary.ranks]
    if absent:
        raise InputError(f"{source}: {len(absent)} of the 256 single bytes are missing (0x{absent[0]:02x} …); add them")
    if vocabulary.end_of_text not in vocabulary.special_tokens:
        raise InputError(f"{source}: no special token {END_OF_TEXT}; add it")


def named_tokenizer(name: str) -> Tokenizer:
    encoding = named_encoding(name)
    if END_OF_TEXT not in encoding._special_tokens:
        raise InputError(f"tokenizer {name}: no special token {END_OF_TEXT}; choices: {', '.join(choices())}")
    return Tokenizer(name, encoding, encoding._special_tokens[END_OF_TEXT])


# ---- training and storing


def trained_tokenizer(source: str, training_text: Iterable[str] | None) -> Tokenizer:
    size = source.removeprefix("bpe:")
    if not re.fullmatch(r"[1-9][0-9]{0,6}", size) or int(size) < 257:
        raise InputError(f"tokenizer {source}: N in bpe:N is a number of ids from 257 to 9999999; try bpe:2048")
    if training_text is None:
        raise InputError(f"tokenizer {source}: trained by data/prepare.py; give the data folder it made instead")
    return train_bpe(training_text, int(size))


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """Returns a byte-level BPE with GPT-2's pattern and `size` ids before end-of-text, trained on `texts`; if they give
    fewer ids, as many as they give. Raises InputError if the package tokenizers is missing."""
    try:
        import tokenizers
    except ImportError:
        raise InputError(
            f"tokenizer bpe:{size}: training needs tokenizers; pip install tokenizers, or use --tokenizer byte"
        ) from None
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(BYTE_OF), show_progress=False, special_tokens=[]
    )
    trained.train_from_iterator(texts, trainer)
    ranks = {unspelled(text): rank for text, rank in trained.get_vocab().items()}
    if len(ranks) < size:
        note("info", f"tokenizer bpe:{size}: the text yields {len(ranks)} ids, so it is bpe:{len(ranks)}")
    name, end_of_text = f"bpe:{len(ranks)}", len(ranks)
    return tokenizer_from(Vocabulary(name, ranks, GPT2_PATTERNS[0], {END_OF_TEXT: end_of_text}), name)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, model_max_length: int | None = None) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, which Hugging Face and `load_tokenizer` both read. Raises
    IntegrityError unless they read back as the same tokenizer."""
    folder = Path(folder)
    text, config = tokenizer.huggingface_files
    if model_max_length is not None:
        config = config | {"model_max_length": model_max_length}
    if pattern_name(tokenizer.pattern) is None:
        check_engine(tokenizer, text)
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8", newline="\n")
    settings = json.dumps(config, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8", newline="\n")
    if load_tokenizer(folder).identity != tokenizer.identity:
        raise IntegrityError(f"{folder}: tokenizer {tokenizer.name} does not read back as it was written; report it")


def check_engine(tokenizer: Tokenizer, text: str) -> None:
    """Raises InputError if Hugging Face's engine, with `text` as tokenizer.json, encodes one of PROBES differently.
    Does nothing if the package tokenizers is missing."""
    try:
        import tokenizers
    except ImportError:
        return
    stored = tokenizers.Tokenizer.from_str(text)
    stored.encode_special_tokens = True
    for probe in PROBES:
        if stored.encode(probe, add_special_tokens=False).ids != tokenizer.encode(probe):
            raise InputError(
                f"tokenizer {tokenizer.name}: its pattern splits {probe[:20]!r}… differently in Hugging Face's engine; "
                "write it without possessive repeats and $"
            )
