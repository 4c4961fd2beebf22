"""`hemostat adapt`: an adapter that compensates the weights' error of a compressed checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from hemostat.commands.arguments import (
    add_overwrite,
    add_texts,
    non_negative_integer,
    number_from_zero,
    positive_integer,
)

HELP = "make an adapter (LoRA) that compensates a compressed checkpoint's weight error"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", type=Path, metavar="REFERENCE", help="checkpoint folder of the original")
    parser.add_argument("compressed", type=Path, metavar="COMPRESSED", help="checkpoint folder of the compressed model")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write: PEFT files for vLLM and peft, profile.safetensors, report.json",
    )
    add_texts(parser, "COMPRESSED")
    parser.add_argument("--rank", type=positive_integer, default=16, metavar="R", help="of every layer (16)")
    parser.add_argument(
        "--shared-out",
        action="store_true",
        help="give rank R's bytes to the layers where they gain most; vLLM pads every layer to the largest rank",
    )
    parser.add_argument(
        "--max-rank", type=positive_integer, metavar="R", help="largest with --shared-out (4 times --rank)"
    )
    parser.add_argument(
        "--metric",
        choices=("auto", "kfac", "full", "diagonal"),
        default="auto",
        help="statistics: inputs and output gradients (kfac), inputs (full), their squares (diagonal); auto: kfac, "
        "with diagonals where --memory-mib is too little",
    )
    parser.add_argument("--memory-mib", type=positive_integer, default=4096, metavar="MIB", help="for auto (4096)")
    parser.add_argument(
        "--tokens", type=positive_integer, default=16_000, metavar="N", help="at most N to learn from (16000)"
    )
    fraction = number_from_zero(1.0, "not a fraction: give 0 up to less than 1")
    parser.add_argument(
        "--held-out", type=fraction, default=0.25, metavar="FRACTION", help="of the prompts, to judge on (0.25)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive_integer, default=128, metavar="N", help="generated per prompt (128)"
    )
    parser.add_argument(
        "--distil",
        action="store_true",
        help="train it further on REFERENCE's predictions of the same texts, with both models whole in memory; kept "
        "only where some of the texts, which it is not trained on, improve",
    )
    parser.add_argument("--seed", type=non_negative_integer, default=0, metavar="S", help="of random numbers (0)")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="torch device (cpu)")
    parser.add_argument("--model", default="", metavar="NAME", help="served name that the profile is for (any)")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep finished work in this folder (default: until DIR is written)"
    )
    add_overwrite(parser, "DIR of --out")
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from hemostat.commands.adapt_steps import AdaptOptions, run  # noqa: PLC0415

    return run(AdaptOptions(**{name: getattr(options, name) for name in AdaptOptions.__dataclass_fields__}))
