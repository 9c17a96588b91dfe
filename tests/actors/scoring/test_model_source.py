"""The reward model as a source: scores against transformers' own classifier, and which tokens it reads."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from actors.scoring.model_source import RewardModelSource, reward_model_digest, try_reading
from actors.scoring.reward import Reward
from common.config.actors import RewardConfig, SourcesConfig
from common.config.sources import ModelSourceConfig
from common.data import prompt_tokens
from common.errors import UserError
from common.model.files import load_tokenizer
from common.model.reward_head import ScoreScale, load_reward_model, save_reward_model, write_scale
from common.types import RewardInput, Score
from tests.fakes import END, WORDS, make_prompt, make_rollout, save_tiny_model

# The reward model's own template. The policy's prompt was made with another one.
TEMPLATE = "{% for m in messages %}{{ 'b0' if m.role == 'user' else 'a0' }} {{ m.content }} <end> {% endfor %}"
TURNS = [
    {"role": "user", "content": "a1 a2"},
    {"role": "assistant", "content": "b3"},
    {"role": "user", "content": "a4"},
]
MEAN, DEVIATION = 1.25, 4.0


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def save_model(directory: Path, scale: ScoreScale, *, template: str | None = None) -> Path:
    """A tiny Llama with a random head, in directory/reward."""
    base = save_tiny_model(directory / "base")
    if template is not None:
        tokenizer = load_tokenizer(base)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(base)
    model = load_reward_model(base, dtype=torch.float32, device=torch.device("cpu"))
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    save_reward_model(model, base, directory / "reward", ScoreScale())
    write_scale(directory / "reward", scale)
    return directory / "reward"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("plain"), ScoreScale(chat=False, mean=MEAN, deviation=DEVIATION))


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("chat"), ScoreScale(chat=True), template=TEMPLATE)


@pytest.fixture(autouse=True)
def _one_thread():
    """As a reward process runs by default."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def source(directory: Path, **settings) -> RewardModelSource:
    settings = {"dtype": "float32", **settings}
    return RewardModelSource(ModelSourceConfig(name="helpful", model=str(directory), **settings), gpus=0)


def answer(prompt: str, response: str, messages: list[dict[str, str]] | None = None) -> RewardInput:
    return RewardInput(prompt, response, len(response.split()) + 1, "stop", {}, messages)


def ask(model: RewardModelSource, answers: list[RewardInput]) -> list[float]:
    async def scenario():
        return await asyncio.gather(*(model(each) for each in answers))

    return [raw.score for raw in asyncio.run(scenario())]


def classified(directory: Path, sequence: list[int]) -> float:
    """transformers' own score of one unpadded sequence."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([sequence])).logits.item()


def ragged_answers(count: int) -> list[RewardInput]:
    rng = np.random.default_rng(0)

    def text(low: int, high: int) -> str:
        return " ".join(WORDS[i] for i in rng.integers(3, 60, rng.integers(low, high)))

    return [answer(text(1, 20), text(0, 25)) for _ in range(count)]


def passes_of(model: RewardModelSource) -> list[tuple[int, int]]:
    """A list that gets (rows, width) of every forward pass from now on."""
    shapes: list[tuple[int, int]] = []
    model._model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


# Scores


def test_scores_are_transformers_own_in_deviations_from_the_mean(plain):
    answers = [answer("ask a1 b2", "a3 b4 b5"), answer("ask a1 b2", ""), answer("b7", "a9 a9 a9 a9 a9 a9 a9")]
    texts = ["ask a1 b2 a3 b4 b5 <end>", "ask a1 b2 <end>", "b7 a9 a9 a9 a9 a9 a9 a9 <end>"]
    expected = [(classified(plain, ids(text)) - 1.25) / 4.0 for text in texts]
    assert len({round(score, 2) for score in expected}) == 3  # the scores differ
    np.testing.assert_allclose(ask(source(plain), answers), expected, atol=1e-5)


def test_a_model_without_mean_and_deviation_gives_its_heads_scores(plain, tmp_path):
    directory = shutil.copytree(plain, tmp_path / "elsewhere")
    config = json.loads((directory / "config.json").read_text())
    del config["ratchet"]
    (directory / "config.json").write_text(json.dumps(config))
    (found,) = ask(source(directory), [answer("ask a1", "a3 b4")])
    assert found == pytest.approx(classified(plain, ids("ask a1 a3 b4 <end>")), abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_rows_of_a_batch_do_not_change_the_bits_of_a_score(plain, dtype):
    answers = ragged_answers(40)
    model = source(plain, dtype=dtype)
    passes = passes_of(model)
    together = ask(model, answers)
    assert [rows for rows, _ in passes] == [40]  # 40 of at most 44 tokens are well within 4096
    passes.clear()
    alone = [score for each in answers for score in ask(model, [each])]
    assert [rows for rows, _ in passes] == [1] * 40
    assert len({width for _, width in passes}) > 1  # each is padded to its own width
    assert together == alone
    assert len(set(together)) == 40

    frugal = source(plain, dtype=dtype, max_tokens=64, max_batch_tokens=128)
    passes = passes_of(frugal)
    assert ask(frugal, answers) == alone
    assert 1 < len(passes) < 40
    assert sum(rows for rows, _ in passes) == 40


def test_a_request_waits_for_others_before_its_forward_pass(plain):
    model = source(plain, batch_window_ms=300)
    passes = passes_of(model)

    async def scenario():
        first = asyncio.create_task(model(answer("ask", "a1")))
        for _ in range(10):  # without waiting, its pass would have begun by now
            await asyncio.sleep(0)
        await asyncio.gather(first, model(answer("ask", "a2")))

    asyncio.run(scenario())
    assert passes == [(2, 16)]


def test_a_pass_holds_like_lengths_within_its_budget(plain):
    model = source(plain, max_tokens=64, max_batch_tokens=96)
    passes = passes_of(model)
    # 16, 32 and 48 tokens with the end token: 48 + 48 | 32 * 3 | 16 * 6
    lengths = [48, 16, 32, 16, 32, 16, 16, 48, 32, 16, 16]
    ask(model, [answer("ask", " ".join(["a1"] * (n - 2))) for n in lengths])
    assert passes == [(2, 48), (3, 32), (6, 16)]


# Tokens that it reads


def test_a_conversation_that_is_too_long_loses_its_beginning(plain):
    model = source(plain, max_tokens=6)
    fits, longer = answer("b1 b2", "a1 a2 a3"), answer("b9 b8 b7 b1 b2", "a1 a2 a3")
    whole = ids("b1 b2 a1 a2 a3 <end>")
    assert model.token_ids(fits) == model.token_ids(longer) == whole
    assert model.token_ids(answer("b1", "a1 a2 a3 a4 a5 a6")) == ids("a2 a3 a4 a5 a6 <end>")
    first, second, uncut = *ask(model, [fits, longer]), *ask(source(plain), [longer])
    assert first == second == pytest.approx((classified(plain, whole) - MEAN) / DEVIATION, abs=1e-5)
    assert abs(uncut - first) > 1e-3


def test_messages_go_through_the_models_own_template(chat):
    asked = answer("what the policy was shown: b20 b21", "b5 b6", TURNS)
    expected = ids("b0 a1 a2 <end> a0 b3 <end> b0 a4 <end> a0 b5 b6 <end>")
    model = source(chat)
    assert model.token_ids(asked) == expected
    assert ask(model, [asked]) == [pytest.approx(classified(chat, expected), abs=1e-5)]


@pytest.mark.parametrize(
    ("trained_on_chat", "template", "messages", "expected"),
    [
        (True, TEMPLATE, TURNS, "b0 a1 a2 <end> a0 b3 <end> b0 a4 <end> a0 b5 <end>"),
        (True, TEMPLATE, None, "b0 ask a7 <end> a0 b5 <end>"),  # text is one message of the user
        (False, TEMPLATE, TURNS, "ask a7 b5 <end>"),
        (False, None, TURNS, "ask a7 b5 <end>"),
        # A model from elsewhere reads messages through its template, if it has one.
        (None, TEMPLATE, TURNS, "b0 a1 a2 <end> a0 b3 <end> b0 a4 <end> a0 b5 <end>"),
        (None, TEMPLATE, None, "ask a7 b5 <end>"),
        (None, None, TURNS, "ask a7 b5 <end>"),
    ],
)
def test_a_model_reads_chat_or_text_as_it_was_trained(tmp_path, trained_on_chat, template, messages, expected):
    model = source(save_model(tmp_path, ScoreScale(chat=trained_on_chat), template=template))
    assert model.token_ids(answer("ask a7", "b5", messages)) == ids(expected)


# Origin of a score


def test_the_origin_names_the_model_and_its_content(plain, tmp_path):
    def origin(directory: Path) -> tuple[str, str]:
        model = source(directory)
        name, _, digest = asyncio.run(model(answer("ask", "a1"))).origin.rpartition("@")
        return name, digest

    name, digest = origin(plain)
    assert name == str(plain)
    assert len(digest) == 16
    assert int(digest, 16) >= 0
    copied = shutil.copytree(plain, tmp_path / "copied")
    assert origin(copied) == (str(copied), digest)  # the hash is of its content, not of its path
    write_scale(copied, ScoreScale(chat=False, mean=MEAN, deviation=5.0))
    rescaled = origin(copied)[1]
    weights = load_file(copied / "model.safetensors")
    weights["score.weight"][0, 0] += 1
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert len({digest, rescaled, origin(copied)[1]}) == 3


# In the reward service


def service(directory: Path, **settings) -> Reward:
    model = {"name": "helpful", "model": str(directory), "dtype": "float32", "weight": 0.5, **settings}
    sources = [{"name": "a_words", "function": "tests.tasks:a_words"}, model]
    policy = load_tokenizer(directory)  # any tokenizer that has these words
    return Reward("Reward(0)", RewardConfig.model_validate({"sources": sources}), model=policy)


def test_a_rollout_is_scored_by_its_text_and_messages(plain, chat):
    rollout = make_rollout(make_prompt(0), ids("b5 a6 <end>"))
    for directory, prompt, expected in (
        (plain, replace(rollout.prompt, text="ask a7"), "ask a7 b5 a6 <end>"),
        (chat, replace(rollout.prompt, text="b20", messages=TURNS[:1]), "b0 a1 a2 <end> a0 b5 a6 <end>"),
    ):
        score = asyncio.run(service(directory).score(replace(rollout, prompt=prompt)))
        assert isinstance(score, Score)
        mean, deviation = (MEAN, DEVIATION) if directory == plain else (0.0, 1.0)
        raw = (classified(directory, ids(expected)) - mean) / deviation
        assert score.components == {"a_words": 0.5, "helpful": pytest.approx(raw, abs=1e-5)}
        assert score.total == pytest.approx(0.5 + 0.5 * raw, abs=1e-5)
        assert list(score.origins) == ["a_words", "helpful"]
        assert score.origins["a_words"] == "tests.tasks:a_words"
        assert score.origins["helpful"].startswith(f"{directory}@")


def test_an_error_in_a_forward_pass_voids_only_the_rollouts_in_it(plain, monkeypatch):
    forward, calls = RewardModelSource.forward, []

    def fails_once(self, sequences):
        calls.append(len(sequences))
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return forward(self, sequences)

    monkeypatch.setattr(RewardModelSource, "forward", fails_once)
    reward = service(plain)
    rollouts = [make_rollout(make_prompt(i), [4 + i, END]) for i in range(3)]

    async def scenario():
        return await asyncio.gather(*(reward.score(r) for r in rollouts)), await reward.score(rollouts[0])

    failed, later = asyncio.run(scenario())
    reason = "reward source helpful raised RuntimeError: out of memory"
    assert [(void.sample_id, void.reason) for void in failed] == [(r.prompt.sample_id, reason) for r in rollouts]
    assert calls == [3, 1]
    assert isinstance(later, Score)


def test_a_score_that_is_not_finite_voids_the_rollout(plain):
    rollout, serving = make_rollout(make_prompt(4), [4, END]), service(plain)
    (model,) = (source._model for _, source in serving._sources if isinstance(source, RewardModelSource))
    torch.nn.init.constant_(model.score.weight, float("nan"))
    result = asyncio.run(serving.score(rollout))
    assert (result.sample_id, result.reason) == (rollout.prompt.sample_id, "reward source helpful returned nan")


# Before a run

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ASKED = answer("ask a3", "a4", [{"role": "user", "content": "ask a3"}])


def tried(directory: Path, asked: RewardInput = ASKED) -> str:
    cfg = ModelSourceConfig(name="s", model=str(directory))
    return try_reading(cfg, SourcesConfig(sources=(cfg,)), asked)


@pytest.mark.parametrize(("template", "chat"), [("{{ messages[1].content }}", True), (None, False)])
def test_a_model_that_can_read_the_first_prompt_passes(tmp_path, template, chat):
    assert tried(save_model(tmp_path, ScoreScale(chat=chat), template=template)) == ""


@pytest.mark.parametrize(
    ("template", "chat", "reason"),
    [
        (None, True, "its tokenizer or chat template refuses the first prompt: Cannot use chat template functions"),
        ("{{ raise_exception('no users') }}", None, "refuses the first prompt: no users; give the model's tokenizer"),
        (ENDLESS, True, "refuses the first prompt: it did not end within 0.1 s of computing"),
    ],
)
def test_a_model_that_cannot_read_the_first_prompt_is_refused(tmp_path, monkeypatch, template, chat, reason):
    monkeypatch.setattr(prompt_tokens._TemplateClock, "TICK_S", 0.05)
    monkeypatch.setattr(prompt_tokens._TemplateClock, "LIMIT", 2)
    monkeypatch.setattr(prompt_tokens, "_clock", prompt_tokens._TemplateClock())
    directory = save_model(tmp_path, ScoreScale(chat=chat), template=template)
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        tried(directory)
    assert str(caught.value).startswith(f"reward source s ({directory}): its tokenizer or chat template")


def test_a_tokenizer_with_more_tokens_than_embedding_rows_is_refused(plain, tmp_path):
    directory = shutil.copytree(plain, tmp_path / "rm")
    own = load_tokenizer(directory)
    own.add_tokens(["a3!"])
    own.save_pretrained(directory)
    with pytest.raises(UserError, match=r"it has 'a3!', token 64, but the model's embedding has 64 rows"):
        tried(directory, answer("ask a3!", "a4"))


def test_a_model_is_the_same_as_long_as_its_content_is(plain, tmp_path):
    directory = shutil.copytree(plain, tmp_path / "moved")
    digest, moved = (reward_model_digest(ModelSourceConfig(name="s", model=str(path))) for path in (plain, directory))
    assert moved == digest
    write_scale(directory, ScoreScale(chat=False, mean=MEAN, deviation=5.0))
    assert reward_model_digest(ModelSourceConfig(name="s", model=str(directory))) != digest
