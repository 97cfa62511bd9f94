"""What the text of each row holds already: the frequency and presence penalties, and no n-gram twice.

`Counts` lowers logits as OpenAI defines it, where count is the number of times that the text, without its prompt, has
the token:

    logit - count * frequency_penalty - (presence_penalty if count > 0 else 0)

`NGrams` forbids a token that would complete a sequence of n tokens which prompt and text hold already, as transformers
does. For each place it knows how many tokens before it equal the newest tokens. Example with n = 3:

    place     0  1  2  3  4
    token     a  b  c  a  b
    equal     0  0  2  0  0     before place 2 stand "a b", as at the end: n - 1 tokens, so "c" is forbidden

When a token t is appended, the number of place j + 1 becomes that of place j, plus 1, where the token of place j is t,
else 0. So a step takes the same time for every n.

Both keep their values in tensors that steps change in place, for all of a text, whatever its window. No row depends on
another row. They allocate memory when a text first needs them. Shapes: R rows, V vocabulary, T places."""

from collections.abc import Sequence

import numpy as np
import torch

from gpt.device import to_device
from gpt.generate.sampling import SamplingParams

FORBIDDEN = torch.finfo(torch.float32).min  # not -inf, which would look like damaged weights
NEVER = 1 << 30  # more tokens than any text has
NOTHING = -1  # in place of an id
FEWEST_PLACES = 256
Ids = Sequence[int]


class Counts:
    """How often the text of each row has each token, for the frequency and presence penalties."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device):
        self.shape, self.device = (rows, vocab_size), device
        self.frequency, self.presence = torch.zeros(2, rows, 1, device=device)  # (R, 1) each
        self.counts = torch.zeros(0, device=device)  # (R, V) once a row needs it; float32 is exact below 2^24
        self.rows: set[int] = set()  # that have a penalty

    def begin(self, row: int, params: SamplingParams | None, prompt: Ids = (), ids: Ids = ()) -> None:
        """Gives `row` to a text with these settings, whose chosen ids are `ids`; None makes the row idle."""
        frequency, presence = (params.frequency_penalty, params.presence_penalty) if params else (0.0, 0.0)
        if row in self.rows or frequency or presence:
            self.frequency[row], self.presence[row] = frequency, presence
        self.rows.discard(row)
        if frequency or presence:
            self.rows.add(row)
            if not len(self.counts):
                self.counts = torch.zeros(self.shape, device=self.device)
            counts = torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=self.shape[1])
            self.counts[row] = to_device(counts.float(), self.device)

    def discourage(self, logits: torch.Tensor) -> None:
        """Lowers logits (R, V) in place."""
        logits.sub_(self.counts * self.frequency + (self.counts > 0) * self.presence)

    def append(self, ids: torch.Tensor) -> None:
        """Adds the next id of each row, (R,), to the texts."""
        self.counts.scatter_add_(1, ids[:, None], torch.ones_like(self.frequency))

    @property
    def kind(self) -> int:
        """0 if no row needs this; see NGrams.kind."""
        return len(self.counts) if self.rows else 0

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What `append` changes."""
        return [self.counts]


class NGrams:
    """The tokens of each row's prompt and text, and for each place how many tokens before it equal the newest ones."""

    def __init__(self, rows: int, device: torch.device):
        self.device = device
        self.needed = torch.full((rows, 1), NEVER, device=device)  # equal tokens before a place that forbid its token
        self.tokens = torch.full((rows, 0), NOTHING, device=device)  # (R, T); NOTHING beyond the end
        self.equal = torch.zeros_like(self.tokens)  # (R, T)
        self.lengths = torch.zeros_like(self.needed)  # (R, 1) places of each row in use
        self.prompt_lengths: dict[int, int] = {}  # row -> tokens of its prompt, for rows that need this

    def begin(self, row: int, params: SamplingParams | None, prompt: Ids = (), ids: Ids = ()) -> None:
        """Gives `row` to a text with these settings, prompt and chosen ids; None makes the row idle."""
        n = params.no_repeat_ngram if params else 0
        if row in self.prompt_lengths or n:
            self.needed[row] = min(n - 1, NEVER) if n else NEVER
        self.prompt_lengths.pop(row, None)
        if n:
            text = [*prompt, *ids]
            self.prompt_lengths[row] = len(prompt)
            self.reserve(len(text))
            for tensor, values, rest in ((self.tokens, text, NOTHING), (self.equal, equal_before(text), 0)):
                tensor[row] = rest
                tensor[row, : len(text)] = to_device(torch.tensor(values), self.device)
            self.lengths[row] = len(text)

    def reserve(self, places: int) -> None:
        """Makes room for texts of this many tokens. The tensors then have other addresses, and `kind` another value."""
        if places > self.tokens.shape[1]:
            more = max(FEWEST_PLACES, 1 << (places - 1).bit_length()) - self.tokens.shape[1]
            self.tokens = torch.nn.functional.pad(self.tokens, (0, more), value=NOTHING)
            self.equal = torch.nn.functional.pad(self.equal, (0, more))

    def discourage(self, logits: torch.Tensor) -> None:
        """Makes FORBIDDEN of the logits (R, V) of tokens that would complete an n-gram a second time, in place."""
        rows, vocab_size = logits.shape
        forbids = (self.equal >= self.needed) & (self.tokens != NOTHING)
        forbidden = torch.zeros(rows, vocab_size + 1, dtype=torch.bool, device=self.device)  # the last column is no id
        forbidden.scatter_(1, self.tokens.where(forbids, vocab_size), True)
        logits.masked_fill_(forbidden[:, :vocab_size], FORBIDDEN)

    def append(self, ids: torch.Tensor) -> None:
        """Adds the next id of each row, (R,), to the texts."""
        longer = (self.equal + 1) * (self.tokens == ids[:, None])
        self.equal[:, 1:] = longer[:, :-1]
        last = self.tokens.shape[1] - 1  # only rows that do not need this get beyond it
        self.tokens.scatter_(1, self.lengths.clamp(max=last), ids[:, None])
        self.lengths += 1

    @property
    def kind(self) -> int:
        """0 if no row needs this, else a number that differs when the tensors have other addresses. A step that was
        captured under one kind must not be replayed under another."""
        return self.tokens.shape[1] if self.prompt_lengths else 0

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What `append` changes."""
        return [self.tokens, self.equal, self.lengths]


class Repeats:
    """Both of them, for the rows of a Step."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device):
        self.parts = Counts(rows, vocab_size, device), NGrams(rows, device)

    @property
    def used(self) -> list[Counts | NGrams]:
        return [part for part in self.parts if part.kind]

    @property
    def kind(self) -> tuple[int, ...]:
        """See NGrams.kind."""
        return tuple(part.kind for part in self.parts)

    def begin(self, row: int, params: SamplingParams | None, prompt: Ids = (), ids: Ids = ()) -> None:
        """Gives `row` to a text with these settings, prompt and chosen ids; None makes the row idle."""
        for part in self.parts:
            part.begin(row, params, prompt, ids)

    def reserve(self, chosen: np.ndarray, steps: int) -> None:
        """Makes room for `steps` more ids in each row, whose text has `chosen` ids, (R,)."""
        ngrams = self.parts[1]
        ends = [length + int(chosen[row]) for row, length in ngrams.prompt_lengths.items()]
        if ends:
            ngrams.reserve(max(ends) + steps)


def equal_before(text: Ids) -> list[int]:
    """Returns for each place of a text how many tokens before it equal the last tokens of the text. This is the Z
    function of the text read backwards (Gusfield 1997, "Algorithms on Strings, Trees, and Sequences", section 1.4):
    linear time.

    equal_before([5, 6, 7, 5, 6]) -> [0, 0, 2, 0, 0]
    """
    backward, equal = text[::-1], [0] * len(text)
    left = right = 0  # backward[left:right] equals the beginning of `backward`; the one that ends last so far
    for start in range(1, len(text)):
        count = min(equal[start - left], right - start) if start < right else 0
        while start + count < len(text) and backward[count] == backward[start + count]:
            count += 1
        equal[start] = count
        if start + count > right:
            left, right = start, start + count
    return [0, *equal[:0:-1]] if text else []
