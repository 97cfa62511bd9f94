"""For tests of tokenizers: texts that are hard to split, rank files, and transformers as an independent answer."""

import base64
import functools
import json
import random

from gpt.text.huggingface import GPT2_PATTERNS
from gpt.text.tokenizer import PROBES, train_bpe

ALPHABET = [*"abcXYZ0123456789 \t\n\r'.,!?-/<|>_^é½٣ſDŽ😀", "  ", "\n\n", "\r\n", "'s", "'LL", "你好", "日本", " the"]
ALPHABET += ["👩‍👩‍👧", "\u0301", "\u00a0", "\u2003", "\u3000", "\u2028", "\x85", "\u200b", "<|endoftext|>"]
GPT2_FILES = ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")  # merges, vocab


def random_texts(count, length=200):
    draw = random.Random(7)
    return [*PROBES, *("".join(draw.choices(ALPHABET, k=length)) for _ in range(count))]


@functools.cache
def small_tokenizer():
    """Returns a trained tokenizer of 400 ids; random_texts(60) is the text it was trained on."""
    return train_bpe(random_texts(60), 400)


def write_rank_file(folder, ranks, pattern=GPT2_PATTERNS[0], special_tokens=None):
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items()]
    (folder / "x.tiktoken").write_bytes(b"".join(lines))
    special_tokens = {"<|endoftext|>": max(ranks.values()) + 1} if special_tokens is None else special_tokens
    (folder / "x.json").write_text(json.dumps({"pattern": pattern, "special_tokens": special_tokens}))
    return folder / "x.tiktoken"


def byte_ranks():
    return {bytes([byte]): byte for byte in range(256)}


def same_as_transformers(folder, tokenizer, texts):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    ordinary = {"split_special_tokens": True}  # end-of-text in a text is ordinary text
    assert [theirs.encode(text, **ordinary) for text in texts] == [tokenizer.encode(text) for text in texts]
    return theirs
