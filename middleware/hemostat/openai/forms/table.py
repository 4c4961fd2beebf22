"""The one table of the forms that are implemented."""

from __future__ import annotations

from collections.abc import Mapping

from hemostat.openai.forms.chat import Chat
from hemostat.openai.forms.completions import Completions
from hemostat.openai.forms.messages import Messages
from hemostat.openai.forms.protocol import Format
from hemostat.openai.forms.responses import Responses
from hemostat.openai.routes import Form

FORMATS: Mapping[Form, Format] = {
    Form.CHAT: Chat(),
    Form.COMPLETIONS: Completions(),
    Form.RESPONSES: Responses(),
    Form.MESSAGES: Messages(),
}
