"""The newest texts of the learning side, as token ids, in memory."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from hemostat_calibration.arrays import Ids

MAX_TEXT_TOKENS = 2048
"""Of a longer text, the newest ones are kept: the memory that a text needs grows with its length."""


@dataclass(frozen=True, slots=True)
class LearnedText:
    """prompt: int32 [P]. output: int32 [T], T ≥ 1."""

    prompt: Ids
    output: Ids

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.output)


class Texts:
    """Bounded by their tokens: the oldest text goes, as soon as the others have `max_tokens`.

    >>> import numpy as np
    >>> texts = Texts(3)
    >>> texts.add(b"a", np.array([1, 2], np.int32), np.array([3], np.int32))
    >>> texts.add(b"b", np.array([4, 5], np.int32), np.array([6], np.int32))
    >>> [text.output.tolist() for text in texts.all()], texts.tokens, texts.known
    ([[6]], 3, 6)
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._texts: OrderedDict[bytes, LearnedText] = OrderedDict()
        self.tokens = 0
        """Of all texts that are kept."""
        self.known = 0
        """The same, with those that went for newer ones."""

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, unit: bytes, prompt: Ids, output: Ids) -> None:
        """unit: of the conversation, whose newest turn repeats the earlier ones: it takes their place."""
        output = output[-(MAX_TEXT_TOKENS - 1) :]
        text = LearnedText(
            np.array(prompt[max(0, len(prompt) + len(output) - MAX_TEXT_TOKENS) :], np.int32),
            np.array(output, np.int32),
        )
        self.known -= self._remove(unit)
        self._texts[unit] = text
        self.tokens += text.tokens
        self.known += text.tokens
        while self.tokens - self._oldest().tokens >= self._max_tokens:
            self._remove(next(iter(self._texts)))

    def all(self) -> list[LearnedText]:
        """The oldest first."""
        return list(self._texts.values())

    def clear(self) -> None:
        self._texts.clear()
        self.tokens = self.known = 0

    def _oldest(self) -> LearnedText:
        return next(iter(self._texts.values()))

    def _remove(self, unit: bytes) -> int:
        """How many tokens the text had."""
        text = self._texts.pop(unit, None)
        tokens = 0 if text is None else text.tokens
        self.tokens -= tokens
        return tokens
