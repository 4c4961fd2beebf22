"""Recognition of requests that go on with an earlier one: turns of a conversation whose beginning changes, such as a
date in the system prompt or a first message that is dropped, so that no hash of the beginning names it.

A request that goes on with another one contains the end of its prompt, followed by the beginning of its answer. Of each
request the hash of these `WINDOW` tokens, `ANSWER` of them of the answer (of a shorter one all), is remembered with the
name of its conversation; a prompt that contains them belongs to that conversation. Variants of a template do not: they
have the prompt's end in common, and no answer follows it. What several conversations have in common, such as the end of
a tool's result and the beginning of the next call, names none of them. Hashes are keyed; no token id is kept.

Turns are not recognized if the client changed their answer or left its thinking out, or if they are tokenized in
another way than they were generated.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Ids

WINDOW, ANSWER = 32, 16
MAX_REQUESTS = 50_000
"""The largest number of requests that are remembered; of more, the older half is forgotten."""
SEVERAL = b""
"""The value in place of the name of a conversation if several conversations have the hash."""
_BITS = 20
"""The number of bits of a place in the filter in front of the table of hashes: 5 % of the places are taken at
`MAX_REQUESTS`.
"""
_SHIFT = np.uint64(64 - _BITS)
_ONE = np.uint64(1)


class Continuations:
    """The table of the hashes of earlier requests. key: secret, at most 64 bytes.

    >>> known = Continuations(b"secret")
    >>> question, answer, next_question = (np.arange(n, n + 40, dtype=np.int32) for n in (0, 100, 200))
    >>> known.update(question, answer, b"first")
    >>> later = np.concatenate([question[5:], answer, next_question])
    >>> known.conversation(later, b"another"), known.conversation(question, b"another")
    (b'first', b'another')
    """

    def __init__(self, key: bytes) -> None:
        seed = hashlib.shake_128(b"hemostat continuations" + key).digest(8 * 6)
        self._factors = np.frombuffer(seed, "<u8").astype(np.uint64) | _ONE
        self._conversations: dict[int, bytes] = {}
        """The name of the conversation by the hash of a window."""
        self._filter = np.zeros(1 << _BITS, np.bool_)

    def conversation(self, prompt: Ids, own: bytes) -> bytes:
        """Returns the conversation of the earlier request that this one goes on with; `own` if none is known. prompt:
        int32 [P].
        """
        hashes = self._hashes(prompt)
        for at in np.flatnonzero(self._filter.take((hashes >> _SHIFT).astype(np.intp))).tolist():
            if known := self._conversations.get(int(hashes[at])):
                return known
        return own

    def update(self, prompt: Ids, output: Ids, conversation: bytes) -> None:
        """Adds a request of this conversation, which is not empty. prompt, output: int32 [P], [T]. Nothing is
        remembered of less than a window."""
        window = np.concatenate([prompt[-WINDOW:], output[:ANSWER]])[-WINDOW:]
        for hashed in self._hashes(window).tolist():
            if self._conversations.setdefault(hashed, conversation) != conversation:
                self._conversations[hashed] = SEVERAL
            self._filter[hashed >> 64 - _BITS] = True
        if len(self._conversations) > MAX_REQUESTS:
            kept = list(self._conversations.items())[MAX_REQUESTS // 2 :]
            self._conversations = dict(kept)
            self._filter[:] = False
            self._filter[[hashed >> 64 - _BITS for hashed, _ in kept]] = True

    def _hashes(self, ids: Ids) -> npt.NDArray[np.uint64]:
        """Returns the hash of every window, uint64 [max(N − WINDOW + 1, 0)]: polynomials, of twice as many tokens at a
        time.
        """
        if len(ids) < WINDOW:
            return np.zeros(0, np.uint64)
        hashes: npt.NDArray[np.uint64] = (ids.astype(np.uint64) + _ONE) * self._factors[0]
        hashes ^= hashes >> np.uint64(32)
        size = 1
        for factor in self._factors[1:]:
            hashes = hashes[:-size] * factor + hashes[size:]
            size *= 2
        return hashes
