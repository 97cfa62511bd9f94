"""The file of answers: a JSON line for each text, in the order of the prompts. After a kill, the
same command continues the file."""

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from gpt.errors import InputError, ResourceError, stdout_errors
from gpt.files import lock_file
from gpt.generate.prompts import Prompt
from gpt.generate.sequence import Completion, Events

OTHER = "give --out another name"
SAME = f"give the prompts and --num_samples of before, or {OTHER}"


def answer_line(prompt: Prompt, completion: Completion, escape: bool = False) -> str:
    """Returns the JSON line of a Completion, without a line break. With `escape`, the line is pure ASCII."""
    answer: dict[str, Any] = {
        **prompt.asked,
        "text": completion.text,
        "tokens": completion.ids,
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason,
    }
    if completion.top_logprobs is not None:
        answer["top_logprobs"] = completion.top_logprobs
    return json.dumps(answer | prompt.extra, ensure_ascii=escape)


class Answers(NamedTuple):
    """What is in a file of answers. A kill may have left a part of an answer behind the whole answers."""

    texts: int  # number of whole answers
    total: int  # number of answers that the file is to hold
    end: int = 0  # number of bytes of the whole answers
    size: int = 0  # number of bytes of the file


def read_answers(path: str, prompts: list[Prompt], samples: list[int]) -> Answers:
    """Returns how many of the answers to `prompts` the file `path` holds; `samples` is the number of texts for each
    prompt. Raises InputError if the file holds anything else, ResourceError if it cannot be read."""
    texts, end, total = 0, 0, sum(samples)
    if not os.path.exists(path):
        return Answers(0, total)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            for prompt in itertools.chain.from_iterable(map(itertools.repeat, prompts, samples)):
                if not read_answer(file, prompt, f"{path}:{texts + 1}"):
                    return Answers(texts, total, end, size)
                texts, end = texts + 1, file.tell()
    except OSError as error:
        raise ResourceError(f"{path}: {error.strerror}; make it readable, or {OTHER}") from None
    if end < size:
        raise InputError(f"{path}:{texts + 1}: more answers than these prompts have; {SAME}")
    return Answers(texts, total, end, size)


def read_answer(file: IO[bytes], prompt: Prompt, where: str) -> bool:
    """Reads a line and returns whether it is a whole answer to `prompt`: False at the end of the file, and for the
    beginning of an answer that a kill has cut off. Raises InputError, which begins with `where`, for any other line."""
    known = json.dumps(prompt.asked, ensure_ascii=False).removesuffix("}")
    begin = known.encode("utf-8", "backslashreplace") + b', "text": "'
    line = file.read(len(begin))  # shorter than `begin` only at the end of the file
    if begin.startswith(line):
        line += file.readline()
        if not line.endswith(b"\n"):
            return False
        if line.endswith(b"}\n"):
            return True
    raise InputError(f"{where}: not an answer to prompt {json.dumps(prompt.id)}; {SAME}")


@contextlib.contextmanager
def open_answers(path: str, answers: Answers | None = None) -> Iterator[IO[str]]:
    """Returns a context that gives the file to write answers to: stdout if `path` is empty; with `answers`, the file
    that they were read from, cut after them; else `path`, overwritten. Raises ResourceError if writing fails, or if
    another program writes to the file or has changed it since it was read."""
    if not path:
        with stdout_errors():
            yield sys.stdout
        return
    mode = "w" if answers is None else "a"
    try:
        # A lone surrogate of a JSONL prompt becomes \udXXX, which is its JSON escape.
        with open(path, mode, encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            if answers is not None:
                lock_answers(file, path, answers)
                file.truncate(answers.end)
            yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ResourceError(f"{path}: {error.strerror}; free space, or {OTHER}") from None


def lock_answers(file: IO[str], path: str, answers: Answers) -> None:
    with contextlib.suppress(OSError):  # some network file systems have no locks
        if not lock_file(file):
            raise ResourceError(f"{path}: another program is writing to it; wait for it, or {OTHER}")
    if os.fstat(file.fileno()).st_size != answers.size:
        raise ResourceError(f"{path}: another program has changed it meanwhile; start again")


class AnswerBar(tqdm):
    """A progress bar on stderr, if stderr is a terminal. Shows the number of finished texts (at the start `texts`, of
    `total`) and the tokens per second. Not `shown` where the answers themselves go to the terminal: the first would
    stand in the bar's line."""

    def __init__(self, texts: int, total: int, shown: bool = True):
        disable = None if shown else True  # None: if stderr is no terminal
        super().__init__(initial=texts, total=total, unit=" texts", mininterval=0.5, miniters=0, disable=disable)

    def count(self, events: Events) -> Events:
        """Yields the events, and adds their tokens and finished texts to the bar."""
        start = time.monotonic()
        for tokens, (sequence, piece) in enumerate(events, 1):
            self.set_postfix_str(f"{tokens / max(time.monotonic() - start, 1e-9):,.0f} tok/s", refresh=False)
            self.update(sequence.finish_reason is not None)
            yield sequence, piece
