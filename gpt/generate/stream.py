"""The bytes of tokens -> pieces of text: whole characters only, and nothing of a stop string."""

import codecs


class TextStream:
    """Assembles text from the bytes of one token after another.

    `push` returns a character when its last byte has arrived, and holds back text that may be the beginning of a stop
    string. The joined pieces are the text that decoding all bytes at once gives, up to the first stop string: the stop
    string that is complete first (the longest, if several end there). Invalid bytes become U+FFFD."""

    def __init__(self, stop: tuple[str, ...] = ()):
        self.stop = stop
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""  # text that is decoded but held back
        self.stopped = False

    def push(self, data: bytes, final: bool = False) -> str:
        """Adds bytes. Returns the text that no later byte can change; with `final`, also the text that was held
        back."""
        if self.stopped:
            return ""
        text = self.held + self.utf8.decode(data, final)
        matches = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stop if stop in text]
        if matches:
            self.stopped, self.held = True, ""
            return text[: min(matches)[1]]
        certain = len(text) if final else len(text) - self.uncertain(text)
        self.held = text[certain:]
        return text[:certain]

    def uncertain(self, text: str) -> int:
        """Returns how many characters at the end of `text` may be the beginning of a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)
