"""Virtual environments that tests install wheels in."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

OWN = ("hemostat", "hemostat_lab", "hemostat_vllm", "hemostat_calibration", "hemostat_engine")


class Environment:
    """An environment without pip, into which the pip of this one installs."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")

    def pip(self, *arguments: str, succeeds: bool = True) -> str:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not succeeds or ended.returncode == 0, ended.stderr
        return ended.stdout

    def would_install(self, wheel: Path) -> list[str]:
        """Returns the distributions that pip would install or move. Their wheels are in the plugin's folder."""
        report = self.pip("install", "--quiet", "--no-index", "--dry-run", "--report", "-", str(wheel))
        return [entry["metadata"]["name"] for entry in json.loads(report)["install"]]

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
            (environment.site / path.name).symlink_to(path)
    return environment
