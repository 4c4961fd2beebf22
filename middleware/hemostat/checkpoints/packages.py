"""Packages that a job needs in addition to Hemostat's own dependencies, and the extra of the distribution that brings
them.

`pyproject.toml` defines the extras. The packages that the configuration needs (`tracing`, `postgres`) are checked
there.
"""

from __future__ import annotations

import importlib.util

from hemostat.config.install_command import install_command
from hemostat_calibration.errors import HemostatError

EXTRAS = {
    "transformers": ("torch", "transformers", "accelerate"),
    "lab": ("hemostat_lab", "torch", "transformers", "accelerate", "compressed_tensors"),
    "report": ("jinja2",),
}
"""Extra -> modules. lab: whatever opens whole checkpoints."""
DISTRIBUTIONS = {"compressed_tensors": "compressed-tensors", "hemostat_lab": "hemostat-lab"}
"""Module -> distribution, where its name is another one."""


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
