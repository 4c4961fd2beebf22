"""Segments: Parquet files, written whole under their final name, and encrypted as a whole if there is a key."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from hemostat.report.written_files import write_atomically
from hemostat.scoring.spool.keys import SegmentCipher, SpoolError, SpoolKey, UnreadableSegmentError
from hemostat.scoring.spool.objects import ObjectPath

Location = Path | ObjectPath
L = TypeVar("L", bound=Location)
SUFFIX = ".parquet"
TAKEN_SUFFIX = ".taken"
"""The suffix of the file next to a segment that says how many of its rows were scored in the window of each day."""
_NAME = re.compile(r"captures-(\d{13})-[0-9a-f]{8}")


def segment_name(at: float) -> str:
    """Returns a new name without its suffix, which begins with the time. at: Unix seconds.

    >>> segment_name(1.5)[:22]
    'captures-0000000001500'
    """
    return f"captures-{round(at * 1000):013d}-{os.urandom(4).hex()}"


def began(path: Location) -> float | None:
    """Returns the Unix time at which a segment or its journal was begun, by its name; None if the name has none."""
    match = _NAME.fullmatch(path.stem)
    return None if match is None else int(match[1]) / 1000


def segments(folder: L) -> list[L]:
    """Returns the segments of a folder in the order of their names, which is the order of time. Raises OSError."""
    paths: Any = folder.files() if isinstance(folder, ObjectPath) else folder.iterdir() if folder.is_dir() else ()
    found = [path for path in paths if path.name.endswith(SUFFIX) and not path.name.startswith(".")]
    return sorted(found, key=lambda path: path.name)


def size_of(path: Location) -> int:
    """Returns the bytes of a segment that `segments` has listed. Raises OSError."""
    return path.size if isinstance(path, ObjectPath) else path.stat().st_size


def taken(path: Path) -> int:
    """Returns the number of rows of a segment that figures have already, as `set_taken` has written it.

    Raises OSError, and SpoolError if it says no number.
    """
    try:
        return int(path.with_suffix(TAKEN_SUFFIX).read_text(encoding="ascii"))
    except FileNotFoundError:
        return 0
    except ValueError:
        raise SpoolError(f"{path.with_suffix(TAKEN_SUFFIX)} has no number of rows; move it and its segment") from None


def set_taken(path: Path, rows: int) -> None:
    """Writes how many rows of a segment figures have, next to it. Raises OSError."""
    write_atomically(path.with_suffix(TAKEN_SUFFIX), b"%d\n" % rows)
    sync_folder(path.parent)


def write_segment(
    path: Location,
    rows: pa.Table | Iterable[pa.Table],
    key: SpoolKey | None,
    compression: str | Mapping[str, str] = "zstd",
) -> None:
    """Writes rows: the file is complete, or it is not there. Only the owner may read it. Raises OSError.

    rows: all of them, or at least one part after the other. compression: of all columns, or of each by its name.
    """
    parts = iter([rows] if isinstance(rows, pa.Table) else rows)
    if isinstance(path, ObjectPath):
        content = pa.BufferOutputStream()
        _write(content, parts, key, compression)
        path.write(content.getvalue())
        return
    new = path.with_name(f".{path.name}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with pa.OSFile(str(new), "wb") as file:  # an own file of Arrow's takes less time than one of Python's
            _write(file, parts, key, compression)
        os.fsync(descriptor)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    sync_folder(path.parent)


def _write(file: Any, parts: Iterator[pa.Table], key: SpoolKey | None, compression: str | Mapping[str, str]) -> None:
    encryption = None if key is None else SegmentCipher(key).encryption()
    rows = next(parts)
    with pq.ParquetWriter(
        file, rows.schema, compression=compression, use_dictionary=False, encryption_properties=encryption
    ) as writer:
        for part in itertools.chain([rows], parts):
            writer.write_table(part)


def sync_folder(folder: Path) -> None:
    """Returns once the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_segment(path: Location, key: SpoolKey | None, metadata: dict[bytes, str]) -> pa.Table:
    """Returns the rows of a segment. metadata: the versions that its schema has to name.

    Raises UnreadableSegmentError.
    """
    properties: Any = None if key is None else SegmentCipher(key).decryption()
    try:
        content = path.read() if isinstance(path, ObjectPath) else pa.memory_map(str(path)).read_buffer()
        encrypted = bytes(content[:4]) == b"PARE"
        if encrypted and key is None:
            raise SpoolError("it is encrypted")
        rows = pq.read_table(
            pa.BufferReader(content), decryption_properties=properties if encrypted else None, partitioning=None
        )
    except SpoolError as error:
        raise UnreadableSegmentError(f"{path} cannot be read: {error}; name its key by --key") from None
    except (OSError, pa.ArrowException) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        text = f"{path} cannot be read: {why[:200]}; name its key, or move the file elsewhere"
        raise UnreadableSegmentError(text) from None
    found = rows.schema.metadata or {}
    for name, version in metadata.items():
        if name not in found:
            raise UnreadableSegmentError(f"{path} has no {name.decode()} in its metadata: it is another file; move it")
        if found[name].decode() != version:
            raise UnreadableSegmentError(
                f"{path} has version {found[name].decode()} of {name.decode()}, and this Hemostat reads {version}; use "
                "the Hemostat that wrote it"
            )
    return rows
