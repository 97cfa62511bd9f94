"""One text: the settings that it is generated with, its prompt, the ids chosen so far, and where it ends."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass, field

from gpt.generate.sampling import SamplingParams
from gpt.generate.stream import TextStream
from gpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerationParams:
    """Everything that decides what is generated from a prompt, apart from model, device, precision and back end."""

    max_new_tokens: int = 200
    """tokens to generate after each prompt"""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    """strings that end the text where they first occur, and are left out of it; on the command line, \n, \t and \\ in
    them are a line break, a tab and a backslash"""
    ignore_eot: bool = False
    """never choose end-of-text, so that every text gets its full length"""
    num_samples: int = 1
    """texts for each prompt"""
    seed: int | None = None
    """the same seed and settings give the same text, if --rows, --dtype and --backend are named; None draws one"""
    rows: int = 0
    """texts generated side by side, each with its own key-value cache; 0 goes by their number, the device and its free
    memory. Another number may round differently: the same text again needs the same --rows, precision and back end"""
    truncate: bool = False
    """drop the beginning of a prompt that is longer than the context, instead of refusing it"""
    allow_special: bool = False
    """read <|endoftext|> in a prompt as the token, not as text"""
    logprobs: bool = False
    """give the log-probability of each token, in the model's own distribution before any sampling setting"""
    top_logprobs: int = 0
    """give, for each token, the log-probabilities of this many likeliest tokens at its position; 0 is off"""

    def problems(self) -> list[str]:
        """Returns what is wrong with these values, in words."""
        stops_fit = not isinstance(self.stop, str) and all(isinstance(stop, str) and stop for stop in self.stop)
        rules = [
            (self.max_new_tokens >= 0, f"max_new_tokens {self.max_new_tokens} must be 0 or more"),
            (self.num_samples >= 1, f"num_samples {self.num_samples} must be at least 1"),
            (self.rows >= 0, f"rows {self.rows} must be 0 (automatic) or more"),
            (self.seed is None or 0 <= self.seed < 1 << 64, f"seed {self.seed} must be from 0 to 2^64 - 1"),
            (0 <= self.top_logprobs <= 100, f"top_logprobs {self.top_logprobs} must be from 0 (off) to 100"),
            (stops_fit, "stop must be strings that are not empty"),
        ]
        return [text for is_fine, text in rules if not is_fine] + self.sampling.problems()


@dataclass(frozen=True)
class Completion:
    text: str  # without the prompt, the stop string and end-of-text
    ids: list[int]  # all chosen ids except end-of-text; includes the ids of a stop string
    finish_reason: str  # why the text ends: "length", or "stop" for end-of-text and stop strings
    logprobs: list[float] | None  # of `ids`, in nats; None unless `logprobs` is set
    top_logprobs: list[list[tuple[int, float]]] | None = None
    """for each of `ids` the likeliest ids at its position, and their log-probabilities; None without `top_logprobs`"""


@dataclass(eq=False)
class Sequence:
    """A text in progress. Its random numbers depend on the seed in `params`, on `prompt_id`, on `sample` and on the
    position of a token, and on nothing else."""

    number: int  # of this text among all texts of a call, from 0
    prompt_number: int  # number of its prompt among the prompts, from 0
    prompt: list[int]  # ids; the samples of a prompt share this list
    prompt_id: int | str
    sample: int  # number of this text among the samples of its prompt, from 0
    params: GenerationParams
    tokenizer: Tokenizer
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)  # of the text; "" where a token completes no character
    finish_reason: str | None = None  # that of Completion; None until the text ends

    def __post_init__(self) -> None:
        self.stream = TextStream(self.params.stop)
        self.logprobs: list[float] | None = [] if self.params.logprobs else None
        self.top_logprobs: list[list[tuple[int, float]]] | None = [] if self.params.top_logprobs else None

    def take(self, chosen: int, logprob: float, likeliest: list[tuple[int, float]]) -> str:
        """Appends the id `chosen`, or ends the text if it is one of the tokenizer's `stops`. Returns the piece of text
        that has become certain. Stores `logprob` and `likeliest`, a list of (id, log-probability), if `params` has
        `logprobs` or `top_logprobs` set."""
        if chosen in self.tokenizer.stops:
            return self.finish("stop")
        self.ids.append(chosen)
        if self.logprobs is not None:
            self.logprobs.append(logprob)
        if self.top_logprobs is not None:
            self.top_logprobs.append(likeliest[: self.params.top_logprobs])
        piece = self.stream.push(self.tokenizer.decode_bytes([chosen]))
        self.pieces.append(piece)
        if self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.ids) == self.params.max_new_tokens:
            piece += self.finish("length")
        return piece

    def finish(self, reason: str) -> str:
        """Ends the text and returns the piece that was held back. `reason` becomes the finish_reason, unless this piece
        completes a stop string."""
        piece = self.stream.push(b"", final=True)
        self.pieces.append(piece)
        self.finish_reason = "stop" if self.stream.stopped else reason
        return piece

    def window(self, length: int) -> list[int]:
        """Returns the last `length` ids of prompt and text."""
        missing = length - len(self.ids)
        return self.prompt[-missing:] + self.ids if missing > 0 else self.ids[-length:]

    @property
    def completion(self) -> Completion:
        """The text so far."""
        reason = self.finish_reason or ""
        return Completion("".join(self.pieces), self.ids, reason, self.logprobs, self.top_logprobs)


Event = tuple[Sequence, str]  # after each token: its Sequence, and the piece of text that has become certain
Events = Generator[Event, None, None]


def in_order(events: Iterable[Event]) -> Events:
    """Yields the events of one text after another, by their `number`. The pieces of a later text wait until its turn
    comes, and are then joined to one event."""
    waiting: dict[int, tuple[Sequence, list[str]]] = {}
    number = 0
    for sequence, piece in events:
        waiting.setdefault(sequence.number, (sequence, []))[1].append(piece)
        while number in waiting:
            sequence, pieces = waiting.pop(number)
            yield sequence, "".join(pieces)
            number += sequence.finish_reason is not None
