"""The architectures of transformers that are supported."""

from __future__ import annotations

from typing import Any

from hemostat_calibration.errors import HemostatError


class UnsupportedModelError(HemostatError):
    """The text names the architecture and the reason."""


def check_causal(config: Any) -> None:
    """Raises UnsupportedModelError unless the model of this configuration predicts each token from those before it.

    transformers loads the decoder of some encoder-decoder models as a causal model, partly with random weights.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{config.model_type} is an encoder-decoder architecture; only decoder-only language models are supported"
        )


def has_attention(config: Any) -> bool:
    """False for pure state-space models, such as Mamba."""
    return hasattr(config.get_text_config(), "num_attention_heads")


def max_positions(config: Any) -> int | None:
    """Tokens of the longest text that the model can read, or was made for; None where its configuration names none."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 0) or None


def check_serves_adapters(config: Any) -> None:
    """Raises UnsupportedModelError where vLLM serves no LoRA adapters of the architecture."""
    if not has_attention(config):
        raise UnsupportedModelError(
            f"{config.model_type} has no attention layers, and vLLM serves no LoRA adapters of such models"
        )


def is_recurrent(model: Any) -> bool:
    """True where a part of the model's state is a summary of everything before, which cannot skip padding or be cut
    back: state-space models, linear attention, and hybrids with such layers."""
    return bool(getattr(model, "_is_stateful", False))
