"""Whole runs with agents: Ray, vLLM, and a tiny random model. An agent with tools, and the one that the docs show."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from common.config.loading import load_config
from common.config.ppo import Config
from common.files import read_records
from common.model.files import load_tokenizer
from common.user_code import import_path
from deploy.audit import run_audit
from deploy.train import run_training
from learner.loop.journal import Journal
from tests.contexts import sampled_places
from tests.environments import ASKS
from tests.fakes import END, ENGINE_GPUS, WORDS, save_tiny_model, tiny_config
from tests.test_docs import ROOT, blocks

pytestmark = pytest.mark.ray

SUMS = [(left, right) for left in range(1, 5) for right in range(1, 5)]
CALLS = [f'<tool_call>{{"name": "add", "arguments": {{"left": {a}, "right": {b}}}}}</tool_call>' for a, b in SUMS]
FIRST_CALL = len(WORDS) - len(CALLS)
# In place of the last words, the model has whole calls as tokens. So a random model writes calls that vLLM can parse.
WORDS_AND_CALLS = [*WORDS[:FIRST_CALL], *CALLS]
TEMPLATE = """{% for message in messages %}
{%- if message.role == 'assistant' %}{{ 'b8 ' + message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ ' <end> ' }}
{%- elif message.role == 'tool' %}{{ 'a9 ' + message.content + ' ' }}
{%- else %}{{ message.content + ' ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'b8 ' }}{% endif %}"""


def rows(directory) -> list[dict]:
    return [row for step in Journal(directory / "journal").since(0) for row in step.table.to_pylist()]


def save_model(directory, words, *, context=128):
    """A tiny model with this vocabulary, whose weights bfloat16 holds exactly."""
    save_tiny_model(directory, context=context)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.to(torch.bfloat16).to(torch.float32).save_pretrained(directory)
    vocabulary = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = Whitespace()
    special = {"eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, **special).save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory):
    """One whole run with an agent that answers the model's calls."""
    directory = tmp_path_factory.mktemp("tools")
    cfg = tiny_config(
        save_model(directory / "model", WORDS_AND_CALLS),
        rollouts_per_step=16,
        prompts={"format": "chat"},
        sampling={"max_new_tokens": 4},
        environment={"agent": "tests.environments:adds", "max_tokens": 60},
        reward={"sources": [{"name": "calls", "environment": True}], "normalise": "none"},
        learner={"precision": "fp32", "critic": "separate"},
        evaluation={"prompts": 4},
    )
    run_training(cfg, directory / "run")
    return directory / "run"


def test_calls_of_the_model_reach_the_agent_and_its_results_the_model(with_tools):
    found, tokenizer = rows(with_tools), load_tokenizer(with_tools.with_name("model"))
    assert len(found) == 3 * 16
    for row in found:
        start, num_calls = 0, 0
        for number, turn in enumerate(row["turns"], 1):
            sampled = row["response_ids"][start : turn["end"]]
            results = [sum(SUMS[token - FIRST_CALL]) for token in sampled if token >= FIRST_CALL]
            num_calls += len(results)
            over = number == len(row["turns"])
            assert over == (not results or number == ASKS)
            said = "" if over else " ".join([*(f"a9 b{result}" for result in results), "b8"])
            ended = "" if over or sampled[-1] == END else "<end> "  # of an answer that was cut off
            assert tokenizer.decode(row["response_ids"][turn["end"] : turn["next_start"]]) == ended + said
            assert not turn["new_context"]
            start = turn["next_start"]
        assert row["score"] == num_calls
        assert json.loads(row["turns"][-1]["info"]) == {"calls": num_calls}
        assert row["finish_reason"] == "terminated"
    assert {len(row["turns"]) for row in found} == {1, 2, 3}
    assert max(row["score"] for row in found) > ASKS  # several calls in one turn


def test_learner_and_generator_agree_about_the_tokens_after_calls(with_tools):
    records = read_records(with_tools / "metrics.jsonl")
    assert abs(records[0]["mismatch/kl"]) < 1e-8
    assert all(abs(record["mismatch/kl"]) < 0.05 for record in records)
    assert all(record["environment/contexts"] == 1 for record in records)
    assert run_audit(with_tools, replay=True) == 0


@pytest.fixture(scope="module")
def as_documented(tmp_path_factory):
    """A run of docs/environments.md's agent and config as they are, with a model and sizes for a test."""
    home, page = tmp_path_factory.mktemp("documented"), ROOT / "docs/environments.md"
    [agent] = [block for block in blocks(page, "python") if "def solve" in block]
    [config] = [block for block in blocks(page, "toml") if "my_agent:solve" in block]
    (home / "my_agent.py").write_text(agent)
    (home / "config.toml").write_text(config)
    records = [{"prompt": f"ask a{i} b{i}", "answer": f"a{i}"} for i in range(16)]
    (home / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    model = save_model(home / "model", WORDS, context=1024)
    sizes = ("num_steps=1", "rollouts_per_step=8", "prompts.max_tokens=16", "ray.dashboard=false")
    engine = (f"generators.gpus={ENGINE_GPUS}", "generators.dtype=float32", "generators.kv_cache_mib=16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(import_path, "_directories", [])
        patch.chdir(home)
        import_path.find_users_modules(home)
        settings = [f"model.path={model}", "ray.object_store_mib=256", *sizes, *engine]
        run_training(load_config(home / "config.toml", settings, Config), home / "run")
    return home / "run"


def test_the_agent_of_the_docs_runs_as_it_is_written_there(as_documented):
    found, tokenizer = rows(as_documented), load_tokenizer(as_documented.with_name("model"))
    assert len(found) == 8
    for row in found:
        texts, start = [], 0
        for turn in row["turns"]:
            texts.append(tokenizer.decode(row["response_ids"][start : turn["end"]], skip_special_tokens=True))
            start = turn["next_start"]
        solved = texts[-1].strip() == json.loads(row["fields"])["answer"]
        assert solved or len(texts) == 3
        assert row["score"] == float(solved)
        again = [{"role": "user", "content": "That is wrong. Try again."}]
        assert [json.loads(turn["observation"]) for turn in row["turns"]] == [again] * (len(texts) - 1) + [[]]
        assert not any(turn["new_context"] for turn in row["turns"])
        assert len(row["rollout_logprobs"]) == len(sampled_places(row))
