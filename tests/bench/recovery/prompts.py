"""Prompts: every template with every topic, split by topic, so that nothing held out was met while learning."""

from __future__ import annotations

from dataclasses import dataclass

TEMPLATES = (
    "Explain {} to a curious teenager.",
    "What is {}? Answer in three sentences.",
    "Write a short story in which {} plays a part.",
    "List five facts about {}.",
    "Write a poem about {}.",
    "What are the advantages and disadvantages of {}?",
    "Give me step by step advice for someone who wants to learn about {}.",
    "Write an email to a colleague about {}.",
    "Summarize the history of {} in one paragraph.",
    "Write a dialogue between two friends who disagree about {}.",
    "Why does {} matter today?",
    "Describe {} as a travel writer would.",
    "What do most people get wrong about {}?",
    "Write a product review that mentions {}.",
    "Compare {} with something similar.",
    "Write five questions for a quiz about {}, with answers.",
    "Give a short lecture on {} for university students.",
    "Write a news report about {}.",
    "How would you explain {} with an analogy?",
    "Plan a weekend project around {}.",
    "Write a Python function that has to do with {}, with a docstring.",
    "Translate into French: I have read a book about {} and I liked it.",
    "Write a speech of one minute in favour of {}.",
    "What will {} look like in fifty years?",
)
"""Prompts of open-ended text."""

TOPICS = (
    "volcanoes", "chess", "the French Revolution", "photosynthesis", "jazz", "bread baking", "black holes",
    "beekeeping", "the printing press", "tides", "vaccines", "sailing", "inflation", "origami", "coral reefs",
    "the Roman Empire", "bicycles", "dreams", "satellites", "tea", "earthquakes", "opera", "compost", "the Silk Road",
    "antibiotics", "mountain climbing", "public libraries", "electric cars", "glaciers", "mythology",
    "the stock market", "knitting", "whales", "the Industrial Revolution", "DNA", "skateboarding", "democracy",
    "pottery", "rainforests", "medieval castles", "trains", "sleep", "telescopes", "coffee", "hurricanes", "ballet",
    "gardening", "the Great Wall of China", "vitamins", "marathon running", "museums", "solar panels", "deserts",
    "fairy tales", "insurance", "woodworking", "wolves", "the Renaissance", "bacteria", "surfing", "human rights",
    "glass making", "wetlands", "pyramids", "aeroplanes", "memory", "microscopes", "chocolate", "lightning",
    "street theatre", "fishing", "the Vikings", "nutrition", "swimming", "universities", "wind turbines", "caves",
    "detective novels", "taxes", "watchmaking", "elephants", "the Cold War", "enzymes", "football",
    "freedom of speech", "mosaics", "rivers", "lighthouses", "submarines", "language learning", "radar", "cheese",
    "rainbows", "puppetry", "farming", "the Aztecs", "allergies", "yoga", "zoos", "nuclear power", "islands",
    "science fiction", "banking", "blacksmithing", "penguins", "the Space Race", "crystals", "tennis",
    "international trade", "calligraphy", "forests", "bridges", "rockets", "creativity", "thermometers", "spices",
    "snow", "comedy", "weather forecasting", "ancient Greece", "the immune system", "dancing", "kindergartens",
    "batteries", "oceans", "biographies", "mortgages", "leatherwork", "butterflies", "computers",
)  # fmt: skip
"""Topics to learn from."""

HELDOUT_TOPICS = (
    "owls", "the Moon landing", "magnetism", "basketball", "elections", "embroidery", "savannas", "canals",
    "helicopters", "empathy", "compasses", "honey", "fog", "the circus", "irrigation", "the Inca", "blood pressure",
    "rowing", "apprenticeships", "hydrogen fuel", "waterfalls", "diaries", "pensions", "bookbinding", "spiders",
    "the Olympic Games", "sound waves", "juggling", "postal services", "smartphones",
)  # fmt: skip
"""Topics that only judge."""


QUESTIONS = (
    "What is the capital of France?", "What is the capital of Japan?", "What is the capital of Italy?",
    "What is the capital of Egypt?", "What is the capital of Canada?", "What is the capital of Germany?",
    "What is the capital of Spain?", "What is the capital of Russia?", "What is the capital of Greece?",
    "What is the capital of Norway?", "What is the capital of Austria?", "What is the capital of Peru?",
    "What is the capital of Cuba?", "What is the capital of China?", "What is the capital of Portugal?",
    "What colour is the sky on a clear day?", "What colour is grass?", "What colour is a ripe banana?",
    "What colour is snow?", "What colour is blood?", "What is the opposite of hot?", "What is the opposite of up?",
    "What is the opposite of fast?", "What is the opposite of light?", "What is the opposite of big?",
    "What is two plus two?", "What is three times three?", "What is ten minus four?", "How many days has a week?",
    "How many months has a year?", "How many legs has a spider?", "Which planet is closest to the Sun?",
    "Which planet is the largest of the solar system?", "What is the largest ocean?", "Which gas do plants take in?",
    "What is frozen water called?", "Who wrote Hamlet?", "Who painted the Mona Lisa?", "On which continent is Kenya?",
    "On which continent is Brazil?",
)  # fmt: skip
"""What can be answered in one or two words."""

PEOPLE = ("Anna", "Boris", "Chen", "Dalia", "Emeka", "Farah", "Goran", "Hana", "Ivan", "Julia")
PLACES = ("Lisbon", "Toronto", "Nairobi", "Kyoto")
EXTRACTION = (
    'Extract the name, the age and the city as JSON with the keys "name", "age" and "city". Answer with JSON only.\n\n'
    "{} is {} years old and lives in {}."
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One user message; `heldout` when its topic judges only."""

    text: str
    topic: str
    heldout: bool


def open_ended() -> list[Prompt]:
    """Every template with every topic, topics in an order that mixes them: a prefix is a smaller fair sample."""
    made = [
        Prompt(template.format(topic), topic, heldout)
        for topics, heldout in ((TOPICS, False), (HELDOUT_TOPICS, True))
        for shift in range(len(TEMPLATES))
        for number, topic in enumerate(topics)
        for template in (TEMPLATES[(number + shift) % len(TEMPLATES)],)
    ]
    return made


def short_answers() -> list[str]:
    return [f"{question} Answer in one or two words." for question in QUESTIONS]


def extraction() -> list[str]:
    """Prompts that ask for JSON."""
    return [
        EXTRACTION.format(person, 21 + 3 * number + 7 * other, place)
        for number, person in enumerate(PEOPLE)
        for other, place in enumerate(PLACES)
    ]
