"""One session with a PostgreSQL server: its settings, and statements that end in time."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psycopg

CONNECT_SECONDS = 3
"""The timeout of a connection to each address of the server."""
EXCHANGE_SECONDS = 5.0
"""The longest exchange of one statement and its answer."""
STATEMENT_SECONDS = 4
"""The time after which the server gives a statement up, and the session goes on."""
IDLE_SECONDS = 10
"""The server ends a session that has sent nothing for so long."""

_SESSION = {
    "idle_session_timeout": f"{IDLE_SECONDS}s",
    "idle_in_transaction_session_timeout": f"{IDLE_SECONDS}s",
    "statement_timeout": f"{STATEMENT_SECONDS}s",
    "lock_timeout": f"{STATEMENT_SECONDS}s",
    "tcp_user_timeout": f"{IDLE_SECONDS}s",
}
"""The settings of the server for this session. tcp_user_timeout: for an answer that is not received."""
_SOCKET = {
    "keepalives": 1,
    "keepalives_idle": 2,
    "keepalives_interval": 2,
    "keepalives_count": 2,
    "tcp_user_timeout": int(1000 * EXCHANGE_SECONDS),
}
"""The settings of this end of the connection."""


def session_settings(given: Mapping[str, str]) -> dict[str, Any]:
    """Returns the parameters of a connection. given: the parameters of `store.url`."""
    options = " ".join(f"-c {name}={value}" for name, value in _SESSION.items())
    settings: dict[str, Any] = {"application_name": "hemostat", **given, **_SOCKET}
    settings["connect_timeout"] = CONNECT_SECONDS
    settings["options"] = f"{given.get('options', '')} {options}".strip()
    settings["target_session_attrs"] = "read-write"  # of several hosts, the one that is no replica
    return settings


class PostgresSession:
    """One connection, which is never opened again by itself."""

    def __init__(self, client: Any, given: dict[str, Any]) -> None:
        self._connection: psycopg.Connection[Any] = client.connect(**given, autocommit=True, prepare_threshold=None)
        self._socket = socket.socket(fileno=os.dup(self._connection.fileno()))
        """A copy of the connection's socket, to end an exchange from another thread."""
        self.backend: int = self._connection.info.backend_pid
        """The server's process that began the session; of a pooler a number of its own."""
        self.timed_out = False
        self.answered = time.monotonic()
        """The time at which the last statement was sent that the server has answered."""

    @property
    def version(self) -> str:
        return str(self._connection.info.parameter_status("server_version"))

    def run(self, statement: str, *values: Any) -> psycopg.Cursor[Any]:
        """Runs a statement. Raises psycopg.Error, also after EXCHANGE_SECONDS: the session has ended then, and the
        outcome is not known.
        """
        limit = threading.Timer(EXCHANGE_SECONDS, self._end)
        limit.daemon = True
        limit.start()
        sent = time.monotonic()
        try:
            result = self._connection.execute(statement.encode(), values or None, binary=True)
        finally:
            limit.cancel()
        self.answered = sent
        return result

    def rows(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        return self.run(statement, *values).fetchall()

    def one(self, statement: str, *values: Any) -> Any:
        return self.rows(statement, *values)[0][0]

    def undo(self) -> None:
        """Ends the transaction. Raises psycopg.Error if the session has ended."""
        if self._connection.info.transaction_status:  # not idle
            self.run("ROLLBACK")

    def _end(self) -> None:
        self.timed_out = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._connection.close()
        self._socket.close()
