"""Reviews that begin with a mood and stop before the opinion. The score is the valence of the first opinion word.

Runs in the driver, and in each reward replica. A critic can learn to predict the score before it arrives: the mood
tells a little of it, and the opinion word nearly all.
"""

from __future__ import annotations

import random
import re
from typing import Any

from common.types import RewardInput
from deploy.tasks.sentiment import analyser

HELDOUT_PROMPTS = 128

_MOODS = (
    "It was the best evening of the year.",
    "Everything went right that day.",
    "We laughed the whole time.",
    "I would go back tomorrow.",
    "The sun came out at last.",
    "A friend had told me to go.",
    "It was our third visit this year.",
    "I went alone.",
    "They had closed half of the rooms.",
    "The price had doubled since spring.",
    "We waited two hours for a table.",
    "I want my money back.",
    "Half of us were ill the next day.",
    "It rained the whole week.",
    "Nobody said that they were sorry.",
    "I have never been so bored.",
)
_OPENINGS = (
    "All in all, the {} was very",
    "The {} was really",
    "In my opinion the {} was so",
    "Everyone agreed that the {} was very",
    "To me the {} felt very",
    "We found the {} quite",
)
_SUBJECTS = (
    *("soup", "fish", "cake", "coffee", "pizza", "music", "room", "staff"),
    *("view", "beach", "film", "concert", "hotel", "guide", "tour", "service"),
)


def train_prompts(seed: int) -> list[dict[str, Any]]:
    """Every beginning of a review that is not held out."""
    return _prompts(seed)[HELDOUT_PROMPTS:]


def heldout_prompts(seed: int) -> list[dict[str, Any]]:
    """128 beginnings that are in no training prompt."""
    return _prompts(seed)[:HELDOUT_PROMPTS]


def first_opinion(answer: RewardInput) -> float:
    """The valence of the first word that VADER's lexicon knows, from -1 (worst) to 1 (best); 0 without such a word."""
    lexicon = analyser().lexicon
    words = re.findall(r"[a-z']+", answer.response.lower())
    return next((lexicon[word] / 4 for word in words if word in lexicon), 0.0)


def _prompts(seed: int) -> list[dict[str, Any]]:
    texts = [f"{mood} {opening.format(subject)}" for mood in _MOODS for opening in _OPENINGS for subject in _SUBJECTS]
    random.Random(seed).shuffle(texts)
    return [{"prompt": text} for text in texts]
