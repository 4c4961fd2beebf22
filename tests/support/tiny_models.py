"""Tiny random models of many architectures, with sharp distributions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCAB = 320
WINDOW = 8
"""Of sliding attention: shorter than the tests' texts."""

_SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
_ATTENTION = {
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 16,
}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_SHARED, **_ATTENTION),
    "gemma2": lambda: transformers.Gemma2Config(
        **_SHARED, **_ATTENTION, **_SLIDING, final_logit_softcapping=5.0, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_SHARED, **_ATTENTION, **_SLIDING),
    "mamba": lambda: transformers.MambaConfig(**_SHARED, state_size=8, time_step_rank=8),
    "falcon_mamba": lambda: transformers.FalconMambaConfig(**_SHARED, state_size=8, time_step_rank=8),
    "mamba2": lambda: transformers.Mamba2Config(
        **_SHARED, state_size=8, num_heads=8, head_dim=16, n_groups=2, chunk_size=8
    ),
}
RECURRENT = ("mamba", "falcon_mamba", "mamba2")

_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
MIXTURES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: transformers.MixtralConfig(**_SHARED, **_ATTENTION, num_local_experts=6, num_experts_per_tok=2),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_SHARED, **_ATTENTION, **_EXPERTS, moe_intermediate_size=64, shared_expert_intermediate_size=64
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_SHARED, **_ATTENTION, **_EXPERTS, moe_intermediate_size=64, norm_topk_prob=True
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**_SHARED, **_ATTENTION, **_EXPERTS),
}
"""Mixtures of experts; the second has an expert that all tokens share."""


def tiny_model(name: str, seed: int = 0) -> Any:
    """In float32; weights of different layers are different, norms' and routers' too."""
    torch.manual_seed(seed)
    config = (CONFIGS | MIXTURES)[name]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            if key.endswith("mlp.gate.weight"):
                parameter.normal_(0.0, 0.3)
    return model
