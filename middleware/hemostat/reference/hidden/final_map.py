"""The map from W h to a model's logits: a scale and a soft cap, read from its configuration. They are applied as vLLM
does it (`model_executor/layers/logits_processor.py` of 0.32, and the classes of the models there): logits = scale · cap
· tanh((W h + b) / cap), without a cap scale · (W h + b).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_OF_LOGITS = re.compile(r"logit|lm_head|output_mult|mup|residual_to_output|final_soft")
"""The settings that may concern what follows the last hidden state."""
_ELSEWHERE = re.compile(r"attn|attention|router|gate|moe|expert|output_router|logits_to_keep|return_|embed|mup_enabled")
"""The names of settings that concern something else."""


class NotModelled(ValueError):
    """The configuration has a setting about the logits that is not known here; the text names it."""


@dataclass(frozen=True, slots=True)
class FinalMap:
    """The map from W h to the logits. scale: factor of the logits, after the cap. soft_cap: nats, None without one.

    >>> FinalMap().is_linear, FinalMap(soft_cap=30.0).is_linear
    (True, False)
    """

    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def is_linear(self) -> bool:
        return self.soft_cap is None

    def __str__(self) -> str:
        said = [] if self.scale == 1.0 else [f"logit scale {self.scale:g}"]
        said += [] if self.soft_cap is None else [f"soft cap {self.soft_cap:g}"]
        return ", ".join(said)


def read_final_map(config: Mapping[str, Any]) -> FinalMap:
    """Returns the map that a configuration describes. Raises NotModelled if it describes anything else.

    config: the model's config.json; for a model with several parts it is the one of the text model, on top.

    >>> read_final_map({"model_type": "granite", "logits_scaling": 8.0})
    FinalMap(scale=0.125, soft_cap=None)
    >>> read_final_map({"model_type": "gemma2", "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0})
    FinalMap(scale=1.0, soft_cap=30.0)
    >>> read_final_map({"model_type": "new", "logits_temper": 3.0})
    Traceback (most recent call last):
        ...
    hemostat.reference.hidden.final_map.NotModelled: logits_temper is 3.0: this is not modelled
    """
    kind = str(config.get("model_type", ""))
    scale, soft_cap = 1.0, None
    for name, value in sorted(config.items()):
        match name:
            case "logit_scale" | "lm_head_multiplier" if value is not None:
                scale *= _number(name, value)
            case "logits_scaling" if value is not None and kind.startswith("granite"):
                scale /= _number(name, value)
            case "logits_scaling" if value is not None and kind.startswith("hyperclovax"):
                scale *= _number(name, value)
            case "dim_model_base" if value is not None and kind.startswith("minicpm"):
                scale *= _number(name, value) / _number("hidden_size", config.get("hidden_size"))
            case "final_logit_softcapping" if value is not None:
                soft_cap = _number(name, value)
            case _ if _OF_LOGITS.search(name) and not _ELSEWHERE.search(name) and not _has_no_effect(value):
                raise NotModelled(f"{name} is {str(value)[:60]}: this is not modelled")
    return FinalMap(scale, soft_cap)


def _has_no_effect(value: object) -> bool:
    return value is None or value is False or (value is not True and value == 1)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise NotModelled(f"{name} is {str(value)[:60]}: a number above 0 is modelled")
    return float(value)
