"""A real PostgreSQL for tests, on a port of its own, with its data in a folder of its own."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psycopg
import pytest
from tests.support.minutes import starting

from hemostat_lab.demo.vllm_server import free_port

USER, PASSWORD = "hemostat", "s3cret/#?@%"
ESCAPED = "s3cret%2F%23%3F%40%25"
"""The password, as a URL has it."""
START_SECONDS = 120.0
"""A machine that is busy with images may take long to write the first files through to its disk."""


@cache
def programs() -> Path | None:
    """The folder of the newest installed server; Debian keeps each version in one of its own, not on the PATH."""
    result = shutil.which("postgres")
    if result and shutil.which("initdb", path=str(Path(result).parent)):
        return Path(result).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return folders[-1].parent if folders else None


def unprivileged() -> pwd.struct_passwd:
    """The user to run as: the server refuses to run as root."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    by_name = {entry.pw_name: entry for entry in pwd.getpwall()}
    return by_name.get("postgres", by_name["nobody"])


def _as_unprivileged() -> list[str]:
    user = unprivileged()
    if os.geteuid() == user.pw_uid:
        return []
    return ["--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--clear-groups"]


class Postgres:
    """`start`, `kill` (at once, as a crash of its host), `start` again: what was committed is there again.

    listen: addresses, as `listen_addresses` has them.
    """

    def __init__(self, folder: Path, listen: str = "127.0.0.1") -> None:
        self.folder, self._listen = folder, listen
        self.host, self.port = listen.partition(",")[0], free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._names = itertools.count(1)

    def url(self, database: str = "postgres", **more: str) -> str:
        """more: another `user`, `password`, `host` or `port`, each as the URL has it."""
        given = {"user": USER, "password": ESCAPED, "host": self.host, "port": str(self.port)} | more
        return f"postgresql://{given['user']}:{given['password']}@{given['host']}:{given['port']}/{database}"

    def new_database(self, owner: str = USER) -> str:
        """The name of an empty database."""
        name = f"test_{next(self._names)}"
        self.execute(f"CREATE DATABASE {name} OWNER {owner}")
        return name

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """As the superuser; the rows where it returns any."""
        with self.superuser(database) as connection:
            done = connection.execute(statement.encode())
            return done.fetchall() if done.description else []

    def superuser(self, database: str = "postgres") -> psycopg.Connection[tuple[object, ...]]:
        where = {"host": str(self.folder), "port": str(self.port), "dbname": database}
        return psycopg.connect(user="postgres", autocommit=True, **where)

    def start(self, **options: str) -> None:
        """options: of postgresql.conf, for this start."""
        with starting("PostgreSQL"):
            self._start(options)

    def _start(self, options: Mapping[str, str]) -> None:
        folder = programs()
        assert folder is not None
        given = {"listen_addresses": self._listen, "port": str(self.port), "unix_socket_directories": str(self.folder)}
        given |= {"fsync": "off", "shared_buffers": "16MB", "max_connections": "40", "autovacuum": "off"} | dict(
            options
        )
        flags = [part for name, value in given.items() for part in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            command = [str(folder / "postgres"), "-D", str(self.folder / "data"), *flags]
            # SIGQUIT, when this process has ended: stop at once.
            with_parent = ["setpriv", "--pdeathsig", "QUIT", *_as_unprivileged()]
            self._process = subprocess.Popen([*with_parent, *command], stdout=log, stderr=log)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(psycopg.OperationalError), self.superuser():
                return
            time.sleep(0.02)
        self.kill()
        raise AssertionError((self.folder / "log").read_text())

    def stop(self) -> None:
        """In an orderly way; sessions are ended."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        self._process.wait(START_SECONDS)
        self._process = None

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)  # it starts no further process
            pids = self._pids()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
            while any(map(_lives, pids)):  # it cannot be started while one of them holds the shared memory
                time.sleep(0.01)

    def set_certificate(self, cert: Path, key: Path) -> None:
        """For the next start with `ssl="on"`."""
        user = unprivileged()
        for source, name in ((cert, "server.crt"), (key, "server.key")):
            target = self.folder / "data" / name
            target.write_bytes(source.read_bytes())
            target.chmod(0o600)
            os.chown(target, user.pw_uid, user.pw_gid)

    def set_standby(self) -> None:
        """From its next start on it is a replica (of no server), until it is promoted."""
        (self.folder / "data" / "standby.signal").touch()
        os.chown(self.folder / "data" / "standby.signal", unprivileged().pw_uid, -1)

    def save(self) -> None:
        """Keep a copy of the data as it is now, for `fail_over`. Sessions are ended."""
        self.stop()
        subprocess.run(["cp", "-a", self.folder / "data", self.folder / "replica"], check=True)
        self.start()

    def fail_over(self) -> None:
        """To a replica that lacks what was committed since `save`."""
        self.kill()
        shutil.rmtree(self.folder / "data")
        (self.folder / "replica").rename(self.folder / "data")
        self.start()

    def freeze(self) -> None:
        """It accepts connections and answers nothing, until `thaw`."""
        for pid in self._pids():
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in self._pids():
            os.kill(pid, signal.SIGCONT)

    def _pids(self) -> list[int]:
        """The first process, which starts others, then these."""
        assert self._process is not None
        first = self._process.pid
        children = Path(f"/proc/{first}/task/{first}/children")
        return [first, *map(int, children.read_text().split() if children.exists() else ())]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def running(listen: str = "127.0.0.1", **options: str) -> Iterator[Postgres]:
    """A new server with the role `USER`, in a folder that goes with it. Skips the test where there is no PostgreSQL."""
    folder = programs()
    if folder is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    user = unprivileged()
    # Not in pytest's folders, which only this user may enter; and a path of a socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="hemostat-pg-", ignore_cleanup_errors=True) as name:
        if user.pw_uid != os.geteuid():
            os.chown(name, user.pw_uid, user.pw_gid)
        made = [str(folder / "initdb"), "-D", f"{name}/data", "-U", "postgres", "-E", "UTF8", "--locale=C", "-N"]
        made += ["--auth-local=trust", "--auth-host=scram-sha-256", "--wal-segsize=1"]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL, user=user.pw_uid, group=user.pw_gid, cwd=name)
        with Path(name, "data", "pg_hba.conf").open("a") as rules:
            rules.write("host all all samenet scram-sha-256\n")
        server = Postgres(Path(name), listen)
        server.start(**options)
        try:
            server.execute(f"CREATE ROLE {USER} LOGIN PASSWORD '{PASSWORD}'")
            yield server
        finally:
            server.kill()


@contextmanager
def pooler(server: Postgres, **settings: str) -> Iterator[str]:
    """The address, without its database, of a pgbouncer before the server: each transaction gets any session. Skips
    the test where it is not there.

    settings: of pgbouncer.ini.
    """
    program = shutil.which("pgbouncer")
    if program is None:
        pytest.skip("no pgbouncer here: apt-get install pgbouncer")
    port = free_port()
    given = {"listen_addr": "127.0.0.1", "listen_port": str(port), "unix_socket_dir": "", "pool_mode": "transaction"}
    given |= {"auth_type": "scram-sha-256", "auth_file": str(server.folder / "users")} | settings
    ini = f"[databases]\n* = host=127.0.0.1 port={server.port}\n[pgbouncer]\n"
    (server.folder / "users").write_text(f'"{USER}" "{PASSWORD}"\n')
    (server.folder / "pgbouncer.ini").write_text(ini + "".join(f"{name} = {value}\n" for name, value in given.items()))
    command = ["setpriv", "--pdeathsig", "KILL", *_as_unprivileged(), program, str(server.folder / "pgbouncer.ini")]
    with (server.folder / "log").open("ab") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            end = time.monotonic() + START_SECONDS
            while time.monotonic() < end and process.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.02)
            yield f"postgresql://{USER}:{ESCAPED}@127.0.0.1:{port}"
        finally:
            process.kill()


_opened = contextlib.ExitStack()
atexit.register(_opened.close)


@cache
def shared() -> Postgres:
    """The server that the tests of this process share: each has a database of its own. It ends with the process."""
    return _opened.enter_context(running())
