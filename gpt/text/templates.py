"""Chat templates of other programs: a model's own program in Jinja that lays out its conversations.

It runs in Jinja's sandbox, which reaches nothing but the messages. What is learned follows from rendering a
conversation turn by turn: an answer is what is added to the question, asked with `add_generation_prompt`.

    question    <|user|>Hi<|end|><|assistant|>
    and answer  <|user|>Hi<|end|><|assistant|>Hello.<|end|>
    learned                                   [Hello.<|end|>]"""

import functools
import json
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
        return compiled(template).render(messages=messages, add_generation_prompt=ask, **tokens)
    except Error:
        raise
    except Exception as error:  # a template is a program of someone else, which may raise anything
        raise InputError(f"the chat template refuses this conversation ({error}); correct it") from None


@functools.cache
def compiled(template: str) -> Any:
    """Returns the Jinja template with the settings and functions that transformers gives to templates."""
    import jinja2  # comes with torch
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if tuple(map(int, jinja2.__version__.split(".")[:3])) < SAFE_JINJA:
        raise ResourceError(f"jinja2 {jinja2.__version__}: its sandbox is not safe; pip install -U jinja2")

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)


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
