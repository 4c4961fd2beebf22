"""The newest texts of the learning side, as token ids, in memory."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from hemostat.checkpoints.texts import Text
from hemostat_calibration.arrays import Ids

MAX_TEXT_TOKENS = 2048
"""The largest number of tokens of one text. The newest ones of a longer text are kept: the memory that a text needs
grows with its length."""


class Texts:
    """Bounded by their tokens: the oldest text goes, as soon as the others have `max_tokens`.

    >>> import numpy as np
    >>> texts = Texts(3)
    >>> texts.update(b"a", np.array([1, 2], np.int32), np.array([3], np.int32))
    >>> texts.update(b"b", np.array([4, 5], np.int32), np.array([6], np.int32))
    >>> [text.output.tolist() for text in texts.all()], texts.tokens, texts.known
    ([[6]], 3, 6)
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._texts: OrderedDict[bytes, Text] = OrderedDict()
        self.tokens = 0
        """The number of tokens of all texts that are kept."""
        self.known = 0
        """The same, with those that went for newer ones."""

    def __len__(self) -> int:
        return len(self._texts)

    def update(self, unit: bytes, prompt: Ids, output: Ids) -> None:
        """unit: of the conversation, whose newest turn repeats the earlier ones: it takes their place."""
        output = output[-(MAX_TEXT_TOKENS - 1) :]
        text = Text(
            np.array(prompt[max(0, len(prompt) + len(output) - MAX_TEXT_TOKENS) :], np.int32),
            np.array(output, np.int32),
        )
        self.known -= self._remove(unit)
        self._texts[unit] = text
        self.tokens += len(text)
        self.known += len(text)
        while self.tokens - len(self._oldest()) >= self._max_tokens:
            self._remove(next(iter(self._texts)))

    def all(self) -> list[Text]:
        """The oldest first."""
        return list(self._texts.values())

    def clear(self) -> None:
        self._texts.clear()
        self.tokens = self.known = 0

    def _oldest(self) -> Text:
        return next(iter(self._texts.values()))

    def _remove(self, unit: bytes) -> int:
        """Removes the text of a unit, if there is one. Returns the number of its tokens, or 0."""
        text = self._texts.pop(unit, None)
        tokens = 0 if text is None else len(text)
        self.tokens -= tokens
        return tokens
