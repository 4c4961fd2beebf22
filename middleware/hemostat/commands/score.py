"""`hemostat score`: scores the captures of a spool on a reference, and reports their figures."""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hemostat.commands.arguments import API_KEY, UsageError, number_from_zero, positive_integer, vllm_server
from hemostat.commands.report import KEY_HELP, add_outputs, check_outputs, unreachable, write_report
from hemostat.config.packages import require
from hemostat.ipc.turns import usable_cores
from hemostat.reference.device import AUTO, cuda_devices, idle

if TYPE_CHECKING:
    from hemostat.reference.protocol import Reference

HELP = "Score the captures of a spool on a reference, and report their figures."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="The folder of spool.path, or a copy of it, also in an object store (s3://bucket/spool); or a file of "
        "JSON lines: see docs/offline.md.",
    )
    parser.add_argument(
        "--reference",
        required=True,
        metavar="MODEL",
        help="The uncompressed model: a folder, a hub name, or the URL[#NAME] of a vLLM server.",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="The folder for the scored captures, also in an object store. The same command again goes on where it "
        "stopped.",
    )
    parser.add_argument(
        "--compressed",
        metavar="MODEL",
        help="The model that has generated the lines of a file, like --reference. It computes the log-probabilities "
        "that lines do not have.",
    )
    parser.add_argument("--key", default="plain", metavar="KEY", help=KEY_HELP)
    parser.add_argument(
        "--model", metavar="NAME", help="The served name whose requests are scored (default: there is only one)."
    )
    parser.add_argument(
        "--max-scored-tokens",
        type=positive_integer,
        metavar="N",
        help="Number of last tokens that are scored of a longer output, as in shadow.max_scored_tokens (default: all).",
    )
    parser.add_argument(
        "--device", default="auto", metavar="DEVICE", help="Torch device of the reference (default: auto)."
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument(
        "--reference-folder",
        type=Path,
        metavar="DIR",
        help="The checkpoint of a reference that is a pooling server, as in reference.folder.",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="The place where captures are scored: this machine, or a Ray cluster (extra `ray`), one task for each "
        "file (default: local).",
    )
    parser.add_argument(
        "--address", metavar="ADDRESS", help="The Ray cluster, such as auto (default: one of this machine alone)."
    )
    parser.add_argument(
        "--workers", type=positive_integer, default=1, metavar="N", help="Number of references on Ray (default: 1)."
    )
    parser.add_argument(
        "--gpus",
        type=number_from_zero(1025.0, "not a number of GPUs"),
        default=0.0,
        metavar="N",
        help="Number of GPUs of each reference on Ray (default: 0).",
    )
    add_outputs(parser)
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from hemostat.reference.protocol import ReferenceFailure  # noqa: PLC0415

    require("spool")
    from hemostat.scoring.spool.objects import location  # noqa: PLC0415  an extra

    options.folder, options.out = location(options.folder), location(options.out)
    try:
        there, is_spool = options.folder.exists(), options.folder.is_dir()
    except OSError as error:
        raise UsageError(unreachable(options.folder, error)) from None
    if not there:
        raise UsageError(f"there is no folder {options.folder}; name the folder of spool.path, or a file of JSON lines")
    if options.compressed is not None and is_spool:
        raise UsageError("--compressed: a spool has log-probabilities; leave it out")
    if options.engine == "ray":
        require("ray")
    elif (options.address, options.workers, options.gpus) != (None, 1, 0.0):
        raise UsageError("--address, --workers and --gpus: only with --engine ray")
    check_outputs(options)
    if isinstance(options.out, Path):
        try:
            options.out.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out: {options.out} cannot be made ({error.strerror}); name another folder") from None
    local = isinstance(options.out, Path) and isinstance(options.folder, Path)
    if os.path.samefile(options.out, options.folder) if local else str(options.out) == str(options.folder):
        raise UsageError("--out: name another folder than the spool's")
    try:
        if options.engine == "ray":
            _score_on_ray(options)
        else:
            asyncio.run(_score(options))
    except ReferenceFailure as failure:
        raise UsageError(f"the reference: {failure}") from None
    except OSError as error:
        why = error.strerror or str(error)[:200]
        raise UsageError(f"{options.folder} or {options.out} cannot be used ({why}); make room, and go on") from None
    write_report(options.out, options)
    return 0


async def _score(options: argparse.Namespace) -> None:
    from hemostat.report.progress import Reporter  # noqa: PLC0415
    from hemostat.scoring.offline.folder import score_folder  # noqa: PLC0415
    from hemostat.scoring.spool.keys import read_key  # noqa: PLC0415

    key = read_key(options.key)
    made = make_references(
        options.reference, device=options.device, dtype=options.dtype, folder=options.reference_folder
    )
    compressed = None
    if options.compressed is not None:
        compressed = make_reference(
            options.compressed,
            device=options.device,
            dtype=options.dtype,
            option="--compressed",
            threads=usable_cores(),
        )
    with Reporter() as reporter:
        rate = 0.0

        def progress(done: int, total: int, per_second: float) -> None:
            nonlocal rate
            rate = per_second
            reporter.step("segments", done, total)

        try:
            scored = await score_folder(
                options.folder,
                options.out,
                made[0],
                key=key,
                model=options.model,
                progress=progress,
                compressed=compressed,
                max_scored=options.max_scored_tokens,
                others=made[1:],
            )
        finally:
            for reference in made:
                await reference.close()
            if compressed is not None:
                await compressed.close()
        reporter.log(f"{scored} captures were scored now, {rate:.1f} in a second")


def _score_on_ray(options: argparse.Namespace) -> None:
    from hemostat.report.progress import Reporter  # noqa: PLC0415
    from hemostat.scoring.offline.on_ray import Job, score_on_ray  # noqa: PLC0415

    place = {"device": options.device, "dtype": options.dtype}
    of = functools.partial(make_reference, options.reference, folder=options.reference_folder, **place)
    own = None
    if options.compressed is not None:
        own = functools.partial(make_reference, options.compressed, option="--compressed", **place)
    job = Job(options.folder, options.out, options.key, options.model, of, own, options.max_scored_tokens)
    with Reporter() as reporter:
        scored = score_on_ray(
            job,
            address=options.address,
            workers=options.workers,
            gpus=options.gpus,
            progress=lambda done, total, rate: reporter.step("segments", done, total),
        )
        reporter.log(f"{scored} captures were scored now")


def devices_of(name: str, device: str) -> list[str]:
    """Returns the devices that each hold a reference: all idle CUDA devices of this machine, or the one that is named
    or chosen. name, device: the options."""
    if "://" in name or device != AUTO:
        return [device]
    found = cuda_devices()
    needed = sum(file.stat().st_size for file in Path(name).expanduser().glob("*.safetensors"))
    devices = idle(found, needed) if isinstance(found, list) else []
    return devices if len(devices) > 1 else [device]


def make_references(name: str, *, device: str, dtype: str, folder: Path | None = None) -> list[Reference]:
    """Returns references on all that this machine has: each idle CUDA device, or all cores. See `make_reference`."""
    return [
        make_reference(name, device=each, dtype=dtype, folder=folder, threads=usable_cores())
        for each in devices_of(name, device)
    ]


def make_reference(
    name: str,
    *,
    device: str,
    dtype: str,
    folder: Path | None = None,
    option: str = "--reference",
    threads: int | None = None,
) -> Reference:
    """Returns the reference that an option names, not started. The other arguments are options, too, but threads: of a
    model on the CPU; None: half of the cores. Raises UsageError."""
    if "://" in name:
        from pydantic import SecretStr  # noqa: PLC0415

        from hemostat.reference.on_server import ServerReference  # noqa: PLC0415

        server, model = vllm_server(option, name, 120.0)
        api_key = os.environ.get(API_KEY)
        key = SecretStr(api_key) if api_key else None
        return ServerReference(server.url, key, model, folder=folder, device=device)
    require("transformers")
    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise UsageError(f"{option}: there is no folder {name!r}; give a folder, a hub name, or the URL of a vLLM")
    from hemostat.reference.transformers import TransformersReference  # noqa: PLC0415

    return TransformersReference(str(Path(name).expanduser()), dtype, device, threads)
