"""Segments in an object store: read and written whole, as the ones of a local folder."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from pyarrow import fs
from pydantic import ValidationError
from tests.support.captures import capture
from tests.support.control import settings
from tests.support.scorer_bench import FakeReference
from tests.support.waiting import until

from hemostat.config.operation import SpoolSettings
from hemostat.config.schema import Settings
from hemostat.control.composition import Control
from hemostat.scoring.offline.evidence import read_evidence
from hemostat.scoring.offline.folder import parts_of, score_folder
from hemostat.scoring.spool.columns import SCHEMA_VERSION, VERSION_KEY, from_rows, to_rows
from hemostat.scoring.spool.keys import SpoolError, SpoolKey
from hemostat.scoring.spool.objects import ObjectPath, location
from hemostat.scoring.spool.segments import read_segment, segments, size_of, write_segment
from hemostat.scoring.spool.spool import Spool
from hemostat.scoring.spool.spooled import Spooled

KEY = SpoolKey(bytes(range(32)))
AT = 1_700_000_000.0
WRITE = re.compile(r'"(PUT|POST|DELETE|COPY) ([^ ?]+)(\?\S+)? HTTP')


@pytest.fixture(params=["file", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}"
        return
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    options = f"endpoint_override={host}:{port}&scheme=http&allow_bucket_creation=true"
    name = f"bucket-{os.urandom(4).hex()}"
    made, bucket = fs.FileSystem.from_uri(f"s3://{name}?{options}")
    made.create_dir(bucket)
    yield f"s3://{name}/{{}}?{options}"
    server.stop()


def at(address: str, name: str, tmp_path: Path) -> ObjectPath:
    (tmp_path / name).mkdir(exist_ok=True)
    found = location(address.format(name) if "{}" in address else f"{address}/{name}")
    assert isinstance(found, ObjectPath)
    return found


@pytest.mark.parametrize("key", [None, KEY])
async def test_a_spool_is_scored_from_one_place_to_another(address: str, key: SpoolKey | None, tmp_path: Path) -> None:
    source, out = at(address, "spool", tmp_path), at(address, "scored", tmp_path)
    assert segments(out) == []
    for number in range(3):
        rows = to_rows([Spooled(capture(f"{number}-{n}"), AT + 60 * number + n) for n in range(4)])
        write_segment(source / f"captures-{round(1000 * (AT + 60 * number)):013d}-00000000.parquet", rows, key)

    async def score() -> int:
        return await score_folder(source, out, FakeReference(), key=key, model=None, progress=lambda *_: None)

    assert await score() == 12
    assert await score() == 0
    assert [path.name for path in segments(out)] == [path.name for path in segments(source)]
    report = await read_evidence(out, key, 0.0)
    assert (report["captures"], report["scored"]) == (12, 12)


def test_what_cannot_be_read_is_named_in_one_line(address: str, tmp_path: Path) -> None:
    folder = at(address, "spool", tmp_path)
    path = folder / "captures-1700000000000-00000000.parquet"
    write_segment(path, to_rows([Spooled(capture("x"), AT)]), KEY)
    for name, key in ((path, None), (path, SpoolKey(bytes(32))), (folder / "none.parquet", KEY)):
        with pytest.raises(SpoolError) as error:
            read_segment(name, key, {VERSION_KEY: SCHEMA_VERSION})
        assert "\n" not in str(error.value)
        assert str(name) in str(error.value)


def spool_in(folder: ObjectPath, journals: Path, wall: float = AT) -> Spool:
    return Spool(
        folder,
        KEY,
        journals=journals,
        max_bytes=1 << 20,
        max_age=3600.0,
        clock=lambda: 0.0,
        wall=lambda: wall,
        draw=lambda: 0.0,
    )


def ids(folder: ObjectPath) -> list[str]:
    rows = (read_segment(path, KEY, {VERSION_KEY: SCHEMA_VERSION}) for path in segments(folder))
    return [spooled.capture.request_id for part in rows for spooled in from_rows(part)]


def test_an_object_exists_once_it_is_written(address: str, tmp_path: Path) -> None:
    folder = at(address, "spool", tmp_path)
    path = folder / "captures-1700000000000-00000000.parquet"
    assert not path.exists()
    write_segment(path, to_rows([Spooled(capture("x"), AT)]), KEY)
    assert path.exists()
    assert folder.exists()
    path.unlink()
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        path.unlink()


def test_a_control_process_spools_to_an_object_store(address: str, tmp_path: Path) -> None:
    """The journal is on this machine, and encrypted. A segment is one object, and the journal goes after it."""
    folder, journals = at(address, "spool", tmp_path), tmp_path / "journals"
    spool = spool_in(folder, journals)
    for name in ("1", "2"):
        assert spool.update(capture(name), None) is None
    assert spool.flush()
    assert len(list(journals.iterdir())) == 1
    assert segments(folder) == []
    spool.close()
    assert list(journals.iterdir()) == []
    (segment,) = segments(folder)
    assert ids(folder) == ["1", "2"]
    spool.look()
    assert spool.bytes == size_of(segment) > 0
    spool_in(folder, journals, AT + 3601).look()
    assert segments(folder) == []


def test_a_segment_is_written_by_one_upload_under_its_final_name(
    address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not address.startswith("s3:"):
        return
    caplog.set_level("INFO", "werkzeug")  # the store's log of requests
    spool = spool_in(at(address, "spool", tmp_path), tmp_path / "journals")
    for number in range(50):
        spool.update(capture(f"{number}"), None)
    spool.close()
    (segment,) = segments(at(address, "spool", tmp_path))
    writes = [found.groups() for line in caplog.messages if (found := WRITE.search(line))]
    assert [(verb, path) for verb, path, _ in writes] == [
        (verb, f"/{segment.path}") for verb in ("POST", "PUT", "POST")
    ]
    # The object is there with the last request, which ends the upload that the first one has begun.
    assert [query.partition("=")[0] for _, _, query in writes] == ["?uploads", "?partNumber", "?uploadId"]


async def test_a_control_process_starts_with_a_spool_in_a_store(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It brings what an earlier process has left to the store, and what it samples itself; each by one upload."""
    caplog.set_level("INFO", "werkzeug")  # the store's log of requests
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("SPOOL_KEY", bytes(range(32)).hex())
    folder = at(address, "spool", tmp_path)
    path = address.format("spool") if "{}" in address else f"{address}/spool"
    given = settings().plain() | {"spool": {"path": path, "key": "env:SPOOL_KEY"}, "reference": {"backend": "none"}}

    def started() -> Control:
        return Control(Settings.model_validate(given), 0)

    killed = started()
    assert killed.spool is not None
    assert killed.spool.update(capture("before"), None) is None
    assert killed.spool.flush()
    (journal,) = (tmp_path / "state/hemostat").glob("spool-*/*.journal")
    left = journal.read_bytes()
    await killed.close()
    for segment in segments(folder):
        segment.unlink()
    journal.write_bytes(left)  # as if it had been killed

    caplog.clear()
    one = started()
    await one.start()
    assert one.spool is not None
    loops = [asyncio.create_task(loop) for loop in (one.spool.run(), *one.pipeline.loops())]
    one.pipeline.offer(capture("after"))
    await until(lambda: one.pipeline.pending == 0 and ids(folder) == ["before"])
    for loop in loops:
        loop.cancel()
    await asyncio.gather(*loops, return_exceptions=True)
    await one.close()
    assert sorted(ids(folder)) == ["after", "before"]
    assert list(journal.parent.iterdir()) == []
    if address.startswith("s3:"):
        writes = [found.groups() for line in caplog.messages if (found := WRITE.search(line))]
        ended = [path for verb, path, query in writes if verb == "POST" and "uploadId" in (query or "")]
        assert sorted(ended) == sorted(f"/{segment.path}" for segment in segments(folder))
        assert {verb for verb, _, _ in writes} == {"POST", "PUT"}, "nothing is copied or removed"


def test_a_folder_is_there_once_an_object_is_in_it(address: str, tmp_path: Path) -> None:
    folder = location(address.format("none") if "{}" in address else f"{address}/none")
    assert not folder.is_dir()
    write_segment(at(address, "none", tmp_path) / "a.parquet", to_rows([Spooled(capture("x"), AT)]), KEY)
    assert folder.is_dir()
    assert not (folder / "a.parquet").is_dir()
    with pytest.raises(SpoolError, match=r"a\.parquet is no folder"):
        parts_of(folder / "a.parquet", KEY, None)


def test_a_journal_whose_object_is_there_is_not_counted_twice(address: str, tmp_path: Path) -> None:
    folder, journals = at(address, "spool", tmp_path), tmp_path / "journals"
    spool = spool_in(folder, journals)
    spool.update(capture("once"), None)
    spool.flush()
    (path,) = journals.iterdir()
    copy = path.read_bytes()
    spool.close()
    path.write_bytes(copy)
    spool_in(folder, journals).recover()
    assert ids(folder) == ["once"]
    assert not path.exists()


def test_captures_stay_on_this_machine_while_the_store_is_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The next process brings them to the store, each once."""
    store = DownStore(fs.LocalFileSystem())
    folder, journals = ObjectPath(store, PurePosixPath(tmp_path / "spool"), "s3://bucket/spool"), tmp_path / "journals"
    (tmp_path / "spool").mkdir()
    spool = spool_in(folder, journals)
    assert spool.update(capture("1"), None) is None
    spool.close()
    spool.look()
    assert spool.update(capture("2"), None) is None
    spool.close()
    assert len(list(journals.iterdir())) == 2
    assert spool.lost == 0
    assert spool.bytes > 0
    assert "cannot look at s3://bucket/spool" in caplog.text
    assert "\n" not in "".join(record.getMessage() for record in caplog.records)
    store.down = False
    spool_in(folder, journals).recover()
    assert sorted(ids(folder)) == ["1", "2"]
    assert list(journals.iterdir()) == []


class DownStore:
    """A file system of Arrow that cannot be reached while `down`."""

    def __init__(self, store: fs.FileSystem) -> None:
        self.store, self.down = store, True

    def __getattr__(self, name: str) -> Any:
        if self.down:
            raise OSError("no route to host")
        return getattr(self.store, name)


def test_the_settings_take_an_address_without_a_password() -> None:
    assert SpoolSettings(path="s3://bucket/spool", key="plain").path == "s3://bucket/spool"
    with pytest.raises(ValidationError, match="AWS_ACCESS_KEY_ID"):
        SpoolSettings(path="s3://user:secret@bucket/spool", key="plain")
    with pytest.raises(ValidationError, match="requires a path on this machine"):
        SpoolSettings(path="s3://bucket/spool", key="plain", score="02:00-05:00")


def test_an_address_is_shown_without_its_password() -> None:
    with pytest.raises(SpoolError) as error:
        location("nothing://user:secret@bucket/folder?token=secret")
    assert "secret" not in str(error.value)
    assert location("a/b") == Path("a/b")
