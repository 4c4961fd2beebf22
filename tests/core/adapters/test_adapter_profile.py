"""The family adapter: its file, what is refused, and that it changes no logits."""

import json
import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.support.temperature_bias import temperature_bias

from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.errors import InvalidArgumentError, InvalidProfileError
from hemostat_calibration.profiles import profile as profile_module
from hemostat_calibration.profiles import transform
from hemostat_calibration.profiles.adapter import (
    adapter_bytes,
    adapter_layers,
    adapter_profile,
    max_rank,
)
from hemostat_calibration.profiles.profile import CalibrationProfile

V = 9
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up_proj"


def layers(seed: int = 0, ranks: tuple[int, int] = (2, 3)) -> dict[str, LowRank]:
    rng = np.random.default_rng(seed)
    shapes = {Q: (4, 5), UP: (7, 4)}
    return {
        name: LowRank(
            rng.normal(size=(rank, inputs)).astype(np.float32), rng.normal(size=(outputs, rank)).astype(np.float32)
        )
        for (name, (outputs, inputs)), rank in zip(shapes.items(), ranks, strict=True)
    }


def make(**metadata: str) -> CalibrationProfile:
    return adapter_profile(model="w4a16", vocab_size=V, layers=layers(), metadata=metadata)


def rewritten(profile: CalibrationProfile, change: Callable[[dict[str, Any]], None]) -> bytes:
    data = profile.to_bytes()
    (length,) = struct.unpack_from("<Q", data)
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    header = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def with_parameters(profile: CalibrationProfile, **changes: Any) -> CalibrationProfile:
    """With changed parameters; None removes one. A name's dots are written as `__`."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    parameters = {k: v for k, v in ({**profile.parameters, **named}).items() if v is not None}
    return CalibrationProfile(
        family="adapter",
        model="m",
        vocab_size=V,
        parameters=parameters,
        clamp_nats=1.0,
        metadata={},
    )


def test_round_trip() -> None:
    profile = make(tokens="2100")
    data = profile.to_bytes()
    again = CalibrationProfile.from_bytes(data, profile.version)
    assert again.to_bytes() == data
    assert pickle.loads(pickle.dumps(profile)) == profile
    assert dict(again.metadata) == {"tokens": "2100"}
    assert json.loads(data[8 : 8 + struct.unpack_from("<Q", data)[0]])["__metadata__"]["format"] == "3"
    result = adapter_layers(again)
    assert list(result) == [Q, UP]
    for name, layer in layers().items():
        np.testing.assert_allclose(result[name].a, layer.a, atol=np.abs(layer.a).max() / 250)
        np.testing.assert_allclose(result[name].b, layer.b, atol=np.abs(layer.b).max() / 250)
    assert max_rank(again) == 3
    assert adapter_bytes(again) == (2 * (5 + 4) + 4 * (2 + 4)) + (3 * (4 + 7) + 4 * (3 + 7))


def test_the_version_is_pinned() -> None:
    """Versions name files and rows in stores: the bytes must not change between releases without a new format."""
    ones = {Q: LowRank(np.ones((1, 2), np.float32), np.ones((2, 1), np.float32))}
    assert adapter_profile(model="m", vocab_size=V, layers=ones).version == "c022631a445d66e69ba38231bd96d85a"


def test_the_order_of_layers_is_not_part_of_it() -> None:
    backwards = dict(reversed(layers().items()))
    assert adapter_profile(model="w4a16", vocab_size=V, layers=backwards) == make()


def test_no_logit_changes() -> None:
    profile = make()
    assert transform.anchors(profile) is None
    logprobs = np.log(np.random.default_rng(0).dirichlet(np.ones(V), size=3))
    ids = np.tile(np.arange(V), (3, 1))
    assert not transform.shift_at(profile, ids, logprobs).any()
    assert transform.max_shift(profile) == 0.0
    with pytest.raises(InvalidArgumentError, match="reads no anchors"):
        transform.code(profile, np.zeros(3))


def test_layers_of_rank_0_are_left_out() -> None:
    empty = LowRank(np.zeros((0, 5), np.float32), np.zeros((4, 0), np.float32))
    profile = adapter_profile(model="m", vocab_size=V, layers=layers() | {Q: empty})
    assert list(adapter_layers(profile)) == [UP]
    with pytest.raises(InvalidProfileError, match="one or more"):
        adapter_profile(model="m", vocab_size=V, layers={Q: empty})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("factor", ["a", "b"])
def test_factors_must_be_finite(value: float, factor: str) -> None:
    given = layers()
    array = getattr(given[UP], factor).copy()
    array[1, 2] = value
    a, b = (array, given[UP].b) if factor == "a" else (given[UP].a, array)
    with pytest.raises(InvalidProfileError, match=rf"^layer {UP}: {factor} holds NaN or an infinity$"):
        adapter_profile(model="m", vocab_size=V, layers=given | {UP: LowRank(a, b)})


@pytest.mark.parametrize("name", ["", ".q", "q.", "a b", "q/../x", "q" * 65, "ü", 'q"'])
def test_names_must_be_modules(name: str) -> None:
    with pytest.raises(InvalidProfileError, match="cannot be the name of a module"):
        adapter_profile(model="m", vocab_size=V, layers={name: layers()[Q]})


QA, QB = "model__layers__0__self_attn__q_proj__a", "model__layers__0__self_attn__q_proj__b"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{QA}_scale": None}, rf"missing \({Q}.a_scale\)"),
        ({QB: None, f"{QB}_scale": None}, rf"missing \({Q}.b, {Q}.b_scale\)"),
        ({"stray": np.zeros(1, np.float32)}, r"unknown \(stray\)"),
        ({"other__c": np.zeros(1, np.float32)}, r"unknown \(other.c\)"),
        ({QA: np.zeros((2, 5), np.float32)}, rf"{Q}.a is float32: it must be int8"),
        ({QA: np.zeros((3, 5), np.int8)}, rf"{Q}.a_scale has shape \(2,\)"),
        ({QA: np.zeros(5, np.int8)}, rf"{Q}.a has shape \(5,\)"),
        ({QB: np.zeros((4, 1), np.int8)}, rf"{Q}.b has shape \(4, 1\)"),
        ({QB: np.zeros((5, 2), np.int8)}, rf"{Q}.b_scale has shape"),
        ({f"{QA}_scale": np.array([1.0, np.nan], np.float32)}, rf"{Q}.a_scale holds NaN"),
        ({f"{QB}_scale": np.array([1.0, np.inf, 0, 0], np.float32)}, rf"{Q}.b_scale holds NaN"),
        ({f"{QB}_scale": np.array([1.0, -1.0, 0, 0], np.float32)}, rf"{Q}.b_scale has a value below 0"),
        ({f"{QB}_scale": np.array([1.0, 1e30, 0, 0], np.float32)}, rf"{Q}.b_scale has a value .* above 1e\+15"),
        ({QA: np.zeros((2, 0), np.int8)}, "leave out a layer whose rank is 0"),
    ],
)
def test_malformed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidProfileError, match=message) as error:
        with_parameters(make(), **changes)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_no_layer() -> None:
    with pytest.raises(InvalidProfileError, match="one or more"):
        with_parameters(make(), **{name.replace(".", "__"): None for name in make().parameters})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["__metadata__"].update(format="2"), "canonical"),
        (lambda e: e["__metadata__"].update(family="contextual"), "in a profile of the family contextual"),
        (lambda e: e[f"{Q}.a"].update(dtype="I64"), f"parameter {Q}.a has a type other than"),
        (lambda e: e.update({f"{Q}.c": e.pop(f"{Q}.a")}), "parameters are missing"),
    ],
)
def test_malformed_files(change: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(InvalidProfileError, match=message) as error:
        CalibrationProfile.from_bytes(rewritten(make(), change))
    assert "\n" not in str(error.value)


def test_a_model_with_many_layers() -> None:
    """80 blocks of 7 layers, with long names: the header is longer than that of the other families may be."""
    low_rank = LowRank(np.ones((1, 2), np.float32), np.ones((2, 1), np.float32))
    many = {
        f"language_model.model.layers.{i}.some_long_block.projection_{j}": low_rank for i in range(80) for j in range(7)
    }
    profile = adapter_profile(model="m", vocab_size=V, layers=many)
    data = profile.to_bytes()
    assert struct.unpack_from("<Q", data)[0] > profile_module.MAX_HEADER_BYTES
    assert CalibrationProfile.from_bytes(data, profile.version) == profile
    # The others keep their bound.
    other = temperature_bias("m", V, 1.0, np.zeros(V), 1.0)
    padded = rewritten(other, lambda e: e["__metadata__"].update({"metadata.x": "x" * 70_000}))
    with pytest.raises(InvalidProfileError, match=r"header has .* bytes: at most 65536"):
        CalibrationProfile.from_bytes(padded)
    endless = struct.pack("<Q", 2 << 20) + b" " * (2 << 20)
    with pytest.raises(InvalidProfileError, match="header claims 2097152"):
        CalibrationProfile.from_bytes(endless)


def test_an_oversize_adapter_is_refused_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "MAX_BYTES", 100)
    with pytest.raises(InvalidProfileError, match="at most 100 are allowed"):
        make()
