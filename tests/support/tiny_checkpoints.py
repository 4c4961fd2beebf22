"""A pair of tiny checkpoints: a random Llama with sharp distributions, and the same with an error in its weights.

Most of the error has a low rank."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from hemostat.adapters.live.folders import CheckpointFolders

VOCAB = 512
HIDDEN = 32
ERROR_RANK = 2


def make_pair(folder: Path, *, seed: int = 0, error: float = 0.5) -> CheckpointFolders:
    """error: its norm relative to the weight's, in every linear layer."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
        tie_word_embeddings=False,
        dtype="float32",
    )
    model = transformers.LlamaForCausalLM(config)
    checkpoint_folders = CheckpointFolders(folder / "reference", folder / "compressed")
    model.save_pretrained(checkpoint_folders.reference)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                weight = module.weight
                change = torch.randn(weight.shape[0], ERROR_RANK) @ torch.randn(ERROR_RANK, weight.shape[1])
                change = change + 0.1 * torch.randn(weight.shape)
                weight += error * weight.norm() / change.norm() * change
    model.save_pretrained(checkpoint_folders.compressed)
    return checkpoint_folders
