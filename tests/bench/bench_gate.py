"""Error rates and units of the gate in simulated worlds: `make bench-gate`, a table and build/bench/gate.json.

Every world has independent units, as prompts in random order are. Both tests of one mean are run side by side:

passes   lives of which the test of passing rejects "the mean is at least the margin" within the units
fails    the same for failing and "the mean is at most the margin"
units    the median until the right one, and the units of a log-optimal bet that knows the distribution

What is wrong where the mean is the margin: both may happen in at most alpha of the lives.

A second table is of live traffic, whose units depend on each other (`gate.live_worlds`): the verdict waits for two of
the eight cycles of each life.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hemostat_calibration.gate.verdict import FRACTIONS, PRIOR, Outcome

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.bench.gate import live_worlds  # noqa: E402  the root is no package

ALPHA = 0.05
BATCH = 250
LIVE_UNITS = 3200
"""Eight cycles of the worlds of live traffic."""

Floats = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int], float], Floats]


@dataclass(frozen=True)
class World:
    """draw: D of lives and units, with this mean."""

    name: str
    draw: Draw


def two_points(spread: float) -> Draw:
    return lambda random, shape, mean: mean + spread * random.choice((-1.0, 1.0), shape)


def seldom_all(random: np.random.Generator, shape: tuple[int, int], mean: float) -> Floats:
    """Nothing mostly, and once in a while as bad as it can be: an answer that breaks off."""
    return (random.random(shape) < mean).astype(np.float64)


def outcomes(random: np.random.Generator, shape: tuple[int, int], mean: float) -> Floats:
    """A bad answer of either model: a tenth of the stable one's are bad."""
    bad = (random.random(shape) < 0.1 + mean).astype(np.float64)
    return bad - (random.random(shape) < 0.1)


def skewed(random: np.random.Generator, shape: tuple[int, int], mean: float) -> Floats:
    """A few prompts far worse than the others, as distances are."""
    return np.minimum(random.gamma(0.5, 0.1, shape), 0.95) - 0.05 + mean


WORLDS = [
    World("no noise", two_points(0.0)),
    World("spread 0.08", two_points(0.08)),
    World("spread 0.3", two_points(0.3)),
    World("spread 0.9", two_points(0.9)),
    World("skewed", skewed),
    World("outcomes", outcomes),
    World("seldom all", seldom_all),
]


def log_evidence(excess: Floats, width: float) -> Floats:
    """The logarithm of the evidence after each unit, [lives, units], that the mean of `excess` is above 0."""
    logs = np.log1p(FRACTIONS * (excess / width)[..., None]).cumsum(axis=1)
    top = logs.max(axis=-1)
    result: Floats = top + np.log(np.exp(logs - top[..., None]) @ PRIOR)
    return result


def first_at(evidence: Floats) -> Floats:
    """The number of the unit at which each life's evidence reaches 1/alpha; infinite where it does not."""
    reached = evidence >= -math.log(ALPHA)
    return np.where(reached.any(axis=1), reached.argmax(axis=1) + 1.0, np.inf)


def optimal_units(excess: Floats, width: float) -> float:
    """The median of the bet with the best constant fraction, which knows the distribution."""
    sample = excess[:200].ravel() / width
    growth = [np.log1p(fraction * sample).mean() for fraction in np.linspace(0.02, 0.999, 50)]
    best = float(np.linspace(0.02, 0.999, 50)[int(np.argmax(growth))])
    return float(np.median(first_at(np.log1p(best * excess / width).cumsum(axis=1))))


def row(world: World, mean: float, margin: float, lives: int, units: int) -> dict[str, object]:
    passes, fails, best = [], [], []
    for batch in range(0, lives, BATCH):
        random = np.random.default_rng([batch, round(1000 * mean), WORLDS.index(world)])
        values = world.draw(random, (min(BATCH, lives - batch), units), mean)
        passing, failing = (margin - values, 1.0 - margin), (values - margin, 1.0 + margin)
        passes.append(first_at(log_evidence(*passing)))
        fails.append(first_at(log_evidence(*failing)))
        if mean != margin and not batch:
            best.append(optimal_units(*(passing if mean < margin else failing)))
    passed, failed = np.concatenate(passes), np.concatenate(fails)
    right = passed if mean < margin else failed
    return {
        "world": world.name,
        "mean": mean,
        "margin": margin,
        "passes": float(np.isfinite(passed).mean()),
        "fails": float(np.isfinite(failed).mean()),
        "units": float(np.median(right)) if mean != margin else None,
        "optimal": best[0] if best else None,
    }


def live_rows(lives: int, margin: float, only: str | None) -> list[dict[str, object]]:
    """Prints and returns the same for live traffic, whose units depend on each other. units: the median until a verdict
    of the right kind, at least two cycles; waived: wrong passes, and units, where the verdict waits for no cycle;
    independent: both errors together if units counted as independent."""
    rows: list[dict[str, object]] = []
    print(f"{'live world':20}{'mean':>7}{'passes':>9}{'fails':>9}{'units':>8}{'waived':>20}{'independent':>13}")
    for world in live_worlds.WORLDS:
        if only not in (None, world.name):
            continue
        for mean in (margin, 0.0, 2.0 * margin):
            passes = fails = waived = wrong = 0.0
            units: list[float] = []
            units_waived: list[float] = []
            for batch in range(0, lives, BATCH):
                size = min(BATCH, lives - batch)
                values = live_worlds.drawn(world, size, LIVE_UNITS, mean, seed=batch)
                found = live_worlds.verdicts(values)
                passes += size * found.share(Outcome.PASS)
                fails += size * found.share(Outcome.FAIL)
                units += np.where(found.outcomes == "", np.inf, found.units).tolist()
                sooner = live_worlds.verdicts(values, waived=True)
                waived += size * sooner.share(Outcome.PASS)
                units_waived += np.where(sooner.outcomes == "", np.inf, sooner.units).tolist()
                if mean == margin:
                    before = live_worlds.verdicts(values, dependent=False)
                    wrong += size * (before.share(Outcome.PASS) + before.share(Outcome.FAIL))
            middle, middle_waived = float(np.median(units)), float(np.median(units_waived))
            row = {"world": world.name, "mean": mean, "passes": passes / lives, "fails": fails / lives}
            row |= {"units": middle if math.isfinite(middle) else None}
            row |= {"waived_passes": waived / lives}
            row |= {"waived_units": middle_waived if math.isfinite(middle_waived) else None}
            row |= {"independent": wrong / lives if mean == margin else None}
            rows.append(row)
            tail = f"{wrong / lives:13.3f}" if mean == margin else ""
            print(
                f"{world.name:20}{mean:7.2f}{passes / lives:9.4f}{fails / lives:9.4f}{_units(middle)}"
                f"{waived / lives:12.4f}{_units(middle_waived)}{tail}",
                flush=True,
            )
    return rows


def _units(middle: float) -> str:
    return f"{middle:8.0f}" if math.isfinite(middle) else f"{'none':>8}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lives", type=int, default=2000)
    parser.add_argument("--units", type=int, default=2000)
    parser.add_argument("--margin", type=float, default=0.05)
    parser.add_argument("--only", choices=("offline", "live"), help="one of the tables")
    parser.add_argument(
        "--world", choices=[world.name for world in live_worlds.WORLDS], help="one world of live traffic"
    )
    options = parser.parse_args(argv)
    rows = []
    print(f"{'world':14}{'mean':>7}{'passes':>9}{'fails':>9}{'units':>8}{'optimal':>9}{'ratio':>7}")
    for world in WORLDS if options.only != "live" else ():
        for mean in (options.margin, 0.0, 2.0 * options.margin):
            result = row(world, mean, options.margin, options.lives, options.units)
            rows.append(result)
            units, best = result["units"], result["optimal"]
            tail = f"{units:8.0f}{best:9.0f}{units / best:7.2f}" if units is not None and best else ""
            print(f"{world.name:14}{mean:7.2f}{result['passes']:9.4f}{result['fails']:9.4f}{tail}", flush=True)
    live = live_rows(options.lives, options.margin, options.world) if options.only != "offline" else []
    path = ROOT / "build" / "bench" / "gate.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"alpha": ALPHA, "lives": options.lives, "rows": rows, "live": live}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
