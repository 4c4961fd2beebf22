"""`hemostat compress`: quantize or prune a checkpoint."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from hemostat.commands.arguments import positive_integer
from hemostat_lab.commands.arguments import WITHOUT_DATA, add_overwrite, add_texts, non_negative_integer

HELP = "Quantize or prune a checkpoint."
PACKED = ("w4a16", "w4a16_gptq", "w8a16_gptq", "w4a16_awq", "w8a16", "w8a8", "fp8", "nvfp4", "mxfp4")
SCHEMES = (*PACKED, "prune", *WITHOUT_DATA)
_DENSE = re.compile(r"int[2-8]")
"""Schemes of earlier versions: integers of so many bits, written dense, which no engine serves."""
CALIBRATIONS = ("none", "clip", "clip_kl", "awq", "smooth", "gptq", "descent", "guided")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="Folder of a transformers checkpoint.")
    parser.add_argument("destination", type=Path, metavar="DEST", help="Folder to write.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--scheme",
        type=_scheme,
        choices=SCHEMES,
        help="Format of the result. w4a16 to mxfp4 are packed. With prune, the "
        "fraction --sparsity of the weights becomes 0. pruneNN drops NN %% by magnitude, without data.",
    )
    what.add_argument(
        "--plan", type=Path, metavar="FILE", help="A file with the bits of each layer, as doctor --plan writes it."
    )
    what.add_argument(
        "--compressed",
        type=Path,
        metavar="DIR",
        help="Repair this compressed copy of SOURCE, whatever program made it.",
    )
    parser.add_argument(
        "--group-size",
        type=group_size,
        metavar="N",
        help="Number of inputs that share a scale, or channel (default: 64; for w8a8: channel).",
    )
    parser.add_argument(
        "--calibrate",
        choices=CALIBRATIONS,
        help="How texts are used. none rounds to nearest without texts (default: the best way for the scheme).",
    )
    pruning = parser.add_argument_group("Options of --scheme prune")
    pruning.add_argument("--sparsity", type=float, metavar="FRACTION", help="Fraction of the weights that becomes 0.")
    pruning.add_argument("--pattern", choices=("unstructured", "2:4", "rows"))
    add_texts(parser, "SOURCE")
    parser.add_argument(
        "--tokens",
        type=positive_integer,
        default=16_000,
        metavar="N",
        help="Use at most N tokens of text (default: 16000).",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive_integer,
        default=96,
        metavar="N",
        help="Generate at most N tokens for each prompt (default: 96).",
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="Afterwards, train norms, biases and the weights that pruning left towards SOURCE.",
    )
    parser.add_argument(
        "--seed", type=non_negative_integer, default=0, metavar="S", help="Seed of the random numbers (default: 0)."
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="Torch device (default: cpu).")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="Keep finished work in this folder (default: until DEST is written)."
    )
    add_overwrite(parser, "DEST")
    parser.set_defaults(command=_run)


def _scheme(text: str) -> str:
    """Returns the scheme. Raises ArgumentTypeError for one of an earlier version, with what takes its place."""
    if _DENSE.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text} has gone, since no engine serves it: use w4a16 or w8a16; hemostat doctor --sweep "
            "measures what a model loses at other widths"
        )
    return text


def group_size(text: str) -> int | str:
    return text if text == "channel" else positive_integer(text)


def _run(options: argparse.Namespace) -> int:
    from hemostat_lab.commands.compress_steps import CompressOptions, run  # noqa: PLC0415

    return run(CompressOptions(**{name: getattr(options, name) for name in CompressOptions.__dataclass_fields__}))
