"""Prunes a checkpoint by SparseGPT or Wanda.

usage: prune.py REFERENCE OUT TEXTS.json METHOD SPARSITY PATTERN
(texts: token ids, a list of lists; METHOD: sparsegpt or wanda; PATTERN: unstructured or 2:4)
"""

from __future__ import annotations

import sys

from calibration import apply  # of this folder

from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier


def main(reference: str, out: str, texts: str, method: str, sparsity: str, pattern: str) -> None:
    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
    structure = "0:0" if pattern == "unstructured" else pattern
    recipe = [modifier(sparsity=float(sparsity), mask_structure=structure, ignore=["re:.*lm_head"])]
    # Dense, as ours are: vLLM does not load sparse formats any more.
    apply(recipe, reference, out, texts, packed=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
