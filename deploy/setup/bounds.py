"""`make test-newest` and `make test-oldest`: Hemostat without vLLM, at both ends of what pyproject.toml allows.

`make setup` installs the versions that vLLM pins; whoever installs the wheel without vLLM gets others. The wheel is
installed with EXTRAS into an environment of its own, outside of the repository, and GROUPS of tests run there: all that
needs no vLLM. newest: what uv resolves. oldest: exactly the lower bound of every direct dependency. When all have
passed, the list of what was installed is written to deploy/setup/passed/, to be committed.

    make test-newest ARGS="--python python3.13"     with another Python
    make test-newest ARGS="--keep"                  the environment stays, and is used again by the next run
    make test-oldest ARGS="--only doctor compress"  some of the groups; writes no list

TORCH_INDEX_URL  PyTorch's index of CPU wheels, used only if uv does not find a torch otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import environment
import passed
import versions
from environment import ROOT, SetupError
from packaging.requirements import Requirement
from packaging.version import Version

ENDS = ("newest", "oldest")
EXTRAS = ("lab", "postgres", "report", "tracing")
TOOLS = (
    "cryptography",
    "gguf",
    "h11",
    "hypothesis",
    "jsonschema",
    "peft",
    "playwright",
    "pytest",
    "pytest-asyncio",
    "pytest-timeout",
    "pytest-xdist",
)
"""The packages of the extra `dev` that the tests import. They are installed at neither end of their bounds: they are
not what is tested."""
GROUPS = {
    "reference": ("tests/reference/test_transformers.py",),
    "noise floor": ("tests/scoring/test_noise_floor.py",),
    "doctor": (
        "tests/lab/doctor/test_checkpoints.py",
        "tests/lab/doctor/test_prompts.py",
        "tests/lab/doctor/test_rounded_inputs.py",
    ),
    "adapt": (
        "tests/lab/adapters/test_adapt_command.py",
        "tests/lab/adapters/test_checkpoint.py",
        "tests/lab/adapters/test_build_process.py",
    ),
    "compress": (
        "tests/checkpoints/test_piecewise.py",
        "tests/lab/compression/test_compress_command.py",
        "tests/lab/compression/test_plan.py",
    ),
    "config, cli": ("tests/config/test_config.py", "tests/lab/demo/test_prompts.py", "tests/deploy/test_extras.py"),
    "serve": (
        "tests/relay/test_relay.py",
        "tests/admin/test_app.py",
        "tests/admin/test_hardening.py",
        "tests/reference/hidden/test_beside_clients.py",
    ),
    "store": ("tests/store/test_conformance.py", "tests/store/test_postgres.py"),
}
"""The tests of each group whose results are counted separately, as paths."""

Report = Callable[[str], None]


# Bounds


def projects() -> list[dict[str, Any]]:
    """Returns the table `project` of each pyproject.toml; the first one is Hemostat's own."""
    files = (ROOT / folder / "pyproject.toml" for folder in environment.FOLDERS)
    return [tomllib.loads(file.read_text(encoding="utf-8"))["project"] for file in files]


def requirements(projects: Sequence[Mapping[str, Any]], extras: Iterable[str]) -> list[Requirement]:
    """Returns the direct dependencies of the first project with some of its extras, each once.

    A requirement of one of the projects stands for what that one needs, with the extras that it names. SetupError if a
    package has other bounds in another place; a requirement without an upper bound, as the plugin has it, is left out.
    """
    known = {project["name"]: project for project in projects}
    result: dict[str, Requirement] = {}
    waiting = [Requirement(f"{projects[0]['name']}[{','.join(extras)}]")]
    taken: set[tuple[str, str]] = set()
    while waiting:
        needed = waiting.pop(0)
        if (project := known.get(needed.name)) is None:
            if result.setdefault(needed.name, needed).specifier != needed.specifier:
                raise SetupError(
                    f"pyproject.toml: {needed.name} has the bounds {needed.specifier} and "
                    f"{result[needed.name].specifier}"
                )
            continue
        for extra in ["", *sorted(needed.extras)]:
            if (needed.name, extra) in taken:
                continue
            taken.add((needed.name, extra))
            texts = project.get("optional-dependencies", {})[extra] if extra else project["dependencies"]
            waiting += [found for found in map(Requirement, texts) if found.name in known or not only_from(found)]
    return [*result.values()]


def only_from(requirement: Requirement) -> bool:
    """True if every version from a lower bound on is taken, as the plugin takes what vLLM has brought."""
    return {part.operator for part in requirement.specifier} == {">="}


def bound(requirement: Requirement, operator: str) -> str:
    """The version of its lower (>=) or upper (<) bound. SetupError where it has none."""
    version = next((part.version for part in requirement.specifier if part.operator == operator), None)
    if version is None:
        raise SetupError(f"pyproject.toml: {requirement} has no bound with {operator}")
    return version


def beyond(outdated: str, wanted: Iterable[Requirement]) -> list[str]:
    """Returns the direct dependencies that have a release which their upper bound excludes, one line each. outdated:
    the JSON of `pip list --outdated`."""
    latest = {row["name"].lower().replace("_", "-"): row["latest_version"] for row in json.loads(outdated)}
    return [
        f"{package.name} {latest[package.name]} is out, which pyproject.toml excludes (<{bound(package, '<')})"
        for package in wanted
        if package.name in latest and Version(latest[package.name]) >= Version(bound(package, "<"))
    ]


# Results


@dataclass(slots=True)
class Outcome:
    """The outcome of a group of tests. reason: why there are no counts."""

    counts: versions.Counts = field(default_factory=versions.Counts)
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    reason: str = ""

    @property
    def good(self) -> bool:
        return not self.reason and not self.counts.failed and self.counts.passed > 0


def table(wanted: Iterable[Requirement], installed: Mapping[str, str], outcomes: Mapping[str, Outcome]) -> str:
    """Two Markdown tables: what was tested, and what came of it."""
    lines = ["| package | lower bound | below | tested |", "|---|---|---|---|"]
    lines += [f"| {r.name} | {bound(r, '>=')} | {bound(r, '<')} | {installed.get(r.name, '–')} |" for r in wanted]
    lines += ["", "| tests | passed | failed | skipped | seconds |", "|---|---|---|---|---|"]
    for name, outcome in outcomes.items():
        counts = outcome.counts
        lines.append(f"| {name} | {counts.passed} | {counts.failed} | {counts.skipped} | {outcome.seconds:.0f} |")
    lines += [f"{name}: {outcome.reason}" for name, outcome in outcomes.items() if outcome.reason]
    lines += [f"FAILED {test}: {text}" for outcome in outcomes.values() for test, text in outcome.failures]
    return "\n".join(lines)


# Environments


class Runner:
    """Owns the environment of one end, below `folder`, and its logs."""

    def __init__(self, end: str, folder: Path, python: str, report: Report) -> None:
        self.environment = folder / end
        self._end = end
        self._logs = folder / f"{end}.logs"
        self._python = python
        self._report = report
        self.wanted = requirements(projects(), EXTRAS)
        self._tools = [str(r) for r in requirements(projects(), ["dev"]) if r.name in TOOLS]
        self._logs.mkdir(parents=True, exist_ok=True)

    @property
    def python(self) -> str:
        return str(self.environment / "bin" / "python")

    def install(self) -> None:
        """SetupError."""
        log = self._logs / "install.log"
        log.write_text("")
        if not Path(self.python).exists():
            self._report(f"[1/3] an environment in {self.environment}")
            environment.create(self.environment, self._python)

        self._report("[2/3] the wheels and their dependencies; several GB where torch is not a CPU build")
        constraints = self._logs / "constraints.txt"
        exact = [f"{r.name}=={bound(r, '>=')}\n" for r in self.wanted] if self._end == "oldest" else []
        constraints.write_text("".join(exact))
        # Not editable: uv builds the three wheels, again at each run.
        own, *others = [str((ROOT / folder).resolve()) for folder in environment.FOLDERS]
        options = ["--constraint", str(constraints), "--upgrade"]
        options += [f"--reinstall-package={project['name']}" for project in projects()]
        wanted = [f"{own}[{','.join(EXTRAS)}]", *others, *self._tools, environment.DEMO_MODEL, *options]
        environment.install(self.environment, wanted, os.environ.get("TORCH_INDEX_URL"), log, self._report)

    def beyond(self) -> list[str]:
        command = [self.python, "-m", "pip", "list", "--outdated", "--format=json"]
        asked = subprocess.run(command, check=False, capture_output=True, text=True)
        return beyond(asked.stdout, self.wanted) if asked.returncode == 0 else []

    def test(self, name: str) -> Outcome:
        """One group."""
        results = self._logs / f"{name.replace(', ', '-').replace(' ', '-')}.xml"
        results.unlink(missing_ok=True)
        log = results.with_suffix(".log")
        log.write_text("")
        command = [
            *(self.python, "-m", "pytest", "-n", "2", "--no-loadscope-reorder", "-v", "-p", "no:cacheprovider"),
            # Warnings of other versions of other packages are no failures here.
            *("-W", "default", "-m", "not vllm", "--tb=short", f"--junitxml={results}", *GROUPS[name]),
        ]
        began = time.monotonic()
        succeeded = environment.run(command, ROOT, log, self._report, versions.PYTEST_PROGRESS, self._variables())
        outcome = Outcome(seconds=time.monotonic() - began)
        if not results.exists():
            outcome.reason = f"pytest did not finish; see {log}"
            return outcome
        groups, outcome.failures = versions.read_junit(results.read_text(encoding="utf-8"), name)
        outcome.counts = groups.get(name, outcome.counts)
        if not outcome.counts.passed and not outcome.failures:
            outcome.reason = f"no test ran; see {log}"
        elif not succeeded and not outcome.failures:
            outcome.reason = f"pytest did not end as it should; see {log}"
        return outcome

    def _variables(self) -> dict[str, str]:
        """The environment's programs come first, and the wheel is imported, not this checkout."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return {
            **kept,
            "PATH": f"{Path(self.python).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONUNBUFFERED": "1",  # progress is read from pytest's output
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }


# ruff: noqa: T201 - main() prints


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make test-newest", description=__doc__.partition("\n")[0])
    parser.add_argument("end", choices=ENDS)
    parser.add_argument("--python", default=sys.executable, help="of the environment (default: that of .venv)")
    parser.add_argument("--keep", action="store_true", help="keep the environment, several GB, for the next run")
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="GROUP", help=f"some of {', '.join(GROUPS)}")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def report(line: str) -> None:
        print(line, flush=True)

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hemostat" / "bounds"
    outcomes: dict[str, Outcome] = {}
    try:
        runner = Runner(options.end, cache, options.python, report)
        try:
            runner.install()
            if options.end == "newest":
                for line in runner.beyond():
                    report(f"      {line}")
            for name in options.only or GROUPS:
                report(f"[3/3] {name}: {' '.join(GROUPS[name])}")
                outcomes[name] = runner.test(name)
            installed = passed.installed(runner.python)
        finally:
            if not options.keep:
                shutil.rmtree(runner.environment, ignore_errors=True)
    except SetupError as error:
        print(f"test-{options.end}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"test-{options.end}: interrupted", file=sys.stderr)
        return 130
    print(table(runner.wanted, installed, outcomes))
    if not all(outcome.good for outcome in outcomes.values()):
        before = passed.read(passed.FOLDER / f"{options.end}.txt")
        for line in passed.newer(installed, before) if before else ["no run has passed yet: there is no list"]:
            print(f"newer: {line}")
        return 1
    if not options.only:
        passed.write(passed.FOLDER / f"{options.end}.txt", installed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
