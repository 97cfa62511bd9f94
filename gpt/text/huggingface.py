"""Converts a byte-level BPE between tiktoken's form (bytes -> rank, and a pattern) and Hugging Face's form
(`tokenizer.json`, or `vocab.json` and `merges.txt`). Both are plain data; no Hugging Face code runs.

Byte-pair encoding begins with single bytes and joins, again and again, the neighbours whose union has the lowest rank.
tiktoken stores the ranks; Hugging Face stores the merges, which are the pairs in the order of the ranks:

    ranks     a: 0   b: 1   c: 2   ab: 3   abc: 4
    encoding  "abc" = a b c -> ab c -> abc
    merges    [(a, b), (ab, c)]     each token is the union of the pair that the lower ranks leave of it

If the lower ranks leave more than two parts of some token, there is no such list: in the example with abc: 3 and ab: 4,
they leave a b c of abc. Then every way to split every token in two is written as a merge, and `ignore_merges` makes
Hugging Face look up whole pieces first. Together this gives the ids that tiktoken gives."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gpt.errors import InputError, IntegrityError
from gpt.files import read_json, read_limited
from gpt.text.added_tokens import (
    BRACKETED,
    END_OF_TEXT,
    GPT2_CLASSES,
    STOPS,
    Additions,
    Entries,
    begins_with_eot,
    bos_is_eot,
    end_of_text,
    read_entries,
    read_settings,
    roles_of,
    stop_ids,
    template_of,
)
from gpt.text.foreign import ADAPTER_CONFIG, FOREIGN_TOKENIZERS

# The spellings of each known pattern: tiktoken's spelling (possessive, hence fast), Hugging Face's spelling, others.
# Hugging Face's engine reads `{1,3}+` as a repeated group and `$` as the end of any line: it must get its own spelling.
GPT2_PATTERNS = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)
CL100K_PATTERNS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
)
O200K_PATTERNS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
) * 2  # one spelling serves both
PATTERNS = {"gpt2": GPT2_PATTERNS, "cl100k": CL100K_PATTERNS, "o200k": O200K_PATTERNS}

Pair = tuple[bytes, ...]


@dataclass(frozen=True)
class Vocabulary:
    """What defines a byte-level BPE: `ranks` (bytes -> id, which is also the order of merging), the split pattern in
    tiktoken's spelling, the special tokens (text -> id), and `end_of_text`, the special token that ends a text."""

    name: str
    ranks: dict[bytes, int]
    pattern: str
    special_tokens: dict[str, int]
    end_of_text: str = END_OF_TEXT
    additions: Additions = field(default_factory=Additions)


def pattern_name(pattern: str | None) -> str | None:
    """Returns the name in PATTERNS of a pattern in any known spelling, or None if the pattern is unknown."""
    return next((name for name, spellings in PATTERNS.items() if pattern in spellings), None)


def byte_alphabet() -> dict[int, str]:
    """Returns the printable character that spells each byte in Hugging Face's vocabularies, in GPT-2's order of ids."""
    plain = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(others)}


CHARACTER_OF = byte_alphabet()
BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}


def spelled(token: bytes) -> str:
    """Returns the characters that spell `token`: spelled(b" the") == "Ġthe"."""
    return "".join(map(CHARACTER_OF.__getitem__, token))


def unspelled(text: str) -> bytes:
    """Returns the bytes that `text` spells: unspelled("Ġthe") == b" the". Raises KeyError for a character that spells
    no byte."""
    return bytes(map(BYTE_OF.__getitem__, text))


# ---- writing


def to_huggingface(vocabulary: Vocabulary) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the contents of `tokenizer.json` and of `tokenizer_config.json`."""
    merges, pure = merges_of(vocabulary.ranks)
    vocab = {spelled(token): rank for token, rank in vocabulary.ranks.items()} | vocabulary.special_tokens
    ordinary, hidden = vocabulary.additions.ordinary, vocabulary.additions.hidden
    added = {text: rank for text, rank in (vocabulary.special_tokens | ordinary).items() if text not in hidden}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    stored = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(text, rank, text not in ordinary) for text, rank in by_id(added)],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer_of(vocabulary.pattern, byte_level),
        "post_processor": beginning(vocabulary) or byte_level | {"use_regex": True},
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": not pure,
            "vocab": dict(by_id(vocab)),
            "merges": [f"{spelled(left)} {spelled(right)}" for left, right in merges],
        },
    }
    return stored, config_of(vocabulary)


def config_of(vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns the content of `tokenizer_config.json`. Another class than PreTrainedTokenizerFast would drop the
    pattern; CTranslate2 needs an unknown token; without `model_input_names` transformers 4 returns token types, which
    GPT-2 adds to its embeddings. The last keys are this program's own."""
    roles: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), vocabulary.end_of_text)
    stops = list(vocabulary.additions.stops)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "tiktoken_name": vocabulary.name,
        "tiktoken_pattern": vocabulary.pattern,
    }
    template = vocabulary.additions.chat_template
    more = ({STOPS: stops} if stops else {}) | ({"chat_template": template} if template else {})
    return roles | vocabulary.additions.roles | config | more


def beginning(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Returns the post_processor of a tokenizer that puts end-of-text before each text, None for any other."""
    if not vocabulary.additions.begins:
        return None
    eot = vocabulary.end_of_text
    token: dict[str, Any] = {"SpecialToken": {"id": eot, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    ids = {eot: {"id": eot, "ids": [vocabulary.special_tokens[eot]], "tokens": [eot]}}
    pair = [token, first, token, second]
    return {"type": "TemplateProcessing", "single": [token, first], "pair": pair, "special_tokens": ids}


def by_id(ids: dict[Any, int]) -> list[tuple[Any, int]]:
    """Returns the (token, id) pairs of a dictionary in the order of their ids."""
    return sorted(ids.items(), key=lambda entry: entry[1])


def added_token(text: str, rank: int, special: bool) -> dict[str, Any]:
    """Returns an entry of "added_tokens". `normalized` makes Hugging Face look for ordinary tokens in the text between
    the special ones."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {"id": rank, "content": text} | flags | {"normalized": not special, "special": special}


def pre_tokenizer_of(pattern: str, byte_level: dict[str, Any]) -> dict[str, Any]:
    known = pattern_name(pattern)
    if known == "gpt2":
        return byte_level | {"use_regex": True}
    spelling = PATTERNS[known][1] if known else pattern
    split = {"type": "Split", "pattern": {"Regex": spelling}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}


def merges_of(ranks: dict[bytes, int]) -> tuple[list[Pair], bool]:
    """Returns the merges of a rank table in order, and whether each token has exactly one merge: see the top of this
    file."""
    tokens = [token for token, _ in by_id(ranks) if len(token) > 1]
    merges = [merge_below(ranks, token) for token in tokens]
    if all(len(parts) == 2 for parts in merges):
        return merges, True
    return [split for token in tokens for split in splits_of(ranks, token)], False


def merge_below(ranks: dict[bytes, int], token: bytes) -> Pair:
    """Returns the parts that byte-pair encoding leaves of `token` with the ranks below that of `token`; among equal
    ranks the leftmost pair merges first."""
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, limit) for left, right in itertools.pairwise(parts)]
        best = min(pairs)
        if best >= limit:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)


def splits_of(ranks: dict[bytes, int], token: bytes) -> list[Pair]:
    """Returns every pair of tokens whose union is `token`."""
    pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
    known = [(left, right) for left, right in pairs if left in ranks and right in ranks]
    return sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


# ---- reading


def read_folder(folder: Path) -> Vocabulary:
    """Returns the Vocabulary of a data folder, a checkpoint or a Hugging Face folder.

    Raises InputError if there is no tokenizer, or if it is not a byte-level BPE with a known pattern, and names the
    component; IntegrityError for a malformed file."""
    path = folder / "tokenizer.json"
    try:
        config, stored = read_settings(folder), read_json(path)
        if stored is not None:
            return from_tokenizer_json(path, stored, config)
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            return from_vocab_and_merges(folder, config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{folder}: malformed tokenizer files ({error!r}); restore them") from None
    for name, kind in FOREIGN_TOKENIZERS.items():
        if (folder / name).exists():
            raise refused(folder / name, f"a tokenizer of the kind {kind}")
    if (folder / ADAPTER_CONFIG).exists():
        base = (read_json(folder / ADAPTER_CONFIG) or {}).get("base_model_name_or_path")
        raise InputError(f"{folder}: an adapter without a tokenizer; give that of its base, {base}")
    raise InputError(f"{folder}: no tokenizer in it; needs tokenizer.json, or vocab.json and merges.txt")


def from_tokenizer_json(path: Path, stored: dict[str, Any], config: dict[str, Any]) -> Vocabulary:
    model = stored["model"]
    check_components(path, stored, model)
    entries = read_entries(path.parent, stored["added_tokens"], config, model["vocab"])
    whole = bool(model.get("ignore_merges"))
    vocabulary = vocabulary_of(path, model["vocab"], model["merges"], whole, entries, config)
    pattern = config.get("tiktoken_pattern")
    if pattern is None:
        pattern = known_pattern(path, stored["pre_tokenizer"], config)
        check_merges(path, vocabulary.ranks, model["merges"], whole)
    eot = vocabulary.special_tokens[vocabulary.end_of_text]
    begins = begins_with_eot(path, stored.get("post_processor"), eot)
    return replace(vocabulary, pattern=pattern, additions=replace(vocabulary.additions, begins=begins))


def from_vocab_and_merges(folder: Path, config: dict[str, Any]) -> Vocabulary:
    path = folder / "vocab.json"
    kind = config.get("tokenizer_class")
    if kind not in GPT2_CLASSES and not str(kind).startswith(("PreTrainedTokenizer", "TokenizersBackend")):
        raise refused(folder / "tokenizer_config.json", f"tokenizer_class {kind}")
    if config.get("add_prefix_space"):
        raise refused(folder / "tokenizer_config.json", "add_prefix_space")
    vocab = read_json(path) or {}
    lines = (read_limited(folder / "merges.txt") or b"").decode("utf-8").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    entries = read_entries(folder, [], config, vocab)
    vocabulary = vocabulary_of(path, vocab, merges, False, entries, config)
    check_merges(folder / "merges.txt", vocabulary.ranks, merges, ignore_merges=False)
    begins = bos_is_eot(path, config, vocabulary.end_of_text)
    return replace(vocabulary, additions=replace(vocabulary.additions, begins=begins))


def vocabulary_of(
    path: Path, vocab: dict[str, int], merges: list[Any], whole: bool, entries: Entries, config: dict[str, Any]
) -> Vocabulary:
    """Returns the Vocabulary of a Hugging Face vocabulary and its added tokens, with GPT-2's pattern. `whole`: whether
    the BPE looks up whole pieces (`ignore_merges`)."""
    made = set() if whole else {"".join(pair) for pair in pairs_of(merges)}
    ordinary, special_tokens = {}, {}
    for text, entry in entries.items():
        in_bpe = text in vocab and (len(text) == 1 or text in made)
        if in_bpe or not entry.get("special"):
            ordinary[text] = entry["id"]
        if not in_bpe:
            special_tokens[text] = entry["id"]
    unnamed = {text: rank for text, rank in vocab.items() if BRACKETED.fullmatch(text) and text not in entries}
    hidden = {} if whole else {text: rank for text, rank in unnamed.items() if text not in made}
    eot = end_of_text(path, special_tokens, config)
    special_tokens |= hidden
    ranks = ranks_of(path, vocab, special_tokens)
    ids = {*ranks.values(), *special_tokens.values()}
    roles = roles_of(config, special_tokens.keys() | ordinary.keys(), eot)
    stops = stop_ids(path.parent, config, ids, special_tokens[eot])
    template = template_of(path.parent, config)
    additions = Additions(ordinary, frozenset(hidden), roles, stops, chat_template=template)
    name = config.get("tiktoken_name", path.parent.name)
    return Vocabulary(name, ranks, GPT2_PATTERNS[0], special_tokens, eot, additions)


def refused(path: Path, component: str) -> InputError:
    return InputError(
        f"{path}: {component} is not supported; needs a byte-level BPE with the pattern of {', '.join(PATTERNS)}"
    )


def check_components(path: Path, stored: dict[str, Any], model: dict[str, Any]) -> None:
    """Raises InputError naming the first component that would give other ids than byte-level BPE alone."""
    if model.get("type", "BPE") != "BPE":
        raise refused(path, f"model {model['type']}")
    if stored.get("normalizer"):
        raise refused(path, f"normalizer {stored['normalizer'].get('type')}")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(setting):
            raise refused(path, f"model setting {setting}")


def known_pattern(path: Path, pre_tokenizer: dict[str, Any] | None, config: dict[str, Any]) -> str:
    """Returns, in tiktoken's spelling, the pattern of `pre_tokenizer`, an entry of tokenizer.json. Raises InputError
    for an unknown pattern."""
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = steps[0]["pretokenizers"]
    kinds = [step.get("type") for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise refused(path, f"pre_tokenizer {' + '.join(map(str, kinds))}")
    if steps[-1].get("add_prefix_space") or config.get("add_prefix_space"):
        raise refused(path, "add_prefix_space")
    use_regex = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and use_regex:
        return GPT2_PATTERNS[0]
    split = steps[0] if not use_regex else {}
    pattern = split.get("pattern", {}).get("Regex")
    name = pattern_name(pattern)
    if name is None or split["behavior"] != "Isolated" or split["invert"]:
        raise refused(path, f"pre_tokenizer pattern {pattern!r}")
    return PATTERNS[name][0]


def ranks_of(path: Path, vocab: dict[str, int], special_tokens: dict[str, int]) -> dict[bytes, int]:
    """Returns the ordinary tokens of a Hugging Face vocabulary as bytes -> id. Raises InputError for a token that is
    not spelled in bytes."""
    ordinary = {text: rank for text, rank in vocab.items() if text not in special_tokens}
    try:
        joined = unspelled("".join(ordinary))  # all at once: token by token takes four times as long
    except KeyError:
        strange = next(text for text in ordinary if not BYTE_OF.keys() >= set(text))
        raise refused(path, f"vocabulary entry {strange!r}, which is not spelled in bytes,") from None
    borders = itertools.pairwise(itertools.accumulate(map(len, ordinary), initial=0))
    return {joined[start:end]: rank for (start, end), rank in zip(borders, ordinary.values(), strict=True)}


def pairs_of(merges: Iterable[Any]) -> list[tuple[str, ...]]:
    """Returns the merges of either spelling, "a b" or ["a", "b"], as pairs."""
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def check_merges(path: Path, ranks: dict[bytes, int], merges: Iterable[Any], ignore_merges: bool) -> None:
    """Raises InputError unless Hugging Face, with these merges, encodes as tiktoken does with the ids as ranks."""
    pairs = pairs_of(merges)
    expected, pure = merges_of(ranks)
    spellings = [(spelled(left), spelled(right)) for left, right in expected]
    if pairs == spellings and (pure or ignore_merges):
        return
    order = [ranks.get(bytes(BYTE_OF.get(c, 0) for c in "".join(pair)), -1) for pair in pairs]
    if not (ignore_merges and not pure and order == sorted(order) and set(pairs) == set(spellings)):
        raise refused(path, "model with merges in another order than its ids")
