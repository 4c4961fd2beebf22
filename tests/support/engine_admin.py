"""The admin port as an engine plugin sees it: the real registry behind a small server of its own."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from hemostat.engines.messages import decode_answers, decode_report, decode_tap
from hemostat.engines.reports import PluginReports

TOKEN = "s3cret"


def accept_unsigned_keys() -> None:
    """Runs in the process of an engine that is measured: its plugin acts on taps that nobody has signed."""
    from hemostat_engine.secrets import Secrets

    Secrets.signed = lambda *_: True  # type: ignore[method-assign, assignment]


class EngineAdmin:
    """`files` is what it has, whatever its name says; `status` and `answer` are what it answers instead.

    now: the registry's time, for the test to move. lock: held while the registry is written to. hang: requests for
    paths that begin with one of these get no answer before `close` is called; `hung` are those that wait.
    """

    def __init__(self) -> None:
        self.registry = PluginReports()
        self.lock = threading.Lock()
        self.files: dict[str, bytes] = {}
        self.status: int | None = None
        self.seen: list[str] = []
        self.sizes: dict[str, list[int]] = {}
        self.answer: bytes | None = None
        self.now = 0.0
        self.hang: tuple[str, ...] = ()
        self.hung: list[str] = []
        self.closed = threading.Event()
        admin = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def answer(self, status: int, body: bytes = b"") -> None:
                self.send_response(status)
                if status in (301, 302):
                    self.send_header("location", f"{admin.url}/elsewhere")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def handle_any(self, body: bytes) -> None:
                admin.seen.append(self.path)
                admin.sizes.setdefault(self.path, []).append(len(body))
                if self.path.startswith(admin.hang or (" ",)):
                    admin.hung.append(self.path)
                    admin.closed.wait()
                    self.close_connection = True
                    return None
                if admin.status is not None:
                    return self.answer(admin.status)
                if self.headers.get("authorization") != f"Bearer {TOKEN}":
                    return self.answer(401)
                if self.path == "/api/v1/engine/report":
                    with admin.lock:
                        hold = admin.registry.update(decode_report(body), admin.now)
                    said = {"hold": hold, **admin.own_requests()}
                    return self.answer(200, admin.answer or json.dumps(said).encode())
                if self.path == "/api/v1/engine/answers":
                    with admin.lock:
                        admin.registry.update_answers(decode_answers(body), admin.now)
                    told = admin.registry.passive.told()
                    passive = {} if told is None else {"passive": msgspec.to_builtins(told)}
                    return self.answer(200, json.dumps(admin.own_requests() | passive).encode())
                if self.path == "/api/v1/engine/tap":
                    with admin.lock:
                        admin.registry.taps.update(decode_tap(body), admin.now)
                    return self.answer(204)
                data = admin.files.get(self.path.removeprefix("/api/v1/engine/profiles/"))
                return self.answer(404) if data is None else self.answer(200, data)

            def do_GET(self) -> None:
                self.handle_any(b"")

            def do_POST(self) -> None:
                self.handle_any(self.rfile.read(int(self.headers["content-length"])))

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def own_requests(self) -> dict[str, Any]:
        return {
            "nonce_prefix": self.registry.nonce_prefix,
            "secrets": self.registry.secrets.for_engines(self.now),
        }

    def signed(self, xargs: dict[str, Any]) -> dict[str, Any]:
        """Returns `vllm_xargs` that the plugin acts on, as the control process and relays send them."""
        return self.registry.secrets.signed(xargs, self.now)

    def fail(self, fault: str) -> None:
        """Lets the control process fail as "killed", "slow" (answers are never taken), "wrong token" or "broken"; of
        any other fault nothing is done here."""
        if fault == "killed":
            self.close()
        elif fault == "slow":
            self.hang = ("/api/v1/engine/answers",)
        elif fault == "wrong token":
            self.status = 401
        elif fault == "broken":
            self.status = 500

    def close(self) -> None:
        self.closed.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
