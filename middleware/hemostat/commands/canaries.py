"""`hemostat canaries …`: the same token sequences on a vLLM server again, by hand, or the first tokens of answers
of any server with the OpenAI API. Nothing else of Hemostat has to run.

Exit codes: 0 equal, 1 changed, 2 could not tell.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hemostat.commands.admin_port import add_admin_options, admin_json, has_token
from hemostat.commands.arguments import SERVER, UsageError, number_from_zero, vllm_server
from hemostat_calibration.errors import HemostatError

if TYPE_CHECKING:
    from hemostat.canaries.client import CanaryClient
    from hemostat.canaries.endpoint import EndpointClient
    from hemostat.canaries.through import RouteFindings
    from hemostat.reference.server import VllmServer
    from hemostat_calibration.canaries import CanarySet, Comparison, Origin
    from hemostat_calibration.canary_endpoint import EndpointSet, EndpointVerdict
    from hemostat_calibration.canary_texts import TextComparison

T = TypeVar("T")

HELP = "Score the same token sequences on a vLLM server again, and say if it has changed."
EQUAL, CHANGED, COULD_NOT_TELL = 0, 1, 2
_VERDICTS = {EQUAL: "equal", CHANGED: "changed", COULD_NOT_TELL: "could not tell"}
TOLERANCE = 0.01
"""A copy of `hemostat_calibration.canaries.TOLERANCE_NATS`, so that the parser need not import numpy."""
ANSWER_SECONDS = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        child = actions.add_parser(name, help=text, allow_abbrev=False)
        child.add_argument("server", metavar="URL", help=SERVER)
        child.set_defaults(command=run)
        return child

    def prompts(child: argparse.ArgumentParser) -> None:
        child.add_argument(
            "--prompts",
            type=Path,
            metavar="FILE",
            help='A file with one prompt per line: text or {"prompt": "..."} (default: prompts that come with '
            "Hemostat).",
        )

    def tolerance(child: argparse.ArgumentParser) -> None:
        child.add_argument(
            "--tolerance",
            type=number_from_zero(100.0, "no distance in nats; give a number from 0 on, like 0.02"),
            default=TOLERANCE,
            metavar="NATS",
            help="Mean |difference of log-probabilities| of a sequence that is not a change yet (default: "
            f"{TOLERANCE}).",
        )

    def first_token(child: argparse.ArgumentParser) -> None:
        child.add_argument(
            "--first-token",
            action="store_true",
            help="URL is any server with the OpenAI API, such as a vendor's, and may have a path. Only the "
            "log-probabilities of each answer's first token are compared.",
        )

    take = action("take", "Have the server write and score a set of sequences, and store it.", _take)
    take.add_argument("file", type=Path, metavar="FILE", help="The file that the set is written to.")
    take.add_argument("--overwrite", action="store_true", help="Replace FILE if it exists.")
    first_token(take)
    prompts(take)
    replay = action(
        "replay",
        "Score a stored set again. The exit code is 0 if the server is equal, 1 if it has changed, 2 if that is "
        "unknown.",
        _replay,
    )
    replay.add_argument("file", type=Path, metavar="FILE", help="The set that take has written.")
    replay.add_argument(
        "--through",
        action="store_true",
        help="URL is a public address with several engines behind it. Each sequence is asked for with and without a "
        "session. With the admin token it is known which engines have answered, and which the route never reaches.",
    )
    add_admin_options(replay)
    tolerance(replay)
    cause = action(
        "cause", "Say why a server differs from a stored set. The exit codes are the same as with replay.", _cause
    )
    cause.add_argument("file", type=Path, metavar="FILE", help="The set that take has written.")
    cause.add_argument(
        "others",
        nargs="*",
        metavar="URL",
        help="Further servers of the same model, which show if one alone has changed.",
    )
    tolerance(cause)
    compare = action(
        "compare", "Compare two servers on the same sequences. The exit codes are the same as with replay.", _compare
    )
    compare.add_argument("other", metavar="URL", help="The server that is compared with the first one.")
    first_token(compare)
    prompts(compare)
    tolerance(compare)


@dataclass(frozen=True, slots=True)
class _Found:
    """The outcome of the replays. tokens: of the sequences. texts: of the texts as clients send them; None for a set
    without. changed: two replays in a row differ in the same way."""

    tokens: Comparison
    texts: TextComparison | None
    changed: bool


def _take(options: argparse.Namespace) -> int:
    if options.file.exists() and not options.overwrite:
        raise UsageError(f"{options.file} exists; name another file, or add --overwrite")
    if options.first_token:
        endpoint = _run(_take_endpoint(options.server, options.prompts))
        _write(options.file, endpoint)
        print(f"taken: first tokens of {_endpoint_described(endpoint)}, in {options.file}")  # noqa: T201
        return EQUAL
    taken = _run(_take_at(options.server, options.prompts))
    _write(options.file, taken)
    print(f"taken: {len(taken.canaries)} sequences of {_described(taken.origin)}, in {options.file}")  # noqa: T201
    return EQUAL


def _replay(options: argparse.Namespace) -> int:
    from hemostat_calibration.canaries import CanarySet  # noqa: PLC0415

    taken = _read(options.file)
    if not isinstance(taken, CanarySet):
        if options.through:
            raise UsageError(f"{options.file} has first tokens only; leave out --through")
        return _say_endpoint(_run(_judge_endpoint(options.server, taken.taken.origin.model, taken, options.tolerance)))
    if options.through:
        return _say_through(_run(_replay_through(options, taken)))
    return _say(*_run(_compare_at(options.server, taken.origin.model, taken, options.tolerance)), taken.origin)


def _cause(options: argparse.Namespace) -> int:
    from hemostat_calibration.canaries import CanarySet  # noqa: PLC0415
    from hemostat_calibration.canary_cause import Cause, Verdict, of_engines  # noqa: PLC0415

    taken = _read(options.file)
    if not isinstance(taken, CanarySet):
        raise UsageError(f"{options.file} has first tokens only, which show no cause")
    if taken.cause is None:
        raise UsageError(f"{options.file} has no variants: the model's context, or the set, is too short for them")
    baseline = taken.cause

    async def explain() -> tuple[Verdict, list[str]]:
        verdicts, facts = {}, []
        for server in (options.server, *options.others):
            async with _client(server, taken.origin.model) as client:
                where = f"{server}: " if options.others else ""
                facts += [f"{where}{change}" for change in taken.origin.changes(await client.origin())]
                measured = await client.variants().measure(baseline.text)
                verdicts[server] = baseline.explain(measured, options.tolerance)
        return of_engines(verdicts), facts

    verdict, facts = _run(explain())
    print("\n  ".join([verdict.text, *facts]))  # noqa: T201
    if verdict.cause is Cause.UNKNOWN:
        return COULD_NOT_TELL
    return EQUAL if verdict.cause is Cause.NONE else CHANGED


def _compare(options: argparse.Namespace) -> int:
    if options.first_token:
        endpoint = _run(_take_endpoint(options.server, options.prompts))
        return _say_endpoint(_run(_judge_endpoint(options.other, None, endpoint, options.tolerance)))

    async def compare() -> tuple[_Found, Origin, Origin]:
        taken = await _take_at(options.server, options.prompts)
        return *await _compare_at(options.other, None, taken, options.tolerance), taken.origin

    return _say(*_run(compare()))


def _say(found: _Found, now: Origin, then: Origin) -> int:
    """Prints the verdict, in one line, and what else is different. Returns the exit code."""
    comparison, texts = found.tokens, found.texts
    unknown = comparison.changed or comparison.differs or (texts is not None and texts.changed)
    exit_code = CHANGED if found.changed else COULD_NOT_TELL if unknown else EQUAL
    print(f"{_VERDICTS[exit_code]}: {comparison.summary}")  # noqa: T201
    if texts is not None and texts.changed:
        print(f"  {texts.summary}")  # noqa: T201
    for change in then.changes(now):
        print(f"  {change}")  # noqa: T201
    return exit_code


def _say_endpoint(found: EndpointVerdict) -> int:
    """Prints the verdict and what limits it. Returns the exit code."""
    exit_code = {text: code for code, text in _VERDICTS.items()}[found.outcome.value]
    print("\n  ".join([f"{found.outcome.value}: {found.comparison.summary}", *found.reasons]))  # noqa: T201
    return exit_code


async def _replay_through(options: argparse.Namespace, taken: CanarySet) -> RouteFindings:
    import msgspec  # noqa: PLC0415

    from hemostat.canaries.through import RouteReplay  # noqa: PLC0415
    from hemostat.engines.messages import Trace  # noqa: PLC0415
    from hemostat.report.progress import Reporter  # noqa: PLC0415

    if taken.decoded:
        raise UsageError(f"{options.file} has decoded answers, which are not sent through a route; take another set")

    def connect(fields: Mapping[str, str]) -> VllmServer:
        return vllm_server("URL", options.server, ANSWER_SECONDS, fields)[0]

    async def ask(nonces: Sequence[str], new: int) -> Trace:
        body = {"nonces": list(nonces), "new": new}
        answer = await asyncio.to_thread(admin_json, options, "POST", "/api/v1/engines/trace", json=body)
        return msgspec.convert(answer, Trace)

    async with _client(options.server, taken.origin.model) as client:
        with Reporter() as reporter:
            asks = ask if has_token(options) else None
            return await RouteReplay(taken, client, connect, options.tolerance, asks, reporter.step).run()


def _say_through(found: RouteFindings) -> int:
    """Prints the verdict and what each engine has shown. Returns the exit code."""
    exit_code = CHANGED if found.changed else COULD_NOT_TELL if found.unknown else EQUAL
    lines = [f"{len(found.comparisons)} engines have answered"] if found.names else [found.chance]
    for boot, comparison in sorted(found.comparisons.items()):
        its = CHANGED if comparison.changed else COULD_NOT_TELL if comparison.differs else EQUAL
        name = found.name(boot) or ("engines without the plugin" if found.names else "all engines together")
        lines.append(f"{name}: {_VERDICTS[its]}: {comparison.summary}")
    lines += [f"{name}: never reached, with a session or without" for name in found.unreached]
    print(f"{_VERDICTS[exit_code]}: " + "\n  ".join(lines))  # noqa: T201
    return exit_code


def _described(origin: Origin) -> str:
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(origin.at))
    return f"{origin.model} on vLLM {origin.version or 'of an unknown version'} at {at}"


def _endpoint_described(taken: EndpointSet) -> str:
    origin = taken.taken.origin
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(origin.at))
    return f"{len(taken.prompts)} prompts of {origin.model} at {at}"


@asynccontextmanager
async def _client(server: str, default: str | None) -> AsyncIterator[CanaryClient]:
    """Yields a client of URL[#NAME], whose progress is shown. default: the model if none is named."""
    from hemostat.canaries.client import CanaryClient  # noqa: PLC0415
    from hemostat.report.progress import Reporter  # noqa: PLC0415

    vllm, name = vllm_server("URL", server, ANSWER_SECONDS)
    try:
        with Reporter() as reporter:
            yield await CanaryClient.of(vllm, name or default, reporter.step)
    finally:
        await vllm.close()


@asynccontextmanager
async def _endpoint(server: str, default: str | None) -> AsyncIterator[EndpointClient]:
    """Yields a client of URL[#NAME], which may have a path. default: the model if none is named."""
    from hemostat.canaries.endpoint import EndpointClient  # noqa: PLC0415
    from hemostat.report.progress import Reporter  # noqa: PLC0415

    vllm, name = vllm_server("URL", server, ANSWER_SECONDS, path=True)
    try:
        with Reporter() as reporter:
            model = name or default or (await vllm.model(None)).id
            yield EndpointClient(vllm, model, reporter.step)
    finally:
        await vllm.close()


async def _take_endpoint(server: str, prompts: Path | None) -> EndpointSet:
    from hemostat.canaries.prompts import load  # noqa: PLC0415

    loaded = load(prompts)
    async with _endpoint(server, None) as client:
        return await client.take([prompt.prompt for prompt in loaded.prompts])


async def _judge_endpoint(server: str, default: str | None, taken: EndpointSet, tolerance: float) -> EndpointVerdict:
    async with _endpoint(server, default) as client:
        return await client.judge(taken, tolerance)


async def _take_at(server: str, prompts: Path | None) -> CanarySet:
    from hemostat.canaries.prompts import load  # noqa: PLC0415

    loaded = load(prompts)
    async with _client(server, None) as client:
        return await client.take(loaded)


async def _compare_at(server: str, default: str | None, taken: CanarySet, tolerance: float) -> tuple[_Found, Origin]:
    async with _client(server, default) as client:
        then, now = taken.origin, await client.origin()
        if then.tokenizer and now.tokenizer and then.tokenizer != now.tokenizer:
            raise UsageError(
                f"could not tell: {server} has another tokenizer than the server of the canaries, to which the same "
                "token ids are another text; take a set there"
            )
        tokens, changed = await client.compare(taken, tolerance)
        if taken.texts is None:
            return _Found(tokens, None, changed), now
        texts, other_texts = await client.texts().compare(taken.texts)
        return _Found(tokens, texts, changed or other_texts), now


def _run(work: Coroutine[None, None, T]) -> T:
    from hemostat.reference.protocol import ReferenceFailure  # noqa: PLC0415

    try:
        return asyncio.run(work)
    except ReferenceFailure as failure:
        raise UsageError(f"could not tell: {failure}") from None


def _read(path: Path) -> CanarySet | EndpointSet:
    from hemostat_calibration.canaries import CanarySet  # noqa: PLC0415
    from hemostat_calibration.canary_endpoint import EndpointSet  # noqa: PLC0415

    try:
        data = path.read_bytes()
        with suppress(HemostatError):
            return EndpointSet.from_bytes(data)
        return CanarySet.from_bytes(data)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); hemostat canaries take writes it") from None
    except HemostatError as error:
        raise UsageError(f"{path}: {error}; hemostat canaries take writes such a file") from None


def _write(path: Path, taken: CanarySet | EndpointSet) -> None:
    try:
        path.write_bytes(taken.to_bytes())
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None
