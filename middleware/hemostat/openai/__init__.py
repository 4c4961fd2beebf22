"""OpenAI's chat and completions API as vLLM implements it, without IO."""
