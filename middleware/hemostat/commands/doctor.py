"""`hemostat doctor`: an offline report on two models."""

from __future__ import annotations

import argparse
from pathlib import Path

from hemostat.commands.arguments import UsageError, non_negative_integer, positive_integer

HELP = "an offline report on two models"
SWEEP_AXES = ("bits", "sparsity", "structure", "decoding", "combinations")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = "checkpoint folder or hub name, or URL[#NAME] of a vLLM server"
    parser.add_argument("reference", metavar="REFERENCE", help=f"the original: {kinds}")
    parser.add_argument(
        "compressed",
        metavar="COMPRESSED",
        nargs="?",
        help="the model made from it, of the same kind; with --sweep one more point, or left out",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="instead: REFERENCE at many settings of bits, sparsity, layers and decoding, and where it breaks",
    )
    parser.add_argument(
        "--sweep-axes",
        type=_axes,
        default=SWEEP_AXES,
        metavar="AXIS,…",
        help=f"what is varied (all of {', '.join(SWEEP_AXES)})",
    )
    parser.add_argument(
        "--sweep-budget",
        type=positive_integer,
        default=60,
        metavar="MINUTES",
        help="begin no further point after so many minutes (60)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='one prompt per line: text, {"prompt": "..."} or {"messages": [...]}, with a "completion" if it is not to '
        "be generated (default: prompts that come with Hemostat)",
    )
    parser.add_argument("--max-prompts", type=positive_integer, metavar="N", help="use the first N prompts only")
    parser.add_argument(
        "--tokens", type=positive_integer, default=64, metavar="N", help="maximum generated tokens per prompt (64)"
    )
    parser.add_argument("--seed", type=non_negative_integer, default=0, metavar="S", help="of random numbers (0)")
    decoding = parser.add_mutually_exclusive_group()
    decoding.add_argument("--greedy", action="store_true", help="generate greedily (default: sample at temperature 1)")
    decoding.add_argument("--given", action="store_true", help="generate nothing: score the completions of the prompts")
    parser.add_argument(
        "--batch", type=positive_integer, default=16, metavar="N", help="number of prompts generated for at once (16)"
    )
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="device of torch (default: cuda, else cpu)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument(
        "--top-k", type=positive_integer, default=20, metavar="K", help="for servers: ids requested per position (20)"
    )
    parser.add_argument(
        "--reference-folder",
        type=Path,
        metavar="DIR",
        help="for servers: the checkpoint of a REFERENCE that is a pooling server (default: where it loaded it from)",
    )
    parser.add_argument(
        "--layer-tokens",
        type=non_negative_integer,
        default=512,
        metavar="N",
        help="number of tokens for the comparison of layers (512; 0: no comparison)",
    )
    parser.add_argument(
        "--worst",
        type=positive_integer,
        default=10,
        metavar="N",
        help="number of rows in each worst-token or worst-prompt list (10)",
    )
    prescription = parser.add_argument_group("prescription", "bits and group size of each layer for a budget of bytes")
    prescription.add_argument("--prescribe", action="store_true", help="choose them (also with --plan or --budget)")
    prescription.add_argument("--plan", type=Path, metavar="FILE", help="write them for hemostat compress --plan")
    prescription.add_argument(
        "--budget",
        metavar="BYTES|SHARE",
        help="for the linear layers: bytes, or a share of REFERENCE's, such as 0.3 (default: the bytes of COMPRESSED)",
    )
    prescription.add_argument(
        "--plan-for",
        choices=("vllm", "vllm-amd", "vllm-intel", "vllm-cpu", "any"),
        default="vllm",
        help="what serves the result: vLLM's packed kernels on NVIDIA's GPUs (vllm), others, CPUs; any: dense weights",
    )
    parser.add_argument("--show-text", action="store_true", help="show texts of the worst prompts and tokens")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep finished work in this folder (default: until the report)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write the report as one HTML page (needs hemostat[report])"
    )
    parser.set_defaults(command=_run)


def _axes(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SWEEP_AXES:
            raise argparse.ArgumentTypeError(f"{name!r} is unknown: use some of {', '.join(SWEEP_AXES)}")
    return tuple(axis for axis in SWEEP_AXES if axis in names)


def _run(options: argparse.Namespace) -> int:
    from hemostat.doctor import DoctorOptions, run  # noqa: PLC0415
    from hemostat.doctor.axes import Axis  # noqa: PLC0415

    if options.compressed is None:
        if not options.sweep:
            raise UsageError("the following arguments are required: COMPRESSED (only --sweep does without it)")
        options.compressed = options.reference
    options.sweep = tuple(map(Axis, options.sweep_axes)) if options.sweep else ()
    named = {name: getattr(options, name) for name in DoctorOptions.__dataclass_fields__ if hasattr(options, name)}
    return run(DoctorOptions(**named, decoding="greedy" if options.greedy else "given" if options.given else "sampled"))
