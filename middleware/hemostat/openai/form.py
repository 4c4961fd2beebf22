"""The names of the forms."""

from __future__ import annotations

from enum import StrEnum


class Form(StrEnum):
    """The form in which a route writes its requests and responses. The value begins the names of its kinds of
    traffic.
    """

    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    MESSAGES = "messages"
