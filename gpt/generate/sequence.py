"""One text under way: its prompt, the tokens chosen so far, the text they make, and where it ends."""

from dataclasses import dataclass

from gpt.generate.stream import TextStream


@dataclass(frozen=True)
class Completion:
    text: str
    """without the prompt, the stop string and end-of-text"""
    ids: list[int]
    """all ids chosen but end-of-text, those of a stop string too"""
    finish_reason: str
    """why the text ends: "length", or "stop" for end-of-text and stop strings"""
    logprobs: list[float] | None
    """of `ids`, in nats; None unless asked for"""
    top_logprobs: list[list[tuple[int, float]]] | None = None
    """for each of `ids` the likeliest ids there with their log-probabilities; None unless asked for"""


class Sequence:
    """Sample `sample` of prompt number `number`, whose ids are `prompt`. What is drawn goes by the seed of `params`,
    `prompt_id`, sample and position."""

    def __init__(self, number, prompt, prompt_id, sample, params, tokenizer):
        self.number, self.prompt, self.prompt_id, self.sample = number, prompt, prompt_id, sample
        self.params, self.tokenizer, self.stream = params, tokenizer, TextStream(params.stop)
        self.ids, self.pieces = [], []
        self.logprobs = [] if params.logprobs else None
        self.top_logprobs = [] if params.top_logprobs else None
        self.finish_reason = None

    def take(self, chosen, logprob=None, likeliest=None):
        """Append the id `chosen`; the piece of text that has become certain. `likeliest` are (id, log-probability)."""
        if chosen == self.tokenizer.eot:
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

    def finish(self, reason):
        """End the text; the piece that was held back."""
        piece = self.stream.push(b"", final=True)
        self.pieces.append(piece)
        self.finish_reason = "stop" if self.stream.stopped else reason
        return piece

    def window(self, length):
        """The last `length` ids of prompt and text."""
        missing = length - len(self.ids)
        return self.prompt[-missing:] + self.ids if missing > 0 else self.ids[-length:]

    @property
    def completion(self):
        return Completion("".join(self.pieces), self.ids, self.finish_reason, self.logprobs, self.top_logprobs)
