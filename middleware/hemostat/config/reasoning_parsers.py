"""vLLM's reasoning parsers by name, with the texts that enclose the thinking (vLLM 0.32, `vllm/reasoning`)."""

from __future__ import annotations

Texts = tuple[str, str]

_THINK: Texts = ("<think>", "</think>")
SINGLE: tuple[Texts, ...] = (
    _THINK,
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<mm:think>", "</mm:think>"),
)
"""The pairs of markers that `auto` looks for, in this order."""
PARSERS: dict[str, Texts] = {
    **dict.fromkeys(
        (
            *("deepseek_r1", "deepseek_v3", "deepseek_v4", "deepseek_v41", "ernie45", "glm45", "glm47", "holo2"),
            *("hunyuan_a13b", "k2_horizon", "kimi_k2", "mimo", "minicpmv", "minimax_m2", "minimax_m2_append_think"),
            *("nemotron_v3", "olmo3", "qwen3", "step3", "step3p5"),
        ),
        _THINK,
    ),
    "mistral": ("[THINK]", "[/THINK]"),
    "seed_oss": ("<seed:think>", "</seed:think>"),
    "cohere_command3": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "cohere_command4": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "minimax_m3": ("<mm:think>", "</mm:think>"),
    "granite": ("Here is my thought process:", "Here is my response:"),
    "openai_gptoss": ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
}
"""The markers by the name of vLLM's parser. A parser that is not here needs `reasoning.start` and `reasoning.end`."""
