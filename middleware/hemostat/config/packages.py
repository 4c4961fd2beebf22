"""The packages that a job needs in addition to Hemostat's own dependencies, and the commands that install them.

Hemostat is on no package index, so that no message may name it as something that pip finds there. The installed
distribution declares the requirements, with the bounds that the tests were run with. `pyproject.toml` defines the
extras. The packages that the configuration needs (`tracing`, `postgres`) are checked there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Collection

from hemostat_calibration.errors import HemostatError

EXTRAS = {
    "transformers": ("torch", "transformers", "accelerate"),
    "lab": ("hemostat_lab", "torch", "transformers", "accelerate", "compressed_tensors"),
    "report": ("jinja2",),
    "spool": ("pyarrow", "cryptography"),
    "ray": ("ray",),
}
"""Extra -> modules. lab: whatever opens whole checkpoints."""
DISTRIBUTIONS = {"compressed_tensors": "compressed-tensors", "hemostat_lab": "hemostat-lab"}
"""Module -> distribution, where its name is another one."""
_REQUIREMENT = re.compile(
    r"(?P<requirement>(?P<name>[A-Za-z0-9._-]+)[^;]*?)\s*(?:;\s*extra\s*==\s*['\"](?P<extra>[\w-]+)['\"])?"
)


IN_THE_SOURCES = ", in the folder of Hemostat's sources"
_FOLDERS = {"hemostat-lab": "./middleware/lab", "hemostat-vllm": "./calibration"}
"""Hemostat's other distributions, and where they are in its sources."""


def requirements(extra: str) -> dict[str, str]:
    """Returns the requirement of each distribution of an extra, such as `jinja2<4,>=3.1`, by the distribution's name.

    The extra `lab` has what the laboratory needs. Empty where Hemostat runs from its sources and is not installed.
    """
    if extra == "lab":
        own = {name: text for name, text in _declared("hemostat-lab").items() if name not in {"hemostat", *_FOLDERS}}
        return own | requirements("transformers") if own else {}
    return _declared("hemostat", extra)


def _declared(distribution: str, extra: str | None = None) -> dict[str, str]:
    """Returns what an installed distribution requires with an extra, or always; empty if it is not installed."""
    try:
        texts = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (match for text in texts if (match := _REQUIREMENT.fullmatch(text)) and match["extra"] == extra)
    return {match["name"]: match["requirement"] for match in found}


def install_command(extra: str, only: Collection[str] = ()) -> str:
    """Returns the pip command for the distributions of an extra. only: what is missing, if not all of them."""
    folders = [folder for name, folder in _FOLDERS.items() if name in only]
    needed = [text for name, text in requirements(extra).items() if not only or name in only]
    if not _declared("hemostat"):  # it runs from its sources, and neither it nor the plugin is on an index
        own = [".", _FOLDERS["hemostat-lab"]] if extra == "lab" else [f"'.[{extra}]'"]
        folders = [_FOLDERS["hemostat-vllm"], *own]
    elif not folders and not needed:
        folders = [_FOLDERS["hemostat-lab"] if extra == "lab" else f"'.[{extra}]'"]
    if folders:
        return "pip install " + " ".join(folders) + IN_THE_SOURCES
    return "pip install " + " ".join(f"'{text}'" for text in needed)


class MissingPackageError(HemostatError):
    """The text names what is not installed, and the extra to install."""


def missing(extra: str) -> str:
    """Returns the packages of an extra that are not installed, and the command that installs them, in one line; "" if
    nothing is missing.

    The packages are not imported, which would take seconds and memory.
    """
    absent = [DISTRIBUTIONS.get(name, name) for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}; {install_command(extra, absent)}" if absent else ""


def require(extra: str) -> None:
    """Raises MissingPackageError."""
    if text := missing(extra):
        raise MissingPackageError(text)
