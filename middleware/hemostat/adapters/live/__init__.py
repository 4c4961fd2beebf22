"""Adapters, live: collected texts, the child process that makes an adapter of them, and the copies that judge it.

Prompts and answers are kept in memory only. While an adapter is made, its process reads their token ids from a folder
that only this user can read, deleted when the process ends, or at the next start.
"""
