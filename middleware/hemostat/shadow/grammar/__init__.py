"""Which ids a request's grammar allows at each position of its answer.

vLLM masks the logits by the grammar before it takes log-probabilities, so what it returns is conditional on the allowed
ids. `masks.GrammarMasks` rebuilds these sets from the request and the emitted ids: a child process (`worker`) makes the
same grammar of the request as vLLM 0.32 (`constraints`, `tool_tags`, `json_features`) and walks it with xgrammar
(`walking`). What cannot be rebuilt, or does not fit what vLLM returned (`checking`), is skipped and counted.
"""
