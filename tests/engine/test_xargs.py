from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hemostat_calibration import __version__, plugin_version
from hemostat_engine import xargs
from hemostat_engine.xargs import NO_PARAMETERS, RequestParameters, edits_logits

parse = functools.partial(xargs.parse, signed=True)

VERSION = "0123456789abcdef" * 2


def test_importing_the_engine_imports_neither_torch_nor_vllm() -> None:
    program = (
        "import sys, hemostat_engine, hemostat_engine.xargs;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'vllm')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_no_entry_point_is_registered() -> None:
    from importlib.metadata import entry_points

    assert not [e for e in entry_points(group="vllm.logits_processors") if "hemostat" in e.value]


@pytest.mark.parametrize("extra", [None, {}, {"other": 1}, {"hemostat": None}])
def test_request_without_parameters(extra: dict[str, Any] | None) -> None:
    assert parse(extra) is NO_PARAMETERS


def test_both_keys_are_read_beside_other_keys() -> None:
    assert parse({"hemostat": VERSION, "hemostat_tap": "a-B_9", "theirs": [1]}) == RequestParameters(VERSION, "a-B_9")


def test_number_of_candidates_of_an_answer() -> None:
    result = [parse({"hemostat_tap": "n", "hemostat_tap_top": value}) for value in (20, "20", "1", 128)]
    assert [request.top for request in result] == [20, 20, 1, 128]
    assert parse({"hemostat_tap": "n"}).top is None
    # Without a nonce there is nobody to send the answer to.
    assert parse({"hemostat_tap_top": "20"}) is NO_PARAMETERS


def test_forced_ids_are_read_alone_and_beside_others() -> None:
    assert parse({"hemostat_force": [3, 0]}) == RequestParameters(None, None, forced=(3, 0))
    assert parse({"hemostat_force": [3], "hemostat_tap": "n"}) == RequestParameters(None, "n", forced=(3,))


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"hemostat": ""}, "vllm_xargs.hemostat must"),
        ({"hemostat": 7}, "vllm_xargs.hemostat must"),
        ({"hemostat": [VERSION]}, "vllm_xargs.hemostat must"),
        ({"hemostat": VERSION.upper()}, "vllm_xargs.hemostat must"),
        ({"hemostat": VERSION + "\n"}, "vllm_xargs.hemostat must"),
        ({"hemostat": "../" + VERSION}, "vllm_xargs.hemostat must"),
        ({"hemostat": "x" * 10_000}, r"\.\.\. \(hemostat-vllm "),
        ({"hemostat_tap": ""}, "vllm_xargs.hemostat_tap must"),
        ({"hemostat_tap": "a" * 65}, "vllm_xargs.hemostat_tap must"),
        ({"hemostat_tap": "a/b"}, "vllm_xargs.hemostat_tap must"),
        ({"hemostat_tap": 1.5}, "vllm_xargs.hemostat_tap must"),
        *(
            ({"hemostat_force": value}, "vllm_xargs.hemostat_force must be 1 to 4096 token ids")
            for value in ([], [-1], [True], [1.0], ["3"], 3, "3", [1] * 4097)
        ),
        *(
            ({"hemostat_tap": "n", "hemostat_tap_top": value}, "vllm_xargs.hemostat_tap_top must be an integer from 1")
            for value in (0, 129, -1, 1.5, "0", "1.5", "", "9" * 100, [3], "2\n")
        ),
    ],
)
def test_invalid_value_is_rejected_by_name(extra: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        parse(extra)
    assert len(str(caught.value)) < 250


def test_a_refused_profile_says_the_plugins_version_for_hemostat_check() -> None:
    with pytest.raises(ValueError, match=r"vllm_xargs\.hemostat must") as caught:
        parse({"hemostat": "not-a-profile-version"})
    assert plugin_version.read(str(caught.value)) == __version__


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.dictionaries(st.sampled_from(["hemostat", "hemostat_tap"]), st.text() | st.integers() | st.floats() | st.none())
)
def test_parse_returns_or_raises_value_error(extra: dict[str, Any]) -> None:
    try:
        asked = parse(extra)
    except ValueError:
        return
    assert asked == RequestParameters(extra.get("hemostat"), extra.get("hemostat_tap"))


def edited(edit: dict[str, Any], after_penalties: bool) -> bool:
    pytest.importorskip("vllm")
    from vllm import SamplingParams

    assert not edits_logits(SamplingParams(), after_penalties)
    return edits_logits(SamplingParams(**edit), after_penalties)


@pytest.mark.parametrize(
    "edit",
    [
        {"logit_bias": {1: 2.0}},
        {"bad_words": ["x"]},
        {"allowed_token_ids": [1]},
        {"min_tokens": 1},
    ],
)
def test_logit_editing_parameters_are_detected(edit: dict[str, Any]) -> None:
    assert edited(edit, after_penalties=True)
    assert edited(edit, after_penalties=False)


@pytest.mark.parametrize(
    "edit",
    [
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
    ],
)
def test_penalties_count_only_where_the_processor_runs_after_them(edit: dict[str, Any]) -> None:
    assert edited(edit, after_penalties=True)
    assert not edited(edit, after_penalties=False)


def test_as_many_tokens_may_be_forced_as_a_long_answer_has() -> None:
    ids = list(range(4096))
    assert parse({"hemostat_force": ids}).forced == tuple(ids)
