"""Tensor parallelism: two real processes with a gloo group bind only profiles that both have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.engine_profiles import VOCAB_SIZE, make_profile
from tests.support.paths import ROOT

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
import torch.distributed as dist  # noqa: E402

from hemostat_calibration.engine_keys import signed  # noqa: E402
from hemostat_engine import transform  # noqa: E402
from hemostat_engine.agent import Identity  # noqa: E402
from hemostat_engine.core import Core, Ranks  # noqa: E402
from hemostat_engine.masks import GrammarMasks  # noqa: E402
from hemostat_engine.settings import Settings  # noqa: E402

SECRETS = ["a" * 32, "b" * 32]


def rank_main(rank: int, folder: str) -> None:
    from vllm import SamplingParams

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    core = Core(
        device=torch.device("cpu"),
        identity=Identity(f"boot-of-{rank}", rank, 2, VOCAB_SIZE, "v1", "test"),
        ranks=Ranks(rank, 2, dist.group.WORLD),
        settings=Settings(admin_url="http://127.0.0.1:9"),
        masks=GrammarMasks(watched=True),
    )
    core.agent.stop()
    both, single = make_profile(1), make_profile(2)
    core.library.put(both)
    if rank == 0:
        core.library.put(single)
    asked = [None, single.version, both.version, "0" * 32]
    # Of the two secrets, rank 1 does not know the second yet: no rank acts on what it has signed.
    core.agent.secrets.update(SECRETS[: 2 - rank])
    taps = [signed({"hemostat": v or "", "hemostat_tap": "n"}, SECRETS[v == "0" * 32], "") for v in asked]
    requests = [SamplingParams(extra_args=tap if v else None) for v, tap in zip(asked, taps, strict=True)]
    first = core.bind(requests)
    # Rank 1 has it a step later: running requests keep their binding, new ones are bound on both ranks.
    core.library.put(single)
    later = core.bind([*requests, SamplingParams(extra_args={"hemostat": single.version})])
    first_applied, later_applied = ([b and b.applied for b in bound] for bound in (first, later))
    # It fails on one rank, in the second of three parts: on both ranks that part and the next one stay as they are.
    transform.CHUNK_ELEMENTS = VOCAB_SIZE
    shifts = iter(range(9))
    shift = transform.HeldProfile.shift

    def raising(held: transform.HeldProfile, *rows: Any) -> transform.Shift:
        if rank == 1 and next(shifts) == 1:
            raise torch.OutOfMemoryError("injected")
        return shift(held, *rows)

    transform.HeldProfile.shift = raising  # type: ignore[method-assign]
    logits = torch.zeros(4, VOCAB_SIZE)
    bound = core.bind([SamplingParams(extra_args={"hemostat": both.version})])[0]
    assert bound is not None
    for _ in range(2):
        core.apply_rows(logits, [(row, bound) for row in range(3)])
    answer = {
        "changed": logits.any(dim=1).tolist(),
        "applied": bound.applied,
        "held": core.library.versions(),
        "failed": core.counters.read().get("profiles_failed"),
        "first": first_applied,
        "later": later_applied,
        "taps": [binding and binding.nonce for binding in first],
        "boot_id": core.agent.identity.boot_id,
    }
    Path(folder, f"rank{rank}").write_text(json.dumps(answer))
    dist.barrier()
    # Destroying the process group sometimes aborts the process inside gloo ("terminate called").
    os._exit(0)


def test_what_one_rank_cannot_apply_no_rank_applies(tmp_path: Path) -> None:
    """A profile is bound only when every rank has it, and is off on all of them where it fails on one."""
    program = "import sys; from tests.engine.test_ranks import rank_main; rank_main(int(sys.argv[1]), sys.argv[2])"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    ranks = [
        subprocess.Popen([sys.executable, "-c", program, str(rank), str(tmp_path)], env=environment) for rank in (0, 1)
    ]
    try:
        assert [process.wait(100) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    both, single = make_profile(1).version, make_profile(2).version
    answers = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
    for answer in answers:
        assert answer["first"] == [None, None, both, None]
        assert answer["later"] == [None, None, both, None, single]
        assert answer["boot_id"] == "boot-of-0"
        assert answer["changed"] == [True, False, False, False]
        assert (answer["applied"], answer["held"], answer["failed"]) == (None, [single], 1)
    assert answers[0]["taps"] == [None, "n", "n", None]
    assert answers[1]["taps"] == [None] * 4
