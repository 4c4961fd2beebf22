"""Hemostat with the relay's hot path compiled, as an unpacked wheel: `python -m tests.support.compiled FOLDER`.

Tests of the relay run on it with the folder first on the path (`environment`) and pytest's option `--compiled`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import zipfile
from pathlib import Path

from tests.support import uv

ROOT = Path(__file__).parents[2]
SWITCH = "HATCH_BUILD_HOOKS_ENABLE"
SUFFIXES = tuple(importlib.machinery.EXTENSION_SUFFIXES)


class NoCompilerError(Exception):
    """Nothing can be compiled here; the text says what to install."""


def modules(root: Path = ROOT) -> list[str]:
    """Paths of the modules that the wheel can have compiled, below middleware/; none in a tree of before there were."""
    targets = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    result: list[str] = targets["wheel"].get("hooks", {}).get("custom", {}).get("modules", [])
    return result


def check_compiler() -> None:
    """Raises NoCompilerError."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        raise NoCompilerError(f"there is no C compiler ({compiler}); on Debian: apt-get install gcc libc6-dev")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise NoCompilerError("there is no Python.h; on Debian: apt-get install python3-dev")


def build_wheel(folder: Path, *, root: Path = ROOT, opt_level: int = 3) -> Path:
    """A compiled wheel in `folder`, of the tree below `root`. opt_level: of the C compiler; 0 is quick.

    Raises NoCompilerError, or CalledProcessError with uv's output.
    """
    check_compiler()
    given = {SWITCH: "1", "MYPYC_OPT_LEVEL": str(opt_level)}
    # Before there was a distribution of its own for what the relay shares with the plugin, there was one wheel.
    for part in (".", "calibration"):
        if (root / part / "pyproject.toml").exists():
            uv.build_wheel(root.resolve() / part, folder, given)
    (wheel,) = folder.glob("hemostat-*.whl")
    return wheel


def digest(root: Path) -> str:
    """Of all that a wheel is made from."""
    result = hashlib.sha256()
    files = [root / "pyproject.toml", root / "deploy" / "hatch_build.py"]
    for folder in ("middleware", "calibration"):
        found = (root / folder).rglob("*")
        files += sorted(path for path in found if "__pycache__" not in path.parts and path.is_file())
    for path in files:
        result.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return result.hexdigest()


def up_to_date(folder: Path, *, root: Path = ROOT) -> Path:
    """`folder` with Hemostat as the image has it, built where it is not from these sources. Raises as `build_wheel`."""
    stamp, wanted = folder / "made-from", f"{digest(root)} {sys.version}"
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory() as wheels:
            unpack(build_wheel(Path(wheels), root=root), folder)
        stamp.write_text(wanted)
    return folder


def unpack(wheel: Path, folder: Path) -> None:
    """Unpack a wheel of `build_wheel`, and the one of what it shares with the plugin."""
    for path in wheel.parent.glob("hemostat*.whl"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)


def environment(folder: Path) -> dict[str, str]:
    """What makes a Python take Hemostat from the folder, and `tests` from the repository."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def is_compiled(module: str) -> bool:
    """Whether this process imports an extension module by that name."""
    spec = importlib.util.find_spec(module)
    return spec is not None and str(spec.origin).endswith(SUFFIXES)


def not_compiled() -> list[str]:
    """Of `modules`, those that this process imports from their sources."""
    names = [path.removesuffix(".py").replace("/", ".") for path in modules()]
    return [name for name in names if not is_compiled(name)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="is emptied, unless it is up to date")
    try:
        up_to_date(parser.parse_args().folder)
    except NoCompilerError as error:
        parser.exit(2, f"{error}\n")
    except subprocess.CalledProcessError as error:
        parser.exit(1, error.stdout + error.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
