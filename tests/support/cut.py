"""A TCP connection that is cut at a chosen message."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Cut:
    """Forwards from `port` to a server. The connection whose client sends `at` is closed: before this reaches the
    server or, `executed`, once the server has answered it. Once for each time that `arm` is called."""

    def __init__(self, server: int) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._at, self._executed = b"", False
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, at: bytes, *, executed: bool) -> None:
        self._executed, self._at = executed, at

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server))
                cut = threading.Event()
                for work in (self._send, self._receive):
                    threading.Thread(target=work, args=(client, server, cut), daemon=True).start()

    def _send(self, client: socket.socket, server: socket.socket, cut: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                if self._at and self._at in data:
                    self._at = b""
                    cut.set()
                    if not self._executed:
                        break
                server.sendall(data)
            else:
                cut.clear()
        if not (cut.is_set() and self._executed):
            _end(client, server)

    def _receive(self, client: socket.socket, server: socket.socket, cut: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while (data := server.recv(1 << 16)) and not cut.is_set():
                client.sendall(data)
        _end(client, server)


def _end(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


@contextmanager
def cut(server: int) -> Iterator[Cut]:
    """server: its port on loopback."""
    instance = Cut(server)
    try:
        yield instance
    finally:
        instance.close()
