"""The key of a spool, which wraps a fresh data key for each file.

A segment is encrypted by Parquet's own modular encryption, whose footer names the key and holds the wrapped data key.
A journal has both in its first line. Data keys are wrapped by AES-GCM.
"""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pyarrow.parquet.encryption import (
    CryptoFactory,
    DecryptionConfiguration,
    EncryptionConfiguration,
    KmsClient,
    KmsConnectionConfig,
)

from hemostat_calibration.errors import HemostatError

PLAIN = "plain"
KEY_BYTES = 32
_NONCE_BYTES = 12


class SpoolError(HemostatError):
    """A spool cannot be used, or a file of it cannot be read; the text names the fix."""


class UnreadableSegmentError(SpoolError):
    """A segment is encrypted with another key, damaged, or no segment of this version. Others may be readable."""


class SpoolKey:
    """A key of 32 bytes. Raises SpoolError unless it has this length."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise SpoolError("the key of a spool has 64 hexadecimal digits; make one by: openssl rand -hex 32")
        self._cipher = AESGCM(key)
        self.name = hashlib.sha256(b"hemostat spool key" + key).hexdigest()[:16]
        """The id of the key, by which files name it. It says nothing of the key itself."""

    def wrap(self, data_key: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return base64.b64encode(nonce + self._cipher.encrypt(nonce, data_key, None))

    def unwrap(self, wrapped: bytes) -> bytes:
        """Returns the data key. Raises SpoolError if another key wrapped it."""
        try:
            raw = base64.b64decode(wrapped)
            return self._cipher.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], None)
        except (InvalidTag, ValueError):
            raise SpoolError("another key has encrypted it") from None


def read_key(source: str) -> SpoolKey | None:
    """Returns the key that a setting names; None if nothing is to be encrypted.

    source: `plain`, `env:NAME` with the name of an environment variable, or the path of a file; both hold 64
    hexadecimal digits. Raises SpoolError.
    """
    if source == PLAIN:
        return None
    name = source.removeprefix("env:")
    try:
        text = os.environ[name] if name != source else Path(source).read_text(encoding="ascii")
        return SpoolKey(bytes.fromhex(text))
    except KeyError:
        raise SpoolError(f"the environment has no {name}; set it to the spool's key") from None
    except OSError as error:
        raise SpoolError(f"the key file {source} cannot be read ({error.strerror}); name another file") from None
    except ValueError:
        raise SpoolError(f"{source} holds no key of 64 hexadecimal digits; make one by: openssl rand -hex 32") from None


class _Wrapping(KmsClient):  # type: ignore[misc]
    """Parquet's interface to a key manager, by one key. data_keys: the data keys that were unwrapped."""

    def __init__(self, key: SpoolKey, data_keys: list[bytes]) -> None:
        super().__init__()
        self._key, self._data_keys = key, data_keys

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
        return self._key.wrap(key_bytes)

    def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
        if master_key_identifier != self._key.name:
            raise SpoolError(f"the key {master_key_identifier} has encrypted it, and not {self._key.name}")
        data_key = self._key.unwrap(wrapped_key)
        self._data_keys.append(data_key)
        return data_key


class SegmentCipher:
    """Encrypts and decrypts segments: uniform modular encryption, AES_GCM_V1, without an AAD prefix."""

    def __init__(self, key: SpoolKey) -> None:
        self._key = key
        self.data_keys: list[bytes] = []
        """The data keys of the segments that were opened: other programs, such as DuckDB, read a segment with its
        one."""
        self._factory = CryptoFactory(lambda _: _Wrapping(key, self.data_keys))

    def encryption(self) -> object:
        """Returns the properties for one new segment, with a data key of its own."""
        configuration = EncryptionConfiguration(
            footer_key=self._key.name,
            uniform_encryption=True,
            encryption_algorithm="AES_GCM_V1",
            double_wrapping=False,
            data_key_length_bits=8 * KEY_BYTES,
        )
        return self._factory.file_encryption_properties(KmsConnectionConfig(), configuration)

    def decryption(self) -> object:
        return self._factory.file_decryption_properties(KmsConnectionConfig(), DecryptionConfiguration())
