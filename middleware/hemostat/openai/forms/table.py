"""The one table of the forms that are implemented."""

from __future__ import annotations

from collections.abc import Mapping

from hemostat.openai.form import Form
from hemostat.openai.forms.chat import Chat
from hemostat.openai.forms.completions import Completions
from hemostat.openai.forms.protocol import Format

FORMATS: Mapping[Form, Format] = {Form.CHAT: Chat(), Form.COMPLETIONS: Completions()}
