"""The task of the critic's demo: beginnings of reviews, and the valence of the first opinion word."""

import pytest

from common.types import RewardInput

pytest.importorskip("vaderSentiment")
from deploy.tasks.reviews import first_opinion, heldout_prompts, train_prompts


def said(response):
    return first_opinion(RewardInput("The worst soup was really", response, 5, "stop", {}))


def test_every_beginning_is_in_training_or_held_out_once():
    for seed in (0, 1):
        train, heldout = (
            [record["prompt"] for record in prompts(seed)] for prompts in (train_prompts, heldout_prompts)
        )
        assert len({*train, *heldout}) == len(train) + len(heldout) == 16 * 6 * 16  # moods, openings, subjects
        assert len(heldout) == 128
        assert (train[0], heldout[0]) == (train_prompts(seed)[0]["prompt"], heldout_prompts(seed)[0]["prompt"])
    assert heldout_prompts(0) != heldout_prompts(1)


# Valences are those of the lexicon's file: delicious 2.7, disappointing -2.2, love 3.2; "was" and "the" are not in it.
@pytest.mark.parametrize(
    ("response", "score"),
    [
        (" delicious, but the waiter was disappointing.", 2.7 / 4),
        (" Disappointing. We love the waiter.", -2.2 / 4),
        (" the same as the\n\nlove", 3.2 / 4),
        (" the same as before.", 0),
        ("", 0),
    ],
)
def test_the_first_word_of_the_lexicon_decides(response, score):
    assert said(response) == pytest.approx(score)
