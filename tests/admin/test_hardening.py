"""The admin port attacked: over a real socket, by pages of other sites in a real browser, by what it shows."""

from __future__ import annotations

import http.server
import ipaddress
import json
import logging
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser, expect
from tests.support.admin_server import Served, everything, served
from tests.support.chromium import needs_chromium
from tests.support.control import AUTHORIZED, TOKEN, scored
from tests.support.served_models import pair, served_models

from hemostat.admin import app as admin_app
from hemostat.admin import hardening
from hemostat.admin.hardening import HEADERS, is_allowed_host
from hemostat.engines import api as engine_api
from hemostat.metrics.reasons import Unscored

SWITCH = "/api/v1/calibration"


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(
        tmp_path_factory.mktemp("served"), everything, alarm={"baseline_requests": 30}, labels=["batch"]
    ) as made:
        yield made


def connect(instance: Served) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", instance.port))
    made.settimeout(10)
    return made


def answer(connection: socket.socket) -> bytes:
    """All that comes until the other side closes, which a reset is too."""
    said = b""
    try:
        while chunk := connection.recv(65536):
            said += chunk
    except ConnectionResetError:
        pass
    return said


def cut_off(connection: socket.socket, piece: bytes, *, pause: float = 0.0, within: float = 8.0) -> bool:
    """Whether the other side closes while piece after piece is sent."""
    ends = time.monotonic() + within
    try:
        while time.monotonic() < ends:
            connection.sendall(piece)
            time.sleep(pause)
    except (ConnectionResetError, BrokenPipeError):
        return True
    return False


def closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(65536) == b""
    except ConnectionResetError:
        return True


def mode(instance: Served) -> str:
    result: str = httpx.get(f"{instance.url}/api/v1/status").json()["profile"]["mode"]
    return result


# --- sizes and timeouts ---------------------------------------------------------------------------------------------


def test_heads_without_end_are_cut_off_before_they_fill_the_memory(instance: Served) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = b"x-filler: " + b"y" * 1000 + b"\r\n"
    with connect(instance) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: 127.0.0.1\r\n")
        assert cut_off(connection, line)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000, "kilobytes"
    assert httpx.get(f"{instance.url}/livez").status_code == 200


@pytest.mark.parametrize("count", [50, 20_000])
def test_many_headers(instance: Served, count: int) -> None:
    head = b"".join(b"x-%d: yyyyyyyyyy\r\n" % n for n in range(count))
    with connect(instance) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n" + head + b"\r\n")
        assert answer(connection).startswith(b"HTTP/1.1 200" if count == 50 else b"HTTP/1.1 400")


@pytest.mark.parametrize(("per_address", "total"), [(32, 256), (64, 32)])
def test_those_who_never_finish_a_head_do_not_stay(
    instance: Served, monkeypatch: pytest.MonkeyPatch, per_address: int, total: int
) -> None:
    monkeypatch.setattr(hardening, "HEAD_SECONDS", 2.0)
    monkeypatch.setattr(hardening, "MAX_WAITING_PER_ADDRESS", per_address)
    monkeypatch.setattr(hardening, "MAX_WAITING", total)
    crowd = [connect(instance) for _ in range(80)]
    try:
        for connection in crowd:
            connection.sendall(b"GET /livez HTTP/1.1\r\n")
        assert httpx.get(f"{instance.url}/livez").status_code == 200, "probes are answered whatever others do"
        assert instance.connections <= 32
        assert [closed(connection) for connection in crowd] == [True] * len(crowd)
        assert httpx.get(f"{instance.url}/livez").status_code == 200
    finally:
        for connection in crowd:
            connection.close()


def test_probes_are_answered_beyond_the_limit_of_requests(instance: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening, "MAX_REQUESTS", 0)
    assert httpx.get(f"{instance.url}/api/v1/status").status_code == 503
    assert httpx.get(f"{instance.url}/livez").status_code == 200
    monkeypatch.undo()
    assert httpx.get(f"{instance.url}/api/v1/status").status_code == 200


def test_idle_connections_give_way_to_new_ones(instance: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening, "MAX_WAITING", 2)
    request = b"GET /livez HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    connections = []
    try:
        for _ in range(3):
            connections.append(connect(instance))
            connections[-1].sendall(request)
            while b"\r\n\r\n" not in connections[-1].recv(65536, socket.MSG_PEEK):
                pass
        assert answer(connections[0]).startswith(b"HTTP/1.1 200"), "and then the connection was closed"
    finally:
        for connection in connections:
            connection.close()


def test_a_second_head_is_not_waited_for_without_end(instance: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening, "HEAD_SECONDS", 0.5)
    with connect(instance) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert cut_off(connection, b"G", pause=0.1)


@pytest.mark.parametrize("path", [SWITCH, "/api/v1/profiles", "/api/v1/canaries/accept"])
def test_a_client_that_leaves_in_the_middle_of_a_body_is_no_traceback(
    instance: Served, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "handlers", [handler])
    left = threading.Event()
    read_body = engine_api.read_body

    async def noted(*arguments: Any) -> bytes:
        try:
            return await read_body(*arguments)
        finally:
            left.set()

    for module in (admin_app, engine_api):
        monkeypatch.setattr(module, "read_body", noted)
    with connect(instance) as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\n"
        connection.sendall(f"{head}content-length: 1000\r\n\r\n{{".encode())
    assert left.wait(10)
    assert httpx.get(f"{instance.url}/livez").text == "ok\n"
    assert [record.getMessage() for record in logged] == []


@pytest.mark.parametrize("headers", ["", f"authorization: Bearer {TOKEN}\r\n"])
def test_a_body_that_never_comes(instance: Served, monkeypatch: pytest.MonkeyPatch, headers: str) -> None:
    """Without the token it is not waited for at all."""
    monkeypatch.setattr(engine_api, "BODY_SECONDS", 0.5)
    with connect(instance) as connection:
        head = (
            f"POST {SWITCH} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 15\r\nconnection: close\r\n{headers}\r\n{{"
        )
        connection.sendall(head.encode())
        assert answer(connection).startswith(b"HTTP/1.1 408" if headers else b"HTTP/1.1 401")


def test_a_body_without_end_and_without_the_token_is_not_read_for_long(
    instance: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardening, "HEAD_SECONDS", 0.5)
    with connect(instance) as connection:
        head = f"POST /api/v1/profiles HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {1 << 40}\r\n\r\n"
        connection.sendall(head.encode())
        assert cut_off(connection, b" " * 10_000, pause=0.005)


@pytest.mark.parametrize(("path", "length"), [(SWITCH, 5000), ("/api/v1/engine/report", 100_000)])
def test_a_body_that_is_too_long(instance: Served, path: str, length: int) -> None:
    response = httpx.post(f"{instance.url}{path}", headers=AUTHORIZED, content=b" " * length)
    assert response.status_code == 413


# --- who may read, who may change -----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "hemostat.example"])
def test_a_public_address_is_not_bound_without_a_token(tmp_path: Path, host: str) -> None:
    config = tmp_path / "hemostat.yaml"
    config.write_text(
        "upstream: {url: http://127.0.0.1:1}\nlisten: {host: 127.0.0.1, port: 0}\n"
        + f"admin: {{host: '{host}', port: 0}}\n"
    )
    command = [str(Path(sys.executable).parent / "hemostat"), "serve", "--config", str(config)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (2, ""), "nothing was announced"
    assert "admin.token: required" in ended.stderr


def test_without_a_word_it_is_on_loopback(instance: Served) -> None:
    from hemostat.config.schema import Settings

    made = Settings.model_validate({"upstream": {"url": "http://127.0.0.1:1"}})
    assert (made.admin.host, made.admin.token, made.admin.names) == ("127.0.0.1", None, [])
    public = {"host": "0.0.0.0", "token": "t"}
    assert Settings.model_validate({"upstream": {"url": "http://127.0.0.1:1"}, "admin": public}).admin.names is None
    named = {**public, "allowed_hosts": ["hemostat"]}
    result = Settings.model_validate({"upstream": {"url": "http://127.0.0.1:1"}, "admin": named}).admin.names
    assert result == ["hemostat"]


@pytest.mark.parametrize("method", ["OPTIONS", "GET", "POST"])
@pytest.mark.parametrize("path", ["/", "/api/v1/status", SWITCH, "/metrics", "/api/v1/history"])
def test_no_other_origin_is_allowed_anything(instance: Served, method: str, path: str) -> None:
    asked = {
        "Origin": "https://evil.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    response = httpx.request(method, f"{instance.url}{path}", headers=asked)
    assert not [name for name in response.headers if name.startswith("access-control-")]
    assert response.headers["cross-origin-resource-policy"] == "same-origin"
    if method == "OPTIONS":
        assert response.status_code == 405


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8081", "127.0.0.1.evil.example", "localhost.evil.example", "[::1", "evil.example."],
)
@pytest.mark.parametrize("path", ["/", "/api/v1/status", "/metrics", "/livez", "/console/app.js"])
def test_a_rebound_name_is_refused(instance: Served, host: str, path: str) -> None:
    """The browser sends the name that the page was loaded from, whatever address that has now."""
    response = httpx.get(f"{instance.url}{path}", headers={"Host": host})
    assert response.status_code == 421
    assert "admin.allowed_hosts" in response.json()["detail"]
    assert HEADERS.items() <= dict(response.headers).items()


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:80", "10.1.2.3", "localhost."])
def test_addresses_and_localhost_are_answered(instance: Served, host: str) -> None:
    assert httpx.get(f"{instance.url}/livez", headers={"Host": host}).status_code == 200


def test_names_that_are_allowed(tmp_path: Path) -> None:
    with served(tmp_path, admin={"allowed_hosts": ["Hemostat.internal"]}) as made:
        for host, code in (("hemostat.internal:8081", 200), ("other.internal", 421), ("127.0.0.1", 200)):
            assert httpx.get(f"{made.url}/livez", headers={"Host": host}).status_code == code


NAMES = st.text("abz19.-:[]@%/\\ \t\u00e9", min_size=1, max_size=24)


@given(st.sampled_from(["", "localhost", "127.0.0.1", "[::1]", "hemostat"]), NAMES, st.booleans())
def test_no_other_name_gets_through_whatever_stands_around_it(ours: str, other: str, before: bool) -> None:
    host = other + ours if before else ours + other
    if is_allowed_host(host, {"hemostat"}):
        name = host.removeprefix("[").partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name.rstrip(".").lower() not in {"localhost", "hemostat"}:
            ipaddress.ip_address(name.rstrip("."))


@pytest.mark.parametrize(
    "path",
    [
        "../admin.py",
        "..%2f__init__.py",
        "vendor/../__init__.py",
        "__init__.py",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "vendor",
        "",
        "vendor/LICENSE-uPlot.txt%00",
    ],
)
def test_nothing_but_the_consoles_files_is_served(instance: Served, path: str) -> None:
    with connect(instance) as connection:  # as it stands: clients tidy paths up
        connection.sendall(f"GET /console/{path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n".encode())
        said = answer(connection)
    assert said.startswith(b"HTTP/1.1 404"), said
    assert b"def " not in said
    assert b"root:" not in said


def test_metrics_may_need_the_token(tmp_path: Path) -> None:
    with served(tmp_path, admin={"metrics_need_token": True}) as made:
        assert httpx.get(f"{made.url}/metrics").status_code == 401
        assert httpx.get(f"{made.url}/metrics", headers={"Authorization": "Bearer no"}).status_code == 401
        allowed = httpx.get(f"{made.url}/metrics", headers=AUTHORIZED)
        assert (allowed.status_code, "hemostat_requests_total" in allowed.text) == (200, True)


# --- in a browser ---------------------------------------------------------------------------------------------------

EVIL = """<!doctype html><title>evil</title>
<iframe id="frame" src="TARGET/"></iframe>
<img id="image" src="TARGET/metrics"><script src="TARGET/api/v1/status"></script>
<form id="form" method="post" action="TARGET/api/v1/calibration" enctype="text/plain" target="sink">
<input name='{"mode": "off", "x": "' value='"}'></form><iframe name="sink"></iframe>
<script>
const got = {}, api = "TARGET/api/v1", authorization = "Bearer secret";
const body = '{"mode": "off"}', method = "POST", mode = "no-cors";
const attempt = async (name, how) => {
  try { const a = await how(); got[name] = a.type + " " + a.status; } catch (error) { got[name] = "refused"; }
};
(async () => {
  await attempt("read", () => fetch(`${api}/status`));
  await attempt("blind", () => fetch(`${api}/status`, { mode }));
  await attempt("switch", () => fetch(`${api}/calibration`, { method, mode, body }));
  await attempt("token", () => fetch(`${api}/calibration`, { method, body, headers: { authorization }}));
  got.stream = await new Promise((done) => {
    const stream = new EventSource(`${api}/stream`);
    stream.addEventListener("state", () => done("read"));
    stream.onerror = () => done("refused");
  });
  document.getElementById("form").submit();
  const seen = document.getElementById("frame").contentDocument;
  got.frame = seen === null ? "refused" : seen.title;
  setTimeout(() => { window.got = got; }, 500);
})();
</script>"""


@needs_chromium
def test_a_page_of_another_site_can_neither_read_nor_change(instance: Served, browser: Browser) -> None:
    """It even knows the token: without CORS the browser does not send it."""

    class Evil(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = EVIL.replace("TARGET", instance.url).encode()
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    before = mode(instance)
    assert before == "auto"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Evil)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        page = browser.new_page()
        refused: list[int] = []
        page.on(
            "response", lambda r: refused.append(r.status) if SWITCH in r.url and r.request.method == "POST" else None
        )
        page.goto(f"http://localhost:{server.server_port}/")
        page.wait_for_function("window.got !== undefined", timeout=15_000)
        got = page.evaluate("window.got")
        assert got == dict.fromkeys(("read", "blind", "switch", "token", "stream", "frame"), "refused")
        assert page.evaluate("document.getElementById('image').naturalWidth") == 0
        frame = page.frames[1]
        assert frame.url.startswith("chrome-error:"), "frame-ancestors 'none'"
        assert refused, "the attack has reached the port"
        assert set(refused) == {401}
        page.close()
    finally:
        server.shutdown()
        server.server_close()
    assert mode(instance) == before


@needs_chromium
def test_nothing_that_is_shown_becomes_markup(tmp_path: Path, browser: Browser) -> None:
    """Names and messages that come from elsewhere: an upstream's model list, a reference's error, imported profiles."""
    script = "</td><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    with served(tmp_path, everything, labels=["batch"]) as made:

        def poison(control: Any) -> None:
            control.monitor.detail = script
            control.monitor.served = served_models(pair(script))
            control.pipeline.endings.unscored(Unscored.REFERENCE_FAILED, scored()[1], script)
            control.profile_manager.events.restore(
                [{"at": time.time(), "decision": script, "version": script, "why": script, "evidence": {}}]
            )
            control.measured.alarms.events.append(
                {"at": time.time(), "decision": "alarm", "version": "", "why": script, "evidence": {"raised": False}}
            )

        made.do(poison)
        page = browser.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        for name in ("events", "measurement", ""):
            page.goto(f"{made.url}/#/{name}")
            expect(page.locator("html")).to_have_attribute("data-at", re.compile(r"\d"), timeout=15_000)
            expect(page.locator("#app")).to_contain_text(script)
        assert re.fullmatch(r"(?:(?:WARNING|CRITICAL) – )?Hemostat", page.title())
        assert page.locator("main img, main script").count() == 0
        # Should that ever fail, the policy is there: what is injected by force does not run.
        page.evaluate("document.body.insertAdjacentHTML('beforeend', `<img src=x onerror=\"document.title='owned'\">`)")
        inline = "Object.assign(document.createElement('script'), {textContent: \"document.title='owned'\"})"
        page.evaluate(f"document.body.append({inline})")
        ends = time.monotonic() + 60
        while sum("Content Security Policy" in text for text in said) < 2:
            assert time.monotonic() < ends, said
            page.wait_for_timeout(100)
        assert re.fullmatch(r"(?:(?:WARNING|CRITICAL) – )?Hemostat", page.title())
        page.close()


# --- the stream -----------------------------------------------------------------------------------------------------


def test_the_stream_says_what_the_api_says_and_streams_are_few(instance: Served) -> None:
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=instance.url, limits=httpx.Limits(max_connections=100)))
        opened = [stack.enter_context(client.stream("GET", "/api/v1/stream")) for _ in range(33)]
        assert [r.status_code for r in opened] == [200] * 32 + [503]
        lines = opened[0].iter_lines()
        assert [next(lines), next(lines), next(lines)] == ["retry: 2000", "", "event: state"]
        data = json.loads(next(lines).removeprefix("data: "))
        assert data["profiles"] == client.get("/api/v1/profiles").json()
        status = client.get("/api/v1/status").json()
        moving = {"at": 0, "shadow": 0, "queue": 0}
        assert data["status"] | moving == status | moving
        assert next(lines) == ""
        assert next(lines) == "event: state", "and goes on"
    ends = time.monotonic() + 60
    code = 503
    while code == 503:
        assert time.monotonic() < ends, "those that went leave room"
        with httpx.stream("GET", f"{instance.url}/api/v1/stream") as again:
            code = again.status_code
    assert code == 200


def test_open_streams_do_not_hold_up_the_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ExitStack() as stack:
        made = stack.enter_context(served(tmp_path))
        response = stack.enter_context(httpx.stream("GET", f"{made.url}/api/v1/stream"))
        lines = response.iter_lines()
        assert next(lines) == "retry: 2000"
        made.stop()
        list(lines)  # raises httpx.RemoteProtocolError where the server cut the stream instead of ending it
    assert "Traceback" not in capfd.readouterr().err


def test_history_comes_in_columns_and_from_where_it_is_asked_for(instance: Served) -> None:
    whole = httpx.get(f"{instance.url}/api/v1/history").json()["points"]
    assert len({len(column) for column in whole.values()}) == 1
    assert len(whole["time"]) == 32
    part = httpx.get(f"{instance.url}/api/v1/history", params={"after": whole["time"][29]}).json()["points"]
    assert part == {name: column[30:] for name, column in whole.items()}
    assert part["kl_recent"][-1] > 2 * whole["kl_recent"][10], "the model changed"
    assert whole["kl_low"][-1] <= whole["kl_nats"][-1] <= whole["kl_high"][-1]
    assert httpx.get(f"{instance.url}/api/v1/history?after=x").status_code == 422
