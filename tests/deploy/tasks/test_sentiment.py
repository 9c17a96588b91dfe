"""The shipped task of the demo: openings that may go well or badly, and how positive a response sounds."""

import sys

import pytest

from common.errors import UserError
from common.types import RewardInput
from common.user_code.functions import load_function

pytest.importorskip("vaderSentiment")
from deploy.tasks.sentiment import heldout_prompts, positivity, train_prompts


def texts(prompts, seed=0):
    return [record["prompt"] for record in prompts(seed)]


def said(response, prompt="My visit to the bakery last week was"):
    return positivity(RewardInput(prompt, response, 5, "stop", {}))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_opening_is_repeated_within_or_across_train_and_heldout(seed):
    train, heldout = texts(train_prompts, seed), texts(heldout_prompts, seed)
    assert len({*train, *heldout}) == len(train) + len(heldout) == 7 * 12 * 5  # groups, subjects and openings
    assert len(heldout) == 128


def test_the_seed_decides_which_openings_are_held_out():
    for prompts in (train_prompts, heldout_prompts):
        assert prompts(5) == prompts(5)
    assert {*texts(train_prompts, 5), *texts(heldout_prompts, 5)} == {*texts(train_prompts), *texts(heldout_prompts)}
    shared = {*texts(heldout_prompts, 5)} & {*texts(heldout_prompts, 6)}
    assert 10 < len(shared) < 70  # 128 * 128 / 420 = 39 expected by chance


def test_openings_are_plain_text_that_a_response_can_continue():
    for text in texts(train_prompts) + texts(heldout_prompts):
        assert text[0].isupper()
        assert text == " ".join(text.split())
        assert not set("{}") & set(text)


def test_most_openings_are_neutral():
    scores = [said(text) for text in texts(train_prompts) + texts(heldout_prompts)]
    assert sum(score == 0 for score in scores) > 0.8 * len(scores)


@pytest.mark.parametrize(
    ("response", "sign"),
    [
        (" wonderful, and I loved every minute of it!", 1),
        (" a delight: kind people and excellent bread.", 1),
        (" horrible. I hated the smell, and I was sick.", -1),
        (" not good at all, a sad waste of money.", -1),
        (" on the left side of the street.", 0),
        ("", 0),
    ],
)
def test_a_clear_sentence_has_the_right_sign_with_any_prompt(response, sign):
    for prompt in ("The happy, brilliant, lovely", "The cruel, disgusting, terrible", ""):
        score = said(response, prompt)
        assert 0.4 < sign * score <= 1 if sign else score == 0


def test_the_message_of_the_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)  # importing it raises ImportError
    monkeypatch.delitem(sys.modules, "deploy.tasks.sentiment")
    for function in ("positivity", "train_prompts"):
        with pytest.raises(UserError, match=r"pip install 'ratchet-rlhf\[demo\]'"):
            load_function(f"deploy.tasks.sentiment:{function}", "reward source human")
