"""The log-probabilities in vLLM's responses: found by their bytes (`cutting`, `scrubbing`) and, later and elsewhere,
parsed (`rows`). A relay only cuts them out; the control process parses what is scored."""
