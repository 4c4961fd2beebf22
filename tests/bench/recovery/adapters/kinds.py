"""Prompts of kinds that no adapter of the benchmark learns from: it learns from open questions only."""

from __future__ import annotations

from tests.bench.recovery import prompts

AGES = 5
"""Of every person in every place."""
EXTRACTIONS = 200

CODE = (
    "reverses a string", "returns the factorial of a number", "checks whether a number is prime",
    "counts the vowels of a string", "returns the largest element of a list", "merges two sorted lists",
    "removes duplicates from a list", "computes the average of a list", "checks whether a string is a palindrome",
    "returns the first n Fibonacci numbers", "converts Celsius to Fahrenheit",
    "sorts a list of tuples by their second element",
    "counts the words of a file", "flattens a list of lists", "returns the common elements of two lists",
    "finds the longest word of a sentence", "inverts a dictionary", "rotates a list by k places",
    "computes the greatest common divisor of two numbers", "checks whether two strings are anagrams",
)  # fmt: skip

_SENTENCES = (
    "{} is {} years old and lives in {}.",
    "My colleague {}, who is {}, has moved to {}.",
    "Name of the patient: {}. Age: {}. Address: {}.",
    "At the age of {1}, {0} still enjoys walking through {2}.",
    "We met {} (aged {}) at a conference in {}.",
)


def extraction() -> list[str]:
    """200 distinct prompts that ask for JSON; every fifth sentence has the same form."""
    head = prompts.EXTRACTION.rpartition("\n\n")[0]
    made = [
        f"{head}\n\n{_SENTENCES[turn].format(person, 19 + 3 * number + 7 * other + 2 * turn, place)}"
        for turn in range(AGES)
        for number, person in enumerate(prompts.PEOPLE)
        for other, place in enumerate(prompts.PLACES)
    ]
    return made[:EXTRACTIONS]


def arithmetic() -> list[str]:
    """Sums, differences and products of small numbers."""
    return [
        f"What is {a} {sign} {b}? Answer with the number only."
        for n in range(40)
        for a, b in ((12 + 7 * n % 83, 3 + 5 * n % 29),)
        for sign in ("+-*"[n % 3],)
    ]


def code() -> list[str]:
    """Small functions."""
    return [f"Write a Python function that {what}." for what in CODE]


def by_kind() -> dict[str, list[str]]:
    """All prompts, by kind."""
    return {"json": extraction(), "short": prompts.short_answers(), "arithmetic": arithmetic(), "code": code()}
