import contextlib
import json
import pickle
import struct

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from tests.support.temperature_bias import temperature_bias

from hemostat_calibration.errors import InvalidProfileError
from hemostat_calibration.profiles import profile as profile_module
from hemostat_calibration.profiles.profile import VERSION_PATTERN, CalibrationProfile

V = 7


def make(temperature: float = 1.25, clamp: float = 1.0, **metadata: str) -> CalibrationProfile:
    return temperature_bias("w4a16", V, temperature, np.linspace(-0.5, 0.5, V), clamp, metadata)


def rewrite(data: bytes, change) -> bytes:
    """The same file with its header's JSON changed."""
    (length,) = struct.unpack_from("<Q", data)
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    header = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def test_round_trip_and_version():
    profile = make(tokens="15000", when="2026-01-01")
    data = profile.to_bytes()
    again = CalibrationProfile.from_bytes(data, profile.version)
    assert again == profile
    assert hash(again) == hash(profile)
    assert again.to_bytes() == data
    assert VERSION_PATTERN.fullmatch(profile.version)
    assert dict(again.metadata) == {"tokens": "15000", "when": "2026-01-01"}
    assert (again.family, again.model, again.vocab_size, again.clamp_nats) == ("temperature_bias", "w4a16", V, 1.0)
    np.testing.assert_array_equal(again.parameters["bias"], profile.parameters["bias"])
    assert float(again.parameters["inverse_temperature"]) == pytest.approx(0.8)


def test_the_version_is_pinned():
    """Versions name files and rows in stores: the bytes must not change between releases without a new format."""
    assert make(a="1", b="2").version == make(b="2", a="1").version == "510d340e2c21cc025e2437e6806a65f3"


def test_the_safetensors_library_reads_it():
    tensors = safetensors.numpy.load(make(a="1").to_bytes())
    assert set(tensors) == {"bias", "inverse_temperature"}
    assert tensors["bias"].shape == (V,)


def test_every_field_is_in_the_version():
    versions = {
        make().version,
        make(temperature=1.3).version,
        make(clamp=0.5).version,
        make(a="1").version,
        temperature_bias("other", V, 1.25, np.linspace(-0.5, 0.5, V), 1.0).version,
        temperature_bias("w4a16", V, 1.25, np.zeros(V), 1.0).version,
    }
    assert len(versions) == 6


def test_frozen():
    bias = np.zeros(V, np.float32)
    profile = temperature_bias("m", V, 1.0, bias, 1.0)
    bias[0] = 9.0
    assert profile.parameters["bias"][0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        profile.parameters["bias"][0] = 1.0
    with pytest.raises(TypeError):
        profile.parameters["bias"] = bias  # type: ignore[index]


def test_crosses_a_process_border():
    assert pickle.loads(pickle.dumps(make(a="1"))) == make(a="1")


@given(cut=st.integers(min_value=0, max_value=len(make().to_bytes()) - 1))
def test_truncated(cut: int):
    with pytest.raises(InvalidProfileError) as error:
        CalibrationProfile.from_bytes(make().to_bytes()[:cut])
    assert "\n" not in str(error.value)


@given(position=st.integers(min_value=0, max_value=len(make().to_bytes()) - 1), mask=st.integers(1, 255))
def test_one_changed_byte_is_refused_or_another_profile(position: int, mask: int):
    profile = make()
    data = bytearray(profile.to_bytes())
    data[position] ^= mask
    with pytest.raises(InvalidProfileError):
        CalibrationProfile.from_bytes(bytes(data), profile.version)
    with contextlib.suppress(InvalidProfileError):
        assert CalibrationProfile.from_bytes(bytes(data)).version != profile.version


@given(st.binary(max_size=300))
def test_noise(data: bytes):
    with pytest.raises(InvalidProfileError):
        CalibrationProfile.from_bytes(data)
    header = struct.pack("<Q", len(data)) + data
    with pytest.raises(InvalidProfileError):
        CalibrationProfile.from_bytes(header)


def test_wrong_digest():
    with pytest.raises(InvalidProfileError, match="digest"):
        CalibrationProfile.from_bytes(make().to_bytes(), make(a="1").version)


def test_longer_than_it_says():
    with pytest.raises(InvalidProfileError, match="safetensors"):
        CalibrationProfile.from_bytes(make().to_bytes() + b"x")


def test_oversize_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(profile_module, "MAX_BYTES", 10)
    with pytest.raises(InvalidProfileError, match="at most 10"):
        CalibrationProfile.from_bytes(make().to_bytes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["__metadata__"].update(family="nonesuch"), "family nonesuch is unknown"),
        (lambda e: e["__metadata__"].update(vocab_size="8"), "bias has shape"),
        (lambda e: e["__metadata__"].update(vocab_size="eight"), "bad number"),
        (lambda e: e["__metadata__"].update(vocab_size="-1"), "vocab_size"),
        (lambda e: e["__metadata__"].update(clamp_nats="nan"), "clamp_nats"),
        (lambda e: e["__metadata__"].update(clamp_nats="inf"), "clamp_nats"),
        (lambda e: e["__metadata__"].update(clamp_nats="0.0"), "clamp_nats"),
        (lambda e: e["__metadata__"].update(clamp_nats="1.00"), "canonical"),
        (lambda e: e["__metadata__"].update(format="4"), "format is 4"),
        (lambda e: e["__metadata__"].update(format="2"), "canonical"),
        (lambda e: e["__metadata__"].update(stray="2"), "canonical"),
        (lambda e: e["__metadata__"].pop("model"), "no 'model'"),
        (lambda e: e.pop("__metadata__"), "no metadata"),
        (lambda e: e["bias"].update(dtype="I32"), "bias is int32: it must be float32"),
        (lambda e: e["bias"].update(dtype="F64"), "bias has a type other than"),
        (lambda e: e.update(extra=e.pop("bias")), "parameters are"),
    ],
)
def test_bad_headers(change, message: str):
    with pytest.raises(InvalidProfileError, match=message) as error:
        CalibrationProfile.from_bytes(rewrite(make().to_bytes(), change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_parameters_must_be_finite(value: float):
    bias = np.zeros(V)
    bias[3] = value
    with pytest.raises(InvalidProfileError, match="bias holds"):
        temperature_bias("m", V, 1.0, bias, 1.0)
    data = bytearray(make().to_bytes())
    data[-8:-4] = struct.pack("<f", value)  # inside `bias`: `inverse_temperature` comes last
    with pytest.raises(InvalidProfileError, match="bias holds"):
        CalibrationProfile.from_bytes(bytes(data))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("m", V, 0.0, np.zeros(V), 1.0), "temperature is 0"),
        (("m", V, float("nan"), np.zeros(V), 1.0), "temperature is nan"),
        (("m", V, 1e300, np.zeros(V), 1.0), "inverse_temperature is 0"),
        (("m", V, 1.0, np.zeros(V + 1), 1.0), "bias has shape"),
        (("m", V, 1.0, np.zeros((V, 1)), 1.0), "bias has shape"),
        (("m", V, 1.0, np.zeros(V), -1.0), "clamp_nats"),
        (("m", V, 1.0, np.zeros(V), 21.0), "clamp_nats"),
        (("m", 0, 1.0, np.zeros(0), 1.0), "vocab_size"),
        (("m" * 70_000, V, 1.0, np.zeros(V), 1.0), "characters"),
    ],
)
def test_bad_arguments(arguments, message: str):
    with pytest.raises(InvalidProfileError, match=message):
        temperature_bias(*arguments)
