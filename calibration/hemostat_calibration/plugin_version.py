"""The version of the plugin in vLLM, and the rule by which it fits a control process.

The plugin is installed where vLLM runs, and the control process elsewhere, so that their versions may differ. They fit
each other if major and minor version are the same: releases that differ in the third number only change neither what
the plugin reports nor what it is asked for. A plugin that does not fit may work all the same, but that was not tested.
"""

from __future__ import annotations

import re

from hemostat_calibration import __version__

DISTRIBUTION = "hemostat-vllm"
INSTALL = (
    f"install {DISTRIBUTION} of the same version where vLLM runs (pip install ./calibration, in the folder of "
    "Hemostat's sources), and restart vLLM"
)
_MINOR = re.compile(r"[0-9]+\.[0-9]+")
_STATED = re.compile(rf"{DISTRIBUTION} ([0-9A-Za-z][0-9A-Za-z.+!_-]*)")


def fits(plugin: str, own: str = __version__) -> bool:
    """Returns True if a plugin of this version fits a control process of the version `own`.

    plugin: "" if it does not say its version, as the plugins before 0.3 do not.

    >>> fits("0.3.1", "0.3.0"), fits("0.3.0rc1", "0.3.0"), fits("0.30.0", "0.3.0"), fits("", "0.3.0")
    (True, True, False, False)
    """
    minor, expected = _MINOR.match(plugin), _MINOR.match(own)
    return minor is not None and expected is not None and minor[0] == expected[0]


def shown(plugin: str) -> str:
    """Returns the version as messages show it.

    >>> shown("0.3.0"), shown("")
    ('0.3.0', 'unknown (older than 0.3)')
    """
    return plugin or "unknown (older than 0.3)"


def misfit(plugin: str) -> str:
    """Returns what a line says of a plugin that does not fit the installed version; "" if it fits.

    >>> misfit(__version__), misfit("0.1.0").partition(" Hemostat ")[0]
    ('', 'its version is 0.1.0 and does not fit')
    """
    return "" if fits(plugin) else f"its version is {shown(plugin)} and does not fit Hemostat {__version__}"


def signature() -> str:
    """Returns how the plugin names itself in a text that `read` understands.

    >>> read(f"something is wrong ({signature()})") == __version__
    True
    """
    return f"{DISTRIBUTION} {__version__}"


def read(text: str) -> str:
    """Returns the version of the plugin that has written the text; "" if the text does not say it.

    >>> read("vllm_xargs.hemostat must be a profile version, not 'x' (hemostat-vllm 0.3.0)"), read("no")
    ('0.3.0', '')
    """
    stated = _STATED.search(text)
    return stated[1] if stated else ""
