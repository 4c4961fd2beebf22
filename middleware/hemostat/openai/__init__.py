"""vLLM's OpenAI-compatible wire format, without input or output."""
