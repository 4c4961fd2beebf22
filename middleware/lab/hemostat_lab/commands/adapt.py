"""`hemostat adapt`: an adapter that compensates the weights' error of a compressed checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from hemostat.commands.arguments import number_from_zero, positive_integer
from hemostat_lab.commands.arguments import add_overwrite, add_texts, non_negative_integer

HELP = "Make an adapter (LoRA) that compensates the weight error of a compressed checkpoint."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", type=Path, metavar="REFERENCE", help="Checkpoint folder of the original.")
    parser.add_argument(
        "compressed", type=Path, metavar="COMPRESSED", help="Checkpoint folder of the compressed model."
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="Folder to write. It gets PEFT files for vLLM and peft, profile.safetensors and report.json.",
    )
    add_texts(parser, "COMPRESSED")
    parser.add_argument(
        "--rank", type=positive_integer, default=16, metavar="R", help="Rank of every layer (default: 16)."
    )
    parser.add_argument(
        "--shared-out",
        action="store_true",
        help="Give the bytes of rank R to the layers that gain most from them. vLLM pads every layer to the largest "
        "rank.",
    )
    parser.add_argument(
        "--max-rank",
        type=positive_integer,
        metavar="R",
        help="Largest rank of a layer with --shared-out (default: 4 times --rank).",
    )
    parser.add_argument(
        "--metric",
        choices=("auto", "kfac", "full", "diagonal"),
        default="auto",
        help="Statistics that weigh the error: of inputs and output gradients (kfac), of inputs (full), or of their "
        "squares (diagonal). auto takes kfac, with diagonals for layers that --memory-mib is too little for.",
    )
    parser.add_argument(
        "--memory-mib",
        type=positive_integer,
        default=4096,
        metavar="MIB",
        help="Memory that --metric auto may use for statistics (default: 4096).",
    )
    parser.add_argument(
        "--tokens",
        type=positive_integer,
        default=16_000,
        metavar="N",
        help="Learn from at most N tokens (default: 16000).",
    )
    fraction = number_from_zero(1.0, "not a fraction: give 0 up to less than 1")
    parser.add_argument(
        "--held-out",
        type=fraction,
        default=0.25,
        metavar="FRACTION",
        help="Fraction of the prompts that the adapter is judged on (default: 0.25).",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive_integer,
        default=128,
        metavar="N",
        help="Generate at most N tokens for each prompt (default: 128).",
    )
    parser.add_argument(
        "--distil",
        action="store_true",
        help="Train the adapter further on REFERENCE's predictions of the same texts, with both models whole in "
        "memory. The result is kept only if texts that it is not trained on improve.",
    )
    parser.add_argument(
        "--seed", type=non_negative_integer, default=0, metavar="S", help="Seed of the random numbers (default: 0)."
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="Torch device (default: cpu).")
    parser.add_argument(
        "--model", default="", metavar="NAME", help="Served name of the model that the profile is for (default: any)."
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="Keep finished work in this folder (default: until DIR of --out is written).",
    )
    add_overwrite(parser, "DIR of --out")
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from hemostat_lab.commands.adapt_steps import AdaptOptions, run  # noqa: PLC0415

    return run(AdaptOptions(**{name: getattr(options, name) for name in AdaptOptions.__dataclass_fields__}))
