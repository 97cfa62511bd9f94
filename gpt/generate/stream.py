"""The bytes of tokens -> pieces of text: whole characters only, and nothing of a stop string."""

import codecs


class TextStream:
    """Assembles text from the bytes of one token after another.

    A character is given out when its last byte is there. Text that may be the beginning of a stop string is held back
    until it is none. The pieces together are the text that decoding all bytes at once would give, up to the first stop
    string: the one that is complete first (of several, the longest). Invalid bytes become U+FFFD."""

    def __init__(self, stop=()):
        self.stop = stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""  # decoded, and perhaps the beginning of a stop string
        self.stopped = False

    def push(self, data, final=False):
        """The text that is certain once bytes `data` follow; `final` gives out what was held back too."""
        if self.stopped:
            return ""
        text = self.held + self.decoder.decode(data, final)
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stop if stop in text]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)[1]]
        certain = len(text) if final else len(text) - self.undecided(text)
        self.held = text[certain:]
        return text[:certain]

    def undecided(self, text):
        """How many characters at the end of `text` may be the beginning of a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)
