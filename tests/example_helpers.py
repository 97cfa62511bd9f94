"""Conversations whose content is hard to tell from the layout around it."""

import random

PARTS = [
    "user",
    "assistant",
    "system",
    "\n",
    " ",
    "\t",
    "{{ messages }}",
    "{% endif %}",
    "{# x #}",
    "'",
    '"',
    "\\n",
    "\\",
]
PARTS += [
    "😀",
    "👩‍👩‍👧",
    "é",
    "e\u0301",
    "日本",
    "\u00a0",
    "\u3000",
    "\x1c",
    "<|user|>",
    "<|endoftext",
    "|>",
    "hello",
    "World 12",
    "\r\n",
]
PARTS += ["eos_token", "assistant\n", "\n\n", "raise_exception", "\x85", "\u200b", "\ufeff", "\0", "'s", "."]


def conversations(count):
    """Yields `count` random conversations whose content tries to be something else, but for the end-of-text string."""
    draw = random.Random(11)
    while count:
        roles = (["system"] if draw.random() < 0.4 else []) + ["user", "assistant"] * draw.randint(1, 4)
        contents = ["".join(draw.choices(PARTS, k=draw.randint(0, 12))) for _ in roles]
        if not any("<|endoftext|>" in content for content in contents):
            count -= 1
            yield [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
