"""The control process: `python -m tests.bench.load.control FOLDER TOKENS_PER_SECOND`, until its standard input ends.

Prints a line of JSON with its counts for each line that it reads.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tests.bench.load import INFO, KIND, MODEL, VOCABULARY, Answers, answers
from tests.support.constant_profile import constant_profile
from tests.support.relay_listener import listen
from tests.support.served_models import pair, served_models

from hemostat.config.schema import Settings
from hemostat.control.composition import Control
from hemostat.ipc.messages import REST_KIND, OutcomeReport
from hemostat.reference.monitor import ReferenceState
from hemostat.reference.protocol import ReferenceInfo, ReferenceScores, ScoreRequest
from hemostat.scoring.pipeline import WORKERS


class StoredReference:
    """Gives every request the same scores at once."""

    def __init__(self, stored: Answers) -> None:
        self._stored = stored

    async def start(self) -> ReferenceInfo:
        return INFO

    async def score(self, request: ScoreRequest) -> ReferenceScores:
        return self._stored.scores

    async def close(self) -> None:
        return


def made(budget: float) -> Control:
    settings = Settings.model_validate(
        {
            "upstream": {"url": "http://127.0.0.1:1"},
            "admin": {"port": 0},
            "reference": {"backend": "vllm", "url": "http://127.0.0.1:1"},
            "shadow": {"rate": 0.05, "floor_fraction": 0.0, "reference_tokens_per_second": budget},
            "calibration": {"mode": "auto"},
        }
    )
    control = Control(settings, 1234)
    control.monitor.served = served_models(pair(MODEL, StoredReference(answers()), INFO))
    control.profile_manager.set_model_pair(MODEL, VOCABULARY)
    return control


def serve(control: Control) -> str:
    """A profile serves all traffic."""
    profiles = control.profile_manager
    bias = np.random.default_rng(0).normal(0.0, 0.1, VOCABULARY)
    version = profiles.operator.import_profile(constant_profile(MODEL, bias, 1.0))
    for _ in range(100):
        profiles.kinds.update(KIND)
    for kind in (KIND, REST_KIND):
        profiles.operator.promote(version, kind)
    return version


def counts(control: Control, reports: int) -> dict[str, Any]:
    return {
        "reports": reports,
        "received": control.pipeline.received,
        "scored": control.pipeline.endings.scored_captures,
        "tokens": control.pipeline.reference_tokens,
        "queued": len(control.pipeline.queue),
        "relays": control.link.reporting,
        "dropped": control.pipeline.received - control.pipeline.endings.scored_captures - control.pipeline.pending,
        "policies": control.policy.generation,
    }


async def run(folder: Path, budget: float) -> None:
    control = made(budget)
    await control.start()
    use, seen = control.link.on_outcome, 0

    def count(report: OutcomeReport) -> None:
        nonlocal seen
        seen += 1
        use(report)

    control.link.on_outcome = count
    relays = listen(control.link, folder / "control.sock")
    version = serve(control)
    scorer = control.pipeline.scorer
    assert scorer is not None
    loops = [control.run_periodic(), control.link.run(), control.writer.run(), scorer.run(WORKERS["vllm"])]
    tasks = [asyncio.create_task(loop) for loop in loops]
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    print(json.dumps({"version": version}), flush=True)
    while line := await lines.readline():
        if line.strip() == b"score":
            control.monitor.state, control.monitor.detail = ReferenceState.READY, "stored scores"
            control.monitor.on_change()
        print(json.dumps(counts(control, seen)), flush=True)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await relays.close()
    await control.close()


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1]), float(sys.argv[2])))
