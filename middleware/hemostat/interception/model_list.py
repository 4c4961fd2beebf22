"""The answer to GET /v1/models on its way to a client: Hemostat's own adapters are taken out."""

from __future__ import annotations

from hemostat.hooks import Comparison, Refusal, Rewrite
from hemostat.openai.model_name import without_versions
from hemostat_calibration.records import Arm

MAX_LIST_BYTES = 4 * 1024 * 1024
"""A longer list is passed on unchanged."""


class ModelList:
    """A `hooks.ExchangeHook` for one request of the list of models."""

    body_limit = 0
    withholds = False

    def __init__(self) -> None:
        self._data = bytearray()
        self._too_long = False

    @property
    def arm(self) -> str:
        return Arm.NONE.value

    @property
    def comparison(self) -> Comparison | None:
        return None

    def request(self, body: bytes | None) -> Rewrite | Refusal | None:
        return None if body is None else Rewrite(body, frozenset({b"accept-encoding"}))

    @property
    def draws_engine(self) -> bool:
        return False

    def sent_to(self, engine: str, *, drawn: bool) -> None:
        pass

    def response_head(self, status: int, content_type: bytes, content_coding: bytes) -> bool:
        return status == 200 and content_coding.lower() == b"identity"

    def response_data(self, data: bytes) -> bytes:
        if self._too_long:
            return data
        self._data += data
        if len(self._data) <= MAX_LIST_BYTES:
            return b""
        self._too_long = True
        return bytes(self._data)

    def replay(self) -> bool:
        return False

    def response_end(self) -> bytes:
        return b"" if self._too_long else without_versions(bytes(self._data))

    def closed(
        self, *, complete: bool, output_tokens: int | None = None, engine: str = "", own_status: int = 0
    ) -> None:
        pass
