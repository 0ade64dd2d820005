"""Open-ended requests: for the chat test set, and others, on other topics, for what fine-tuning must not unlearn.

Knows texts only. No request of one set is in the other, since no topic is.
"""

import random

TASKS = (
    "Write a short story about {}.",
    "Invent three unusual uses for {} and defend the best one.",
    "Write a letter from {} to the mayor of a small town.",
    "Describe {} to somebody who has never seen anything like it.",
    "Argue that {} changed history more than the printing press did.",
    "Write a dialogue in which two old friends disagree about {}.",
    "Give a speech at a wedding that somehow turns to {}.",
    "Make up a legend that explains the origin of {}.",
)
TEST_TOPICS = (
    "a lighthouse without a keeper",
    "the last tram of the night",
    "an orchestra of kitchen tools",
    "a bridge that hums in the wind",
    "homemade marmalade",
    "a library on a boat",
    "the smell of rain",
    "a chess club for beginners",
    "a mountain that is not on any map",
    "secondhand umbrellas",
    "a market in the desert",
    "an honest weather forecast",
    "a garden on a rooftop",
    "the colour of old letters",
    "a robot that collects stamps",
    "migrating geese",
)
REPLAY_TOPICS = (
    "a clock that runs backwards",
    "a bakery at the harbour",
    "wild strawberries",
    "a choir of fishermen",
    "the longest staircase in the city",
    "a museum of lost gloves",
)


def test_requests(seed: int) -> list[str]:
    """Every task with every test topic, 128 distinct requests, shuffled."""
    return _combine(TEST_TOPICS, f"data/chat/{seed}")


def replay_requests(seed: int) -> list[str]:
    """Every task with every replay topic, 48 distinct requests, shuffled."""
    return _combine(REPLAY_TOPICS, f"replay/{seed}")


def _combine(topics: tuple[str, ...], seed: str) -> list[str]:
    requests = [task.format(topic) for task in TASKS for topic in topics]
    random.Random(seed).shuffle(requests)
    return requests
