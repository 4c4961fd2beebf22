"""Prompts of the probes: beginnings of texts that are in the public domain."""

PROMPTS = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be",
    "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little and see the "
    "watery part of the world. It is a way I have",
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book",
    "When in the Course of human events, it becomes necessary for one people to dissolve the political bands which "
    "have connected them with another,",
)
