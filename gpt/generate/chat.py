"""A conversation in the terminal: what is typed is the user's turn, and the model answers as the assistant."""

import contextlib
from typing import Any

from gpt.errors import Error, tell
from gpt.generate.generator import TextGenerator
from gpt.generate.interactive import Session, Write
from gpt.text.examples import ASSISTANT, SYSTEM, USER, Turn, Turns, encode_chat, require_template

HELP = r"""What you type is your message, and the model answers. Lines that are pasted
together are one message. Ctrl-C stops the answer, Ctrl-D leaves.
/system TEXT      begin a new conversation, with this system message
/set NAME VALUE   change a setting: /set temperature 0.7, /set seed none
/set              list the settings
/reset            begin a new conversation; the settings stay
/help  /quit"""


class Chat(Session):
    """The conversation so far, and the settings with which the model continues it. Raises InputError if the model has
    not learned from messages."""

    help, beginning = HELP, "a new conversation begins"
    greeting = "type a message; /help explains, Ctrl-D leaves"

    def __init__(self, generator: TextGenerator, settings: dict[str, Any], seed: int, write: Write):
        require_template(generator.tokenizer, "--chat")
        super().__init__(generator, settings, seed, write)
        self.turns: Turns = ()

    def obey(self, line: str) -> None:
        """Runs a command, or lets the model answer: see Session.obey."""
        command, _, text = line.strip().partition(" ")
        if command == "/system":
            self.reset()
            self.turns = (Turn(SYSTEM, text),) if text else ()
        else:
            super().obey(line)

    def extend(self, typed: str) -> None:
        """Adds the user's turn `typed` and the model's answer to the conversation. After Ctrl-C the conversation keeps
        what was written so far; after an Error it is that before the call. Does nothing for a blank line."""
        if not typed.strip():
            return
        before, asked = self.turns, self.fitting((*self.turns, Turn(USER, typed)))
        text, reason = "", None
        events = self.generator.events([asked], [self.params()], [self.turn])
        self.turn += 1
        try:
            with contextlib.closing(events):
                for sequence, piece in events:
                    text += piece
                    self.turns = (*asked, Turn(ASSISTANT, text))
                    reason = sequence.finish_reason
                    self.write(piece)
        except Error:
            self.turns = before
            raise
        finally:
            self.write("\n")
        if reason == "length":
            tell(f"(cut off after {self.params().max_new_tokens} tokens; /set max_new_tokens N allows more)")

    def fitting(self, turns: Turns) -> Turns:
        """Returns `turns` without the oldest questions and answers, as many as leave no room for the answer in the
        context. The system message and the last turn stay."""
        context = self.generator.model.config.block_size
        most = context - min(self.params().max_new_tokens, context // 2)
        kept = turns
        first = int(turns[0].role == SYSTEM)
        while len(kept) > first + 1 and len(encode_chat(kept, self.generator.tokenizer)) > most:
            kept = kept[:first] + kept[first + 2 :]
        if len(kept) < len(turns):
            tell(f"(the oldest turns are forgotten: the context is {context} tokens)")
        return kept

    def reset(self) -> None:
        """Begins a new conversation: see Session.reset."""
        self.turns = ()
        super().reset()
