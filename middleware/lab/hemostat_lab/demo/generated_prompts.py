"""Generated prompts: every task with every subject, and with five others that it has to mention.

Prompts that are alike count only once in the test of a profile, so a run that promotes one needs hundreds that differ.
A request counts the same whether it is long or short; these are short.
"""

from __future__ import annotations

import random

from hemostat_lab.demo.prompts import Message, Prompt

MAX_TOKENS = 48

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
            result.append(Prompt([Message("user", text)], MAX_TOKENS, "varied"))
    return result
