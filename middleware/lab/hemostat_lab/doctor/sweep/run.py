"""The sweep: rungs of points, stored one by one, and the report."""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from hemostat import __version__
from hemostat.report.progress import Reporter
from hemostat_calibration.errors import HemostatError
from hemostat_lab.doctor.causes.units import Incomparable, decoder_layers
from hemostat_lab.doctor.checkpoints import CheckpointPair
from hemostat_lab.doctor.options import DoctorError, DoctorOptions
from hemostat_lab.doctor.pair import Ids, Job, encode, jobs_digest
from hemostat_lab.doctor.prompts import Prompt
from hemostat_lab.doctor.sweep.alterations import NotApplicableError, check, stored_share
from hemostat_lab.doctor.sweep.analysis import Statement, Threshold, promoted, rungs, statements, threshold
from hemostat_lab.doctor.sweep.measuring import Block, Measured, SweptModel
from hemostat_lab.doctor.sweep.outcomes import Task, tasks
from hemostat_lab.doctor.sweep.points import UNCHANGED, Line, Point, grid, lines
from hemostat_lab.doctor.sweep.report import sweep_report
from hemostat_lab.doctor.sweep.results import Results
from hemostat_lab.models.work_folder import WorkFolder

SCHEMA = 1
GIVEN = "given"


def sweep_jobs(pair: CheckpointPair, prompts: Sequence[Prompt], options: DoctorOptions) -> list[Job]:
    """Raises DoctorError where the model or the prompts cannot be swept."""
    if getattr(pair.reference_model.config, "quantization_config", None) is not None:
        raise DoctorError("REFERENCE: it is quantized already; a sweep compresses the original")
    jobs = encode(pair, prompts, replace(options, decoding="sampled"))
    if len(jobs) < 2:
        raise DoctorError("--prompts: a sweep needs at least 2 prompts for its intervals; give more")
    return jobs


def sweep_key(pair: CheckpointPair, jobs: Sequence[Job], options: DoctorOptions) -> dict[str, Any]:
    """Everything that a stored point depends on; not the budget, nor the axes."""
    return {
        "hemostat": __version__,
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "reference": pair.reference.digest,
        "compressed": pair.compressed.digest,
        "dtype": pair.reference.dtype,
        "prompts and --tokens": jobs_digest(jobs),
        "--seed": options.seed,
        "--device": options.device,
    }


def run_sweep(
    pair: CheckpointPair, jobs: Sequence[Job], options: DoctorOptions, work: WorkFolder, reporter: Reporter
) -> dict[str, Any]:
    """The report. Raises DoctorError and WorkFolderError."""
    sweep = Sweep(pair, jobs, options, work, reporter)
    sweep.measure()
    return sweep.report()


class Sweep:
    """Measures rung by rung; owns what has been measured and which points are left."""

    def __init__(
        self, pair: CheckpointPair, jobs: Sequence[Job], options: DoctorOptions, work: WorkFolder, reporter: Reporter
    ) -> None:
        self._pair, self._jobs, self._options, self._work, self._reporter = pair, jobs, options, work, reporter
        self._swept = SweptModel(pair, options.seed)
        self._tasks = _encoded_tasks(pair)
        self._started, self._cpu = time.monotonic(), time.process_time()
        self.results = Results()
        self.given: list[Measured] = []
        """COMPRESSED, by rung."""
        self.notes: list[str] = []
        model = pair.reference_model
        try:
            layers = len(decoder_layers(model))
        except Incomparable as reason:
            raise DoctorError(f"REFERENCE: {reason}, which a sweep changes") from None
        self.lines: list[Line] = lines(options.sweep, layers)
        self.points: list[Point] = []
        for point in grid(options.sweep, layers):
            try:
                check(model, point)
                self.points.append(point)
            except NotApplicableError as reason:
                self.notes.append(f"{point.name}: left out: {reason}")
        self.shares = {point: stored_share(model, point) for point in self.points}
        self.planned: list[int] = []
        """Points by rung."""

    def measure(self) -> None:
        """All rungs, or as many points as the budget allows."""
        result = rungs(len(self._jobs))
        points = self.points
        for number, (begin, end) in enumerate(result):
            block = Block(self._jobs[begin:end], self._tasks[begin:end])
            self.planned.append(len(points))
            stage = f"sweep, rung {number + 1} of {len(result)} ({end} texts)"
            self._measure_given(number, block)
            for done, point in enumerate(points):
                self._reporter.step(stage, done, len(points))
                if not self._measure_point(number, point, block):
                    self.notes.append(
                        f"--sweep-budget: {self._options.sweep_budget:g} minutes ended in rung {number + 1} of "
                        f"{len(result)}, at point {done + 1} of {len(points)}; the same command with --work continues"
                    )
                    return
            self._reporter.step(stage, len(points), len(points))
            if number + 1 < len(result):
                points = [point for point in points if point in self.results.texts]
                thresholds = self.thresholds()
                points = promoted(self.results, points, thresholds, self.statements(thresholds), self.shares)

    def _measure_point(self, rung: int, point: Point, block: Block) -> bool:
        """False when the budget is used up; what is stored already costs nothing."""
        name = f"point-{hashlib.sha256(repr(point).encode()).hexdigest()[:16]}-{rung}"
        data = self._work.get(name)
        if data is None:
            # The unchanged model's figures are needed by all others.
            if point != UNCHANGED and time.monotonic() - self._started > 60.0 * self._options.sweep_budget:
                return False
            data = msgspec.msgpack.encode(self._swept.measure(point, block))
            self._work.put(name, data)
        measured = msgspec.msgpack.decode(data, type=Measured)
        texts = measured.texts()
        if self.results.comparable(point, texts):
            self.results.add(point, texts, measured.outcomes)
        elif point == UNCHANGED:
            raise DoctorError(f"REFERENCE: its logits are not finite in {self._pair.reference.dtype}; --dtype float32")
        else:
            self.notes.append(f"{point.name}: left out in rung {rung + 1}: logits or KL are not finite")
        return True

    def _measure_given(self, rung: int, block: Block) -> None:
        if self._options.compressed == self._options.reference:
            return
        data = self._work.get(f"{GIVEN}-{rung}")
        if data is None:
            data = msgspec.msgpack.encode(self._swept.measure_other(block))
            self._work.put(f"{GIVEN}-{rung}", data)
        measured = msgspec.msgpack.decode(data, type=Measured)
        if self.results.comparable(UNCHANGED, measured.texts()):
            self.given.append(measured)
        else:
            self.notes.append(f"COMPRESSED: left out in rung {rung + 1}: logits or KL are not finite")

    def thresholds(self) -> list[Threshold]:
        result = [threshold(self.results, line, self._options.seed) for line in self.lines]
        return [limit for limit in result if limit is not None]

    def statements(self, thresholds: Sequence[Threshold]) -> list[Statement]:
        by_name = {limit.line.name: limit for limit in thresholds}
        return statements(self.results, by_name, self.lines, self.shares)

    def report(self) -> dict[str, Any]:
        options, pair = self._options, self._pair
        thresholds = self.thresholds()
        measured = self.results.measured(self.points)
        return {
            "schema": SCHEMA,
            "hemostat": __version__,
            "reference": {"name": pair.reference.name, "digest": pair.reference.digest, "dtype": pair.reference.dtype},
            "vocab_size": pair.vocab_size,
            "prompt_file": "packaged" if options.prompts is None else options.prompts.name,
            "seed": options.seed,
            "max_new_tokens": options.tokens,
            "notes": [*pair.notes, *self.notes],
            "sweep": sweep_report(
                self.results,
                measured,
                thresholds,
                self.statements(thresholds),
                self.shares,
                _given_report(pair, self.given),
            )
            | {
                "axes": [axis.value for axis in options.sweep],
                "points": len(self.points),
                "rungs": self.planned,
                "seconds": round(time.monotonic() - self._started, 1),
                "cpu_seconds": round(time.process_time() - self._cpu, 1),
            },
        }


def _given_report(pair: CheckpointPair, given: Sequence[Measured]) -> tuple[str, Results] | None:
    """COMPRESSED's name and what was measured of it, as the point `UNCHANGED`."""
    if not given:
        return None
    results = Results()
    for measured in given:
        results.add(UNCHANGED, measured.texts(), measured.outcomes)
    return pair.compressed.name, results


def _encoded_tasks(pair: CheckpointPair) -> list[tuple[int, Task, Ids]]:
    """With the chat template where there is one."""
    result = []
    for number, task in enumerate(tasks()):
        try:
            ids = pair.tokenize(Prompt("outcomes", 0, messages=[{"role": "user", "content": task.prompt}]))
        except HemostatError:
            ids = pair.tokenize(Prompt("outcomes", 0, text=task.prompt + "\n"))
        result.append((number, task, np.array(ids, np.int32)))
    return result
