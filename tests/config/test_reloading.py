"""Which settings take effect at SIGHUP, and secrets that are read from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hemostat.config.errors import ConfigError
from hemostat.config.loading import load
from hemostat.config.reloading import IN_PLACE, NEEDS_RESTART, RELAYS_ONLY, plan_reload
from hemostat.config.schema import LEAVES, Settings


def settings(**sections: Any) -> Settings:
    return Settings.model_validate({"upstream": {"url": "http://a:1"}} | sections)


def test_the_table_names_settings_once() -> None:
    named = [*NEEDS_RESTART, *RELAYS_ONLY, *IN_PLACE]
    assert set(named) <= LEAVES.keys()
    assert len(named) == len(set(named))


@pytest.mark.parametrize(
    ("changed", "replaces_control"),
    [
        ({}, False),
        ({"shadow": {"rate": 0.5}}, False),
        ({"limits": {"connections_per_client": 5000}, "workers": 3}, False),
        ({"shadow": {"rate": 0.5, "top_k": 5}}, True),
        ({"upstream": {"url": "http://b:1"}}, True),
        ({"labels": ["a"]}, True),
    ],
)
def test_the_control_process_is_replaced_only_where_it_has_to_be(
    changed: dict[str, Any], replaces_control: bool
) -> None:
    plan = plan_reload(settings(), settings(**changed))
    assert plan.replaces_control == replaces_control
    assert plan.needs_restart == []
    assert bool(plan.changed) == bool(changed)
    assert plan.settings == settings(**changed)


def test_what_needs_a_restart_stays_as_it_was_and_is_named(tmp_path: Path) -> None:
    old = settings(listen={"port": 1}, admin={"port": 2})
    new = settings(listen={"port": 3}, admin={"port": 4}, run_dir=str(tmp_path), workers=2)
    plan = plan_reload(old, new)
    assert plan.needs_restart == ["listen.port", "admin.port", "run_dir"]
    assert plan.settings == old.model_copy(update={"workers": 2})
    assert not plan.replaces_control
    assert plan_reload(plan.settings, new).needs_restart == plan.needs_restart, "said again at the next SIGHUP"


def test_secrets_come_from_files(tmp_path: Path) -> None:
    file, config = tmp_path / "token", tmp_path / "hemostat.yaml"
    file.write_text("  from-a-file\n")
    config.write_text(f"upstream:\n  url: http://a:1\n  api_key_file: {file}\n")
    engines, store = tmp_path / "engines", tmp_path / "store"
    engines.write_text("of-engines")
    store.write_text("postgresql://hemostat:from-a-file@h/d\n")
    env = {"HEMOSTAT_ADMIN__TOKEN_FILE": str(file), "HEMOSTAT_ADMIN__ENGINE_TOKEN_FILE": str(engines)}
    loaded = load(config, env, [("reference.api_key_file", str(file)), ("store.url_file", str(store))])
    assert loaded.store.url == "postgresql://hemostat:from-a-file@h/d"
    assert loaded.admin.engine_token is not None
    assert loaded.admin.engine_token.get_secret_value() == "of-engines"
    for secret in (loaded.upstream.api_key, loaded.admin.token, loaded.reference.api_key):
        assert secret is not None
        assert secret.get_secret_value() == "from-a-file"
    assert Settings.model_validate(loaded.plain()) == loaded
    assert "from-a-file" not in str(loaded.redacted())


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (b"", {}, "does not hold one line of printable ASCII"),
        (b"\xff", {}, "does not hold one line of printable ASCII"),
        (b"x" * 5000, {}, "does not hold one line of printable ASCII"),
        (b"two words", {}, "must be printable ASCII without spaces"),
        (b"good", {"HEMOSTAT_ADMIN__TOKEN": "t"}, "admin.token_file: does not go with admin.token"),
        (None, {}, "there is no file"),
    ],
)
def test_a_bad_secret_file_is_one_line(
    tmp_path: Path, content: bytes | None, more: dict[str, str], message: str
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load(None, {"HEMOSTAT_UPSTREAM__URL": "http://a:1", "HEMOSTAT_ADMIN__TOKEN_FILE": str(file)} | more)
    text = str(refused.value)
    assert message in text
    assert "\n" not in text
    assert "admin.token" in text


@pytest.mark.parametrize(("value", "kept"), [(False, "off"), ("stdout", "stdout"), ("/var/log/a", "/var/log/a")])
def test_the_access_log_goes_to_stdout_or_a_path(value: object, kept: str) -> None:
    assert settings(log={"access": value}).log.access == kept


def test_another_target_of_the_access_log_is_refused() -> None:
    with pytest.raises(ValueError, match="none of off, stdout and a path"):
        settings(log={"access": "stdrr"})
