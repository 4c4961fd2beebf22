"""Segments in an object store: read and written whole, as the ones of a local folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs
from tests.support.captures import capture
from tests.support.scorer_bench import FakeReference

from hemostat.scoring.offline.evidence import read_evidence
from hemostat.scoring.offline.folder import score_folder
from hemostat.scoring.spool.columns import SCHEMA_VERSION, VERSION_KEY, to_rows
from hemostat.scoring.spool.keys import SpoolError, SpoolKey
from hemostat.scoring.spool.objects import ObjectPath, location
from hemostat.scoring.spool.segments import read_segment, segments, write_segment
from hemostat.scoring.spool.spooled import Spooled

KEY = SpoolKey(bytes(range(32)))
AT = 1_700_000_000.0


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


def test_an_address_is_shown_without_its_password() -> None:
    with pytest.raises(SpoolError) as error:
        location("nothing://user:secret@bucket/folder?token=secret")
    assert "secret" not in str(error.value)
    assert location("a/b") == Path("a/b")
