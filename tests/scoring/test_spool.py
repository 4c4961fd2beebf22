"""The spool: what is written is read again, once, whenever a process ends and whatever is wrong with a file."""

from __future__ import annotations

import base64
import errno
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import duckdb
import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from tests.support.captures import capture

from hemostat.engines.messages import TapRun
from hemostat.engines.taps import TapResult
from hemostat.ipc.messages import Capture
from hemostat.metrics.reasons import Unscored
from hemostat.scoring.spool import columns, journal
from hemostat.scoring.spool import spool as spool_module
from hemostat.scoring.spool.columns import SCHEMA, SCHEMA_VERSION, VERSION_KEY, from_rows, to_rows
from hemostat.scoring.spool.journal import Journal, read_journal
from hemostat.scoring.spool.keys import SegmentCipher, SpoolError, SpoolKey, read_key
from hemostat.scoring.spool.segments import read_segment, segments, write_segment
from hemostat.scoring.spool.spool import Spool, admission
from hemostat.scoring.spool.spooled import Spooled, SpooledTap

KEY, OTHER = SpoolKey(bytes(range(32))), SpoolKey(bytes(32))
VERSIONS = {VERSION_KEY: SCHEMA_VERSION}
RICH = {
    "adapter": "a" * 32,
    "kind": "chat text sampled",
    "conversation": b"c" * 16,
    "client": b"k" * 8,
    "requested": "b" * 32,
    "choice": 1,
    "choices": 2,
    "engine": "e:8000",
    "engine_drawn": True,
    "decoding": b'{"seed":1}',
    "tools": True,
}


class World:
    """A spool whose clocks and draws a test sets."""

    def __init__(
        self, folder: Path, key: SpoolKey | None = KEY, max_bytes: int = 1 << 30, max_age: float = 3600.0
    ) -> None:
        self.folder, self.key, self.max_bytes, self.max_age = folder, key, max_bytes, max_age
        self.now, self.wall, self.drawn = 0.0, 1_700_000_000.0, 0.0
        self.spool = self.opened()

    def opened(self) -> Spool:
        return Spool(
            self.folder,
            self.key,
            journals=self.folder,
            max_bytes=self.max_bytes,
            max_age=self.max_age,
            clock=lambda: self.now,
            wall=lambda: self.wall,
            draw=lambda: self.drawn,
        )

    def ids(self) -> list[str]:
        return [s.capture.request_id for path in segments(self.folder) for s in rows_of(path, self.key)]


def rows_of(path: Path, key: SpoolKey | None = KEY) -> list[Spooled]:
    return list(from_rows(read_segment(path, key, VERSIONS)))


def numbered(name: object, **more: object) -> Capture:
    return capture(str(name), **more)  # type: ignore[arg-type]


def tap() -> TapResult:
    run = TapRun("n", 0, 3, {"c" * 32: b""}, None, set_rows=np.zeros(3, "<i4").tobytes(), sets=b"s")
    return TapResult("boot", "b" * 32, False, {"c" * 32: np.array([0.5, np.nan, 1.0])}, None, [run])


# --- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, KEY])
def test_a_capture_is_read_as_it_was_written(tmp_path: Path, key: SpoolKey | None) -> None:
    world = World(tmp_path, key)
    given = [numbered("1", **RICH), numbered("2", temperature=0.0, grammar=True)]
    assert [world.spool.update(given[0], tap()), world.spool.update(given[1], None)] == [None, None]
    world.spool.close()
    (segment,) = segments(tmp_path)
    first, second = rows_of(segment, key)
    assert [first.capture, second.capture] == given
    assert (first.at, first.probability, second.tap) == (world.wall, 1.0, None)
    result = first.tap.result() if first.tap is not None else None
    assert result is not None
    assert (result.boot_id, result.applied, result.mixed) == ("boot", "b" * 32, False)
    np.testing.assert_array_equal(result.log_normalizer["c" * 32], [0.5, np.nan, 1.0])
    assert [(run.start, run.tokens, run.sets) for run in result.runs] == [(0, 3, b"s")]
    assert segment.stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob("*.journal"))


def test_a_token_takes_at_most_300_bytes(tmp_path: Path) -> None:
    world, generator, tokens, k = World(tmp_path), np.random.default_rng(0), 128, 20
    for number in range(200):
        ids = generator.integers(0, 150_000, (tokens, k + 1), dtype=np.int32)
        logprobs = -np.sort(generator.exponential(5.0, (tokens, k + 1)).astype("<f4"), axis=1)
        made = capture(
            str(number),
            top_k=k,
            prompt_token_ids=generator.integers(0, 150_000, 256, dtype=np.int32).tobytes(),
            output_token_ids=ids[:, 0].astype("<i4").tobytes(),
            candidate_ids=ids.astype("<i4").tobytes(),
            candidate_logprobs=logprobs.tobytes(),
            emitted_logprobs=logprobs[:, 0].copy().tobytes(),
        )
        assert world.spool.update(made, None) is None
    world.spool.close()
    (segment,) = segments(tmp_path)
    assert segment.stat().st_size / (200 * tokens) < 300


def test_other_programs_read_an_encrypted_segment_with_its_data_key(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.spool.update(numbered("seen"), None)
    world.spool.close()
    (segment,) = segments(tmp_path)
    cipher = SegmentCipher(KEY)
    pq.read_table(segment, decryption_properties=cipher.decryption(), partitioning=None)
    connection = duckdb.connect()
    connection.execute(f"PRAGMA add_parquet_key('k', '{base64.b64encode(cipher.data_keys[0]).decode()}')")
    query = f"select request_id, output_token_ids from read_parquet('{segment}', encryption_config={{footer_key: 'k'}})"
    assert connection.execute(query).fetchall() == [("seen", bytes(12))]


def test_nothing_of_a_capture_can_be_read_without_the_key(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.spool.update(numbered("secret-id", label="secret-label"), None)
    world.spool.flush()
    (open_file,) = tmp_path.glob("*.journal")
    before = open_file.read_bytes()
    world.spool.close()
    (segment,) = segments(tmp_path)
    for data in (before, segment.read_bytes()):
        assert b"secret" not in data
        assert KEY.name.encode() in data


# --- keys and foreign files -----------------------------------------------------------------------------------------


def written(folder: Path, key: SpoolKey | None = KEY) -> Path:
    path = folder / "captures-1700000000000-00000000.parquet"
    write_segment(path, to_rows([Spooled(numbered("x"), 1.0)]), key)
    return path


@pytest.mark.parametrize(
    ("break_it", "key", "says"),
    [
        (lambda path: None, OTHER, "encrypted"),
        (lambda path: None, None, "name its key"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), KEY, "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), KEY, "cannot be read"),
        (lambda path: path.write_bytes(b"no parquet"), KEY, "cannot be read"),
        (lambda path: path.write_bytes(b""), KEY, "cannot be read"),
        (lambda path: pq.write_table(SCHEMA.remove_metadata().empty_table(), path), None, "another file"),
        (
            lambda path: pq.write_table(SCHEMA.with_metadata({VERSION_KEY: "9"}).empty_table(), path),
            None,
            "version 9",
        ),
    ],
)
def test_a_segment_that_cannot_be_read_is_named_in_one_line(
    tmp_path: Path, break_it: object, key: SpoolKey | None, says: str
) -> None:
    path = written(tmp_path)
    break_it(path)  # type: ignore[operator]
    with pytest.raises(SpoolError) as error:
        read_segment(path, key, VERSIONS)
    assert says in str(error.value)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text(bytes(range(32)).hex() + "\n")
    monkeypatch.setenv("SPOOL_KEY", bytes(range(32)).hex())
    assert [getattr(read_key(source), "name", None) for source in (str(file), "env:SPOOL_KEY", "plain")] == [
        KEY.name,
        KEY.name,
        None,
    ]
    for wrong in (str(tmp_path / "none"), "env:NOT_SET"):
        with pytest.raises(SpoolError):
            read_key(wrong)
    file.write_text("zz")
    with pytest.raises(SpoolError, match="openssl rand -hex 32"):
        read_key(str(file))


def test_a_journal_of_another_key_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left = Journal(tmp_path / "captures-1700000000000-00000000.journal", OTHER)
    left.append([Spooled(numbered("x"), 1.0)])
    left.close()
    world = World(tmp_path)
    world.spool.recover()
    assert "stays as it is" in caplog.text
    assert world.ids() == []
    assert World(tmp_path, OTHER).spool.recover() is None
    assert World(tmp_path, OTHER).ids() == ["x"]


# --- faults ---------------------------------------------------------------------------------------------------------


def test_a_journal_that_was_torn_anywhere_loses_its_last_capture_only(tmp_path: Path) -> None:
    path = tmp_path / "captures-1700000000000-00000000.journal"
    whole = Journal(path, KEY)
    ends = [whole.bytes]
    for number in range(3):
        whole.append([Spooled(numbered(number), 1.0)])
        ends.append(whole.bytes)
    whole.close()
    data = path.read_bytes()
    for length in [*range(ends[0], len(data), 7), len(data)]:
        path.write_bytes(data[:length])
        kept = [spooled.capture.request_id for spooled in read_journal(path, KEY) if spooled]
        assert kept == [str(number) for number in range(3) if ends[number + 1] <= length]
    path.write_bytes(data[: ends[1]] + b"\0" + data[ends[1] + 1 :])
    assert [spooled.capture.request_id for spooled in read_journal(path, KEY) if spooled] == ["0"]


@pytest.mark.parametrize("key", [None, KEY])
def test_a_journal_that_was_changed_stays_as_it_is(
    tmp_path: Path, key: SpoolKey | None, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named in one line, however often it is looked at, and counted."""
    path = tmp_path / "captures-1700000000000-00000000.journal"
    changed = Journal(path, key)
    changed.append([Spooled(numbered("x"), 1.0)])
    changed.close()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    world = World(tmp_path, key)
    for _ in range(2):
        world.spool.recover()
    assert caplog.text.count("was changed") == 1
    assert world.spool.left == 1
    assert path.exists()
    assert world.ids() == []
    path.unlink()
    world.spool.recover()
    assert world.spool.left == 0


@pytest.mark.parametrize("key", [None, KEY])
def test_a_frame_that_is_damaged_costs_its_own_capture(
    tmp_path: Path, key: SpoolKey | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "captures-1700000000000-00000000.journal"
    damaged = Journal(path, key)
    ends = []
    for number in range(3):
        damaged.append([Spooled(numbered(number), 1.0)])
        ends.append(damaged.bytes)
    damaged.close()
    data = bytearray(path.read_bytes())
    data[ends[1] - 1] ^= 1
    path.write_bytes(data + bytes(100))  # a crash of the machine may leave zeros
    world = World(tmp_path, key)
    world.spool.recover()
    assert world.ids() == ["0", "2"]
    assert world.spool.lost == 1
    assert "1 captures of captures-1700000000000-00000000.journal cannot be read" in caplog.text
    assert not path.exists()


def test_a_segment_is_made_without_reading_the_journal_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a journal that an earlier process left is read."""
    world = World(tmp_path)
    world.spool.update(numbered("1"), None)
    monkeypatch.setattr("hemostat.scoring.spool.spool.read_journal", None)
    world.spool.close()
    assert world.ids() == ["1"]


def test_a_segment_has_more_rows_than_are_written_at_a_time(tmp_path: Path) -> None:
    world = World(tmp_path)
    for number in range(columns.PART_ROWS + 3):
        world.spool.update(numbered(number), None)
    world.spool.close()
    assert world.ids() == [str(number) for number in range(columns.PART_ROWS + 3)]


def test_a_journal_whose_segment_is_there_is_not_counted_twice(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.spool.update(numbered("once"), None)
    world.spool.flush()
    (path,) = tmp_path.glob("*.journal")
    copy = path.read_bytes()
    world.spool.close()
    path.write_bytes(copy)
    world.opened().recover()
    assert world.ids() == ["once"]
    assert not path.exists()


def test_a_full_disk_loses_captures_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Captures that cannot be written wait, and no others are taken: what waits does not grow."""
    world = World(tmp_path)
    assert world.spool.update(numbered("before"), None) is None
    assert world.spool.flush()
    real, full = os.write, [True]

    def write(descriptor: int, data: memoryview) -> int:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    def writev(descriptor: int, parts: Sequence[bytes]) -> int:
        data = b"".join(parts)
        return real(descriptor, data[:100] if full[0] else data)

    monkeypatch.setattr(journal.os, "write", write)
    monkeypatch.setattr(journal.os, "writev", writev)
    assert world.spool.update(numbered("waits"), None) is None
    assert not world.spool.flush()
    assert world.spool.update(numbered("lost"), None) is Unscored.SPOOL_FAILED
    world.now = 1.0
    assert world.spool.update(numbered("lost"), None) is Unscored.SPOOL_FAILED
    full[0], world.now = False, 10.0
    assert world.spool.update(numbered("after"), None) is None
    world.spool.close()
    assert world.ids() == ["before", "waits", "after"]
    assert (world.spool.written, world.spool.lost) == (3, 2)
    assert [record.getMessage() for record in caplog.records] == [
        "spool.path: cannot write (No space left on device); captures are lost until it can be written again",
        "spool.path: written again; 2 captures were lost so far",
    ]


def test_what_cannot_be_written_before_the_end_is_lost_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Journal, captures: Sequence[Spooled]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Journal, "append", full)
    world = World(tmp_path)
    assert world.spool.update(numbered("lost"), None) is None
    world.spool.close()
    assert (world.spool.written, world.spool.lost, world.ids()) == (0, 1, [])
    assert "spool.path: 1 captures could not be written" in caplog.messages


def test_captures_are_appended_together_and_large_ones_at_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    for number in range(3):
        world.spool.update(numbered(number), None)
    assert (world.spool.written, list(tmp_path.iterdir())) == (0, [])
    assert world.spool.bytes > 0
    world.spool.update(numbered("large", prompt_token_ids=bytes(spool_module.WAITING_BYTES)), None)
    assert world.spool.written == 4
    (path,) = tmp_path.glob("*.journal")
    assert path.stat().st_size == world.spool.bytes
    read = [spooled.capture.request_id for spooled in read_journal(path, KEY) if spooled]
    assert read == ["0", "1", "2", "large"]


@pytest.mark.parametrize("key", [None, KEY])
def test_a_damaged_frame_costs_the_captures_that_were_appended_with_it(tmp_path: Path, key: SpoolKey | None) -> None:
    path = tmp_path / "captures-1700000000000-00000000.journal"
    damaged = Journal(path, key)
    damaged.append([Spooled(numbered(number), 1.0) for number in range(3)])
    end = damaged.bytes
    damaged.append([Spooled(numbered(number), 1.0) for number in range(3, 5)])
    damaged.close()
    data = bytearray(path.read_bytes())
    data[end - 1] ^= 1
    path.write_bytes(data)
    world = World(tmp_path, key)
    world.spool.recover()
    assert world.ids() == ["3", "4"]
    assert world.spool.lost == 3


@pytest.mark.parametrize("key", [None, KEY])
def test_a_journal_of_version_1_is_read(tmp_path: Path, key: SpoolKey | None) -> None:
    """An earlier Hemostat that was killed has left it: each frame has one capture."""
    path, data_key = tmp_path / "captures-1700000000000-00000000.journal", bytes(32)
    named = {} if key is None else {"key": key.name, "data_key": key.wrap(data_key).decode()}
    data = json.dumps({"hemostat_spool_journal": 1} | named).encode() + b"\n"
    for number in range(2):
        frame, checksum = msgspec.msgpack.encode(Spooled(numbered(number), 1.0)), 0
        if key is None:
            checksum = zlib.crc32(frame)
        else:
            frame = AESGCM(data_key).encrypt(number.to_bytes(12, "little"), frame, None)
        data += struct.pack("<II", len(frame), checksum) + frame
    path.write_bytes(data)
    world = World(tmp_path, key)
    world.spool.recover()
    assert world.ids() == ["0", "1"]


@pytest.mark.parametrize(
    ("header", "says"), [('{"hemostat_spool_journal": 3}', "use a newer"), ('{"hemostat_spool_journal": []}', "not a")]
)
def test_a_journal_of_an_unknown_version_is_named(tmp_path: Path, header: str, says: str) -> None:
    path = tmp_path / "captures-1700000000000-00000000.journal"
    path.write_text(header + "\n")
    with pytest.raises(SpoolError, match=says):
        list(read_journal(path, KEY))


def test_no_number_of_a_frame_comes_twice_under_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that could not be written, and came on the disk in part, was encrypted under a number of its own."""
    path = tmp_path / "captures-1700000000000-00000000.journal"
    whole = Journal(path, KEY)
    whole.append([Spooled(numbered("1"), 1.0)])

    def writev(descriptor: int, parts: Sequence[bytes]) -> int:
        os.write(descriptor, parts[0])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "writev", writev)
        with pytest.raises(OSError, match="No space"):
            whole.append([Spooled(numbered("2"), 1.0)])
    whole.append([Spooled(numbered("3"), 1.0)])
    whole.close()
    assert [spooled.capture.request_id for spooled in read_journal(path, KEY) if spooled] == ["1", "3"]
    heads = path.read_bytes().split(b"\n", 1)[1]
    first = struct.unpack_from("<IIII", heads)
    assert [first[3], struct.unpack_from("<IIII", heads, 16 + first[0])[3]] == [0, 2]


def test_a_clock_that_is_set_back_loses_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.spool.update(numbered("1"), None)
    world.spool.close()
    world.wall -= 10 * 365 * 86400
    world.spool = world.opened()
    world.spool.update(numbered("2"), None)
    world.spool.close()
    world.spool.look()
    assert sorted(world.ids()) == ["1", "2"]


def test_a_segment_is_removed_when_its_time_is_over(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.spool.update(numbered("old"), None)
    world.spool.close()
    world.wall += 3599
    world.spool.look()
    assert world.ids() == ["old"]
    assert world.spool.bytes > 0
    world.wall += 2
    world.spool.look()
    assert world.ids() == []
    assert world.spool.bytes == 0


def test_above_half_of_the_limit_captures_are_admitted_with_the_probability_in_their_row(tmp_path: Path) -> None:
    world = World(tmp_path, max_bytes=400_000)
    draws = random.Random(0)
    outcomes = []
    for number in range(600):
        world.drawn = draws.random()
        outcomes.append(world.spool.update(numbered(number), None))
    refused = outcomes.count(Unscored.SPOOL_FULL)
    assert world.spool.bytes <= 400_000
    assert world.spool.refused == refused > 50
    world.spool.close()
    rows = [spooled for path in segments(tmp_path) for spooled in rows_of(path)]
    assert len(rows) == 600 - refused
    probabilities = [row.probability for row in rows]
    assert probabilities == sorted(probabilities, reverse=True)
    assert probabilities[0] == 1.0
    assert 0.0 < probabilities[-1] < 0.7
    # Each admitted capture stands for 1 / probability of those that came.
    assert sum(1.0 / p for p in probabilities) == pytest.approx(600, rel=0.1)
    assert admission(1.0) == 0.0


def test_captures_without_log_probabilities_are_not_kept(tmp_path: Path) -> None:
    assert World(tmp_path).spool.update(numbered("x", ids_only=True), None) is Unscored.NO_LOGPROBS


# --- kill -9 --------------------------------------------------------------------------------------------------------

WRITER = """
import sys, time, itertools
from pathlib import Path
from tests.support.captures import capture
from hemostat.scoring.spool import spool as module
from hemostat.scoring.spool.keys import SpoolKey
module.SEGMENT_BYTES = 4000
folder = Path(sys.argv[1])
spool = module.Spool(folder, SpoolKey(bytes(range(32))), journals=folder, max_bytes=1 << 30, max_age=1e9,
    clock=time.monotonic, wall=time.time, draw=lambda: 0.0)
spool.recover()
said = []
for number in itertools.count():
    name = f"{sys.argv[2]}-{number}"
    assert spool.update(capture(name), None) is None
    said.append(name)
    if number % 3 == 2:
        assert spool.flush()
        print(*said, sep="\\n", flush=True)
        said.clear()
    if number % 15 == 14:
        spool._detach()
        spool.recover()
"""


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment_leaves_each_capture_once(tmp_path: Path) -> None:
    killed_at_random(tmp_path, 100)


def test_a_process_that_is_killed_leaves_each_capture_once(tmp_path: Path) -> None:
    killed_at_random(tmp_path, 3)


def killed_at_random(folder: Path, times: int) -> None:
    generator, said = random.Random(7), list[str]()
    for life in range(times):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(life)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
        )
        assert child.stdout is not None
        said.append(child.stdout.readline().strip())
        time.sleep(generator.uniform(0.0, 0.2))
        child.send_signal(signal.SIGKILL)
        said += [line.strip() for line in child.stdout if line.endswith("\n")]
        child.stdout.close()
        child.wait()
    world = World(folder, max_age=1e18)
    world.spool.recover()
    ids = world.ids()
    assert len(ids) == len(set(ids))
    assert set(said) <= set(ids)
    # A process may have written captures, together, that it did not live to say.
    assert len(set(ids) - set(said)) <= 3 * times


def test_rows_of_one_schema_are_the_ones_that_the_documentation_lists() -> None:
    text = (Path(__file__).parents[2] / "docs/formats.md").read_text()
    missing = [name for name in SCHEMA.names if f"`{name}`" not in text]
    assert missing == []


def test_a_column_is_the_same_in_one_piece_and_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [Spooled(numbered(number, output_token_ids=bytes(4 * number)), 1.0) for number in range(3)]
    whole = to_rows(given)
    assert whole["output_token_ids"].to_pylist() == [b"", bytes(4), bytes(8)]
    monkeypatch.setattr(columns, "MAX_COLUMN_BYTES", 3)
    assert to_rows(given).equals(whole)


def test_a_tap_without_sets_keeps_no_runs() -> None:
    plain = msgspec.structs.replace(tap().runs[0], set_rows=b"", sets=b"")
    assert SpooledTap.of(TapResult("boot", None, False, {}, None, [plain])).runs == []
