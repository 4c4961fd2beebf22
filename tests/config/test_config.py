"""An invalid configuration gives one line that names the key and a valid value; a valid one is loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from tests.support.paths import ROOT

from hemostat.config.errors import ConfigError
from hemostat.config.loading import FOREIGN_VARIABLES, load
from hemostat.config.schema import LEAVES, Settings

UPSTREAM = "upstream:\n  url: http://127.0.0.1:8000\n"


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "hemostat.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def test_only_the_upstream_is_required(written: Any) -> None:
    settings = load(written(UPSTREAM), {})
    assert settings.upstream.url == "http://127.0.0.1:8000"
    assert settings.admin.host == "127.0.0.1"
    assert settings.reference.backend == "none"
    assert settings.calibration.mode == "observe"
    assert settings.records.path is None
    assert load(None, {"HEMOSTAT_UPSTREAM__URL": "http://127.0.0.1:8000/"}) == settings
    assert load(None, {}, [("upstream.url", "http://127.0.0.1:8000")]) == settings


def test_flags_win_over_environment_over_file(written: Any) -> None:
    path = written(UPSTREAM + "shadow: {rate: 0.1, max_tokens: 100, top_k: 5}\nlabels: [a]\nadmin: {token: file}\n")
    env = {"HEMOSTAT_SHADOW__RATE": "0.2", "HEMOSTAT_SHADOW__MAX_TOKENS": "200", "HEMOSTAT_LABELS": "b, c"}
    settings = load(path, env, [("shadow.rate", "0.3"), ("shadow.allow_on", "on"), ("admin.token", "null")])
    shadow = settings.shadow
    assert (shadow.rate, shadow.max_tokens, shadow.top_k, shadow.allow_on) == (0.3, 200, 5, True)
    assert settings.labels == ["b", "c"]
    assert settings.admin.token is None


@pytest.mark.parametrize("mode", ["off", "observe", "auto"])
def test_every_mode_quoted_unquoted_and_from_outside(written: Any, mode: str) -> None:
    for text in (mode, f"'{mode}'"):
        assert load(written(f"{UPSTREAM}calibration: {{mode: {text}}}\n"), {}).calibration.mode == mode
    assert load(written(UPSTREAM), {"HEMOSTAT_CALIBRATION__MODE": mode}).calibration.mode == mode
    assert load(written(UPSTREAM), {}, [("calibration.mode", mode)]).calibration.mode == mode


def test_a_section_with_every_key_commented_out_is_empty(written: Any) -> None:
    assert load(written(UPSTREAM + "shadow:\n  # rate: 0.1\nreference: {backend: }\n"), {}) == load(
        written(UPSTREAM), {}
    )


WRONG = [
    ("", "upstream.url: required"),
    ("# nothing\n", "upstream.url: required"),
    ("shadow: {rate: 0.1}\n", "upstream.url: required"),
    ("upstream: {url: http://a, urls: [http://b]}\n", "upstream: url or urls: give exactly one"),
    ("upstream: {urls: [http://a, http://a]}\n", "an address is listed twice"),
    ("upstream: {urls: [http://a, https://b]}\n", "http and https do not go together"),
    ("upstream: {urls: [dns+http://a]}\n", "upstream.urls.0"),
    ("upstream: {url: dns+http://a/v1}\n", "has a path"),
    ("upstream: {}\n", "upstream: url or urls: give exactly one"),
    ("just words\n", "a mapping is expected"),
    ("- upstream\n", "a mapping is expected"),
    ("upstream: [\n", ":2: not YAML"),
    ("upstream:\n  url: http://h\n url: x\n", ":3: not YAML"),
    ("a: \x01\n", "not YAML"),
    (b"\xff\xfe\xfa", "not UTF-8 (byte 0)"),
    (UPSTREAM + "when: 2024-13-45\n", "not YAML"),
    (UPSTREAM + "workers: !!python/object:os.system x\n", ":3: not YAML"),
    (UPSTREAM + "workers: 1\nworkers: 2\n", ":4: workers: duplicate key"),
    (UPSTREAM + "  url: http://other\n", ":3: upstream.url: duplicate key"),
    (UPSTREAM + "off: 1\n", ":3: 'off': unknown key"),
    (UPSTREAM + "? [a]\n: 1\n", "unknown key; every key is a word"),
    (UPSTREAM + "x: " + "[" * 3000, "nested too deep"),
    # keys
    (UPSTREAM + "shadow: {ratee: 1}\n", ":3: shadow.ratee: unknown key; did you mean shadow.rate?"),
    (UPSTREAM + "shadw: {rate: 1}\n", ":3: shadw: unknown key; did you mean shadow?"),
    (UPSTREAM + "rate: 0.1\n", ":3: rate: unknown key; did you mean shadow.rate?"),
    (UPSTREAM + "log:\n  zzzz: 1\n", ":4: log.zzzz: unknown key; the keys here are level"),
    ("upstream: {ulr: http://h}\n", ":1: upstream.ulr: unknown key; did you mean upstream.url?"),
    # types
    (UPSTREAM + "shadow: 3\n", ":3: shadow: 3 is not a mapping; its keys are rate, allow_on"),
    (UPSTREAM + "shadow: {rate: often}\n", "shadow.rate: 'often' does not fit"),
    (UPSTREAM + "shadow: {rate: yes}\n", "shadow.rate: a number is expected"),
    (UPSTREAM + "shadow: {rate: [1]}\n", "shadow.rate: [1] does not fit"),
    (UPSTREAM + "shadow: {rate: }\n", "shadow.rate: null does not fit"),
    (UPSTREAM + "workers: 1.5\n", "workers: 1.5 does not fit"),
    (UPSTREAM + "workers: on\n", "workers: a number is expected"),
    (UPSTREAM + "labels: chat\n", "labels: 'chat' does not fit"),
    (UPSTREAM + "labels: [1]\n", "; put it in quotes"),
    (UPSTREAM + "admin: {token: 1234}\n", "admin.token: the value does not fit"),
    # values
    (UPSTREAM + "shadow: {rate: 1.5}\n", "shadow.rate: 1.5 does not fit: should be less than or equal to 1"),
    (UPSTREAM + "shadow: {rate: .nan}\n", "shadow.rate: nan does not fit"),
    (UPSTREAM + "shadow: {reference_tokens_per_second: .inf}\n", "inf does not fit"),
    (UPSTREAM + "listen: {port: 70000}\n", "listen.port: 70000 does not fit"),
    (UPSTREAM + "evidence: {client_header: 'a b'}\n", "evidence.client_header: 'a b' is not the name of a header"),
    *(
        (UPSTREAM + f"client_limits: {{trusted_proxies: {value}}}\n", f"client_limits.trusted_proxies{said}")
        for value, said in (
            ("['10.0.0.1/8']", ".0: '10.0.0.1/8' is not a network; write it like 10.0.0.0/8"),
            ("['gateway']", ".0: 'gateway' is not a network"),
            ("['10.0.0.0/8', '0.0.0.0/0']", ".1: 0.0.0.0/0 is everybody; name the networks of your gateways"),
            ("['::/0']", ".0: ::/0 is everybody"),
            ("['::ffff:0:0/96']", ".0: ::ffff:0:0/96 is everybody"),
            ("10.0.0.0/8", ": '10.0.0.0/8' does not fit"),
        )
    ),
    (UPSTREAM + "workers: 0\n", "workers: 0 does not fit"),
    (UPSTREAM + "calibration: {control_fraction: 0}\n", "calibration.control_fraction: 0 does not fit"),
    (
        UPSTREAM + "calibration: {mode: on}\n",
        "calibration.mode: an unquoted on/yes/true is not one of off, observe, auto",
    ),
    (UPSTREAM + "calibration: {mode: obsrve}\n", "'obsrve' is not one of off, observe, auto; did you mean observe?"),
    (
        UPSTREAM + "drain_seconds: 60\n",
        "drain_seconds: this setting has gone: relays that were replaced have 600 s",
    ),
    (
        UPSTREAM + "limits: {connections: 20000}\n",
        "limits.connections: this setting has gone: a relay process accepts 16384 connections",
    ),
    (
        UPSTREAM + "adapter: {reference: /models/whole}\n",
        "adapter.reference: this setting has gone: adapters are made from the reference's checkpoint",
    ),
    (
        UPSTREAM + "calibration: {apply: engine}\n",
        "calibration.apply: this setting has gone: the plugin in vLLM applies",
    ),
    (
        UPSTREAM + "calibration: {force: /no/such/file}\n",
        "calibration.force: this setting has gone: import",
    ),
    (UPSTREAM + "canaries: {file: /no/such/file}\n", "canaries.file: there is no file '/no/such/file'"),
    (UPSTREAM + "reference: {backend: vlm, model: m}\n", "did you mean vllm?"),
    (
        UPSTREAM + "calibration: {scope: pooled}\n",
        "calibration.scope: this setting has gone: profiles are learned from",
    ),
    (UPSTREAM + "calibration: {clamp_nats: 0}\n", "calibration.clamp_nats: 0 does not fit"),
    (UPSTREAM + "reference: {backend: vllm}\n", "reference.url: required with reference.backend: vllm"),
    (UPSTREAM + "reference: {backend: transformers}\n", "reference.model: required"),
    (UPSTREAM + "reference: {device: gpu}\n", "reference.device: 'gpu' is not a device"),
    (UPSTREAM + "labels: [a b]\n", "labels: 'a b' is not a label"),
    (UPSTREAM + "labels: [a, a]\n", "labels: a label is listed twice"),
    (UPSTREAM + "store: {url: 'redi://u:p@h'}\n", "store.url: ***@h is none of memory://"),
    (UPSTREAM + "store: {url: 'sqlite://[h'}\n", "store.url: *** is not an address"),
    (UPSTREAM + "store: {url: 'postgresql://u:p@[h/d'}\n", "store.url: postgresql://*** is not an address, or has an"),
    (
        UPSTREAM + "store: {url: 'postgresql://u:p@h/d?mode=x'}\n",
        "store.url: postgresql://***@h… is not an address, or",
    ),
    (UPSTREAM + "store: {url: 'postgresql://u:p/w@h/d'}\n", "store.url: postgresql://***@h…: what is before the @ is"),
    (UPSTREAM + "store: {url: 'postgresql://u:p@w@h/d'}\n", "store.url: postgresql://***@h…: what is before the @ is"),
    (
        UPSTREAM + "store: {url: 'postgresql://u:p'}\n",
        "store.url: postgresql://***: what is before the @ is not a user",
    ),
    (UPSTREAM + "store: {url: 'sqlite:///'}\n", "store.url: sqlite:/// is none of"),
    (UPSTREAM + "log: {level: loud}\n", "log.level: 'loud' is not one of debug, info, warning, error"),
    (UPSTREAM + "admin: {host: 0.0.0.0}\n", "admin.token: required, as admin.host 0.0.0.0 is not loopback"),
    (UPSTREAM + "admin: {host: '::'}\n", "admin.token: required"),
    (UPSTREAM + "admin: {host: example.org}\n", "admin.token: required"),
    (UPSTREAM + "admin: {token: ''}\n", "admin.token: must be printable ASCII"),
    (UPSTREAM + "admin: {token: a, engine_token: a}\n", "admin.engine_token: is admin.token, too"),
    (UPSTREAM + 'admin: {token: "a\\nb"}\n', "admin.token: must be printable ASCII"),
    (
        UPSTREAM + "control: {addresses: [localhost]}\n",
        "'localhost' is not a host and a port; write it like control:8082",
    ),
    (UPSTREAM + "control: {addresses: ['::1:80']}\n", "'::1:80' is not a host and a port"),
    (UPSTREAM + "control: {addresses: ['h:99999']}\n", "'h:99999' is not a host and a port"),
    (UPSTREAM + "control: {listen: 8082}\n", "control.listen: 8082 does not fit"),
    (UPSTREAM + "control: {listen: '127.0.0.1:0'}\n", "control: token: required with addresses or listen"),
    (UPSTREAM + "control: {addresses: ['localhost:1']}\n", "control: token: required with addresses or listen"),
    (
        UPSTREAM + "control: {token: t, addresses: ['127.0.0.2:1', 'b:1']}\n",
        "control: ca: required, as b:1 is not loop",
    ),
    (UPSTREAM + "control: {token: t, addresses: ['10.0.0.1:1']}\n", "captures travel with clients' tokens"),
    (UPSTREAM + "control: {token: t, listen: '0.0.0.0:1'}\n", "control: cert: required, as 0.0.0.0:1 is not loopback"),
    (UPSTREAM + "control: {token: t, listen: '[::]:1'}\n", "control: cert: required"),
    (UPSTREAM + f"control: {{cert: {__file__}}}\n", "control: cert and key: set both"),
    (UPSTREAM + "admin: {port: 8080}\n", "admin.port: 8080 is listen.port too"),
    ("upstream: {url: 127.0.0.1:8000}\n", "is not an http address; write it like http://127.0.0.1:8000"),
    ("upstream: {url: 'http://'}\n", "is not an http address"),
    ("upstream: {url: 'http://h:99999'}\n", "upstream.url: 'http://h:99999' is not an http address"),
    ("upstream: {url: 'http://[::1'}\n", "upstream.url: 'http://***' is not an http address"),
    ("upstream: {url: http://h/v1}\n", "give the server's root, http://h"),
    ("upstream: {url: 'http://h?x=1'}\n", "give the server's root, http://h"),
]


@pytest.mark.parametrize(("text", "words"), WRONG, ids=[w for _, w in WRONG])
def test_an_invalid_configuration_is_one_line(written: Any, text: str | bytes, words: str) -> None:
    path = written(text)
    with pytest.raises(ConfigError) as error:
        load(path, {})
    message = str(error.value)
    assert words in message
    assert message.startswith(str(path))
    assert "\n" not in message


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Any) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load(tmp_path / "absent.yaml", {})
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path, {})
    with pytest.raises(ConfigError, match="cannot be read"):
        load(Path("nul\0byte"), {})
    monkeypatch.setattr("hemostat.config.loading.MAX_FILE_BYTES", 10)
    with pytest.raises(ConfigError, match="longer than 10 bytes"):
        load(written(UPSTREAM), {})


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"HEMOSTAT_SHADOW_RATE": "1"}, "HEMOSTAT_SHADOW_RATE: unknown; did you mean HEMOSTAT_SHADOW__RATE?"),
        ({"HEMOSTAT_SHADOW__RATEE": "1"}, "did you mean HEMOSTAT_SHADOW__RATE?"),
        ({"HEMOSTAT_LISTEN_PORT": "80"}, "did you mean HEMOSTAT_LISTEN__PORT?"),
        ({"HEMOSTAT_SHADOW": "1"}, "HEMOSTAT_SHADOW: a section, not a key; did you mean HEMOSTAT_SHADOW__RATE?"),
        ({"HEMOSTAT_": "1"}, "HEMOSTAT_: unknown"),
        ({"HEMOSTAT_CALIBRATION__APPLY": "request"}, "HEMOSTAT_CALIBRATION__APPLY: this setting has gone: the plugin"),
        ({"HEMOSTAT_SHADOW__RATE": "x"}, "HEMOSTAT_SHADOW__RATE: shadow.rate: 'x' does not fit"),
        ({"HEMOSTAT_SHADOW__RATE": ""}, "HEMOSTAT_SHADOW__RATE: shadow.rate: '' does not fit"),
        ({"HEMOSTAT_CALIBRATION__MODE": "aut"}, "did you mean auto?"),
        ({"HEMOSTAT_LABELS": "a,b c"}, "HEMOSTAT_LABELS: labels: 'b c' is not a label"),
    ],
)
def test_wrong_environment_names_the_variable(written: Any, env: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(written(UPSTREAM), env)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_the_plugin_in_vllm_reads_is_no_setting() -> None:
    """Whoever starts vLLM and Hemostat from one shell has its variables in both."""
    plugin = (ROOT / "calibration" / "hemostat_engine").rglob("*.py")
    read = {name for file in plugin for name in re.findall(r"\bHEMOSTAT_[A-Z_]+\b", file.read_text())}
    assert "HEMOSTAT_ADAPTERS" in read
    assert read <= FOREIGN_VARIABLES


def test_variables_of_other_programs_are_ignored(written: Any) -> None:
    """Variables of the engine plugin and of make, and those that Kubernetes sets for a Service called hemostat."""
    env = dict.fromkeys(FOREIGN_VARIABLES, "x") | {
        "HEMOSTAT_SERVICE_HOST": "10.0.0.1",
        "HEMOSTAT_SERVICE_PORT_HTTP": "8080",
        "HEMOSTAT_ADMIN_SERVICE_PORT": "8081",
        "HEMOSTAT_PORT": "tcp://10.0.0.1:8080",
        "HEMOSTAT_PORT_8080_TCP": "tcp://10.0.0.1:8080",
        "HEMOSTAT_PORT_8080_TCP_PROTO": "tcp",
        "OTHER": "x",
    }
    assert load(written(UPSTREAM), env) == load(written(UPSTREAM), {})


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (("shadow.rat", "1"), "--set shadow.rat: unknown; did you mean shadow.rate?"),
        (("shadow", "1"), "a section, not a key; did you mean shadow.rate?"),
        (("shadow.rate", "7"), "--set: shadow.rate: '7' does not fit: should be less than or equal to 1"),
        (("shadow.top_k", "1"), "shadow.top_k: '1' does not fit: should be greater than or equal to 2"),
        (("", ""), "unknown"),
    ],
)
def test_wrong_flags(written: Any, flag: tuple[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(written(UPSTREAM), {}, [flag])
    assert words in str(error.value)


def test_a_value_below_a_key_that_is_not_a_section(written: Any) -> None:
    with pytest.raises(ConfigError, match=r":3: shadow: 3 is not a mapping"):
        load(written(UPSTREAM + "shadow: 3\n"), {"HEMOSTAT_SHADOW__RATE": "1"})


SECRETS = {
    "admin.token": "s3cret-a",
    "admin.engine_token": "s3cret-e",
    "control.token": "s3cret-d",
    "upstream.api_key": "s3cret-b",
    "reference.api_key": "s3cret-c",
}


def test_secrets_are_masked_but_reach_hemostats_processes(written: Any) -> None:
    settings = load(written(UPSTREAM), {}, SECRETS.items())
    for shown in (repr(settings), str(settings), str(settings.redacted()), settings.model_dump_json()):
        assert "s3cret" not in shown
    assert Settings.model_validate(settings.plain()) == settings
    assert settings.plain()["admin"]["token"] == "s3cret-a"
    for key in SECRETS:
        with pytest.raises(ConfigError) as error:
            load(written(UPSTREAM), {}, [(key, "s3cret with spaces")])
        assert "s3cret" not in str(error.value)
        section, _, name = key.partition(".")
        with pytest.raises(ConfigError) as error:
            load(written(yaml.safe_dump({"upstream": {"url": "http://h"}} | {section: {name: ["s3cret"]}})), {})
        assert "s3cret" not in str(error.value)
    with pytest.raises(ConfigError) as error:
        load(None, {}, [("upstream.url", "http://user:s3cret@h")])
    assert "s3cret" not in str(error.value)


def test_the_stores_password_is_masked_but_reaches_hemostats_processes(written: Any) -> None:
    url = "postgresql://user:s3cret@h:1/d?sslmode=require"
    settings = load(written(UPSTREAM), {}, [("store.url", url)])
    for shown in (repr(settings), str(settings), str(settings.redacted()), settings.model_dump_json()):
        assert "s3cret" not in shown
    assert settings.redacted()["store"]["url"] == "postgresql://***@h:1…"
    assert settings.plain()["store"]["url"] == url


def test_a_postgresql_store_needs_the_client_library(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"store\.url: needs .* pip install 'psycopg\[binary\]<4,>=3"):
        load(written(UPSTREAM), {}, [("store.url", "postgresql://h/d")])


def test_references_of_several_models(written: Any) -> None:
    text = """
upstream: {url: http://a}
reference:
  backend: vllm
  url: http://ref:8000
  models:
    small: small-bf16
    org/large: {model: large-bf16, url: http://other:8000}
"""
    models = load(written(text), {}).reference.models
    assert {name: (model.model, model.url) for name, model in models.items()} == {
        "small": ("small-bf16", None),
        "org/large": ("large-bf16", "http://other:8000"),
    }
    env = {"HEMOSTAT_REFERENCE__BACKEND": "transformers", "HEMOSTAT_REFERENCE__MODELS": "a=/models/a, org/b=/models/b"}
    models = load(written("upstream: {url: http://a}"), env).reference.models
    assert {name: model.model for name, model in models.items()} == {"a": "/models/a", "org/b": "/models/b"}


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("{backend: vllm, models: {a: x}}", "reference.models.a.url or reference.url: required"),
        ("{backend: vllm, url: http://r, model: m, models: {a: x}}", "reference.model: does not go with"),
        ("{backend: transformers, models: {a: {model: x, url: http://r}}}", "reference.models.a.url: only with"),
        ("{backend: transformers, models: {a: {model: x, folder: /x}}}", "models.a.folder: only with"),
        ("{backend: transformers, models: {a: {modl: x}}}", "did you mean reference.models.a.model?"),
        ("{backend: transformers, models: {a: 3}}", "models.a: 3 is not a mapping; its keys are model, url, device"),
        ("{backend: transformers, models: [a]}", "reference.models: ['a'] is not a mapping; write name: reference"),
        ("{models: {a: x}}", "reference.models: has no effect with reference.backend: none"),
        ("{backend: transformers, models: {b: x}}", "calibration.model: 'a' has no reference; add it to"),
    ],
)
def test_references_that_do_not_fit_together(written: Any, reference: str, words: str) -> None:
    text = f"upstream: {{url: http://a}}\ncalibration: {{model: a}}\nreference: {reference}\n"
    with pytest.raises(ConfigError) as error:
        load(written(text), {})
    assert words in str(error.value)


def test_plain_round_trips_through_json(written: Any, tmp_path: Path) -> None:
    import json

    path = written(UPSTREAM + f"records: {{path: {tmp_path}/r.jsonl}}\ncanaries: {{file: {tmp_path}/hemostat.yaml}}\n")
    settings = load(path, {})
    assert Settings.model_validate(json.loads(json.dumps(settings.plain()))) == settings


KEYS = list(LEAVES)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.dates(), st.binary(max_size=5)
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | scalars, inner, max_size=3),
)


def outcome(path: Path, env: dict[str, str], flags: list[tuple[str, str]]) -> None:
    message = ""
    try:
        load(path, env, flags)
    except ConfigError as error:
        message = str(error)
    assert message == "" or message.isprintable()
    assert len(message) < 1000


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(b"a: &a [*a]")
@example(b"labels: &a [*a]")
@example(b"upstream: &a {url: *a}")
@example(b"&a *a : 1")
@example(b"<<: {shadow: 1}")
@example(b"x: !!int ''")
@example(b"x: !!timestamp x")
@example(b"x: !!bool x")
@example(b"x: " + b"9" * 5000)
@example(b"x: 1:2:3e400")
@example(b"\xef\xbb\xbfupstream: {url: http://h}")
def test_arbitrary_files_give_no_traceback(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.yaml"
    path.write_bytes(data)
    outcome(path, {}, [])


@given(
    st.dictionaries(st.sampled_from(KEYS), trees, max_size=4),
    st.dictionaries(st.sampled_from(KEYS), st.text(max_size=20), max_size=3),
    st.lists(st.tuples(st.sampled_from(KEYS) | st.text(max_size=20), st.text(max_size=20)), max_size=3),
)
def test_arbitrary_values_give_no_traceback(
    tmp_path_factory: pytest.TempPathFactory,
    values: dict[str, object],
    env: dict[str, str],
    flags: list[tuple[str, str]],
) -> None:
    data: dict[str, Any] = {"upstream": {"url": "http://h"}}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if section:
            data.setdefault(section, {})[name] = value
        else:
            data[name] = value
    path = tmp_path_factory.getbasetemp() / "values.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    outcome(path, {"HEMOSTAT_" + k.upper().replace(".", "__"): v for k, v in env.items()}, flags)


@pytest.mark.parametrize("command", ["serve", "check"])
def test_the_command_ends_with_one_line_and_code_2(written: Any, command: str) -> None:
    path = written(UPSTREAM + "shadow: {ratee: 1}\n")
    env = {k: v for k, v in os.environ.items() if not k.startswith("HEMOSTAT_")}
    arguments = [sys.executable, "-m", "hemostat", command, "--config", str(path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=30, env=env, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"hemostat: {path}:3: shadow.ratee: unknown key; did you mean shadow.rate?\n"
