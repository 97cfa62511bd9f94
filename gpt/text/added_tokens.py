"""What a Hugging Face folder adds to its BPE: tokens beside the BPE's own, the roles of tokens, the ids that end a
text, and the id that precedes one. transformers collects them from many files; so does this module.

Three kinds of added tokens differ in the text that becomes them:

    special     only where the caller allows special tokens: in other texts, `<|endoftext|>` is ordinary text
    ordinary    any text, before the BPE sees it; of several that fit, the leftmost and then the longest
    hidden      none: an entry of the vocabulary that no merge makes and no file names, such as the <s> of a training"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt.errors import InputError, note
from gpt.files import read_json, read_limited

END_OF_TEXT = "<|endoftext|>"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")  # the names in transformers 4 and 5
FLAGS = ("single_word", "lstrip", "rstrip")  # these change which text becomes the token
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")  # their end of text is <|endoftext|> if no file names one
BRACKETED = re.compile(r"<.+>|\[.+\]")  # what a special token looks like
TEMPLATE_FILE = "chat_template.jinja"
STOPS = "end_of_text_ids"  # this program's own key in tokenizer_config.json

Entries = dict[str, dict[str, Any]]  # text of an added token -> its "id", whether it is "special", and its flags


@dataclass(frozen=True, eq=False)
class Additions:
    """What a tokenizer has beside its ranks, pattern, special tokens and end-of-text."""

    ordinary: dict[str, int] = field(default_factory=dict)
    """ordinary added tokens, text -> id; the BPE may have the same token"""
    hidden: frozenset[str] = frozenset()
    """texts of the special tokens that no text becomes"""
    roles: dict[str, str] = field(default_factory=dict)
    """names in ROLES -> text of the token, for roles that end-of-text does not have"""
    stops: tuple[int, ...] = ()
    """ids that end a text, apart from end-of-text"""
    begins: bool = False
    """whether transformers puts end-of-text before each text"""
    chat_template: str = ""
    """the Jinja template that lays out conversations; "" without one"""


def matcher(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Returns a pattern that finds the leftmost and longest of `tokens`, in a group; None if there are no tokens."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


# ---- the files of a folder


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns the content of tokenizer_config.json, with the roles that special_tokens_map.json names."""
    named = read_json(folder / "special_tokens_map.json") or {}
    return (read_json(folder / "tokenizer_config.json") or {}) | {role: token for role, token in named.items() if token}


def read_entries(folder: Path, listed: list[dict[str, Any]], config: dict[str, Any], vocab: dict[str, int]) -> Entries:
    """Returns the added tokens that any file of `folder` names: `listed` (those of tokenizer.json), `config` (the
    settings), added_tokens.json. A token without an id gets that of `vocab`, or the next free one. Leaves out tokens
    that have no row in the model beside them. Raises InputError for a flag that is not supported."""
    entries: Entries = {entry["content"]: dict(entry) for entry in listed}
    for rank, entry in (config.get("added_tokens_decoder") or {}).items():
        entries.setdefault(entry["content"], entry | {"id": int(rank)})
    for text, rank in (read_json(folder / "added_tokens.json") or {}).items():
        entries.setdefault(text, {"id": rank})
    for text, entry in named_tokens(config).items():
        entries[text] = entry | entries.get(text, {}) | {"special": True}
    free = 1 + max([*vocab.values(), *(entry["id"] for entry in entries.values() if "id" in entry)], default=-1)
    for text, entry in entries.items():
        if "id" not in entry:
            entry["id"] = vocab.get(text, free)
            free += entry["id"] == free
    kept = with_rows(folder, entries, vocab)
    for text, entry in kept.items():
        for flag in filter(entry.get, FLAGS):
            raise InputError(f"{folder}: added token {text!r} with {flag} is not supported; save it without {flag}")
    return kept


def named_tokens(config: dict[str, Any]) -> Entries:
    """Returns the tokens that have a role in the settings `config`, in the order in which transformers numbers them."""
    if config.get("tokenizer_class") in GPT2_CLASSES and not config.get("eos_token"):
        config = config | {"eos_token": END_OF_TEXT}
    tokens = [config.get(role) for role in ROLES]
    for name in LISTS:
        more = config.get(name) or []
        tokens += more.values() if isinstance(more, dict) else more
    entries = [{"content": token} if isinstance(token, str) else token for token in tokens if token]
    return {entry["content"]: {name: entry[name] for name in FLAGS if name in entry} for entry in entries}


def with_rows(folder: Path, entries: Entries, vocab: dict[str, int]) -> Entries:
    """Returns the added tokens for which the model in the same folder, if there is one, has a row. Prints a note about
    the others: someone added them and did not resize the model. A model without rows for the BPE is another matter."""
    rows = (read_json(folder / "config.json") or {}).get("vocab_size")
    if type(rows) is not int or any(rank >= rows for text, rank in vocab.items() if text not in entries):
        return entries
    missing = [f"{text} (id {entry['id']})" for text, entry in entries.items() if entry["id"] >= rows]
    if missing:
        note("info", f"{folder}: the model has no row for {', '.join(missing[:5])}; such text stays ordinary text")
    return {text: entry for text, entry in entries.items() if entry["id"] < rows}


def template_of(folder: Path, config: dict[str, Any]) -> str:
    """Returns Additions.chat_template: TEMPLATE_FILE, which newer transformers write, else that of the settings
    `config`. Returns "" for several templates by name."""
    file = read_limited(folder / TEMPLATE_FILE)
    template = config.get("chat_template") if file is None else file.decode("utf-8", "replace")
    return template if isinstance(template, str) else ""


def token_text(token: str | dict[str, Any] | None) -> str | None:
    """Returns the text of a token in tokenizer_config.json, which may be an object."""
    return token["content"] if isinstance(token, dict) else token


def end_of_text(path: Path, special_tokens: dict[str, int], config: dict[str, Any]) -> str:
    """Returns the special token that separates documents: <|endoftext|>, else the token that is named as `eos_token`.
    Raises InputError if there is neither."""
    name = END_OF_TEXT if END_OF_TEXT in special_tokens else token_text(config.get("eos_token"))
    if name not in special_tokens:
        raise InputError(f"{path}: no end-of-text token; needs {END_OF_TEXT}, or an eos_token in tokenizer_config.json")
    return name


def roles_of(config: dict[str, Any], known: Iterable[str], eot: str) -> dict[str, str]:
    """Returns Additions.roles: the roles in `config` of tokens in `known`, apart from those of end-of-text, `eot`."""
    roles = {role: token_text(config.get(role)) for role in ROLES}
    return {role: text for role, text in roles.items() if text is not None and text in known and text != eot}


def stop_ids(folder: Path, config: dict[str, Any], ids: set[int], eot: int) -> tuple[int, ...]:
    """Returns Additions.stops: the `eos_token_id` of generation_config.json and config.json, one id or several, and
    what this program stored in the settings `config`. Leaves out `eot` and ids that are not in `ids`."""
    stops = list(config.get(STOPS) or [])
    for name in ("generation_config.json", "config.json"):
        value = (read_json(folder / name) or {}).get("eos_token_id")
        stops += value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(rank for rank in stops if type(rank) is int and rank in ids and rank != eot))


# ---- what transformers adds to each text


def begins_with_eot(path: Path, post_processor: dict[str, Any] | None, eot: int) -> bool:
    """Returns whether `post_processor`, an entry of tokenizer.json, puts the id `eot` before each text. Raises
    InputError if it adds anything else."""
    if not post_processor or post_processor["type"] == "ByteLevel":
        return False
    if post_processor["type"] == "Sequence":
        found = [begins_with_eot(path, part, eot) for part in post_processor["processors"]]
        if found.count(True) < 2:
            return any(found)
    if post_processor["type"] == "TemplateProcessing":
        single = post_processor["single"]
        names = [part["SpecialToken"]["id"] for part in single if "SpecialToken" in part]
        added = [post_processor["special_tokens"][name]["ids"] for name in names]
        if not added or (added == [[eot]] and "Sequence" in single[-1]):
            return bool(added)
    raise InputError(
        f"{path}: post_processor {post_processor['type']} is not supported, unless it adds end-of-text before a text "
        "and nothing else; save the tokenizer without it"
    )


def bos_is_eot(path: Path, config: dict[str, Any], eot: str) -> bool:
    """Returns whether the settings `config` put the end-of-text token `eot` before each text. Raises InputError if they
    add another token."""
    bos = token_text(config.get("bos_token")) or END_OF_TEXT
    if config.get("add_eos_token") or (config.get("add_bos_token") and bos != eot):
        what = "add_eos_token" if config.get("add_eos_token") else f"add_bos_token with {bos}"
        raise InputError(f"{path}: {what} is not supported; set it to false in tokenizer_config.json")
    return bool(config.get("add_bos_token"))
