"""The captures of the segment that is still open: a file of frames, which a crash leaves whole up to its last frame.

The first line is JSON: the version, and the wrapped data key if the spool is encrypted. Each frame behind it is the
length of its bytes, their CRC-32, the number of captures and the frame's own number, each a little-endian uint32, and
the bytes: a list of `Spooled` in msgpack. With a key, it is encrypted by AES-GCM under the frame's number. The cipher's
tag shows damage, too, and the CRC-32 is 0 then. A frame of version 1 has one capture, which is no list, and the head
has no more than length and CRC-32: frames are numbered in their order.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hemostat.scoring.spool.keys import KEY_BYTES, SpoolError, SpoolKey
from hemostat.scoring.spool.spooled import Spooled

SUFFIX = ".journal"
VERSION = 2
_FRAMES = {1: struct.Struct("<II"), VERSION: struct.Struct("<IIII")}
"""The head of a frame, by the version of the journal."""
_MAX_FRAME_BYTES = 1 << 30


def _nonce(number: int) -> bytes:
    """Returns the nonce of a frame. A data key belongs to one journal, so a number never comes twice under a key."""
    return number.to_bytes(12, "little")


class Journal:
    """A journal that is written. It is locked for as long as it is open. Raises OSError if it cannot be made."""

    def __init__(self, path: Path, key: SpoolKey | None) -> None:
        self.path = path
        self._cipher: AESGCM | None = None
        header: dict[str, object] = {"hemostat_spool_journal": VERSION}
        if key is not None:
            data_key = os.urandom(KEY_BYTES)
            self._cipher = AESGCM(data_key)
            header |= {"key": key.name, "data_key": key.wrap(data_key).decode()}
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self.captures: list[Spooled] = []
        """The captures of the journal: a segment is made of them without reading the file again."""
        self._frames = 0
        self.bytes = 0
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            self._write(json.dumps(header).encode() + b"\n")
        except OSError:
            self.close()
            with contextlib.suppress(OSError):
                path.unlink()
            raise

    def append(self, captures: Sequence[Spooled]) -> None:
        """Appends captures as one frame, or raises OSError and appends none of them. Several of them take less time
        together."""
        data, checksum, number = msgspec.msgpack.encode(captures), 0, self._frames
        self._frames += 1  # also if it cannot be written: no number comes twice under a key
        if self._cipher is None:
            checksum = zlib.crc32(data)
        else:
            data = self._cipher.encrypt(_nonce(number), data, None)
        self._write(_FRAMES[VERSION].pack(len(data), checksum, len(captures), number), data)
        self.captures += captures

    def _write(self, *parts: bytes) -> None:
        size = sum(map(len, parts))
        try:
            # One call, without a copy: usually all of it is written at once.
            done = os.writev(self._descriptor, parts)
            rest = memoryview(b"".join(parts))[done:] if done < size else memoryview(b"")
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            os.ftruncate(self._descriptor, self.bytes)
            raise
        self.bytes += size

    def sync(self) -> None:
        """Returns once all that was appended is on the disk. Raises OSError."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def in_use(path: Path) -> bool:
    """Returns True if another process, or this one, still writes a journal."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def read_journal(path: Path, key: SpoolKey | None) -> Iterator[Spooled | None]:
    """Yields the captures of a journal up to the first frame that is not whole, and None for each one that is damaged.

    Raises SpoolError, OSError."""
    with path.open("rb") as file:
        try:
            header = json.loads(file.readline())
            version, wrapped = header["hemostat_spool_journal"], header.get("data_key")
            frame = _FRAMES.get(version)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SpoolError(f"{path} is not a journal of a spool; move it elsewhere") from None
        if frame is None:
            raise SpoolError(f"{path} has version {version}, and this Hemostat reads {VERSION}; use a newer Hemostat")
        cipher = None
        if wrapped is not None:
            if key is None:
                raise SpoolError(f"{path} is encrypted: name its key {header.get('key')}")
            try:
                cipher = AESGCM(key.unwrap(wrapped.encode()))
            except SpoolError as error:
                raise SpoolError(f"{path}: {error}; name the key {header.get('key')}") from None
        order = 0
        while len(head := file.read(frame.size)) == frame.size:
            length, checksum, count, number = (*frame.unpack(head), 1, order)[:4]
            data = file.read(length) if 0 < length <= _MAX_FRAME_BYTES else b""
            if not data or len(data) < length:
                return
            try:
                plain = _checked(data, checksum, number, cipher)
                if plain is None:
                    yield from [None] * min(count, length)
                elif version == 1:
                    yield msgspec.msgpack.decode(plain, type=Spooled)
                else:
                    yield from msgspec.msgpack.decode(plain, type=list[Spooled])
            except msgspec.MsgspecError:
                raise SpoolError(f"{path} is of another version of Hemostat; use the one that wrote it") from None
            order += 1


def _checked(data: bytes, checksum: int, number: int, cipher: AESGCM | None) -> bytes | None:
    """Returns the content of a frame; None if it is damaged."""
    if cipher is None:
        return data if zlib.crc32(data) == checksum else None
    try:
        return cipher.decrypt(_nonce(number), data, None)
    except InvalidTag:
        return None
