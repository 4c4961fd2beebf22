"""No user and no password of an address is printed, however it is written and whatever characters it has."""

from __future__ import annotations

import logging
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.support.slow import examples

from hemostat.cli import main
from hemostat.config.errors import ConfigError
from hemostat.config.loading import load
from hemostat.store.factory import open_store
from hemostat.store.protocol import StoreFailure
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_engine.settings import Settings

UPSTREAM = "http://127.0.0.1:1"
"""Nothing listens there."""
PLACES = [
    "upstream.url",
    "upstream.urls",
    "reference.url",
    "reference.models.m.url",
    "tracing.endpoint",
    "store.url",
    # A section or a list where an address is expected, and the reverse.
    *("upstream", "reference", "tracing", "store", "labels", "upstream.url.url", "store.url.0", "listen.port"),
]
SECRETS = st.lists(st.sampled_from(string.printable[:95].replace("Q", "")), max_size=12).map(
    lambda characters: "Q" + "".join(f"{character}Q" for character in characters)
)
"""With Q beside each character: what is printed has no other one, so that also a part of a secret is found."""
SCHEMES = ["http://", "https://", "dns+http://", "postgresql://", "sqlite:///", "htp://", ""]


def written(key: str, address: str) -> dict[str, Any]:
    """The configuration with `address` at `key`."""
    if key == "upstream.urls":
        return {"upstream": {"urls": [address]}}
    result: dict[str, Any] = {"upstream": {"url": UPSTREAM}, "reference": {"backend": "vllm"}}
    if key == "reference.models.m.url":
        result["reference"]["models"] = {"m": {"model": "m", "url": address}}
        return result
    *parents, last = key.split(".")
    section = result
    for name in parents:
        section = section.setdefault(name, {}) if isinstance(section.get(name, {}), dict) else {}
    section[last] = address
    return result


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(PLACES), scheme=st.sampled_from(SCHEMES), user=SECRETS, password=SECRETS)
@example(key="store.url", scheme="postgresql://", user="", password="Q/Q#Q")
@example(key="store.url", scheme="postgresql://", user="Q", password="1/2#Q")
@example(key="upstream.url", scheme="http://", user="Q", password="QQ/Q")
@example(key="upstream.url", scheme="http://", user="Q", password="QQ#Q")
@example(key="upstream.url", scheme="sqlite:///", user="Q", password="Q,Q")
@example(key="upstream.urls", scheme="http://", user="Q#Q", password="Q,Q,Q")
@example(key="upstream", scheme="http://", user="Q", password="Q")
@example(key="upstream.url.url", scheme="http://", user="Q", password="Q")
@example(key="upstream.url", scheme="", user="Q=Q", password="Q")
def test_errors_of_the_configuration_and_of_commands(
    key: str, scheme: str, user: str, password: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"{scheme}{user}:{password}@127.0.0.1:1"
    file = tmp_path / "hemostat.yaml"
    file.write_text(yaml.safe_dump(written(key, address)))
    assert main(["check", "--config", str(file), "--print-config"]) in (0, 2)
    for flags in (
        ["--set", f"{key}={address}"],
        ["--set", address],
        ["--upstream", address],
        [address],
        ["--no", address],
    ):
        main(["check", *flags, "--print-config"])
    main(["engines", "--admin", address])
    main([address])
    if "://" in address:
        main(["doctor", address, address])
    try:
        loaded = load(file, {f"HEMOSTAT_{key.upper().replace('.', '__')}": address})
    except ConfigError as error:
        print(error)
    else:
        print(repr(loaded), loaded.redacted())
    try:
        Settings.from_environment({"HEMOSTAT_ADMIN_URL": address})
    except InvalidArgumentError as error:
        print(error)
    printed = "".join(capsys.readouterr())
    assert "Q" not in printed


def test_a_comma_in_a_password_does_not_end_the_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEMOSTAT_ADMIN_URL", "http://Q:1,Q@127.0.0.1:1")
    assert main(["engines"]) == 2
    printed = "".join(capsys.readouterr())
    assert "Q" not in printed
    assert "127.0.0.1:1" in printed


@settings(max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scheme=st.sampled_from(["postgres://", "postgresql://"]), user=SECRETS, password=SECRETS)
@example(scheme="postgresql://", user="", password="Q/Q#Q")
@example(scheme="postgresql://", user="Q", password="Q")
def test_check_and_logs_of_a_store(
    scheme: str, user: str, password: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """An address that is valid, too: nothing answers there."""
    caplog.set_level(logging.DEBUG)
    address = f"{scheme}{user}:{password}@127.0.0.1:1/0"
    assert main(["check", "--upstream", UPSTREAM, "--set", f"store.url={address}"]) in (1, 2)
    try:
        open_store(address).read()
    except StoreFailure as failure:
        print(failure)
    assert "Q" not in "".join(capsys.readouterr()) + caplog.text
