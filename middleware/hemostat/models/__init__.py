"""Checkpoints and the vLLM server that serves one."""
