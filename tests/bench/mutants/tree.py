"""A checkout of a revision, below build/, in which sources are changed and tests run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

FOLDER = Path(__file__).parent
PRODUCT = (
    "calibration/hemostat_calibration",
    "calibration/hemostat_engine",
    "middleware/hemostat",
    "middleware/lab/hemostat_lab",
)
"""The folders of the packages that are changed."""


def git(folder: Path, *arguments: str) -> str:
    """Returns git's output. Raises CalledProcessError."""
    command = ["git", "-c", "user.name=mutants", "-c", "user.email=mutants@example.org", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


class Tree:
    """Owns a worktree of `repository` at a revision. tests_of: the revision that the folder `tests` is taken from."""

    def __init__(self, repository: Path, folder: Path, revision: str, tests_of: str = "") -> None:
        self.folder = folder
        self.revision = git(repository, "rev-parse", revision).strip()
        self._tests_of = git(repository, "rev-parse", tests_of or revision).strip()
        if not folder.exists():
            git(repository, "worktree", "prune")
            git(repository, "worktree", "add", "--detach", str(folder), self.revision)
        if not (environment := folder / ".venv").is_symlink() and (repository / ".venv").exists():
            environment.symlink_to((repository / ".venv").resolve())
        self.restore()

    def restore(self) -> None:
        """Undoes every change of files that git does not ignore."""
        git(self.folder, "reset", "--quiet", "--hard", self.revision)
        if self._tests_of != self.revision:
            git(self.folder, "rm", "--quiet", "-r", "tests")
            git(self.folder, "checkout", "--quiet", self._tests_of, "--", "tests")
        git(self.folder, "clean", "--quiet", "-fd", "--exclude=.venv")

    def product_files(self, folders: Sequence[str] = PRODUCT) -> list[str]:
        """Returns the paths of the product's modules below some folders."""
        listed = git(self.folder, "ls-files", "--", *folders).splitlines()
        return [path for path in listed if path.endswith(".py")]

    def pytest(
        self, tests: Sequence[str], seconds: float, log: Path, variables: Mapping[str, str] | None = None
    ) -> int | None:
        """Returns pytest's exit status; None if it ran longer than `seconds`, and was killed with its children.

        seconds: on a machine that does nothing else. They are multiplied by the processes that wait for each processor.
        """
        limit = seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        paths = [FOLDER, *(self.folder / name for name in ("", "middleware", "middleware/lab", "calibration"))]
        own = {"PYTEST_CURRENT_TEST"}  # of a pytest that this runs in: children of the new one would report its test
        environment = {
            **{name: value for name, value in os.environ.items() if name not in own},
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",  # a change within a second would keep the byte code of before
            "OMP_NUM_THREADS": "1",
            **(variables or {}),
        }
        options = ["-n", "0", "-q", "--no-header", "-p", "recording", "-p", "no:cacheprovider", "-m", "not vllm"]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as names, log.open("w") as output:
            names.write("".join(f"{test}\n" for test in tests))
            names.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *options, f"@{names.name}"],
                cwd=self.folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def remove(self, repository: Path) -> None:
        """Removes the worktree."""
        shutil.rmtree(self.folder, ignore_errors=True)
        git(repository, "worktree", "prune")
