"""Clusters of alike prompts: variants of one template, and the turns of a conversation whose beginning changes.

A prompt belongs to the oldest cluster with which it has at least about a third of its *shingles* (three successive
token ids) in common. The share is estimated by MinHash (Broder, "On the resemblance and containment of documents",
1997): under each of `HASHES` orders of all shingles, a prompt's first one is remembered with its cluster, and so many
of a prompt's first ones are a cluster's as its share of the prompt is. All hashes are keyed with a secret; no token id
is kept.

- A longer prompt is compared by its beginnings of several lengths, too: a later turn contains the earlier ones.
- *Frames* do not count: shingles of the chat template, of a system prompt, or of whatever else is in `FRAME_PROMPTS`
  different prompts or more, and in `FRAME_SHARE` of the recent ones. Else all traffic with one system prompt would be
  one cluster. So a template with that many variants is traffic of its own: its variants are told from each other.
- A conversation, or the prompt where none is known, is in one cluster whatever its turns say.

The digest of a cluster follows from shingles of its first prompt, so that a template that was forgotten often gets the
same one again. Memory is fixed: a new entry takes the slot of an older one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from hemostat_calibration.arrays import Ids
from hemostat_calibration.errors import InvalidArgumentError

SHINGLE = 3
HASHES, MIN_COMMON, MIN_PART = 32, 10, 4
SLOTS = 1 << 17
"""A new prompt takes up to `HASHES` + 1 of them."""
MAX_PROMPTS = 1 << 15
"""The last ones; what is of an older one is forgotten."""
COUNTERS = 1 << 18
"""The number of counters of shingles. Shingles that share a counter are counted together, which adds 0.2 to 0.4 % of
the prompts.
"""
FRAME_PROMPTS, FRAME_SHARE = 32, 0.02
RECENT_PROMPTS = 8192
"""All counts are halved after so many prompts."""
MAX_SHINGLES = 136
"""The first ones of a prompt that are no frames."""
BLOCKS = (0, 512, 2048, 8192)
"""The blocks of a prompt: its tokens are looked at from one of these to the next; no more of them where there are
enough that are no frames."""
_LENGTHS = np.array([0, 12, 17, 24, 34, 48, 68, 96, 136])
"""The numbers of shingles of the beginnings that are compared. Of two neighbours the shorter one is 0.7 of the longer
one."""
_BEGINNINGS = [_LENGTHS[: np.searchsorted(_LENGTHS, count)] for count in range(MAX_SHINGLES + 1)]
"""The places at which `np.minimum.reduceat` cuts the shingles, by their number."""
_FIELDS = {
    "counters": (COUNTERS, np.uint16),
    "tags": (SLOTS, np.uint32),
    "owners": (SLOTS, np.uint32),
    "digests": (MAX_PROMPTS, np.uint64),
    "clusters": (MAX_PROMPTS, np.uint32),
}
_SLOT_BITS, _COUNTER_BITS = np.uint32(32 - 17), np.uint32(32 - 18)
_ONE, _HALF, _COUNT = np.uint32(1), np.uint32(16), np.uint16(1)
_MAX_HEADER_BYTES = 1 << 16
_MAX_COUNT = (1 << 32) - 1

Words = npt.NDArray[np.uint32]


class TemplateTable:
    """The table of all clusters. key: secret, at most 64 bytes.

    >>> table = TemplateTable(b"secret")
    >>> prompts = np.arange(60, dtype=np.int32).reshape(1, -1).repeat(3, axis=0)
    >>> prompts[1, 30] = 7
    >>> prompts[2] += 100
    >>> first, variant, other = (table.assign(prompt) for prompt in prompts)
    >>> first == variant, first == other
    (True, False)
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        seed = hashlib.shake_128(b"hemostat templates" + key).digest(4 * (3 + 3 * HASHES))
        words = np.frombuffer(seed, "<u4").astype(np.uint32)
        self._fold = words[:3] | _ONE
        factors, spread, self._turns = words[3:].reshape(3, HASHES, 1)
        self._factors, self._spread = factors | _ONE, spread | _ONE
        self.counted = 0
        """The number of different prompts so far, in the units of the counters."""
        self.prompts = 0
        """The number of all prompts so far, which is the number of the last one."""
        self._counters = np.zeros(COUNTERS, np.uint16)
        self._tags = np.zeros(SLOTS, np.uint32)
        """The tag of the entry in each slot; 0: nothing."""
        self._owners = np.zeros(SLOTS, np.uint32)
        """The number of the first prompt that had it."""
        self._clusters = np.zeros(MAX_PROMPTS, np.uint32)
        """The first prompt of the cluster of each of the last prompts, by the prompt's number."""
        self._digests = np.zeros(MAX_PROMPTS, np.uint64)
        """The digest of the cluster of each of the last prompts, by the prompt's number."""

    def assign(self, prompt: Ids, conversation: bytes = b"") -> bytes:
        """Returns the 16-byte digest of the prompt's cluster, which begins with it where it is like none. prompt: int32
        [P]. conversation: digest of the request's conversation; empty where none is known. Raises InvalidArgumentError
        for another shape."""
        if prompt.ndim != 1:
            raise InvalidArgumentError(f"prompt has shape {prompt.shape}: it must be [P]")
        prompt = np.ascontiguousarray(prompt, np.int32)
        name = hashlib.blake2b(conversation or prompt.tobytes(), digest_size=8, key=self._key).digest()
        own = int.from_bytes(name, "little")
        slot, tag = own & SLOTS - 1, own >> 32 | 1
        owner = int(self._owners[slot]) if self._tags[slot] == tag else 0
        if owner <= self._forgotten:
            owner = self._add(self._count(prompt), own)
            self._tags[slot], self._owners[slot] = tag, owner
        digest = self._digests[owner % MAX_PROMPTS].tobytes()
        return hashlib.blake2b(digest, digest_size=16, key=self._key).digest()

    @property
    def _forgotten(self) -> int:
        """The number up to which prompts are forgotten."""
        return max(self.prompts - MAX_PROMPTS, 0)

    def _count(self, prompt: Ids) -> Words:
        """Returns the hashes of the first shingles that are no frames; all that were looked at are counted."""
        parts: list[Words] = []
        left = MAX_SHINGLES
        least = max(FRAME_PROMPTS, FRAME_SHARE * self.counted)
        for start, end in pairwise(BLOCKS):
            if start >= len(prompt):
                break
            hashes = self._shingles(prompt[start : end + SHINGLE - 1])
            slots = (hashes >> _COUNTER_BITS).astype(np.intp)
            counts = self._counters.take(slots)
            # Once, however often it is in these tokens; far below 2¹⁶ since all are halved (`RECENT_PROMPTS`).
            self._counters[slots] = counts + _COUNT
            parts.append((hashes if counts.max(initial=0) < least else hashes.compress(counts < least))[:left])
            left -= len(parts[-1])
            if left <= MAX_SHINGLES // 2:
                break
        self.counted += 1
        if self.counted >= RECENT_PROMPTS:
            self._counters >>= _COUNT
            self.counted //= 2
        return np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else np.zeros(0, np.uint32)

    def _shingles(self, ids: Ids) -> Words:
        """Returns the shingles of a prompt, uint32 [P - 2]."""
        words = ids.view(np.uint32)
        first, second, third = self._fold
        hashes: Words = words[:-2] * first
        hashes += words[1:-1]
        hashes *= second
        hashes += words[2:]
        hashes ^= hashes >> _HALF
        hashes *= third
        return hashes

    def _add(self, shingles: Words, own: int) -> int:
        """Returns the number of a new prompt with these shingles. own: names it."""
        self.prompts += 1
        number, cluster, digest = self.prompts, self.prompts, np.uint64(own)
        if len(shingles):
            hashes = self._factors * shingles
            ends = _BEGINNINGS[len(shingles)]
            # uint32 [HASHES, L]: the first shingle under each order, of all beginnings.
            minima = np.minimum.accumulate(np.minimum.reduceat(hashes, ends, axis=1), axis=1)
            slots = ((minima * self._spread + self._turns) >> _SLOT_BITS).astype(np.intp)
            owners = self._owners.take(slots) * (self._tags.take(slots) == minima)
            like = self._find(owners)
            if like:
                cluster, digest = self._clusters[like % MAX_PROMPTS], self._digests[like % MAX_PROMPTS]
            else:
                digest = np.uint64(int(minima[0, -1]) << 32 | int(minima[1, -1]))
            new = owners[:, -1] <= self._forgotten  # what is known stays with its first prompt
            at = slots[new, -1]
            self._tags[at], self._owners[at] = minima[new, -1], number
        self._clusters[number % MAX_PROMPTS], self._digests[number % MAX_PROMPTS] = cluster, digest
        return number

    def _find(self, owners: Words) -> int:
        """Returns a prompt of the oldest of the clusters that have enough in common with one of the beginnings; 0 where
        none has. owners: uint32 [HASHES, L], the first prompt that had each of the first shingles, or 0.

        Only prompts with a part of it count: else what is made of phrases that are common, each in another prompt,
        would be like all of them."""
        if np.count_nonzero(owners) < MIN_COMMON:
            return 0
        like: list[int] = []
        for column in owners[:, np.count_nonzero(owners, axis=0) >= MIN_COMMON].T.tolist():
            common = {n: count for n, count in Counter(column).items() if n > self._forgotten and count >= MIN_PART}
            if sum(common.values()) >= MIN_COMMON:
                like += common
        return min(like, key=lambda number: int(self._clusters[number % MAX_PROMPTS]), default=0)

    def save(self) -> bytes:
        """Returns the table as bytes, about 1.8 MB; `load` reads it, with the same key."""
        arrays = {name: getattr(self, f"_{name}") for name in _FIELDS}
        return bytes(safetensors.numpy.save(arrays, {"prompts": str(self.prompts), "counted": str(self.counted)}))

    @classmethod
    def load(cls, data: bytes, key: bytes) -> TemplateTable:
        """Returns the table that `save` wrote. Raises InvalidArgumentError if `data` was not made by `save`.

        >>> table = TemplateTable(b"secret")
        >>> digest = table.assign(np.arange(40, dtype=np.int32))
        >>> TemplateTable.load(table.save(), b"secret").assign(np.arange(1, 41, dtype=np.int32)) == digest
        True
        """
        table = cls(key)
        try:
            length = int.from_bytes(data[:8], "little")
            counts = json.loads(data[8 : 8 + min(length, _MAX_HEADER_BYTES)])["__metadata__"]
            arrays = safetensors.numpy.load(data)
            table.prompts, table.counted = (
                min(max(int(counts[name]), 0), _MAX_COUNT) for name in ("prompts", "counted")
            )
            stored = {name: arrays[name] for name in _FIELDS}
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidArgumentError(f"templates cannot be read: {str(error)[:100]}") from None
        for name, (shape, kind) in _FIELDS.items():
            if stored[name].shape != (shape,) or stored[name].dtype != kind:
                raise InvalidArgumentError(f"templates: {name} is {stored[name].dtype} {stored[name].shape}")
            setattr(table, f"_{name}", stored[name].copy())
        return table
