"""Prompts of kinds other than open questions: those that are answered at the engine, which no adapter learns from, and
others of the same kinds, which adapters "from all kinds" do."""

from __future__ import annotations

from collections.abc import Sequence

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


# --- to learn from ----------------------------------------------------------------------------------------------------

_OTHER_EXTRACTIONS = (
    (("product", "price", "shop"), "The {0} costs {1} euros at {2}.", (
        ("lamp", "35", "Holm"), ("kettle", "28", "Nordhaus"), ("backpack", "64", "Trail & Co"),
        ("desk", "190", "Arbor"),
        ("printer", "120", "Byteline"), ("jacket", "89", "Fjord"), ("blender", "47", "Cucina"),
        ("helmet", "55", "Velo"),
        ("camera", "410", "Optika"), ("carpet", "230", "Loom"), ("guitar", "340", "Corda"), ("tent", "150", "Summit"),
    )),
    (("event", "date", "place"), "{0}: {1}, in the {2}.", (
        ("Book fair", "3 May", "town hall"), ("Chess open", "12 June", "library"), ("Jazz night", "8 July", "old mill"),
        ("Flea market", "21 August", "station square"), ("Science day", "2 September", "museum"),
        ("Choir concert", "30 October", "cathedral"), ("Film week", "14 November", "cinema"),
        ("Winter run", "9 December", "city park"), ("Job fair", "17 January", "trade hall"),
        ("Poetry slam", "25 February", "theatre"), ("Repair cafe", "6 March", "school"),
        ("Open lab", "19 April", "institute"),
    )),
    (("title", "author", "year"), "I am reading {0} by {1}, published in {2}.", (
        ("The Long Harbour", "M. Osei", "1987"), ("Salt Roads", "L. Brandt", "2004"),
        ("Nine Bridges", "T. Aoki", "1995"),
        ("A Map of Rain", "S. Moreau", "2011"), ("The Clockmaker", "P. Lind", "1972"),
        ("North Light", "R. Silva", "2019"),
        ("Quiet Engines", "D. Novak", "1968"), ("The Orchard", "E. Blake", "2001"), ("Low Tide", "J. Haddad", "1999"),
        ("Paper Gardens", "W. Chan", "2015"), ("The Ninth Wave", "K. Berg", "1981"), ("Iron Hill", "A. Rossi", "2008"),
    )),
    (("sender", "subject", "priority"), "Mail from {0}, about {1}, {2} priority.", (
        ("Marta", "the budget", "high"), ("Oskar", "the offsite", "low"), ("Priya", "a failed backup", "high"),
        ("Luis", "new badges", "low"), ("Greta", "the audit", "medium"), ("Samir", "the release", "high"),
        ("Nora", "lunch", "low"), ("Viktor", "a customer call", "medium"), ("Aiko", "the roadmap", "medium"),
        ("Tom", "the heating", "low"), ("Ines", "an outage", "high"), ("Paul", "holidays", "medium"),
    )),
)  # fmt: skip

_OTHER_QUESTIONS = (
    "What is the capital of Sweden?", "What is the capital of Turkey?", "What is the capital of Kenya?",
    "What is the capital of Argentina?", "What is the capital of Poland?", "What is the capital of Ireland?",
    "What colour is a lemon?", "What colour is coal?", "What colour is a carrot?", "What colour is milk?",
    "What is the opposite of wet?", "What is the opposite of old?", "What is the opposite of loud?",
    "What is the opposite of heavy?", "How many hours has a day?", "How many sides has a triangle?",
    "How many minutes has an hour?", "How many wheels has a bicycle?", "Which planet has rings?",
    "Which planet is called the red one?", "What is the smallest ocean?", "Which metal is liquid at room temperature?",
    "What do bees make?", "What do cows drink?", "Who wrote Faust?", "Who painted Guernica?",
    "On which continent is India?", "On which continent is Egypt?", "What is the longest river of Africa?",
    "Which season follows winter?", "Which month follows June?", "Which day follows Monday?",
)  # fmt: skip

_OTHER_CODE = (
    "doubles every element of a list", "returns the last character of a string", "adds two matrices",
    "counts the lines of a text", "checks whether a list is sorted", "returns the smallest of three numbers",
    "converts miles to kilometres", "splits a string at commas", "capitalizes every word",
    "sums the digits of a number",
    "returns the even numbers of a list", "computes the area of a circle", "swaps two elements of a list",
    "checks whether a year is a leap year", "returns the index of an element", "computes a power without the operator",
    "removes spaces from a string", "counts how often each letter occurs", "reads a JSON file",
    "writes a list to a file",
    "returns the intersection of two sets", "computes the median of a list", "generates a random password",
    "converts a number to binary", "validates an email address", "zips two lists to a dictionary",
    "returns the n largest elements of a list", "transposes a matrix", "checks whether brackets are balanced",
    "pads a string with zeros",
)  # fmt: skip


def other_extractions() -> list[str]:
    """48 distinct prompts that ask for JSON with other keys."""
    return [
        f'Extract the {a}, the {b} and the {c} as JSON with the keys "{a}", "{b}" and "{c}". '
        f"Answer with JSON only.\n\n{sentence.format(*row)}"
        for turn in range(12)
        for (a, b, c), sentence, rows in _OTHER_EXTRACTIONS
        for row in (rows[turn],)
    ]


def to_learn_from(open_questions: Sequence[str], count: int) -> list[str]:
    """Prompts of all kinds in turn, of which none is answered at the engine; extractions ask for other keys.

    open_questions: those that are learned from.
    """
    short = [f"{question} Answer in one or two words." for question in _OTHER_QUESTIONS]
    sums = [f"What is {a} {sign} {b}? Answer with the number only." for a, b, sign in _sums(len(short))]
    small = [f"Write a Python function that {what}." for what in _OTHER_CODE]
    several = [other_extractions(), [*(p for pair in zip(short, sums, strict=True) for p in pair)], small]
    # Open questions take the places of the kinds whose prompts are all taken.
    rest = iter(open_questions)
    made: list[str] = []
    for turn in range(count):
        made += [some[turn] for some in several if turn < len(some)]
        made.append(next(rest))
        if len(made) >= count:
            break
    return made[:count]


def _sums(count: int) -> list[tuple[int, int, str]]:
    """Of other numbers than `arithmetic`."""
    return [(101 + 9 * n, 2 + 4 * n % 31, "+-*"[n % 3]) for n in range(count)]
