"""The file of answers: a JSON line for each text, in the order of the prompts. After a kill a run goes on with it."""

import contextlib
import json
import os
import sys
import time
from collections import Counter

from gpt.errors import InputError, ResourceError
from gpt.files import lock_file

LONGEST_LINE = 1 << 30  # bytes; what is longer is no answer
OTHER = "give --out another name"


def answer_line(prompt, completion, escape=False):
    """The JSON line of a Completion, less its line break; `escape` leaves only ASCII."""
    answer = {
        "id": prompt.id,
        "prompt": prompt.text,
        "text": completion.text,
        "tokens": completion.ids,
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason,
    }
    if completion.top_logprobs is not None:
        answer["top_logprobs"] = completion.top_logprobs
    return json.dumps(answer, ensure_ascii=escape)


class Answers:
    """What a file of answers holds already. `samples` maps each Prompt's id to the number of its texts.

    `finished` are the ids all of whose texts it holds, `end` the number of bytes that these take: what follows was
    cut off by a kill and is to be made again. Raises InputError for a file that holds anything else."""

    def __init__(self, path, prompts, samples):
        self.path, self.prompts, self.samples = path, {prompt.id: prompt for prompt in prompts}, samples
        self.finished, self.end, self.size = set(), 0, 0
        self.counts, self.begun = Counter(), None  # texts by id; the id some of whose texts are there
        if not os.path.isfile(path):  # not there, or a device
            return
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self.read(file)
        except OSError as error:
            raise ResourceError(f"{path}: {error.strerror}; make it readable, or {OTHER}") from None

    @property
    def texts(self):
        """The number of texts of the finished ids."""
        return sum(self.counts[prompt_id] for prompt_id in self.finished)

    def read(self, file):
        place, number = 0, 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            place += len(line)
            if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                self.check_torn(line, number)
                break
            self.count(self.id_of(line, number))
            if self.begun is None:
                self.end = place

    def id_of(self, line, number):
        """The id of an answer's line. Raises InputError unless it is an answer to one of the prompts."""
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or not isinstance(answer.get("text"), str) or "finish_reason" not in answer:
            raise InputError(f"{self.path}:{number}: not an answer of this program; {OTHER}")
        prompt_id = answer.get("id")
        known = self.prompts.get(prompt_id) if type(prompt_id) in (int, str) else None
        if known is None or known.text != answer.get("prompt"):
            raise InputError(f"{self.path}:{number}: holds answers to other prompts; {OTHER}")
        return prompt_id

    def count(self, prompt_id):
        """Take note of one more text. Raises InputError where a kill cannot be the reason that a number is wrong."""
        self.counts[prompt_id] += 1
        found, due = self.counts[prompt_id], self.samples[prompt_id]
        wrong = prompt_id if found > due else self.begun
        if wrong is not None and (found > due or wrong != prompt_id):
            texts = f"{self.counts[wrong]} texts for prompt {json.dumps(wrong)}, not {self.samples[wrong]}"
            raise InputError(f"{self.path}: holds {texts}; give the --num_samples of before, or {OTHER}")
        self.begun = prompt_id if found < due else None
        if found == due:
            self.finished.add(prompt_id)

    def check_torn(self, line, number):
        """Raise InputError unless `line`, the file's last and without an end, is the beginning of an answer."""
        for prompt in self.prompts.values():
            begin = json.dumps({"id": prompt.id, "prompt": prompt.text}, ensure_ascii=False)[:-1]
            begin = begin.encode("utf-8", "backslashreplace")
            if line.startswith(begin) or begin.startswith(line):
                return
        raise InputError(f"{self.path}:{number}: not the beginning of an answer to these prompts; {OTHER}")


@contextlib.contextmanager
def opened(path, answers=None):
    """The text file `path`, made anew, or to write on after the finished ones of `answers`. Raises ResourceError if
    another program writes to it, or did so since it was read."""
    # A lone surrogate from a JSONL prompt becomes \\udXXX, which is its JSON escape.
    with open(path, "a" if answers else "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        if answers and os.path.isfile(path):
            with contextlib.suppress(OSError):  # some network file systems have no locks
                if not lock_file(file):
                    raise ResourceError(f"{path}: another program is writing to it; wait for it, or {OTHER}")
            if os.fstat(file.fileno()).st_size != answers.size:
                raise ResourceError(f"{path}: another program has changed it meanwhile; start again")
            if answers.end < answers.size:
                file.truncate(answers.end)
        yield file


class Progress:
    """A context with a bar on stderr, if that is a terminal: texts that are finished, tokens a second."""

    def __init__(self, done, params):
        """`done` texts are there already, those of `params`, one for each prompt, are to come."""
        from tqdm import tqdm

        total = done + sum(own.num_samples for own in params)
        self.bar = tqdm(initial=done, total=total, unit=" texts", disable=not sys.stderr.isatty())
        self.tokens, self.start, self.shown = 0, time.monotonic(), 0.0

    def add(self, finished):
        """Take note of one more token, and of a text that it finished."""
        self.tokens += 1
        self.bar.update(finished)
        now = time.monotonic()
        if now - self.shown > 0.5:
            self.bar.set_postfix_str(f"{self.tokens / max(now - self.start, 1e-9):,.0f} tok/s")
            self.shown = now

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
