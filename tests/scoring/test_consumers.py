"""What a scored record may be used for, and the one way in which it reaches all that use it."""

from __future__ import annotations

import ast
import inspect
import time
from dataclasses import FrozenInstanceError, dataclass, field, replace
from pathlib import Path

import msgspec
import pytest
from tests.support.captures import INFO
from tests.support.control import MODEL, control, scored
from tests.support.served_models import pair, served_models

from hemostat.metrics import names
from hemostat.scored_record import NO_USE, ScoredRecord, Use
from hemostat.scoring import consumers as module
from hemostat.scoring.record_reader import uses_of
from hemostat_calibration.records import TokenRecord


@dataclass
class Noting:
    """A new consumer."""

    seen: list[ScoredRecord] = field(default_factory=list)
    fails: bool = False

    def update(self, scored: ScoredRecord) -> None:
        if self.fails:
            raise ValueError("a bug")
        self.seen.append(scored)


def variant(record: TokenRecord, name: str) -> TokenRecord:
    """Of `USES`."""
    if "part" in name:
        record = replace(record, position=100, context_tokens=105)
    if "grammar" in name:
        record = replace(record, constraint="grammar")
    if "adapter" in name:
        record = replace(record, adapter="a" * 32)
    return replace(record, model="another") if "other" in name else record


USES = {
    "whole": Use.FIGURES | Use.PROFILES | Use.NOISE_FLOOR,
    "part": Use.PART_FIGURES,
    "scored again": Use.FIGURES | Use.PROFILES,
    "adapter": Use.FIGURES | Use.PROFILES,
    "grammar": Use.CONDITIONAL_FIGURES | Use.PROFILES,
    "grammar, part": Use.CONDITIONAL_FIGURES,
    "other model": Use.OTHER_FIGURES | Use.NOISE_FLOOR,
    "other model, grammar": Use.OTHER_FIGURES,
    "other model, part": NO_USE,
    "other model, grammar, part": NO_USE,
}


@pytest.mark.parametrize("name", USES)
def test_what_a_record_may_be_used_for(name: str) -> None:
    made = uses_of(variant(scored()[0], name), calibrated="other" not in name, scored_again="again" in name)
    assert made == USES[name]


async def test_a_new_consumer_gets_every_record_once(tmp_path: Path) -> None:
    async with control(tmp_path) as plane:
        plane.monitor.served = served_models(pair(MODEL, info=INFO), pair("another", info=INFO))
        consumer = Noting()
        plane.pipeline.users.consumers.append(consumer)
        for number, name in enumerate(USES):
            record, capture = scored(str(number), prompt=number, captured_at=time.monotonic())
            capture = msgspec.structs.replace(capture, ids_only="again" in name)
            plane.pipeline.update(variant(record, name), capture)
        assert [each.uses for each in consumer.seen] == list(USES.values())
        assert [each.capture.request_id for each in consumer.seen] == [str(number) for number in range(len(USES))]
        with pytest.raises(FrozenInstanceError):
            consumer.seen[0].fresh = False  # type: ignore[misc]


async def test_a_consumer_that_fails_costs_the_others_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with control(tmp_path) as plane:
        after = Noting()
        plane.pipeline.users.consumers.insert(0, Noting(fails=True))
        plane.pipeline.users.consumers.append(after)
        with pytest.raises(RuntimeError, match="Noting"):  # counted by the scorer
            plane.pipeline.update(*scored())
        assert len(after.seen) == 1
        assert plane.measured.measurements.tokens == 3
        assert plane.registry.get_sample_value(names.INTERNAL_ERRORS, {"part": "calibration"}) == 0
        assert "Noting could not use the record of r" in caplog.text


def test_each_consumer_is_a_class_and_a_line() -> None:
    """Nothing of them is called but `update`, and each is made in one place."""
    tree = ast.parse(inspect.getsource(module))
    classes = {
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and "Protocol" not in map(ast.unparse, node.bases)
        and [item.name for item in node.body if isinstance(item, ast.FunctionDef) and item.name[0] != "_"] == ["update"]
    }
    assert len(classes) >= 11
    package = Path(module.__file__).parent
    composition = package.parent / "control" / "composition.py"
    made = [
        node.func.id
        for path in (*sorted(package.glob("*.py")), composition)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    assert {name: made.count(name) for name in classes - {"Each"}} == dict.fromkeys(classes - {"Each"}, 1)
