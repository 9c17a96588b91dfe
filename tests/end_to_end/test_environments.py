"""Whole runs whose rollouts are episodes with an environment, and a tiny random model: one on Ray with vLLM, and two in
one process."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.config.ppo import Config
from common.experience_table import response_masks
from common.files import read_records
from common.model.files import load_tokenizer
from common.types import SampleId
from deploy.audit import run_audit
from deploy.train import run_training
from learner.loop.journal import Journal
from tests.contexts import contexts_of, sampled_places
from tests.environments import TURNS
from tests.fakes import save_tiny_model, tiny_config
from tests.local_run import in_one_process

pytestmark = pytest.mark.ray

GAME = {"name": "game", "environment": True}


def run_config(model, game: str, **overrides) -> Config:
    return tiny_config(
        model,
        **{
            "rollouts_per_step": 16,
            "max_staleness": 1,
            "sampling": {"max_new_tokens": 4},
            "environment": {"function": f"tests.environments:{game}", "max_tokens": 40},
            "reward": {"sources": [GAME], "normalise": "none"},
            "learner": {"precision": "fp32", "critic": "separate"},
            "optimizer": {"learning_rate": 5e-4, "value_head_learning_rate": 1e-2},  # so a version changes little
            "evaluation": {"prompts": 4},
            **overrides,
        },
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose weights bfloat16 holds exactly. The learner then publishes exactly its weights."""
    directory = save_tiny_model(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.to(torch.bfloat16).to(torch.float32).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """One whole run with AWords. A prompt kills the environment's process once, and another one makes it raise an
    error."""
    home = tmp_path_factory.mktemp("run")
    (home / "2.kill").write_text("x")  # one death, which costs nothing
    for name, first, number in (("train", 0, 12), ("heldout", 20, 4)):
        records = [{"prompt": f"ask a{i} b{i}", "kill": str(home / f"{i}.kill")} for i in range(first, first + number)]
        (home / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cfg = run_config(
        model,
        "Fragile",
        prompts={name: str(home / f"{name}.jsonl") for name in ("train", "heldout")},
        reward={"sources": [GAME], "normalise": "none", "max_void_share": 0.6},
    )
    run_training(cfg, home / "whole")
    return home / "whole"


def rows(directory) -> list[dict]:
    journal = Journal(directory / "journal")
    return [row for step in journal.since(0) for row in step.table.to_pylist()]


def test_policy_and_environment_write_in_turns(finished):
    found = rows(finished)
    assert len(found) == 3 * 16
    for row in found:
        turns = row["turns"]
        assert [json.loads(turn["info"]) for turn in turns] == [{"turn": n + 1} for n in range(TURNS)]
        assert row["finish_reason"] == "terminated"
        assert all(turn["next_start"] - turn["end"] == 2 for turn in turns[:-1])  # two b-words
        assert turns[-1]["end"] == turns[-1]["next_start"] == len(row["response_ids"])
        assert row["score"] == pytest.approx(sum(turn["reward"] for turn in turns))
        sampled = len(row["response_ids"]) - 2 * (TURNS - 1)
        assert [len(row[name]) for name in ("rollout_logprobs", "policy_versions", "ref_logprobs")] == [sampled] * 3


def test_learner_and_generator_agree_about_every_sampled_token(finished):
    records = read_records(finished / "metrics.jsonl")
    # In step 0 both have the same weights in float32. Later the published ones are rounded to bfloat16, and may be old.
    assert abs(records[0]["mismatch/kl"]) < 1e-8
    assert all(abs(record["mismatch/kl"]) < 0.05 for record in records)
    for record in records:
        assert (record["environment/turns"], record["environment/tokens"]) == (TURNS, 2 * (TURNS - 1))
        assert 0 <= record["environment/cached"] <= 1
        assert record["wait/environments_s"] >= 0


def test_the_journal_alone_rebuilds_the_weights(finished):
    assert run_audit(finished, replay=True) == 0


# It forgets all but the last two messages, so a longer conversation does not begin with the tokens of a shorter one.
FORGETFUL = """{% for message in messages[-2:] %}
{{- ('ask ' if message.role == 'user' else 'b9 ') + message.content + ' ' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'b8' }}{% endif %}"""


@pytest.fixture(scope="module")
def by_turns(model, tmp_path_factory):
    """One whole run in which each turn has a prompt of its own, and each second turn ends a sequence."""
    directory = tmp_path_factory.mktemp("turns")
    chat = shutil.copytree(model, directory / "model")
    (chat / "chat_template.jinja").write_text(FORGETFUL)
    environment = {"function": "tests.environments:Restarting", "max_tokens": 60, "sequence": "turn"}
    prompts = {"format": "chat", "max_tokens": 16}
    with in_one_process():
        run_training(run_config(chat, "Restarting", prompts=prompts, environment=environment), directory / "run")
    return directory / "run"


def test_each_turn_may_have_a_prompt_of_its_own(by_turns):
    found = rows(by_turns)
    assert len(found) == 3 * 16
    tokenizer = load_tokenizer(by_turns.with_name("model"))
    for row in found:
        assert [turn["new_context"] for turn in row["turns"]] == [True, True, False]
        assert [turn["ends"] for turn in row["turns"]] == [False, True, False]
        assert len(row["rollout_logprobs"]) == len(row["ref_logprobs"]) == len(sampled_places(row))
        (_, first), (second, _), (third, _) = contexts_of(row)
        said = tokenizer.decode(row["response_ids"][: len(first)], skip_special_tokens=True)
        text = tokenizer.decode(second[: row["turns"][0]["next_start"] - row["turns"][0]["end"]])
        assert text.split() == f"b9 {said} ask b1 b7 b8".split()
        assert tokenizer.decode(third[:5]) == "ask a3 b5 b6 b8"


def test_learner_and_generator_agree_about_the_tokens_of_every_context(by_turns):
    records = read_records(by_turns / "metrics.jsonl")
    assert abs(records[0]["mismatch/kl"]) < 1e-8
    assert all(abs(record["mismatch/kl"]) < 0.05 for record in records)
    model = AutoModelForCausalLM.from_pretrained(by_turns.with_name("model"), dtype=torch.float32)
    for row in rows(by_turns)[:16]:  # of step 0
        expected = []
        for ids, places in contexts_of(row):
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected += [logprobs[place - 1, ids[place]].item() for place in places]
        np.testing.assert_allclose(row["rollout_logprobs"], expected, atol=1e-4)


def test_a_journal_of_new_contexts_alone_rebuilds_the_weights(by_turns):
    assert run_audit(by_turns, replay=True) == 0


@pytest.fixture(scope="module")
def with_agent(model, tmp_path_factory):
    """One whole run with an agent that has two conversations in each episode."""
    directory = tmp_path_factory.mktemp("agent")
    chat = shutil.copytree(model, directory / "model")
    (chat / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ 'b8 ' + message.content + ' <end> ' if message.role == 'assistant' "
        "else message.content + ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'b8 ' }}{% endif %}"
    )
    environment = {"function": None, "agent": "tests.environments:talks", "max_tokens": 60}
    cfg = run_config(chat, "", prompts={"format": "chat", "max_tokens": 16}, environment=environment)
    with in_one_process():
        run_training(cfg, directory / "run")
    return directory / "run"


def test_the_conversations_of_an_agent_are_sequences_with_its_score(with_agent):
    found = rows(with_agent)
    assert len(found) == 3 * 16
    tokenizer = load_tokenizer(with_agent.with_name("model"))
    for row in found:
        assert [(turn["new_context"], turn["ends"]) for turn in row["turns"]] == [
            (False, False),
            (True, True),
            (False, False),
        ]
        (first, _), (second, _) = contexts_of(row)
        said = tokenizer.decode([row["response_ids"][place] for place in sampled_places(row)], skip_special_tokens=True)
        words = said.split()
        assert row["score"] == pytest.approx(sum(word.startswith("a") for word in words) / max(1, len(words)))
        assert json.loads(row["turns"][-1]["info"]) == {"words": len(words)}
        assert " b5 b6 b8 " in tokenizer.decode(first)
        assert tokenizer.decode(second[:3]) == "a3 b7 b8"
        assert row["finish_reason"] == "terminated"


def test_learner_and_generator_agree_about_the_tokens_of_an_agent(with_agent):
    records = read_records(with_agent / "metrics.jsonl")
    assert abs(records[0]["mismatch/kl"]) < 1e-8
    assert run_audit(with_agent, replay=True) == 0


def test_an_environments_process_may_die_in_the_middle_of_an_episode(finished):
    assert (finished.parent / "2.kill").read_text() == ""
    found = rows(finished)
    assert len({SampleId(row["epoch"], row["prompt_index"], row["replica"]) for row in found}) == 3 * 16
    assert "died" in (finished / "pool-events.jsonl").read_text()


def test_an_episode_that_fails_is_void_with_its_traceback(finished):
    voids = [reason for step in Journal(finished / "journal").since(0) for _, reason in step.voids]
    assert len(voids) >= 3  # 48 rollouts are more than three passes over the prompts
    assert all("b3 has no answer" in reason for reason in voids)
    records = read_records(finished / "metrics.jsonl")
    assert sum(record["environment/voids/raised"] for record in records) == len(voids)
    prompts = [row["prompt"] for row in rows(finished)]
    assert not any(prompt.endswith("b3") for prompt in prompts)
    assert "ValueError: b3 has no answer" in next((finished / "errors").glob("*.txt")).read_text()


def test_masks_of_the_journal_hide_what_the_environment_said(finished):
    table = Journal(finished / "journal").read(0).table
    for mask, row in zip(response_masks(table), table.to_pylist(), strict=True):
        ids = np.array(row["response_ids"])
        assert len(ids[~mask]) == 2 * (TURNS - 1)
        assert mask.sum() == len(row["rollout_logprobs"])
