"""`hemostat compress`: quantize or prune a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from hemostat.commands.arguments import WITHOUT_DATA, add_overwrite, add_texts, non_negative_integer, positive_integer

HELP = "quantize or prune a checkpoint"
PACKED = ("w4a16", "w4a16_gptq", "w8a16_gptq", "w4a16_awq", "w8a16", "w8a8", "fp8", "nvfp4", "mxfp4")
DENSE = ("int2", "int3", "int5", "int6", "int7")
SCHEMES = (*PACKED, *DENSE, "prune", *WITHOUT_DATA)
CALIBRATIONS = ("none", "clip", "clip_kl", "awq", "smooth", "gptq", "descent", "guided")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of a transformers checkpoint")
    parser.add_argument("destination", type=Path, metavar="DEST", help="folder to write")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--scheme",
        choices=SCHEMES,
        help="w4a16 to mxfp4: packed; intN: N bits, written dense; prune: --sparsity of the weights become 0; "
        "pruneNN: NN %% by magnitude, without data",
    )
    what.add_argument("--plan", type=Path, metavar="FILE", help="bits of each layer, as doctor --plan writes it")
    what.add_argument(
        "--compressed", type=Path, metavar="DIR", help="repair this compressed copy of SOURCE, whatever made it"
    )
    parser.add_argument(
        "--group-size", type=group_size, metavar="N", help="inputs that share a scale, or channel (64; w8a8: channel)"
    )
    parser.add_argument(
        "--calibrate",
        choices=CALIBRATIONS,
        help="how texts are used; none: rounding to nearest without texts (default: the best for the scheme)",
    )
    pruning = parser.add_argument_group("of --scheme prune")
    pruning.add_argument("--sparsity", type=float, metavar="FRACTION", help="of the weights that become 0")
    pruning.add_argument("--pattern", choices=("unstructured", "2:4", "rows"))
    add_texts(parser, "SOURCE")
    parser.add_argument(
        "--tokens", type=positive_integer, default=16_000, metavar="N", help="at most N of them (16000)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive_integer, default=96, metavar="N", help="generated per prompt (96)"
    )
    parser.add_argument(
        "--repair", action="store_true", help="then train norms, biases and what pruning left towards SOURCE"
    )
    parser.add_argument("--seed", type=non_negative_integer, default=0, metavar="S", help="of random numbers (0)")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="torch device (cpu)")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep finished work in this folder (default: until DEST is written)"
    )
    add_overwrite(parser, "DEST")
    parser.set_defaults(command=_run)


def group_size(text: str) -> int | str:
    return text if text == "channel" else positive_integer(text)


def _run(options: argparse.Namespace) -> int:
    from hemostat.commands.compress_steps import CompressOptions, run  # noqa: PLC0415

    return run(CompressOptions(**{name: getattr(options, name) for name in CompressOptions.__dataclass_fields__}))
