"""The commands that messages give for installing a package: from the requirements that Hemostat itself declares.

Hemostat is on no package index, so that no message may name it as something that pip finds there. The installed
distribution declares the requirements, with the bounds that the tests were run with.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Collection

_REQUIREMENT = re.compile(
    r"(?P<requirement>(?P<name>[A-Za-z0-9._-]+)[^;]*?)\s*;\s*extra\s*==\s*['\"](?P<extra>[\w-]+)['\"]"
)


def requirements(extra: str) -> dict[str, str]:
    """Returns the requirement of each distribution of an extra, such as `jinja2<4,>=3.1`, by the distribution's name.

    Empty where Hemostat runs from its sources and is not installed.
    """
    try:
        declared = importlib.metadata.requires("hemostat") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (match for text in declared if (match := _REQUIREMENT.fullmatch(text)) and match["extra"] == extra)
    return {match["name"]: match["requirement"] for match in found}


def install_command(extra: str, only: Collection[str] = ()) -> str:
    """Returns the pip command for the distributions of an extra. only: what is missing, if not all of them."""
    needed = [text for name, text in requirements(extra).items() if not only or name in only]
    if not needed:
        return f"pip install '.[{extra}]', in the folder of Hemostat's sources"
    return "pip install " + " ".join(f"'{text}'" for text in needed)
