"""Chat templates of other programs: a model's own program in Jinja that lays out its conversations.

It runs in Jinja's sandbox, which reaches nothing but the messages; a template that takes for ever is not stopped. To
find the answers, a conversation is rendered turn by turn: first the turns before an answer, with
`add_generation_prompt`, then the same turns and the answer. What the second text adds to the first is learned.

    question    <|user|>Hi<|end|><|assistant|>
    and answer  <|user|>Hi<|end|><|assistant|>Hello.<|end|>
    learned                                   [Hello.<|end|>]"""

import functools
import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from gpt.errors import Error, InputError, ResourceError

SAFE_JINJA = (3, 1, 6)  # CVE-2025-27516 before: a way out of the sandbox
CHANGES = "the chat template changes earlier turns, so the answers cannot be found; use --chat_template ours"
Message = dict[str, str]
Parts = list[tuple[str, bool]]


def rendered(template: str, messages: Sequence[Message], tokens: dict[str, str], ask: bool) -> str:
    """Returns the text of a conversation; with `ask`, up to where the assistant's answer begins. `tokens` has the texts
    of bos_token, eos_token and others. Raises InputError if the template refuses the conversation or fails."""
    try:
        nothing = {"tools": None, "documents": None}  # some templates ask whether they are None
        return compiled(template).render(messages=messages, add_generation_prompt=ask, **nothing, **tokens)
    except Error:
        raise
    except Exception as error:  # a template is a program of someone else, which may raise anything
        raise InputError(f"the chat template refuses this conversation ({error}); correct it") from None


@functools.cache
def compiled(template: str) -> Any:
    """Returns the Jinja template with the settings and functions that transformers gives to templates, but without
    `strftime_now`: the same text must have the same ids on another day."""
    import jinja2  # comes with torch
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < SAFE_JINJA:
        raise ResourceError(f"jinja2 {jinja2.__version__}: its sandbox is not safe; pip install -U jinja2")

    class Generation(Extension):
        """The tags {% generation %} … {% endgeneration %} around answers: they change no text."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.exceptions.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns a value as JSON, as transformers' filter of this name does. Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def parts_of(template: str, messages: Sequence[Message], tokens: dict[str, str]) -> Parts:
    """Returns the text of a conversation in parts, each with whether it is an answer of the assistant. Raises
    InputError if the text of a turn depends on the turns after it."""
    parts: Parts = []
    text = ""
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            for upto, ask, is_answer in ((number, True, False), (number + 1, False, True)):
                longer = rendered(template, messages[:upto], tokens, ask)
                if not longer.startswith(text):
                    raise InputError(CHANGES)
                parts.append((longer[len(text) :], is_answer))
                text = longer
    whole = rendered(template, messages, tokens, ask=False)
    if not whole.startswith(text):
        raise InputError(CHANGES)
    return [*parts, (whole[len(text) :], False)]
