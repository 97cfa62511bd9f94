"""Examples to learn from: a record becomes turns, and the turns become ids with a mask of what is learned.

An example is a prompt and its completion, or a conversation. Each line below is encoded by itself; what is learned
stands in brackets, and | is the end-of-text id:

    prompt and completion     prompt
                              [completion]
                              [|]
    conversation              |
                              user, line break, content
                              |
                              assistant, line break, [content]
                              [|]                                  it also begins the next turn, if there is one

The content of a turn is trimmed. `<|endoftext|>` in it is ordinary text, so no content can pretend to be a turn. The
same layout is written as `chat_template` for transformers, where a typed `<|endoftext|>` would become the id: there the
template raises an error. A tokenizer with the chat template of another program lays out conversations by that: see
templates.py."""

import itertools
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from gpt.errors import InputError, printable
from gpt.text.records import FIELDS, Record, fields_of, type_of
from gpt.text.shards import FIRST, TARGET
from gpt.text.templates import parts_of, rendered
from gpt.text.tokenizer import ROLES_WITH_IDS, Tokenizer

PROMPTS, MESSAGES = "prompts", "messages"  # the two kinds of examples
PROMPT, COMPLETION = "prompt", "completion"  # roles of the turns of the first kind
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"  # roles of the turns of the second kind
ROLES = {SYSTEM: SYSTEM, USER: USER, ASSISTANT: ASSISTANT, "human": USER, "gpt": ASSISTANT}  # the last two: ShareGPT's
CONVERSATIONS = ("messages", "conversations", "conversation")  # names of the field with a conversation
PAIRS = (  # names of the fields with a prompt and its completion
    (PROMPT, COMPLETION),
    (PROMPT, "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
)
CONTEXTS = ("input", "context")  # names of a field with more of an instruction
GREEN, GRAY, PLAIN, REVERSE, FORWARD = "\x1b[32m", "\x1b[90m", "\x1b[0m", "\x1b[7m", "\x1b[27m"


class Turn(NamedTuple):
    """What a role says."""

    role: str
    content: str


Turns = tuple[Turn, ...]


class Form(NamedTuple):
    """Which fields of a record are an example: (prompt, completion), (instruction, context, output), (messages,)."""

    kind: str  # PROMPTS or MESSAGES
    fields: tuple[str, ...]

    @property
    def wanted(self) -> str:
        """What a record must have, for a message."""
        if self.kind == MESSAGES:
            return f'list "{self.fields[0]}" of messages'
        return f'strings "{self.fields[0]}" and "{self.fields[-1]}"'

    @property
    def description(self) -> str:
        """What was recognised, for a message."""
        if self.kind == MESSAGES:
            return f"conversations in the field {self.fields[0]!r}; the assistant's turns are learned"
        prompts = " and ".join(map(repr, self.fields[:-1]))
        return f"examples with the prompt in {prompts} and the completion, which is learned, in {self.fields[-1]!r}"


# ---- records to turns


def recognise(records: Iterable[Any]) -> Form | None:
    """Returns the Form of records by the names of their fields, upper or lower case: a field in CONVERSATIONS that is a
    list of objects, else a pair in PAIRS of strings, else None. If only one field of a pair holds strings, and no field
    of plain text stands beside it, the records are examples too: turns_of then names the field that is wrong."""
    values = [value for value in records if isinstance(value, dict)]
    names = {key.lower(): key for value in values for key in value if isinstance(key, str)}
    for name in CONVERSATIONS:
        lists = [value.get(names.get(name)) for value in values]
        if any(isinstance(items, list) and items and isinstance(items[0], dict) for items in lists):
            return Form(MESSAGES, (names[name],))
    texts = {name for name, key in names.items() if any(isinstance(value.get(key), str) for value in values)}
    whole = [pair for pair in PAIRS if texts.issuperset(pair)]
    half = [pair for pair in PAIRS if names.keys() >= set(pair) and texts.intersection(pair)]
    for prompt, completion in whole or ([] if texts.intersection(FIELDS) else half):
        more = [name for name in CONTEXTS if name in names and prompt == "instruction"][:1]
        return Form(PROMPTS, tuple(names[name] for name in (prompt, *more, completion)))
    return None


def turns_of(record: Record, form: Form, where: str) -> Turns:
    """Returns the turns of a record, or () if nothing in them can be learned. Raises InputError, which begins with
    `where`, for a record that is no example."""
    if record.problem:
        raise record.problem
    if not isinstance(record.value, dict):
        raise wrong(where, f"expected an object with {form.wanted}, it is {type_of(record.value)}")
    if form.kind == PROMPTS:
        turns = prompt_turns(record.value, form, where)
    else:
        if form.fields[0] not in record.value:
            raise wrong(where, f"expected an object with {form.wanted}, it has {fields_of(record.value)}")
        turns = message_turns(record.value[form.fields[0]], where)
        if turns[-1].role != ASSISTANT:
            raise wrong(
                where, f"the conversation ends with the {turns[-1].role}; its last turn must be the assistant's"
            )
    return turns if any(map(is_learned, turns)) else ()


def is_learned(turn: Turn) -> bool:
    """Returns whether a turn is learned. An empty answer is not: it would teach to say nothing."""
    return turn.role in (COMPLETION, ASSISTANT) and bool(turn.content.strip())


def prompt_turns(value: dict[str, Any], form: Form, where: str) -> Turns:
    """Returns the prompt and the completion of a record. Texts in the fields prompt and completion are taken as they
    are. Those of other names are texts of their own: they are trimmed, and a line break goes before the completion and
    between an instruction and its context."""
    texts = [text_in(value, name, name in form.fields[1:-1], where) for name in form.fields]
    if [name.lower() for name in form.fields] != [PROMPT, COMPLETION]:
        *parts, completion = (text.strip() for text in texts)
        texts = ["\n".join(filter(None, parts)), completion and f"\n{completion}"]
    return Turn(PROMPT, texts[0]), Turn(COMPLETION, texts[1])


def text_in(value: dict[str, Any], name: str, optional: bool, where: str) -> str:
    """Returns the string in the field `name`; "" for one that is `optional` and not there. Raises InputError if there
    is no string."""
    text = value.get(name)
    if text is None and optional:
        return ""
    if not isinstance(text, str):
        problem = f'"{name}" is {type_of(text)}' if name in value else f'there is no "{name}"'
        raise wrong(where, f"{problem}, expected a string")
    return text


def message_turns(messages: Any, where: str, advice: str = "") -> Turns:
    """Returns the turns of a list of messages, {"role": …, "content": …} or ShareGPT's {"from": …, "value": …}. Content
    is a string, or a list of parts {"type": "text", "text": …}, which are joined. Raises InputError, which begins with
    `where`, for anything else, an unknown role, and a system message after the first turn."""
    if not isinstance(messages, list) or not messages:
        raise wrong(where, "expected a list of messages", advice)
    turns: list[Turn] = []
    for number, message in enumerate(messages, 1):
        place = f"{where}: message {number}"
        if not isinstance(message, dict):
            raise wrong(place, f"expected an object, it is {type_of(message)}", advice)
        role, content = message.get("role", message.get("from")), joined(message.get("content", message.get("value")))
        if not isinstance(role, str) or role not in ROLES:
            raise wrong(place, f"unknown role {json.dumps(role)[:60]}; roles are {', '.join(ROLES)}", advice)
        if not isinstance(content, str):
            raise wrong(place, f"its content is {type_of(content)}, expected a string", advice)
        if ROLES[role] == SYSTEM and turns:
            raise wrong(place, "a system message must be the first, and there may be one", advice)
        turns.append(Turn(ROLES[role], content))
    return tuple(turns)


def joined(content: Any) -> Any:
    """Returns the joined text of a list of parts of text, as OpenAI's messages have them. Returns anything else
    unchanged."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    whole = [text for text in texts if isinstance(text, str)]
    return "".join(whole) if len(whole) == len(content) else content


def wrong(where: str, problem: str, advice: str = "") -> InputError:
    return InputError(f"{where}: {problem}; {advice or 'correct it, or use --errors skip'}")


# ---- turns to ids


def turn_text(turn: Turn) -> str:
    """Returns what is encoded for a turn of a conversation, after an end-of-text id."""
    return f"{turn.role}\n{turn.content.strip()}"


def whole_text(turns: Turns) -> str:
    """Returns the text of an example, which is counted and compared with others."""
    if turns and turns[0].role == PROMPT:
        return "".join(turn.content for turn in turns)
    return "\n".join(map(turn_text, turns))


def encode_example(turns: Turns, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of an example, uint32 (T,), and its mask of the bits TARGET and FIRST, uint8 (T,). Raises
    InputError for a conversation that the tokenizer's own template cannot lay out."""
    if turns[0].role != PROMPT and has_other_template(tokenizer):
        return encode_by_template(turns, tokenizer)
    parts: list[tuple[Iterable[int], bool]] = []
    for turn in turns:
        learned = is_learned(turn)
        if turn.role == PROMPT:
            parts.append((tokenizer.encode_prompt(turn.content), False))
        elif turn.role == COMPLETION:
            parts.append((tokenizer.encode_to_numpy(turn.content), learned))
        else:
            ids = tokenizer.encode_to_numpy(turn_text(turn))
            border = ids_over(ids, len(f"{turn.role}\n"), tokenizer)
            parts += [([tokenizer.eot], bool(parts) and parts[-1][1]), (ids[:border], False), (ids[border:], learned)]
    parts.append(([tokenizer.eot], is_learned(turns[-1])))
    arrays = [np.asarray(ids, np.uint32) for ids, _ in parts]
    mask = np.repeat(np.array([learned for _, learned in parts], np.uint8), list(map(len, arrays)))
    mask[0] |= FIRST
    return np.concatenate(arrays), mask


def ids_over(ids: np.ndarray, size: int, tokenizer: Tokenizer) -> int:
    """Returns how many of the first `ids` it takes to cover the first `size` bytes of their text. If a token spans that
    border, it counts: a model that continues a prompt which ends at the border cannot choose it, so it is not
    learned."""
    count = covered = 0
    while covered < size:
        covered += len(tokenizer.decode_bytes([int(ids[count])]))
        count += 1
    return count


def encode_chat(turns: Iterable[Turn], tokenizer: Tokenizer) -> list[int]:
    """Returns the ids after which a model writes the assistant's next turn. Raises InputError for a conversation that
    the tokenizer's own template cannot lay out."""
    if has_other_template(tokenizer):
        text = rendered(tokenizer.additions.chat_template, *for_template(turns, tokenizer), ask=True)
        return tokenizer.encode(text, allow_special=True)
    texts = [*map(turn_text, turns), f"{ASSISTANT}\n"]
    return list(itertools.chain.from_iterable([tokenizer.eot, *tokenizer.encode(text)] for text in texts))


# ---- the layout of another program


def has_other_template(tokenizer: Tokenizer) -> bool:
    """Returns whether a tokenizer has a chat template that is not this program's."""
    return tokenizer.additions.chat_template not in ("", chat_template(tokenizer))


def for_template(turns: Iterable[Turn], tokenizer: Tokenizer) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Returns what a chat template gets: the messages, and the texts of bos_token, eos_token and others. Raises
    InputError for content that spells a special token: the rendered text is encoded with special tokens."""
    messages = [turn._asdict() for turn in turns]
    for message in messages:
        if held := [token for token in tokenizer.special_tokens if token in message["content"]]:
            raise InputError(f"the content of a message holds the special token {held[0]}; leave it out")
    [end] = [text for text, rank in tokenizer.special_tokens.items() if rank == tokenizer.eot]
    return messages, dict.fromkeys(ROLES_WITH_IDS, end) | tokenizer.additions.roles


def encode_by_template(turns: Turns, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Returns what encode_example returns, laid out by the tokenizer's own chat template. A token that spans the border
    of an answer is not learned."""
    parts = parts_of(tokenizer.additions.chat_template, *for_template(turns, tokenizer))
    ids = tokenizer.encode_to_numpy("".join(text for text, _ in parts), allow_special=True)
    if not len(ids):
        raise InputError("the chat template makes no text of this conversation; use --chat_template ours")
    sizes = [len(tokenizer.decode_bytes([rank])) for rank in ids.tolist()]
    ends = np.cumsum(sizes)
    begins, mask, at = ends - sizes, np.zeros(len(ids), np.uint8), 0
    answers = iter(map(is_learned, (turn for turn in turns if turn.role == ASSISTANT)))
    for text, is_answer in parts:
        size = len(text.encode("utf-8", "replace"))
        if is_answer and next(answers):
            mask[(begins >= at) & (ends <= at + size)] = TARGET
        at += size
    mask[0] = FIRST
    return ids, mask


# ---- the same layout for other programs


def chat_template(tokenizer: Tokenizer) -> str:
    """Returns the Jinja template with which transformers and others lay out a conversation. It raises an error for an
    unknown role, for a system message after the first turn, and for content that is no string or holds a special token:
    these programs would read it as the token."""
    special = json.dumps(sorted(tokenizer.special_tokens), ensure_ascii=False)
    [end] = [text for text, rank in tokenizer.special_tokens.items() if rank == tokenizer.eot]
    end = json.dumps(end, ensure_ascii=False)
    return (
        "{%- for message in messages -%}"
        "{%- if message['role'] not in ['system', 'user', 'assistant'] "
        "or (message['role'] == 'system' and not loop.first) -%}"
        "{{- raise_exception('roles are system (first only), user and assistant') -}}{%- endif -%}"
        "{%- if message['content'] is not string -%}"
        "{{- raise_exception('the content of a message must be a string') -}}{%- endif -%}"
        f"{{%- for token in {special} -%}}{{%- if token in message['content'] -%}}"
        "{{- raise_exception('the content of a message holds the special token ' + token) -}}{%- endif -%}"
        "{%- endfor -%}"
        f"{{{{- {end} + message['role'] + '\\n' + (message['content'] | trim) -}}}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- {end} + 'assistant\\n' -}}}}"
        f"{{%- elif messages[-1]['role'] == 'assistant' -%}}{{{{- {end} -}}}}{{%- endif -%}}"
    )


def require_template(tokenizer: Tokenizer, name: str) -> None:
    """Raises InputError, which begins with `name`, unless the tokenizer of a model has a chat template."""
    if not tokenizer.additions.chat_template:
        why = "has not learned from messages: it has no chat template"
        raise InputError(f"{name}: this model {why}; give it a prompt, or fine-tune it on messages")


# ---- for the user's eyes


def shown_example(ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer, in_colour: bool) -> str:
    """Returns the text of an example: in colour, where learned text is green and the rest gray, or in lines that name
    which is which."""
    learned = (np.asarray(mask) & TARGET).tolist()
    parts = []
    for is_target, run in itertools.groupby(
        zip(np.asarray(ids).tolist(), learned, strict=True), key=lambda pair: pair[1]
    ):
        text = shown_text([rank for rank, _ in run], tokenizer, in_colour)
        if in_colour:
            parts.append(f"{GREEN if is_target else GRAY}{text}{PLAIN}")
        else:
            parts.append(f"  {'learned' if is_target else 'given'}: {text}\n")
    return "".join(parts).removesuffix("\n")


def shown_text(ids: list[int], tokenizer: Tokenizer, in_colour: bool) -> str:
    """Returns the text of ids. An end-of-text id differs from text that spells it: it is shown in reverse video, or,
    without colour, outside of the quotation marks."""
    parts = []
    for is_end, run in itertools.groupby(ids, key=lambda rank: rank == tokenizer.eot):
        text = tokenizer.decode(list(run))
        if in_colour:
            parts.append(f"{REVERSE}{text}{FORWARD}" if is_end else printable(text))
        else:
            parts.append(text if is_end else printable(json.dumps(text, ensure_ascii=False)))
    return ("" if in_colour else " ").join(parts)
