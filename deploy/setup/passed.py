"""The versions of all packages that the tests last passed with: a list for each environment, in `passed/`.

make passed                               write the list of .venv, after `make test` has passed
.venv/bin/python deploy/setup/passed.py   what is newer in .venv; `make test` prints it where it fails
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from packaging.version import Version

FOLDER = Path(__file__).with_name("passed")
ENGINE = "engine"
"""The list of the environment that `make setup` makes. The others: `bounds.py`."""
NOT_LISTED = {"hemostat", "hemostat-lab", "hemostat-vllm", "pip", "uv"}


def installed(python: str = sys.executable) -> dict[str, str]:
    """Name -> version of every distribution of an environment."""
    command = [python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    versions = {str(package["name"]).lower().replace("_", "-"): str(package["version"]) for package in result}
    return {name: versions[name] for name in sorted(versions.keys() - NOT_LISTED)}


def read(path: Path) -> dict[str, str]:
    """Lines of `name==version`; empty where there is no such file."""
    lines = path.read_text(encoding="utf-8").split() if path.exists() else []
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


def write(path: Path, versions: Mapping[str, str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()), encoding="utf-8")


def newer(now: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    """A line for each package that is newer than it was, or was not there.

    >>> newer({"a": "1.10", "b": "2.0", "c": "1"}, {"a": "1.9", "b": "2.0"})
    ['a 1.10 (1.9 when they last passed)', 'c 1 (not installed when they last passed)']
    """
    return [
        f"{name} {version} ({before.get(name, 'not installed')} when they last passed)"
        for name, version in now.items()
        if name not in before or Version(version) > Version(before[name])
    ]


# ruff: noqa: T201 - main() prints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="the tests have passed with what is installed")
    path = FOLDER / f"{ENGINE}.txt"
    if parser.parse_args().write:
        write(path, installed())
        return 0
    lines = newer(installed(), read(path))
    print("\nNewer than what the tests last passed with, which may be the reason:" if lines else "", *lines, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
