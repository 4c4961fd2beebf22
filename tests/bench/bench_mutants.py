"""Do the tests find what breaks the product? `make bench-mutants`, two tables and build/bench/mutants/REVISION/.

First half: small changes of the product (mutants) are drawn, with the revision's commit as the seed. Each runs the
tests that execute its line, the quickest first, for at most 60 s, without vLLM and with Hypothesis derandomized. With
`--removed BASE` the draw is in proportion to the lines of tests that were removed since the revision BASE: the more a
folder of tests has lost, the more mutants are drawn from the lines that its tests execute.

Second half: the last commits that added an entry to "Fixed" of the changelog and changed the product are reversed,
one at a time. The tests that the commit changed, or that execute the lines, have to fail. Of a commit that cannot be
reversed as a whole any more, what has not been changed since is reversed. If nothing of it is left, or what is left
does not run, it is named, and the next one is taken.

    make bench-mutants ARGS="--mutants 300 --reversals 40"
    make bench-mutants ARGS="--tests-of BASE"       the same mutants, with the tests of another revision
    make bench-mutants ARGS="--tests tests/core --product calibration/hemostat_calibration --mutants 20"

All that has a result is not run again, so a run that was interrupted goes on. What is drawn is stored once, for any
`--tests-of`. It takes hours: run it with `nice`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.bench.mutants.executed import Executed  # noqa: E402
from tests.bench.mutants.mutations import Mutant, apply, draw, mutants  # noqa: E402
from tests.bench.mutants.reversals import ConflictError, mended, reverse  # noqa: E402
from tests.bench.mutants.tree import PRODUCT, Tree, git  # noqa: E402

MUTANT_SECONDS = 60.0
REVERSAL_SECONDS = 300.0
SHARE_OF_TIME = 0.6
"""The tests of a change may take this share of its time where they were recorded; the rest is for pytest's start."""

BROKEN = {"ImportError", "ModuleNotFoundError", "NameError", "SyntaxError", "IndentationError", "UnboundLocalError"}
"""The errors of a reversal in part that does not run at all."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Bench:
    """Judges changes of one tree, and keeps the results. folder: where the results are."""

    def __init__(self, tree: Tree, executed: Executed, folder: Path) -> None:
        self._tree = tree
        self._executed = executed
        self._results = folder / "results.jsonl"
        self._log = folder / "pytest.log"
        folder.mkdir(parents=True, exist_ok=True)
        lines = self._results.read_text().splitlines() if self._results.exists() else []
        self.done: dict[str, dict[str, Any]] = {row["what"]: row for row in map(json.loads, lines)}

    def mutant(self, mutant: Mutant) -> dict[str, Any]:
        """Returns the result of one mutant."""
        if (what := str(mutant)) in self.done:
            return self.done[what]
        path = self._tree.folder / mutant.path
        original = path.read_text(encoding="utf-8")
        tests = self._executed.tests_of(mutant.path, range(mutant.line, mutant.end_line + 1))
        path.write_text(apply(mutant, original), encoding="utf-8")
        try:
            return self._judged(what, tests, MUTANT_SECONDS)
        finally:
            path.write_text(original, encoding="utf-8")

    def reversal(self, commit: str, subject: str, changed: Sequence[str]) -> dict[str, Any]:
        """Returns the result of the reversal of one commit; in part, if it cannot be reversed as a whole any more."""
        if (what := f"{commit[:10]} {subject}") in self.done:
            return self.done[what]
        try:
            in_part = False
            try:
                lines = reverse(self._tree, commit)
            except ConflictError:
                self._tree.restore()
                in_part = True
                lines = reverse(self._tree, commit, in_part=True)
            kept = {"in_part": in_part}
            known = [path for path in changed if (self._tree.folder / path).exists()]
            if failed := self._first_failure(known):
                return self._keep(what, _verdict(failed[1], in_part), f"{failed[0]} ({failed[1]})", known, kept)
            self._executed.record(self._tree, known, PRODUCT, say)  # where `--tests` has left them out
            self._executed.load(known)
            reverse(self._tree, commit, in_part=in_part)
            tests = {test for module, numbers in lines.items() for test in self._executed.tests_of(module, numbers)}
            tests |= {test for test in self._executed.seconds if test.partition("::")[0] in changed}
            return self._judged(what, tests, REVERSAL_SECONDS, first=changed, more=kept)
        except ConflictError as error:
            return self._keep(what, "not reversed", str(error), [])
        finally:
            self._tree.restore()

    def _first_failure(self, files: Sequence[str]) -> tuple[str, str] | None:
        """Runs the files of tests that the commit changed, then restores the tree. Returns the first test that fails
        with the reversal and passes without it, and the error: so most commits need no record of what these files
        execute."""
        if not files or not self._tree.pytest(["-x", *files], REVERSAL_SECONDS, self._log):
            failed = None
        else:
            failed = _failed(self._log)
        self._tree.restore()
        alone = self._tree.pytest([failed[0]], REVERSAL_SECONDS, self._log) if failed else None
        return failed if alone == 0 else None

    def _judged(
        self,
        what: str,
        tests: set[str],
        seconds: float,
        first: Sequence[str] = (),
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Runs the tests, those in the files `first` before the others, until one fails."""
        before = [test for test in tests if test.partition("::")[0] in first]
        chosen = self._executed.quickest(before, seconds * SHARE_OF_TIME) if before else []
        left = seconds * SHARE_OF_TIME - sum(self._executed.seconds[test] for test in chosen)
        if (others := tests - {*before}) and left > 0:
            chosen += self._executed.quickest(others, left)
        if not chosen:
            return self._keep(what, "no test", "no test that was recorded executes it", [], more)
        status = self._tree.pytest(["-x", *chosen], seconds, self._log)
        if status is None:
            return self._keep(what, "timed out", f"the tests did not end within {seconds:.0f} s", chosen, more)
        if status == 0:
            return self._keep(what, "survived", f"{len(chosen)} of {len(tests)} tests pass", chosen, more)
        failed = _failed(self._log) or (f"pytest ends with {status}", "")
        verdict = _verdict(failed[1], more.get("in_part", False))
        return self._keep(what, verdict, f"{failed[0]} ({failed[1]})" if failed[1] else failed[0], chosen, more)

    def _keep(
        self,
        what: str,
        verdict: str,
        why: str,
        tests: Sequence[str],
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, Any]:
        row = {"what": what, "verdict": verdict, "why": why, "tests": len(tests), **more}
        with self._results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.done[what] = row
        return row


def _failed(log: Path) -> tuple[str, str] | None:
    """Returns the first test that failed, or the file that could not be read, and the name of its error."""
    text = log.read_text(errors="replace")
    if (test := re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", text, re.MULTILINE)) is None:
        return None
    error = re.search(r"^E +(?:[\w.]+\.)?(\w*(?:Error|Exception|Warning|Group)\b|Failed|assert\b)", text, re.MULTILINE)
    return test[1], "AssertionError" if error and error[1] == "assert" else error[1] if error else "no error named"


def _verdict(error: str, in_part: bool) -> str:
    """Returns the verdict on a reversal that made a test fail. What is left of a commit may name what has gone: that it
    cannot run says nothing of the tests.

    >>> _verdict("AssertionError", True), _verdict("ImportError", True), _verdict("ImportError", False)
    ('found', 'does not run', 'found')
    """
    return "does not run" if in_part and error in BROKEN else "found"


def removed_lines(tree: Tree, base: str) -> Counter[str]:
    """Returns folder of tests -> lines that were removed there since `base`."""
    result: Counter[str] = Counter()
    for row in git(tree.folder, "diff", "--numstat", "--no-renames", base, tree.revision, "--", "tests").splitlines():
        _, removed, path = row.split("\t")
        if removed.isdigit():
            result[path.rpartition("/")[0]] += int(removed)
    return result


def drawn(tree: Tree, executed: Executed, options: argparse.Namespace, stored: Path) -> list[Mutant]:
    """Returns the drawn mutants: the stored ones, if there are some."""
    if stored.exists():
        return [Mutant(**row) for row in json.loads(stored.read_text())]
    files = tree.product_files(options.product)
    candidates = [
        mutant for file in files for mutant in mutants(file, (tree.folder / file).read_text(encoding="utf-8"))
    ]
    weights = None
    if options.removed:
        removed = removed_lines(tree, options.removed)
        weights = []
        for mutant in candidates:
            tests = executed.tests_of(mutant.path, range(mutant.line, mutant.end_line + 1))
            folders = Counter(test.partition("::")[0].rpartition("/")[0] for test in tests)
            weights.append(sum(removed[folder] * count for folder, count in folders.items()) / max(1, len(tests)))
    result = draw(candidates, options.mutants, options.seed or tree.revision, weights)
    say(f"{len(result)} of {len(candidates)} mutants drawn")
    stored.parent.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps([asdict(mutant) for mutant in result], indent=1))
    return result


def table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Returns a Markdown table of the verdicts, and a line for each change that was not found.

    >>> print(table("mutants", [{"what": "a", "verdict": "found", "why": ""}, {"what": "b", "verdict": "survived", "why": "3 of 3 tests pass"}]))
    | mutants | number |
    |---|---|
    | found | 1 |
    | survived | 1 |
    <BLANKLINE>
    - survived: `b` (3 of 3 tests pass)
    """  # noqa: E501
    counts = Counter(row["verdict"] for row in rows)
    lines = [
        f"| {title} | number |",
        "|---|---|",
        *(f"| {verdict} | {count} |" for verdict, count in sorted(counts.items())),
    ]
    missed = [row for row in rows if row["verdict"] != "found"]
    return "\n".join(
        [*lines, *([""] if missed else []), *(f"- {row['verdict']}: `{row['what']}` ({row['why']})" for row in missed)]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make bench-mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("--mutants", type=int, default=300, metavar="N", help="mutants to draw (default: %(default)s)")
    parser.add_argument(
        "--reversals", type=int, default=40, metavar="N", help="commits to reverse (default: %(default)s)"
    )
    parser.add_argument("--revision", default="HEAD", help="of the product (default: %(default)s)")
    parser.add_argument("--tests-of", default="", metavar="REVISION", help="of the tests (default: the product's)")
    parser.add_argument(
        "--removed", default="", metavar="BASE", help="draw in proportion to the tests removed since then"
    )
    parser.add_argument("--seed", default="", help="of the draw (default: the revision's commit)")
    parser.add_argument("--tests", nargs="+", default=["tests"], metavar="PATH", help="files or folders of tests")
    parser.add_argument(
        "--product", nargs="+", default=PRODUCT, metavar="PATH", help="what is changed: files or folders"
    )
    options = parser.parse_args(arguments)

    revision = git(ROOT, "rev-parse", options.revision).strip()
    tests_of = git(ROOT, "rev-parse", options.tests_of or revision).strip()
    folder = ROOT / "build" / "bench" / "mutants" / revision[:10]
    tree = Tree(ROOT, folder / "tree", revision, tests_of)
    files = [
        path
        for path in git(tree.folder, "ls-files", "--", *options.tests).splitlines()
        if re.fullmatch(r"tests/(?!bench/).*test_\w+\.py", path)
    ]
    of_tests = folder / tests_of[:10]
    executed = Executed(of_tests)
    began = time.monotonic()
    executed.record(tree, files, PRODUCT, say)
    executed.load(files)
    say(f"{len(executed.seconds)} tests are recorded ({time.monotonic() - began:.0f} s)")

    bench = Bench(tree, executed, of_tests)
    of_draw = repr((options.seed, options.removed, options.mutants, *options.product))
    stored = folder / f"drawn-{hashlib.sha256(of_draw.encode()).hexdigest()[:10]}.json"
    judged = []
    for number, mutant in enumerate(wanted := drawn(tree, executed, options, stored), 1):
        judged.append(bench.mutant(mutant))
        say(f"[{number}/{len(wanted)}] {judged[-1]['verdict']}: {mutant}")
    reversed_: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    commits = mended(tree) if options.reversals else islice(mended(tree), 0)
    for commit in commits:
        row = bench.reversal(commit.commit, commit.subject, commit.tests)
        say(f"{row['verdict']}: {row['what']}")
        (skipped if row["verdict"] in {"not reversed", "does not run"} else reversed_).append(row)
        if len(reversed_) == options.reversals:
            break
    tables = [table("mutants", judged)] if judged else []
    for title, in_part in (("reversed commits", False), ("commits reversed in part", True)):
        if rows := [row for row in [*reversed_, *skipped] if row.get("in_part", True) is in_part]:
            tables.append(table(title, rows))
    text = "\n\n".join(tables)
    (of_tests / "table.md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
