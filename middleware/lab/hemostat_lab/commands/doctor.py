"""`hemostat doctor`: an offline report on two models."""

from __future__ import annotations

import argparse
from pathlib import Path

from hemostat.commands.arguments import UsageError, positive_integer
from hemostat_lab.commands.arguments import non_negative_integer

HELP = "Compare two models offline and write a report."
SWEEP_AXES = ("bits", "sparsity", "structure", "decoding", "combinations")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = "checkpoint folder or hub name, or URL[#NAME] of a vLLM server"
    parser.add_argument("reference", metavar="REFERENCE", help=f"The original: {kinds}.")
    parser.add_argument(
        "compressed",
        metavar="COMPRESSED",
        nargs="?",
        help="The model that was made from it, of the same kind. With --sweep it is one more point, and may be left "
        "out.",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="Instead of a comparison, examine REFERENCE at many settings of bits, sparsity, layers and decoding, and "
        "say where it breaks.",
    )
    parser.add_argument(
        "--sweep-axes",
        type=_axes,
        default=SWEEP_AXES,
        metavar="AXIS,…",
        help=f"What is varied (default: all of {', '.join(SWEEP_AXES)}).",
    )
    parser.add_argument(
        "--sweep-budget",
        type=positive_integer,
        default=60,
        metavar="MINUTES",
        help="Begin no further point after this number of minutes (default: 60).",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='A file with one prompt per line: text, {"prompt": "..."} or {"messages": [...]}. A "completion" in the '
        "line is scored in place of a generated one (default: prompts that come with Hemostat).",
    )
    parser.add_argument("--max-prompts", type=positive_integer, metavar="N", help="Use only the first N prompts.")
    parser.add_argument(
        "--tokens",
        type=positive_integer,
        default=64,
        metavar="N",
        help="Generate at most N tokens for each prompt (default: 64).",
    )
    parser.add_argument(
        "--seed", type=non_negative_integer, default=0, metavar="S", help="Seed of the random numbers (default: 0)."
    )
    decoding = parser.add_mutually_exclusive_group()
    decoding.add_argument("--greedy", action="store_true", help="Generate greedily (default: sample at temperature 1).")
    decoding.add_argument(
        "--given", action="store_true", help="Generate nothing, and score the completions of the prompts."
    )
    parser.add_argument(
        "--batch",
        type=positive_integer,
        default=16,
        metavar="N",
        help="Number of prompts that are completed at once (default: 16).",
    )
    parser.add_argument(
        "--device", default="auto", metavar="DEVICE", help="Torch device (default: cuda if there is one, else cpu)."
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument(
        "--top-k",
        type=positive_integer,
        default=20,
        metavar="K",
        help="Number of ids that a server is asked for at each position (default: 20).",
    )
    parser.add_argument(
        "--reference-folder",
        type=Path,
        metavar="DIR",
        help="The checkpoint of a REFERENCE that is a pooling server (default: the folder that the server loaded it "
        "from).",
    )
    parser.add_argument(
        "--layer-tokens",
        type=non_negative_integer,
        default=512,
        metavar="N",
        help="Number of tokens for the comparison of layers (default: 512). 0 makes no comparison.",
    )
    parser.add_argument(
        "--worst",
        type=positive_integer,
        default=10,
        metavar="N",
        help="Number of rows in the lists of the worst tokens and prompts (default: 10).",
    )
    prescription = parser.add_argument_group("prescription", "Bits and group size of each layer for a budget of bytes.")
    prescription.add_argument(
        "--prescribe", action="store_true", help="Choose bits and group sizes. --plan and --budget imply it."
    )
    prescription.add_argument(
        "--plan", type=Path, metavar="FILE", help="Write the chosen plan to this file, for hemostat compress --plan."
    )
    prescription.add_argument(
        "--budget",
        metavar="BYTES|SHARE",
        help="Budget of the linear layers: a number of bytes, or a share of REFERENCE's bytes, such as 0.3 (default: "
        "the bytes of COMPRESSED).",
    )
    prescription.add_argument(
        "--plan-for",
        choices=("vllm", "vllm-amd", "vllm-intel", "vllm-cpu", "any"),
        default="vllm",
        help="What serves the result. vllm stands for vLLM's packed kernels on NVIDIA's GPUs; there are names for "
        "other GPUs and for CPUs. With any, weights are written dense.",
    )
    parser.add_argument("--show-text", action="store_true", help="Show the texts of the worst prompts and tokens.")
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="Keep finished work in this folder (default: until the report is written).",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write all figures to this file.")
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="Write the report as one HTML page. It needs the extra `report`.",
    )
    parser.set_defaults(command=_run)


def _axes(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SWEEP_AXES:
            raise argparse.ArgumentTypeError(f"{name!r} is unknown: use some of {', '.join(SWEEP_AXES)}")
    return tuple(axis for axis in SWEEP_AXES if axis in names)


def _run(options: argparse.Namespace) -> int:
    from hemostat_lab.doctor import DoctorOptions, run  # noqa: PLC0415
    from hemostat_lab.doctor.options import Axis  # noqa: PLC0415

    if options.compressed is None:
        if not options.sweep:
            raise UsageError("the following arguments are required: COMPRESSED (only --sweep does without it)")
        options.compressed = options.reference
    options.sweep = tuple(map(Axis, options.sweep_axes)) if options.sweep else ()
    named = {name: getattr(options, name) for name in DoctorOptions.__dataclass_fields__ if hasattr(options, name)}
    return run(DoctorOptions(**named, decoding="greedy" if options.greedy else "given" if options.given else "sampled"))
