"""Scores captured rows, wherever that is done: captured columns in, scored columns out.

A scored row is a captured row with what the reference said of it. It takes the stages that a capture takes in the
control process (`ScoringStages.ask`). Whoever reads scored rows makes the record anew by the same stages, with a
reference that answers what the row has (`StoredReference`). So a figure of a scored row is computed by the code that
computes it live.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa

from hemostat.engines.taps import TapResult
from hemostat.ipc.messages import Capture
from hemostat.metrics.reasons import Outcome
from hemostat.reference.protocol import FailureReason, ReferenceInfo, ReferenceScores, ScoreRequest
from hemostat.scoring.endings import NotScored
from hemostat.scoring.spool.columns import SCHEMA, VERSION_KEY, from_rows
from hemostat.scoring.spool.columns import SCHEMA_VERSION as CAPTURES_VERSION
from hemostat.scoring.spool.spooled import Spooled
from hemostat.scoring.stages import Answered
from hemostat_calibration.records import Candidates, RecoveredDivergence

SCORES_KEY: Final = b"hemostat.scores"
"""The key of the schema's metadata that has the version of the scored columns."""
SCORES_VERSION: Final = "1"
VERSIONS: Final = {VERSION_KEY: CAPTURES_VERSION, SCORES_KEY: SCORES_VERSION}
"""The versions that the schema of scored rows names."""
FAILURES_OF_A_ROW = frozenset({FailureReason.OUT_OF_MEMORY, FailureReason.MODEL_ERROR, FailureReason.REFUSED})
"""The failures of a reference that another row need not have."""
AT_ONCE = 4
"""The number of rows that the scorer is asked for at a time."""

_INFO: dict[str, pa.DataType] = {
    "model": pa.string(),
    "digest": pa.string(),
    "dtype": pa.string(),
    "vocab_size": pa.int32(),
    "full_vocabulary": pa.bool_(),
}
_SCORES: dict[str, str] = {
    "at": "<f8",
    "ids": "<i4",
    "logprobs": "<f8",
    "emitted": "<f8",
    "entropy": "<f8",
    **{f"recovered_{field.name}": "<f8" for field in fields(RecoveredDivergence)},
}
"""The columns that are arrays of `ReferenceScores`, as little-endian bytes of these types."""
SCORED_SCHEMA = pa.schema(
    [
        *SCHEMA,
        pa.field("unscored", pa.string()),
        *(pa.field(f"reference_{name}", kind) for name, kind in _INFO.items()),
        *(pa.field(f"reference_{name}", pa.binary()) for name in _SCORES),
    ],
    {key: version.encode() for key, version in VERSIONS.items()},
)


class RowScorer(Protocol):
    """The scorer of captures: `ScoringStages`."""

    async def ask(self, capture: Capture, tap: TapResult | None) -> Answered:
        """Returns the record with what it was made of. Raises NotScored."""


async def score_rows(rows: pa.Table, scorer: RowScorer) -> pa.Table:
    """Returns scored rows, in the order of `rows`. Only the scorer has effects.

    A row that can never be scored has the reason in `unscored`, and no scores; so has one on which the reference fails
    although it works. Raises NotScored if the reference cannot score now.
    """
    return _with_scores(rows, await answers(list(from_rows(rows)), scorer))


async def answers(captures: Sequence[Spooled], scorer: RowScorer) -> list[Answered | str]:
    """Returns what the scorer says of each capture, in their order, or the reason of `score_rows` in its place. Raises
    NotScored if the reference cannot score now."""
    limit = asyncio.Semaphore(AT_ONCE)

    async def answer(spooled: Spooled) -> Answered | str:
        async with limit:
            try:
                return await scorer.ask(spooled.capture, None if spooled.tap is None else spooled.tap.result())
            except NotScored as ending:
                if ending.reason.outcome is Outcome.DROPPED and ending.detail not in FAILURES_OF_A_ROW:
                    raise
                return ending.reason.label(ending.detail)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer(spooled)) for spooled in captures]
    except* NotScored as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


def _with_scores(rows: pa.Table, results: Sequence[Answered | str]) -> pa.Table:
    answered = [None if isinstance(result, str) else result for result in results]
    scores = [None if one is None else _columns_of(one.scores) for one in answered]
    columns: list[Any] = [
        *(rows[field.name] for field in SCHEMA),
        pa.array([result if isinstance(result, str) else None for result in results], pa.string()),
        *(
            pa.array([None if one is None else getattr(one.info, name) for one in answered], kind)
            for name, kind in _INFO.items()
        ),
        *(pa.array([None if one is None else one.get(name) for one in scores], pa.binary()) for name in _SCORES),
    ]
    return pa.Table.from_arrays(columns, schema=SCORED_SCHEMA)


def _columns_of(scores: ReferenceScores) -> dict[str, bytes]:
    """Returns the bytes of the arrays that are there, by column."""
    arrays: dict[str, Any] = {
        "at": scores.at,
        "ids": scores.top.ids,
        "logprobs": scores.top.logprobs,
        "emitted": scores.emitted,
        "entropy": scores.entropy,
    }
    if scores.recovered is not None:
        for field in fields(scores.recovered):
            arrays[f"recovered_{field.name}"] = getattr(scores.recovered, field.name)
    return {name: array.astype(_SCORES[name]).tobytes() for name, array in arrays.items() if array is not None}


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A row that was scored, or not. unscored: why not; None if it was."""

    spooled: Spooled
    unscored: str | None
    info: ReferenceInfo | None
    scores: ReferenceScores | None


def scored_rows(rows: pa.Table) -> Iterator[ScoredRow]:
    """Yields scored rows, in their order."""
    names = SCORED_SCHEMA.names[len(SCHEMA) :]
    for spooled, values in zip(from_rows(rows), rows.select(names).to_pylist(), strict=True):
        if values["unscored"] is not None:
            yield ScoredRow(spooled, values["unscored"], None, None)
            continue
        info = ReferenceInfo(**{name: values[f"reference_{name}"] for name in _INFO})
        yield ScoredRow(spooled, None, info, _scores_of(values))


def _scores_of(values: dict[str, Any]) -> ReferenceScores:
    def array(name: str) -> Any:
        data = values[f"reference_{name}"]
        return None if data is None else np.frombuffer(data, _SCORES[name]).astype(_SCORES[name][1:])

    emitted = array("emitted")
    recovered = {field.name: array(f"recovered_{field.name}") for field in fields(RecoveredDivergence)}
    return ReferenceScores(
        at=array("at").reshape(len(emitted), -1),
        top=Candidates(array("ids").reshape(len(emitted), -1), array("logprobs").reshape(len(emitted), -1)),
        emitted=emitted,
        entropy=array("entropy"),
        recovered=None if recovered["kl_rc"] is None else RecoveredDivergence(**recovered),
    )


class StoredReference:
    """A `Reference` that answers what a scored row has. `row` is set before it is asked."""

    row: ScoredRow

    async def start(self) -> ReferenceInfo:
        assert self.row.info is not None
        return self.row.info

    async def score(self, request: ScoreRequest) -> ReferenceScores:
        assert self.row.scores is not None
        return self.row.scores

    async def adapters(self) -> frozenset[str]:
        return frozenset()

    async def render(self, messages: list[dict[str, str]]) -> list[int]:
        raise NotImplementedError

    async def tokenize(self, text: str) -> list[int]:
        raise NotImplementedError

    async def close(self) -> None:
        return
