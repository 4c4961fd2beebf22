"""The learner: `python -m hemostat.learner.learner_process PARENT_PID`. Numpy, no torch.

It receives records, keeps statistics (`hemostat_calibration.learning.contextual.learner`), and makes a proposal on
request. That can take minutes: between its steps the records that have come meanwhile are learned from.
"""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hemostat.checkpoints.output_embedding import load
from hemostat.ipc import child_process as child
from hemostat.learner import learner_messages
from hemostat_calibration.errors import HemostatError, InvalidArgumentError
from hemostat_calibration.learning.contextual import storage
from hemostat_calibration.learning.contextual.anchors import choose_anchors
from hemostat_calibration.learning.contextual.choose import ProfileLimits
from hemostat_calibration.learning.contextual.learner import ContextualLearner

NICENESS = 15
"""The niceness of the learner: a lower priority than all other processes have, the reference included."""
MAX_QUEUED_MESSAGES = 16
"""The largest number of messages that are read ahead of the one that is being worked on."""
ALL = ""
"""The name of the state in what is stored. Earlier versions also learned of parts of the traffic, under other names."""
MAX_ANCHOR_ELEMENTS = 1 << 26
"""The largest number of elements of the output embedding that anchors are chosen from: enough rows, and seconds instead
of minutes."""
MAX_TOKENIZER_BYTES = 256 * 1024 * 1024

Send = Callable[[learner_messages.Answer], None]


class ProcessLearner:
    """Owns what was learned."""

    def __init__(self, start: learner_messages.Start, stored: bytes = b"") -> None:
        """Raises HemostatError if the output embedding cannot be used. stored: an earlier learner's export; b"":
        none."""
        weight = load(Path(start.folder), start.vocab_size)
        if start.hidden_size and weight.shape[1] != start.hidden_size:
            raise HemostatError(
                f"{start.folder}: its output embedding has {weight.shape[1]} columns, the reference's hidden states "
                f"{start.hidden_size}; reference.folder must be the reference's own checkpoint"
            )
        anchors = choose_anchors(weight, start.anchors, among=eligible(weight, special_ids(Path(start.folder))))
        self._family = ContextualLearner(
            weight,
            anchors,
            limits=ProfileLimits(start.rank, start.clamp_nats, start.kl_limit),
            half_life_tokens=start.half_life_tokens,
            recent_tokens=start.recent_tokens,
            min_tokens=start.min_tokens,
        )
        self._model, self._vocab_size, self._anchors = start.model, start.vocab_size, len(anchors)
        self._state = self._family.init(start.model, start.vocab_size)
        self._failed: Counter[str] = Counter()
        self._about = json.dumps([start.model, start.vocab_size, start.hidden_size, start.reference])
        self._stored_bytes = start.stored_bytes
        self.has_unsaved = False
        """It is True if something was learned since the last export."""
        detail = self._restore(stored) if stored else ""
        self.ready = learner_messages.Ready(anchors.astype("<i4").tobytes(), self._learned(), detail)

    def _restore(self, stored: bytes) -> str:
        """Goes on from an export. Returns why that is not possible, or ""."""
        try:
            states = storage.load(stored, self._family, self._about)
        except InvalidArgumentError as error:
            return str(error)
        if any((s.model, s.vocab_size) != (self._model, self._vocab_size) for s in states.values()):
            return "what was learned is of another model"
        self._state = states.get(ALL, self._state)
        return ""

    def export(self) -> Iterator[learner_messages.Exported]:
        """Yields what was learned, in parts."""
        self.has_unsaved = False
        data = storage.save({ALL: self._state}, self._family, self._about, self._stored_bytes)
        for part, last in learner_messages.parts(data):
            yield learner_messages.Exported(part, last)

    def update(self, request: learner_messages.Learn) -> learner_messages.Learned:
        for row in request.rows:
            try:
                self._learn(row)
            except (HemostatError, ValueError) as error:
                # What does not fit is left out, and counted.
                self._failed[type(error).__name__] += 1
        self.has_unsaved = self.has_unsaved or (bool(request.rows) and self._stored_bytes > 0)
        return self._learned()

    def _learned(self) -> learner_messages.Learned:
        return learner_messages.Learned(
            tokens=self._state.tokens,
            sources={str(source): tokens for source, tokens in self._state.tokens_by_source.items()},
            failed=dict(self._failed),
        )

    def _learn(self, row: learner_messages.Row) -> None:
        record = learner_messages.from_row(row, self._vocab_size)
        if record.features is not None and record.features.values.shape[1] != self._anchors:
            raise InvalidArgumentError(f"features of {record.features.values.shape[1]} anchors, not {self._anchors}")
        self._state = self._family.update(self._state, [record])

    def propose(self, progress: Callable[[str, float], None]) -> learner_messages.Proposed:
        tokens = self._state.tokens
        try:
            proposal = self._family.fit(self._state, progress)
        except (HemostatError, ValueError, np.linalg.LinAlgError, MemoryError) as error:
            return learner_messages.Proposed(tokens, b"", {"problem": f"{type(error).__name__}: {error}"})
        if proposal is None:
            return learner_messages.Proposed(tokens, b"", {})
        report = {name: _plain(value) for name, value in asdict(proposal.report).items()}
        return learner_messages.Proposed(tokens, proposal.profile.to_bytes(), report)


def _plain(value: object) -> str | int | float:
    return value if isinstance(value, str | int | float) else str(value)


def eligible(weight: npt.NDArray[np.float32], special: set[int]) -> npt.NDArray[np.int32]:
    """Returns the ids that anchors are chosen from: no special ones, as those get masked; only a part of the others if
    need be."""
    ids = np.setdiff1d(np.arange(len(weight), dtype=np.int32), np.array(sorted(special), np.int32))
    return ids[:: max(1, -(-ids.size * weight.shape[1] // MAX_ANCHOR_ELEMENTS))]


def special_ids(folder: Path) -> set[int]:
    """Returns the ids of begin, end, padding and the like, as far as the checkpoint's files name them."""
    result: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        given = _json(folder / name)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = given.get(key)
            result.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    added = _json(folder / "tokenizer.json").get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and token.get("special") and isinstance(token.get("id"), int):
            result.add(token["id"])
    return result


def _json(file: Path) -> dict[str, object]:
    """Returns the content of a JSON file; {} if it is missing or not readable: it is optional."""
    try:
        if file.stat().st_size > MAX_TOKENIZER_BYTES:
            return {}
        result = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


class RequestLoop:
    """Handles one request after the other; while a proposal is made, records that come are learned from."""

    def __init__(
        self, learner: ProcessLearner, requests: queue.Queue[learner_messages.Request | None], send: Send
    ) -> None:
        """requests: None is their end."""
        self._learner = learner
        self._requests = requests
        self._send = send
        self._proposals_due = 0
        """The number of proposals that were requested."""
        self._ended = False

    def run(self) -> None:
        """Handles requests until they end."""
        while not self._ended:
            if self._proposals_due:
                self._proposals_due -= 1
                self._propose()
            else:
                self._handle(self._requests.get())

    def _handle(self, request: learner_messages.Request | None) -> None:
        match request:
            case None:
                self._ended = True
            case learner_messages.Learn():
                self._send(self._learner.update(request))
            case learner_messages.Propose():
                self._proposals_due += 1
            case learner_messages.Export():
                self.export()
            case learner_messages.Start() | learner_messages.Restore():
                raise ValueError("the learner has started already")

    def export(self) -> None:
        for part in self._learner.export():
            self._send(part)

    def _propose(self) -> None:
        def progress(stage: str, done: float) -> None:
            self._send(learner_messages.Training(stage, done))
            with contextlib.suppress(queue.Empty):
                while not self._ended:
                    self._handle(self._requests.get_nowait())
            if self._ended:
                raise SystemExit(0)

        self._send(self._learner.propose(progress))


def read_ahead(bodies: Iterator[bytes]) -> queue.Queue[learner_messages.Request | None]:
    """Returns a queue of the messages, which a thread of its own reads; None is their end."""
    requests: queue.Queue[learner_messages.Request | None] = queue.Queue(MAX_QUEUED_MESSAGES)

    def read() -> None:
        try:
            for body in bodies:
                requests.put(learner_messages.REQUESTS.decode(body))
        finally:
            requests.put(None)

    threading.Thread(target=read, name="reader", daemon=True).start()
    return requests


def main(parent: int) -> int:
    """Runs the learner; returns 0 when the input has ended, 1 if it could not start."""
    bodies, send = child.connect_to_parent(parent, NICENESS)

    def answer(message: learner_messages.Answer) -> None:
        send(learner_messages.ANSWERS.encode(message))

    start = learner_messages.REQUESTS.decode(next(bodies))
    try:
        if not isinstance(start, learner_messages.Start):
            raise HemostatError("the first message must be start")
        learner = ProcessLearner(start, _stored(bodies) if start.restores else b"")
    except (HemostatError, MemoryError) as error:
        answer(learner_messages.Refused(str(error) or type(error).__name__))
        return 1
    answer(learner.ready)
    loop = RequestLoop(learner, read_ahead(bodies), answer)
    with contextlib.suppress(SystemExit):  # a proposal was abandoned
        loop.run()
    if learner.has_unsaved:
        loop.export()
    return 0


def _stored(bodies: Iterator[bytes]) -> bytes:
    """Returns the bytes of the `Restore` messages that follow. Raises HemostatError on another message."""
    parts: list[bytes] = []
    for body in bodies:
        message = learner_messages.REQUESTS.decode(body)
        if not isinstance(message, learner_messages.Restore):
            break
        parts.append(message.part)
        if message.last:
            return b"".join(parts)
    raise HemostatError("what was stored came incomplete")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(int(sys.argv[1])))
