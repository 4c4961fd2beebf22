"""The learner: `python -m hemostat.learner.process PARENT_PID`. Numpy, no torch.

It takes in records, keeps statistics (`hemostat_calibration.learning.contextual.learner`) of all traffic and of each
scope, and makes a proposal when asked. That can take minutes: between its steps it goes on taking in what has come
meanwhile.
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

from hemostat.ipc import child_process as child
from hemostat.learner import wire
from hemostat.learner.embedding import load
from hemostat_calibration.errors import HemostatError, InvalidArgumentError
from hemostat_calibration.learning.contextual.anchors import choose_anchors
from hemostat_calibration.learning.contextual.learner import ContextualLearner, ContextualState
from hemostat_calibration.learning.contextual.mlp import TrainingSettings

NICENESS = 15
"""Behind all else, the reference too."""
INBOX = 16
"""Messages read ahead of what is being worked on."""
SCOPES_AT_MOST = 8
"""That have statistics of their own: each costs as much memory as those of all traffic."""
ANCHORS_AMONG = 1 << 26
"""Elements of the output embedding that anchors are chosen from: rows enough, and seconds instead of minutes."""
ALL = ""
TOKENIZER_BYTES = 256 * 1024 * 1024

Say = Callable[[wire.Answer], None]


class Statistics:
    """What was learned, of all traffic and by scope."""

    def __init__(self, start: wire.Start) -> None:
        """HemostatError when the output embedding cannot be used."""
        weight = load(Path(start.folder), start.vocab_size)
        if start.hidden_size and weight.shape[1] != start.hidden_size:
            raise HemostatError(
                f"{start.folder}: its output embedding has {weight.shape[1]} columns, the reference's hidden states "
                f"{start.hidden_size}; calibration.output_embedding must be the reference's own checkpoint"
            )
        anchors = choose_anchors(weight, start.anchors, among=eligible(weight, special_ids(Path(start.folder))))
        self._family = ContextualLearner(
            weight,
            anchors,
            rank=start.rank,
            clamp_nats=start.clamp_nats,
            kl_limit=start.kl_limit,
            half_life_tokens=start.half_life_tokens,
            recent_tokens=start.recent_tokens,
            min_tokens=start.min_tokens,
            network=TrainingSettings(),
        )
        self._model, self._vocab_size, self._anchors = start.model, start.vocab_size, len(anchors)
        self._states: dict[str, ContextualState] = {ALL: self._new()}
        self._failed: Counter[str] = Counter()
        self.ready = wire.Ready(anchors.astype("<i4").tobytes(), weight.shape[1])

    def _new(self) -> ContextualState:
        return self._family.init(self._model, self._vocab_size)

    def learn(self, rows: list[wire.Row]) -> wire.Learned:
        for row in rows:
            try:
                self._learn(row)
            except (HemostatError, ValueError) as error:
                # One record that does not fit is one record less.
                self._failed[type(error).__name__] += 1
        whole = self._states[ALL]
        return wire.Learned(
            tokens={scope: state.tokens for scope, state in self._states.items()},
            sources={str(source): tokens for source, tokens in whole.tokens_by_source.items()},
            failed=dict(self._failed),
        )

    def _learn(self, row: wire.Row) -> None:
        record = wire.record(row, self._vocab_size)
        if record.features is not None and record.features.values.shape[1] != self._anchors:
            raise InvalidArgumentError(f"features of {record.features.values.shape[1]} anchors, not {self._anchors}")
        for scope in dict.fromkeys((ALL, row.scope)):
            if scope not in self._states:
                if len(self._states) > SCOPES_AT_MOST:
                    continue
                self._states[scope] = self._new()
            self._states[scope] = self._family.update(self._states[scope], [record])

    def propose(self, scope: str, progress: Callable[[str, float], None]) -> wire.Proposed:
        state = self._states.get(scope)
        if state is None:
            return wire.Proposed(scope, 0, b"", {"problem": "nothing has been learned of this scope"})
        base = self._states[ALL] if scope != ALL else None
        try:
            proposal = self._family.fit(state, base, progress)
        except (HemostatError, ValueError, np.linalg.LinAlgError, MemoryError) as error:
            return wire.Proposed(scope, state.tokens, b"", {"problem": f"{type(error).__name__}: {error}"})
        if proposal is None:
            return wire.Proposed(scope, state.tokens, b"", {})
        report = {name: _plain(value) for name, value in asdict(proposal.report).items()}
        return wire.Proposed(scope, state.tokens, proposal.profile.to_bytes(), report)


def _plain(value: object) -> str | int | float:
    return value if isinstance(value, str | int | float) else str(value)


def eligible(weight: npt.NDArray[np.float32], special: set[int]) -> npt.NDArray[np.int32]:
    """Ids that anchors are chosen from: none that is special, as those get masked; a part of the rest if need be."""
    ids = np.setdiff1d(np.arange(len(weight), dtype=np.int32), np.array(sorted(special), np.int32))
    return ids[:: max(1, -(-ids.size * weight.shape[1] // ANCHORS_AMONG))]


def special_ids(folder: Path) -> set[int]:
    """Begin, end and padding of text and the like, as far as the checkpoint's files tell."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        given = _json(folder / name)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = given.get(key)
            found.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    added = _json(folder / "tokenizer.json").get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and token.get("special") and isinstance(token.get("id"), int):
            found.add(token["id"])
    return found


def _json(file: Path) -> dict[str, object]:
    """{} where it is not there or not readable: it is of use only."""
    try:
        if file.stat().st_size > TOKENIZER_BYTES:
            return {}
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Desk:
    """Takes one request after the other; while it makes a proposal, it goes on learning."""

    def __init__(self, statistics: Statistics, inbox: queue.Queue[wire.Request | None], say: Say) -> None:
        self._statistics = statistics
        self._inbox = inbox
        self._say = say
        self._later: list[str] = []
        self._ends = False

    def run(self) -> None:
        """Until the input ends."""
        while not self._ends:
            if self._later:
                self._propose(self._later.pop(0))
            else:
                self._take(self._inbox.get())

    def _take(self, request: wire.Request | None) -> None:
        match request:
            case None:
                self._ends = True
            case wire.Learn():
                self._say(self._statistics.learn(request.rows))
            case wire.Propose():
                self._later.append(request.scope)
            case wire.Start():
                raise ValueError("it has started already")

    def _propose(self, scope: str) -> None:
        def progress(stage: str, done: float) -> None:
            self._say(wire.Training(stage, done))
            with contextlib.suppress(queue.Empty):
                while not self._ends:
                    self._take(self._inbox.get_nowait())
            if self._ends:
                raise SystemExit(0)

        self._say(self._statistics.propose(scope, progress))


def read_ahead(bodies: Iterator[bytes]) -> queue.Queue[wire.Request | None]:
    """What comes, as it comes; None at the end."""
    inbox: queue.Queue[wire.Request | None] = queue.Queue(INBOX)

    def read() -> None:
        try:
            for body in bodies:
                inbox.put(wire.decode_request(body))
        finally:
            inbox.put(None)

    threading.Thread(target=read, name="reader", daemon=True).start()
    return inbox


def main(parent: int) -> int:
    """0 when the input ended; 1 when it could not start."""
    bodies, send = child.begin(parent, NICENESS)

    def say(answer: wire.Answer) -> None:
        send(wire.encode(answer))

    start = wire.decode_request(next(bodies))
    try:
        if not isinstance(start, wire.Start):
            raise HemostatError("the first message must be start")
        statistics = Statistics(start)
    except (HemostatError, MemoryError) as error:
        say(wire.Refused(str(error) or type(error).__name__))
        return 1
    say(statistics.ready)
    Desk(statistics, read_ahead(bodies), say).run()
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(int(sys.argv[1])))
