"""Scores captures on a reference, as `hemostat score` does."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hemostat.commands.score import make_reference, make_references
from hemostat.config.packages import require
from hemostat.interface.reports import Report, wait
from hemostat_calibration.errors import HemostatError


def score(
    captures: str | Path,
    reference: str,
    *,
    compressed: str | None = None,
    out: str | Path | None = None,
    key: str = "plain",
    model: str | None = None,
    cycle_hours: float = 24.0,
    device: str = "auto",
    dtype: str = "auto",
) -> Report:
    """Returns the report of captures, which a reference scores now.

    captures: the folder of `spool.path`, or a copy of it; or a file of JSON lines. reference: a folder or a hub name of
    the uncompressed model, or the URL[#NAME] of a vLLM server. compressed: the model that has generated the lines of a
    file, likewise; it computes the log-probabilities that lines do not have. out: the folder for the scored captures,
    where the same call goes on after an interruption; None keeps none of them. The other arguments are options of
    `hemostat score`.

    Raises HemostatError, which says what to change.
    """
    require("spool")
    from hemostat.scoring.offline.folder import score_folder  # noqa: PLC0415  an extra
    from hemostat.scoring.spool.keys import read_key  # noqa: PLC0415
    from hemostat.scoring.spool.objects import location  # noqa: PLC0415

    source, spool_key = location(captures), read_key(key)
    if not source.exists():
        raise HemostatError(f"captures: there is no folder {source}; name the folder of spool.path, or a file of lines")
    with tempfile.TemporaryDirectory(prefix="hemostat-") as temporary:
        folder = location(temporary if out is None else out)
        if isinstance(folder, Path):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

        async def work() -> None:
            made = make_references(reference, device=device, dtype=dtype)
            own = None
            if compressed is not None:
                own = make_reference(compressed, device=device, dtype=dtype, option="compressed")
            try:
                await score_folder(
                    source,
                    folder,
                    made[0],
                    key=spool_key,
                    model=model,
                    progress=lambda done, total, rate: None,
                    compressed=own,
                    others=made[1:],
                )
            finally:
                for each in made:
                    await each.close()
                if own is not None:
                    await own.close()

        wait(work())
        return Report.read(folder, key=key, cycle_hours=cycle_hours)
