"""`hemostat gate`: may a candidate replace what serves? Nothing else of Hemostat has to run.

Exit codes: 0 pass, 1 fail, 2 undecided, or an error that the user can correct.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hemostat import __version__
from hemostat.commands.arguments import SERVER, UsageError, positive_integer, vllm_server
from hemostat.commands.report import KEY_HELP
from hemostat.config.packages import install_command

if TYPE_CHECKING:
    from hemostat.gate.endpoint import Endpoint
    from hemostat.gate.run import Result
    from hemostat.gate.summary import Subject
    from hemostat.gate.unit import At
    from hemostat.report.progress import Reporter

HELP = "Say if a candidate may replace the model that serves: pass, fail or undecided, with an error rate."
EXIT_CODES = {"pass": 0, "fail": 1, "undecided": 2}
_DURATION = re.compile(r"(\d+)([smh])")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_gate)
    parser.add_argument(
        "--stable",
        required=True,
        metavar="URL|FOLDER",
        help=f"The model that serves now: {SERVER} With the folder of a checkpoint, vLLM is started here with it.",
    )
    parser.add_argument("--candidate", required=True, metavar="URL|FOLDER", help="The model that may replace it.")
    parser.add_argument(
        "--expect",
        required=True,
        choices=("same", "other"),
        help="same: it is to be the same model (another version, flag, kernel or GPU). other: it is another "
        "checkpoint, which is to be at least as near to the reference.",
    )
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="The uncompressed model, with --expect other: a folder, a hub name, or the URL[#NAME] of a vLLM server.",
    )
    parser.add_argument(
        "--prompts",
        "--captures",
        type=Path,
        metavar="FILE",
        help='A file with one prompt per line, best of your own traffic: text, {"prompt": "..."} or {"messages": '
        '[...]}, with "kind", "max_tokens", "response_format" and "tools" if you like; or what records.path has '
        "written; or a folder of such files, or of spool.path (default: prompts that come with Hemostat).",
    )
    parser.add_argument("--key", default="plain", metavar="KEY", help=KEY_HELP)
    parser.add_argument(
        "--within", type=_duration, default=3600.0, metavar="TIME", help="Longest time, like 30m (default: 1h)."
    )
    parser.add_argument(
        "--margin",
        type=_fraction,
        metavar="D",
        help="The mean difference that is allowed over all prompts, in total variation (default: 0.02 with same, 0.05 "
        "with other).",
    )
    parser.add_argument(
        "--kind-margin",
        type=_fraction,
        default=0.15,
        metavar="D",
        help="The same in one kind of prompts (default: 0.15).",
    )
    parser.add_argument(
        "--outcome-margin",
        action="append",
        default=[],
        metavar="NAME=D",
        help="The margin of one question about what clients get, such as cut=0.2; may be repeated. first_token and "
        "token_time are tested only if they have one: on machines that others use, times mean little.",
    )
    parser.add_argument(
        "--alpha",
        type=_fraction,
        default=0.05,
        metavar="P",
        help="Probability of a wrong pass, and of a wrong fail (default: 0.05).",
    )
    parser.add_argument(
        "--at-once", type=positive_integer, default=8, metavar="N", help="Prompts under way at a time (default: 8)."
    )
    parser.add_argument(
        "--timeout", type=_duration, default=120.0, metavar="TIME", help="Longest time of one answer (default: 2m)."
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of the order of the prompts and of the answers (default: 0)."
    )
    parser.add_argument(
        "--state", type=Path, metavar="FILE", help="Keep the evidence here; the same command again goes on with it."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the result as JSON.")
    parser.add_argument("--html", type=Path, metavar="FILE", help="Write the result as a page (extra `report`).")


def _gate(options: argparse.Namespace) -> int:
    from hemostat.gate import summary  # noqa: PLC0415
    from hemostat.reference.protocol import ReferenceFailure  # noqa: PLC0415
    from hemostat.report.written_files import other_content  # noqa: PLC0415

    if (options.expect == "other") != (options.reference is not None):
        raise UsageError(
            "--reference: --expect other needs the uncompressed model, and --expect same takes none: add or remove it"
        )
    for path, marker in ((options.json, b'"verdict":'), (options.html, summary.MARKER)):
        if path is not None and (why := other_content(path, marker)):
            raise UsageError(why)
        if path is not None and not os.access(path.parent, os.W_OK):
            raise UsageError(f"{path} cannot be written: its folder does not exist or is read-only; name another file")
    try:
        result, subject = asyncio.run(_asked(options))
    except ReferenceFailure as failure:
        raise UsageError(f"undecided: {failure}") from None
    print(summary.sentence(result))  # noqa: T201
    for line in summary.lines(result):
        print(line)  # noqa: T201
    _write(options, result, subject)
    return EXIT_CODES[result.outcome.value]


def _write(options: argparse.Namespace, result: Result, subject: Subject) -> None:
    import msgspec  # noqa: PLC0415

    from hemostat.gate import summary  # noqa: PLC0415
    from hemostat.report.written_files import write_atomically  # noqa: PLC0415

    try:
        if options.json is not None:
            written = msgspec.json.encode(summary.as_json(result, subject))
            write_atomically(options.json, msgspec.json.format(written, indent=2) + b"\n")
        if options.html is not None:
            write_atomically(options.html, summary.as_page(result, subject, __version__).encode())
    except OSError as error:
        raise UsageError(f"the result cannot be written ({error.strerror}); name another file") from None
    except ModuleNotFoundError as error:
        raise UsageError(f"--html needs {error.name}; {install_command('report')}, or leave --html out") from None


async def _asked(options: argparse.Namespace) -> tuple[Result, Subject]:
    from hemostat.gate import asked, outcomes, run, summary, unit  # noqa: PLC0415
    from hemostat.gate.state import FORMAT, Evidence, Header  # noqa: PLC0415
    from hemostat.report.progress import Reporter  # noqa: PLC0415
    from hemostat_calibration.gate.verdict import Gate, Outcome  # noqa: PLC0415

    prompts = asked.load(options.prompts, options.key)
    expect = unit.Expect(options.expect)
    margin = options.margin if options.margin is not None else unit.MARGINS[expect]
    reference_name = options.reference or ""
    served = outcomes.Outcomes(_margins(options.outcome_margin))
    with Reporter() as reporter:
        if options.prompts is None:
            reporter.log(f"--prompts is not given: {len(prompts)} prompts that come with Hemostat are asked")
        on_this_machine = [model for model in (options.stable, options.candidate) if "://" not in model]
        async with (
            _endpoint("--stable", options, len(on_this_machine), reporter) as stable,
            _endpoint("--candidate", options, len(on_this_machine), reporter) as candidate,
            _reference(options, reporter) as reference,
        ):

            def subject(left_out: int, header: Header | None) -> Subject:
                named = options.stable, options.candidate, reference_name, expect.value
                return summary.Subject(*named, left_out, header)

            identity = await stable.identity()
            other, why = await run.identity_of_candidate(candidate)
            if other is None:
                return run.Result(Outcome.FAIL, None, why), subject(0, None)
            margins = margin, options.kind_margin, options.alpha, served.margins
            header = Header(FORMAT, expect, identity, other, reference_name, *margins)
            with_ids, why = await run.same_prompt_ids(
                prompts, stable, candidate, lambda done, total: reporter.step("prompts tokenized", done, total)
            )
            if why:
                return run.Result(Outcome.FAIL, None, why), subject(0, header)
            with Evidence(options.state, header) as evidence:
                ordered = asked.in_order(with_ids, options.seed, evidence.units)
                new = [each for each in ordered if each.prompt.digest not in evidence.units]
                planned = Counter([kind for kind, _ in evidence.units.values()] + [each.prompt.kind for each in new])
                known = [(kind, each.excess) for kind, each in evidence.units.values()]
                partly = served.planned((each.prompt for each in new), known)
                shown = [""]

                def progress(done: int, total: int, known: str) -> None:
                    reporter.step("prompts", done, total)
                    if done % 10 == 0 and known != shown[0]:
                        shown[0] = known
                        reporter.log(f"{done} of {total} prompts: {known}")

                planned_most, partly_most = evidence.plan(planned, partly)
                questions = [*unit.questions(expect, margin, options.kind_margin), *served.questions(partly_most)]
                gate = Gate(questions, planned_most, options.alpha, partly_most, unit.KIND_WEIGHTS)
                measuring = unit.Measuring(stable, candidate, reference, served)
                running = run.Run(gate, measuring, evidence, options.at_once, progress, options.seed)
                result = await running.until_verdict(new, options.within)
                return result, subject(len(prompts) - len(ordered), header)


@asynccontextmanager
async def _endpoint(
    flag: str, options: argparse.Namespace, on_this_machine: int, reporter: Reporter
) -> AsyncIterator[Endpoint]:
    """Yields the model that the flag names. on_this_machine: the number of vLLM servers that are started here."""
    from hemostat.gate.endpoint import Endpoint  # noqa: PLC0415
    from hemostat.gate.folders import serving  # noqa: PLC0415

    name = flag.removeprefix("--")
    address: str = getattr(options, name)
    async with AsyncExitStack() as opened:
        if "://" not in address:
            started = serving(name, Path(address), on_this_machine, reporter.log)
            address = await opened.enter_async_context(started)
        vllm, model = vllm_server(flag, address, options.timeout)
        opened.push_async_callback(vllm.close)
        yield await Endpoint.of(vllm, model)


@asynccontextmanager
async def _reference(options: argparse.Namespace, reporter: Reporter) -> AsyncIterator[At | None]:
    """Yields the reference's values of given tokens; None if there is no reference."""
    import numpy as np  # noqa: PLC0415

    from hemostat.reference.own_answers import TOP_K, listed_by  # noqa: PLC0415
    from hemostat.reference.protocol import ScoreRequest  # noqa: PLC0415
    from hemostat.reference.transformers import TransformersReference  # noqa: PLC0415
    from hemostat.reference.vllm import VllmReference  # noqa: PLC0415
    from hemostat_calibration.arrays import Ids  # noqa: PLC0415
    from hemostat_calibration.gate.distance import Listed  # noqa: PLC0415

    if options.reference is None:
        yield None
        return
    reference: VllmReference | TransformersReference
    async with AsyncExitStack() as opened:
        if "://" in options.reference:
            server, name = vllm_server("--reference", options.reference, options.timeout)
            opened.push_async_callback(server.close)
            reference = VllmReference(server.url, model=name, top_k=TOP_K)
            reference.set_server(server)
        else:
            reporter.log(f"loading the reference {options.reference}")
            reference = TransformersReference(options.reference)
        opened.push_async_callback(reference.close)
        await reference.start()

        async def at(prompt: tuple[int, ...], output: Ids, ids: Ids) -> Listed:
            scores = await reference.score(ScoreRequest(np.array(prompt, np.int32), output, ids))
            return listed_by(scores, ids)

        yield at


def _margins(given: list[str]) -> dict[str, float]:
    """Returns the margins that --outcome-margin gives, by name."""
    from hemostat.gate.outcomes import OUTCOMES  # noqa: PLC0415

    margins = {}
    for text in given:
        name, _, number = text.partition("=")
        if name not in OUTCOMES:
            raise UsageError(f"--outcome-margin: {name!r} is no question; name one of {', '.join(OUTCOMES)}")
        try:
            margins[name] = _fraction(number)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"--outcome-margin: {error}") from None
    return margins


def _duration(text: str) -> float:
    match = _DURATION.fullmatch(text)
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write it like 90s, 30m or 2h")
    return float(int(match[1]) * _SECONDS[match[2]])


def _fraction(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return number
