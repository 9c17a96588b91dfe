"""Openings of short reviews and stories that may end well or badly, and a labeller that prefers positive words.

Runs in the driver, and in each reward replica. The labeller takes the place of the human in RLHF: it is the VADER
sentiment lexicon (Hutto and Gilbert 2014), from PyPI.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from common.types import RewardInput

try:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
except ImportError as error:
    raise ImportError("the labeller needs the package vaderSentiment: pip install 'ratchet-rlhf[demo]'") from error

HELDOUT_PROMPTS = 128

# Subjects, and openings that take any of them.
_OPENINGS = (
    (
        "the new film, the play, the last episode, the concert, the documentary, the school musical, the opera, "
        "the magic show, the radio play, the final, the lecture, the exhibition",
        "When we left after {}, I told my friend that it was",
        "My honest review of {}: it was",
        "I saw {} on Friday night and I felt",
        "People keep asking me about {}. I think",
        "Halfway through {} I looked at my sister and she was",
    ),
    (
        "the corner restaurant, the airport hotel, the train to Leeds, the campsite, the dentist, the gym, the "
        "swimming pool, the bank, the youth hostel, the garage, the bakery, the museum",
        "My visit to {} last week was",
        "If you ask me about {}, I would say",
        "The staff at {} were",
        "We had heard a lot about {}, and in the end it was",
        "After an hour at {} I was",
    ),
    (
        "the soup, the fish, the cake, the coffee, the stew, the curry, the salad, the pizza, the pudding, the "
        "bread, the omelette, the lemonade",
        "I tasted {} and it was",
        "The waiter brought {}. It smelled",
        "My brother cooked {} yesterday and everyone",
        "About {}: I have to say that it",
        "Whoever made {} must be",
    ),
    (
        "my new phone, this vacuum cleaner, the used car, the tent, this keyboard, the washing machine, the "
        "bicycle, this raincoat, the heater, the camera, this mattress, the drill",
        "I bought {} a month ago and it has been",
        "Two weeks with {} have shown me that",
        "My opinion of {} is simple:",
        "Would I buy {} again? Well,",
        "Since the delivery of {}, my days have been",
    ),
    (
        "my boss, our neighbour, my old teacher, the landlord, my cousin, the coach, the mayor, my flatmate, the "
        "new doctor, our guide, my uncle, the librarian",
        "This morning {} called me, and I was",
        "I met {} at the market and we",
        "The letter from {} made me feel",
        "When I think of {}, I remember",
        "Yesterday {} said something that was",
    ),
    (
        "the meeting, the exam, the interview, the wedding, the long drive, the match, the trial, the reunion, the "
        "storm, the election, the school trip, the move",
        "After {} everybody went home feeling",
        "Looking back on {}, I believe it was",
        "The day of {} began early. By noon I was",
        "I wrote in my diary about {}: today was",
        "As soon as {} was over, my mother said that",
    ),
    (
        "the village, the new office, the old house, the beach, the city centre, the hospital, the harbour, the "
        "airport, the old mill, the park, the campus, the island",
        "Living near {} has been",
        "The first time I saw {}, I thought it was",
        "On a rainy evening {} looks",
        "My grandmother remembers {} as",
        "What I will say about {} is that it",
    ),
)


def train_prompts(seed: int) -> list[dict[str, Any]]:
    """Every opening that is not held out."""
    return _prompts(seed)[HELDOUT_PROMPTS:]


def heldout_prompts(seed: int) -> list[dict[str, Any]]:
    """128 openings that are in no training prompt."""
    return _prompts(seed)[:HELDOUT_PROMPTS]


def positivity(answer: RewardInput) -> float:
    """VADER's compound sentiment of the response alone: -1 most negative, 1 most positive."""
    return analyser().polarity_scores(answer.response)["compound"]


@cache
def analyser() -> Any:
    return SentimentIntensityAnalyzer()


def _prompts(seed: int) -> list[dict[str, Any]]:
    texts = [
        opening.format(subject)
        for subjects, *openings in _OPENINGS
        for subject in subjects.split(", ")
        for opening in openings
    ]
    random.Random(seed).shuffle(texts)
    return [{"prompt": text[0].upper() + text[1:]} for text in texts]
