"""Sections of the configuration with other constants, for tests."""

from __future__ import annotations

from typing import Any, TypeVar

from hemostat.config.fields import Section

SectionT = TypeVar("SectionT", bound=Section)


def with_constants(section: type[SectionT], **constants: Any) -> type[SectionT]:
    """The section with other values of its `ClassVar`s."""
    assert constants.keys() <= section.__class_vars__
    return type(section.__name__, (section,), {"__module__": section.__module__, **constants})
