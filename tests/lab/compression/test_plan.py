"""plan.json: what is written is read again, and what is no plan is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat_lab.compression.plan import (
    LayerPlan,
    Plan,
    check_plan,
    encode_plan,
    fused_name,
    read_plan,
    stored_bytes,
)
from hemostat_lab.models.checkpoint_folders import CompressError

SHAPES = {"layers.0.q_proj": (8, 64), "layers.0.down_proj": (64, 128)}


def plan(**changed: LayerPlan) -> Plan:
    layers = {"layers.0.q_proj": LayerPlan(4, 32), "layers.0.down_proj": LayerPlan(16)} | changed
    return Plan("d" * 32, layers, sum(stored_bytes(*SHAPES[n], p) for n, p in layers.items() if n in SHAPES), {"by": 1})


def test_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(encode_plan(plan()))
    assert read_plan(tmp_path / "plan.json") == plan()
    check_plan(read_plan(tmp_path / "plan.json"), "d" * 32, SHAPES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "x"}, "schema is 'x', version 1: this Hemostat reads 'hemostat-plan', version 1"),
        ({"version": 2}, "version 2"),
        ({"bytes": "many"}, r"plan\.json is no plan: .*; let doctor --plan write it"),
        ({"extra": 1}, r"plan\.json is no plan: "),
        ({"layers": {}}, "layers is empty"),
        ({"layers": {"a.b": {"bits": 9}}}, "layer a.b: bits is 9: it must be 2 to 8, or 16"),
        ({"layers": {"a.b": {"bits": 4, "group_size": 0}}}, "layer a.b: group_size is 0: it must be positive, or null"),
        ({"layers": {"a.b": {"bits": 16, "group_size": 64}}}, "layer a.b: group_size is 64: with 16 bits there are no"),
        ({"layers": {"a.b": {"bits": 4, "sparsity": 1.2}}}, "layer a.b: sparsity is 1.2: it must be from 0 to below 1"),
        ({"layers": {"a.b": {"bits": 4, "sparsity": 0.3, "pattern": "2:4"}}}, "layer a.b: sparsity is 0.3: with the"),
        ({"layers": {"a.b": {"bits": 4, "pattern": "4:8"}}}, "layer a.b is none .*; let doctor --plan write it again"),
        ({"layers": {"a.b": {"width": 4}}}, "layer a.b is none "),
    ],
)
def test_what_is_no_plan_is_refused_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(encode_plan(plan()))
    fields = json.loads((tmp_path / "plan.json").read_text()) | change
    (tmp_path / "plan.json").write_text(json.dumps(fields))
    with pytest.raises(CompressError, match=message) as caught:
        read_plan(tmp_path / "plan.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"schema": "hemostat-plan"}'])
def test_damaged_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(CompressError, match=r"plan\.json is no plan: .*; let doctor --plan write it"):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(CompressError, match="cannot be read"):
        read_plan(tmp_path / "absent.json")


def test_plan_for_another_checkpoint() -> None:
    with pytest.raises(CompressError, match="the plan is for another checkpoint"):
        check_plan(plan(), "e" * 32, SHAPES)
    with pytest.raises(CompressError, match=r"layer layers\.0\.v_proj is not in layers"):
        check_plan(plan(), "d" * 32, SHAPES | {"layers.0.v_proj": (8, 64)})
    with pytest.raises(CompressError, match=r"layer x is in layers, and SOURCE does not have it"):
        check_plan(plan(x=LayerPlan(4)), "d" * 32, SHAPES)
    with pytest.raises(CompressError, match="group_size is 48, which does not divide its 64 inputs"):
        check_plan(plan(**{"layers.0.q_proj": LayerPlan(4, 48)}), "d" * 32, SHAPES)
    with pytest.raises(CompressError, match=r"bytes is 1, its layers have \d+"):
        check_plan(Plan("d" * 32, plan().layers, 1, {}), "d" * 32, SHAPES)


def test_stored_bytes() -> None:
    assert stored_bytes(8, 64, LayerPlan(16)) == 8 * 64 * 2
    assert stored_bytes(8, 64, LayerPlan(4, 32)) == 8 * 64 // 2 + 8 * 2 * 2
    assert stored_bytes(8, 64, LayerPlan(3)) == 8 * 64 * 3 // 8 + 8 * 2
    # Half of the weights, and one bit for each that says where they are.
    assert stored_bytes(8, 64, LayerPlan(16, sparsity=0.5)) == 8 * 64 + 8 * 64 // 8
    assert stored_bytes(8, 64, LayerPlan(8, sparsity=0.5, pattern="2:4")) == 8 * 64 // 2 + 8 * 64 // 8 + 8 * 2
    assert stored_bytes(8, 64, LayerPlan(8, sparsity=0.25, pattern="rows")) == 6 * 64 + 6 * 2


@given(st.sampled_from((2, 3, 4, 5, 6, 7)), st.sampled_from((32, 64, None)), st.integers(1, 40), st.integers(1, 4))
def test_more_bits_and_smaller_groups_need_more_bytes(bits: int, group: int | None, outputs: int, units: int) -> None:
    inputs = 128 * units
    assert stored_bytes(outputs, inputs, LayerPlan(bits, group)) < stored_bytes(
        outputs, inputs, LayerPlan(bits + 1, group)
    )
    assert stored_bytes(outputs, inputs, LayerPlan(bits, 32)) >= stored_bytes(outputs, inputs, LayerPlan(bits, group))


def test_fused_layers() -> None:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len({fused_name(f"model.layers.3.x.{kind}") for kind in kinds}) == 4
    assert fused_name("layers.0.q_proj") != fused_name("layers.1.q_proj")


def test_a_plan_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    text = encode_plan(plan()).replace('"by": 1', '"by": ' + "[" * 100_000 + "]" * 100_000)
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(CompressError, match="is no plan: maximum recursion depth"):
        read_plan(tmp_path / "plan.json")


def test_two_of_four_needs_inputs_in_fours() -> None:
    sparse = Plan("d" * 32, {"a": LayerPlan(16, sparsity=0.5, pattern="2:4")}, 0, {})
    with pytest.raises(CompressError, match="layer a: pattern is 2:4, and its 66 inputs are no multiple of 4"):
        check_plan(sparse, "d" * 32, {"a": (8, 66)})
