"""Prompts: one JSON object a line, `{"messages": [{"role", "content"}, ...], "max_tokens": n}`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from hemostat.config.prompt_lines import PromptFileError, lines_of, parse_json_line, read_prompts

MAX_TOKENS = 64
"""For a line without `max_tokens`."""
SHAPE = '{"messages": [{"role": "user", "content": "..."}], "max_tokens": 64}'


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str


class Prompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    messages: list[Message]
    max_tokens: int = MAX_TOKENS
    kind: str = ""
    """The kind of task, for readers of the file."""


def load(path: Path | None = None) -> list[Prompt]:
    """Returns the prompts of a file, by default the ones that the gate asks. Blank lines are skipped. Raises
    PromptFileError."""
    name, data = read_prompts(path)
    prompts = [_parse(line, f"{name}:{number}") for number, line in lines_of(data)]
    if not prompts:
        raise PromptFileError(f'{name}: no prompts in it; write one {{"messages": [...], "max_tokens": n}} a line')
    return prompts


def _parse(line: bytes, where: str) -> Prompt:
    prompt = parse_json_line(line, where, Prompt, SHAPE)
    if not prompt.messages:
        raise PromptFileError(f"{where}: messages is empty; give at least one with role user")
    if prompt.max_tokens < 1:
        raise PromptFileError(f"{where}: max_tokens is {prompt.max_tokens}; give at least 1")
    return prompt


def plan(prompts: Sequence[Prompt], model: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Endless (request id, chat-completions body): every prompt once a round, in random order.

    Three in four are sampled at temperature 1, where the estimates have no truncation bias; the others are greedy. Half
    are streamed. The same seed gives the same requests.
    """
    random_ = random.Random(seed)  # noqa: S311 - nothing secret
    number = 0
    while True:
        for prompt in random_.sample(prompts, len(prompts)):
            number += 1
            yield (
                f"demo-{seed}-{number}",
                {
                    "model": model,
                    "messages": msgspec.to_builtins(prompt.messages),
                    "max_tokens": prompt.max_tokens,
                    "temperature": 0.0 if random_.random() < 0.25 else 1.0,
                    "seed": random_.randrange(2**31),
                    "stream": random_.random() < 0.5,
                },
            )


MAX_GENERATED_TOKENS = 48

TASKS = (
    "Explain {} to somebody who has never heard of it.",
    "Give me four surprising facts about {}.",
    "Write the opening paragraph of a story set around {}.",
    "What should a beginner know about {}?",
    "Draft a short email inviting the team to a talk on {}.",
    "Argue in a few sentences that {} deserves more attention.",
    "Describe {} in the style of an old travel guide.",
    "Make a checklist for an afternoon spent on {}.",
    "What are three common misunderstandings about {}?",
    "Write a four-line poem on {}.",
    "How has {} changed over the last hundred years?",
    "Write a Python dictionary that holds some facts on {}.",
    'Answer in JSON with the keys "name", "summary" and "keywords": {}.',
    "Two people at a bus stop talk about {}. Write their dialogue.",
    "Compare {} with whatever you find most similar to it.",
    "Write a headline and the first sentence of a news item on {}.",
    "Which questions would you ask an expert on {}?",
    "Summarize in three bullet points why people care about {}.",
    "Write a polite complaint that has to do with {}.",
    "Invent a riddle whose answer is {}, and give the answer.",
)

SUBJECTS = (
    "tide pools", "typewriters", "mushroom picking", "the metric system", "night trains", "sign language",
    "kite flying", "the ozone layer", "board games", "plate tectonics", "sourdough", "lighthouse keeping",
    "the violin", "bird migration", "recycling glass", "the Olympic torch", "stage lighting", "hot air balloons",
    "crossword puzzles", "the Suez Canal", "goat cheese", "solar eclipses", "letter writing", "street markets",
    "ice skating", "the periodic table", "home insulation", "wild garlic", "film editing", "emergency rooms",
    "rope bridges", "tax returns", "folk dancing", "desert foxes", "the postage stamp", "urban gardening",
    "submarine cables", "handball", "paper making", "the Alps", "honey bees", "car sharing", "shadow puppets",
    "the common cold", "stone walls", "radio drama", "sea otters", "bicycle repair", "the Nobel Prize",
    "seed banks", "choir singing", "fire drills", "salt mines", "map making", "second-hand books", "the jet stream",
    "rock climbing", "school lunches", "wind chimes", "canal locks",
)  # fmt: skip


def generated_prompts() -> list[Prompt]:
    """All of them, always the same ones in the same order."""
    drawn = random.Random(0)  # noqa: S311 - nothing secret
    result = []
    for subject in SUBJECTS:
        for task in TASKS:
            *others, last = drawn.sample([other for other in SUBJECTS if other != subject], 5)
            text = f"{task.format(subject)} Bring in {', '.join(others)} and {last}."
            result.append(Prompt([Message("user", text)], MAX_GENERATED_TOKENS, "varied"))
    return result
