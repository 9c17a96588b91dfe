"""Texts in windows: each token is predicted once, in every form of tokenizer and text."""

from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import UserError
from deploy.evaluation import texts
from deploy.evaluation.texts import cut, load_texts
from deploy.policy_files import PolicyFiles
from tests.fakes import save_tiny_model, tiny_config


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return PolicyFiles.load(str(save_tiny_model(tmp_path_factory.mktemp("policy"), context=16)))


def config(policy, **evaluation):
    return tiny_config(policy.path, evaluation=evaluation)


@pytest.mark.parametrize("beginning", [[], [9], [8, 9]])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 11])
def test_windows_predict_every_token_once_from_the_one_before(beginning, count):
    bare = list(range(100, 100 + count))
    windows = list(cut(bare, beginning, 5))
    predicted = [token for _, ids in windows for token in ids]
    assert predicted == (bare if beginning else bare[1:])
    for context, ids in windows:
        assert len(context) + len(ids) <= 5
        assert context[: len(beginning)] == beginning
        assert context[len(beginning) :] == ([ids[0] - 1] if ids[0] > 100 else [])
        assert context


def test_windows_are_as_long_as_setting_context_and_batch_allow(policy):
    for evaluation, others, longest in (
        ({"text_window": 6}, {}, 6),
        ({}, {}, 16),  # the model's context
        ({"text_window": 12}, {"max_batch_tokens": 10}, 10),
    ):
        cfg = tiny_config(policy.path, evaluation=evaluation, reference=others, sampling={"max_new_tokens": 2})
        [text] = load_texts(cfg.model_copy(update={"reference": cfg.reference.model_copy(update=others)}), [policy])
        assert {len(w.prompt.token_ids) + len(w.response_ids) for w in text.windows[:-1]} == {longest}


def test_the_shipped_text_is_measured_whole(policy):
    [text] = load_texts(config(policy), [policy])
    assert text.name == "shipped"
    assert text.tokens.sum() == sum(len(w.response_ids) for w in text.windows) > 4000
    ids = [id for w in text.windows for id in w.response_ids.tolist()]
    words = policy.tokenizer((texts.files("deploy.evaluation") / "held-out-text.txt").read_text())["input_ids"]
    assert ids == words[1:]


def test_windows_of_the_users_text_do_not_cross_its_records(policy, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "a1 a2 a3"}\n{"text": "b1"}\n{"text": "b2 b3 b4 b5"}\n')
    own = load_texts(config(policy, text=str(path), text_window=3), [policy])[1]
    pairs = [(w.prompt.token_ids.tolist(), w.response_ids.tolist()) for w in own.windows]
    words = [policy.tokenizer.convert_ids_to_tokens(context + ids) for context, ids in pairs]
    assert words == [["a1", "a2", "a3"], ["b2", "b3", "b4"], ["b4", "b5"]]
    assert [str(w.prompt.text) for w in own.windows] == [f"{path}, line {n}" for n in (1, 3, 3)]


@pytest.mark.parametrize("limit", [1, 4, 5, 6])
def test_no_more_tokens_than_the_setting_are_measured(policy, tmp_path, limit):
    path = tmp_path / "own.txt"
    path.write_text("a1 " * 7)
    shipped, own = load_texts(config(policy, text=str(path), text_window=3, text_tokens=limit), [policy])
    assert shipped.tokens.sum() == own.tokens.sum() == limit
    assert load_texts(config(policy, text_tokens=0), [policy]) == []


def test_a_text_without_a_token_to_predict_is_refused(policy, tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("a1")
    with pytest.raises(UserError, match=r"evaluation\.text .*own\.txt.*no text of two tokens"):
        load_texts(config(policy, text=str(path)), [policy])


def test_a_token_that_a_model_lacks_is_refused(policy, tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("a1 b29")
    small = SimpleNamespace(tokenizer=policy.tokenizer, size=SimpleNamespace(context=16, vocabulary=40))
    with pytest.raises(UserError, match=r"own\.txt.*embedding has 40 rows"):
        load_texts(config(policy, text=str(path), text_tokens=1), [policy, small])
    assert np.all([len(text.windows) for text in load_texts(config(policy, text=str(path)), [policy])])
