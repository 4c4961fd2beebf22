"""The common parts of the forms whose responses are passed on as they are."""

from __future__ import annotations

from abc import ABC, abstractmethod

from hemostat.openai.forms.protocol import Stripper
from hemostat.openai.json_splice import JsonObject
from hemostat.openai.observing import EndingObserver
from hemostat.openai.requests import Request
from hemostat.openai.tokens import ResponseTokens


class TappedForm(ABC):
    """Every byte of a response is passed on. A `Format` but for `read`, and an `observing.EndingForm`."""

    @abstractmethod
    def record_ending(self, data: JsonObject, tokens: ResponseTokens) -> None:
        """See `observing.EndingForm`."""

    def goes_on(self, events: bytes) -> bool:
        """See `observing.EndingForm`."""
        return False

    def injected_members(self, request: Request, top_k: int) -> dict[str, bytes]:
        """Returns no members: see `Unscored.NO_TOKEN_IDS`."""
        return {}

    def stripper(self, request: Request, tokens: ResponseTokens, *, stream: bool) -> Stripper:
        return self.observer(request, tokens, stream=stream)

    def observer(self, request: Request, tokens: ResponseTokens, *, stream: bool) -> Stripper:
        return EndingObserver(self, request, tokens, stream=stream)
