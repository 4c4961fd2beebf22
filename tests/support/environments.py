"""Virtual environments that tests install wheels in."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
import venv
from functools import partial
from pathlib import Path
from shutil import copytree

from tests.support.uv import install, uv

OWN = ("hemostat", "hemostat_lab", "hemostat_vllm", "hemostat_calibration", "hemostat_engine")


class Environment:
    """An environment without pip, into which the uv of this one installs."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")

    def install(self, *arguments: str) -> None:
        install(self.python, *arguments)

    def would_change(self, wheel: Path) -> list[tuple[str, str]]:
        """Returns what installing the wheel would do, without an index: + or - for a distribution that comes or goes,
        and its name. One that moves to another version has both."""
        command = ("pip", "install", "--python", str(self.python), "--no-index", "--dry-run", str(wheel))
        said = uv(*command).stderr
        assert "Would" in said
        return re.findall(r"^ ([-+~]) ([\w.-]+)", said, re.MULTILINE)

    def complaints(self) -> set[str]:
        """Returns the requirements that what is installed does not satisfy, a sentence each."""
        said = uv("pip", "check", "--python", str(self.python), succeeds=False).stderr
        assert "Checked" in said
        return {line for line in said.splitlines() if line.startswith("The package")}

    def installed(self) -> set[str]:
        """Returns all distributions, as name==version."""
        program = "import importlib.metadata as m; print(*{f'{d.name}=={d.version}' for d in m.distributions()})"
        return set(self.run(program).split())

    def run(self, program: str) -> str:
        """Returns what a program prints that sees nothing of this checkout."""
        command = [str(self.python), "-I", "-c", program]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()


def vllm_environment(folder: Path) -> Environment:
    """Returns an environment with all that is installed here, vLLM and PyTorch among it, but Hemostat."""
    environment = Environment(folder)
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.name.partition("-")[0] not in OWN and not path.name.startswith("_hemostat"):
            # uv does not see a distribution whose folder of metadata is a link itself.
            link = partial(copytree, copy_function=os.symlink) if path.suffix == ".dist-info" else os.symlink
            link(path, environment.site / path.name)
    return environment
