"""Tasksets of the package verifiers: their rollouts ask the model at the endpoint, and their rewards are the score.

Most tests need the package, which is no dependency of the tests.
"""

import asyncio
import json
import os
import sys

import pytest

from actors.environments.check import check_environment, check_verifiers
from actors.environments.environments import Environments
from actors.environments.verifiers_agent import VerifiersAgent
from common.config.actors import PromptFormat
from common.config.environment import EnvironmentConfig
from common.data.prompt_records import prompt_record
from common.data.records import read_source
from common.errors import UserError
from common.optional_packages import is_installed
from common.types import Prompt, SampleId, Void
from tests.actors.environments.templates import CHATML, with_template
from tests.actors.environments.test_agents import ASKED, TOKENIZER, play

needs_package = pytest.mark.skipif(not is_installed("verifiers"), reason="needs the package verifiers")
CHAT = PromptFormat(format="chat")
NEEDS = "needs the package verifiers, which is not installed; call pip install verifiers"
# A taskset whose harness asks twice, in the process of the rollout.
TASKSET = """
import verifiers.v1 as vf
from openai import AsyncOpenAI


class AddData(vf.TaskData):
    answer: str


class AddTask(vf.Task[AddData]):
    @vf.reward(weight=2.0)
    async def right(self, trace: vf.Trace) -> float:
        return float(self.data.answer in (trace.last_reply or ""))

    @vf.metric
    async def letters(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply or ""))


class AddTaskset(vf.Taskset[AddTask]):
    def load(self):
        for a in range(20):
            yield AddTask(AddData(prompt=f"{a} + 1 =", system_prompt="Add.", answer=str(a + 1)), self.config.task)


class TwiceConfig(vf.HarnessConfig):
    pass


class Twice(vf.Harness[TwiceConfig]):
    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data, **more):
        system, prompt = self.resolve_prompt(data)
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        async with AsyncOpenAI(base_url=endpoint, api_key=secret) as client:
            for _ in range(2):
                done = await client.chat.completions.create(model=ctx.model, messages=messages)
                messages += [done.choices[0].message.model_dump(), {"role": "user", "content": "Sure?"}]
        if "fail" in messages[-2]["content"]:
            raise RuntimeError("no more")
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


__all__ = ["AddTaskset", "Twice"]
"""


@pytest.fixture
def taskset(tmp_path, monkeypatch):
    """The name of the taskset, next to the config file."""
    (tmp_path / "made_adding.py").write_text(TASKSET)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield "made_adding"
    sys.modules.pop("made_adding", None)


def prompts(taskset, setting="prompts.train"):
    return [
        record for _, record in read_source(f"verifiers:{taskset}", setting, seed=0, reasoning_gym=CHAT.reasoning_gym)
    ]


def episode(taskset, *texts, **settings):
    """The rollout or void of the first training task, and its contexts."""
    cfg = EnvironmentConfig(verifiers=taskset, **settings)
    host = Environments("Environments(0)", cfg, model=TOKENIZER, prompts=CHAT)
    record = prompt_record("here", prompts(taskset)[0], CHAT, TOKENIZER)
    prompt = Prompt(SampleId(0, 0, 0), record.text, record.token_ids, record.fields, record.messages)
    left = list(texts)
    try:
        return asyncio.run(asyncio.wait_for(play(host, prompt, model=lambda context: left.pop(0)), 60))
    finally:
        host.close()


@needs_package
def test_each_task_is_a_prompt_and_one_in_five_is_held_out(taskset):
    train, heldout = prompts(taskset), prompts(taskset, "prompts.heldout")
    assert 0 < len(heldout) < len(train)
    numbers = [record["verifiers"]["task"]["idx"] for record in [*train, *heldout]]
    assert sorted(numbers) == list(range(20))
    for record in train:
        number = record["verifiers"]["task"]["idx"]
        assert record["prompt"] == [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": f"{number} + 1 ="},
        ]
        assert record["verifiers"]["task"]["answer"] == str(number + 1)


@needs_package
def test_a_rollout_of_the_package_is_an_episode_and_its_reward_the_score(taskset):
    number = prompts(taskset)[0]["verifiers"]["task"]["idx"]
    rollout, contexts = episode(taskset, "Hm.", f"It is {number + 1}.")
    assert contexts[0] == "<|im_start|>system\nAdd.<|im_end|>\n" + ASKED.format(f"{number} + 1 =")
    assert contexts[1] == contexts[0] + "Hm.<|im_end|>\n" + ASKED.format("Sure?")
    assert [turn.reward for turn in rollout.turns] == [0.0, 2.0]
    info = json.loads(rollout.turns[-1].info)
    assert info == {"rewards": {"right": 2.0}, "metrics": {"letters": float(len(f"It is {number + 1}."))}}
    assert rollout.finish_reason == "terminated"
    assert not [name for name in os.environ if name.startswith("RATCHET_EPISODE_API_KEY_")]


@needs_package
def test_the_package_ends_and_scores_a_rollout_at_max_turns(taskset):
    rollout, contexts = episode(taskset, "Hm.", max_turns=1)
    assert len(contexts) == 1
    assert [turn.reward for turn in rollout.turns] == [0.0]


@needs_package
def test_a_rollout_that_fails_is_void(taskset):
    void, _ = episode(taskset, "Hm.", "I fail.")
    assert isinstance(void, Void)
    assert "the agent raised RuntimeError: the rollout of verifiers failed: HarnessError" in void.reason
    assert "no more" in void.reason


@needs_package
def test_a_rollout_that_reaches_max_tokens_is_void(taskset):
    void, contexts = episode(taskset, "Hm.", max_tokens=5)
    assert len(contexts) == 1
    assert "a request was refused, because the episode has reached environment.max_tokens (5), and the agent" in (
        void.reason
    )
    assert "context_length_exceeded" in void.reason


@needs_package
def test_a_taskset_is_checked_before_a_run(taskset):
    cfg = EnvironmentConfig(verifiers=taskset)
    assert check_environment(cfg, with_template(CHATML), model="m", chat=True) == []
    with pytest.raises(UserError, match=r"^environment\.verifiers \(nowhere\) cannot be used: .*nowhere"):
        check_verifiers("nowhere")
    with pytest.raises(UserError, match=r"^prompts\.train \(verifiers:nowhere\) cannot be used: .*nowhere"):
        prompts("nowhere")


@needs_package
def test_a_harness_that_runs_what_the_model_writes_is_refused(taskset, tmp_path):
    (tmp_path / "made_adding.py").write_text(TASKSET.replace("EXECUTES_CODE = False", "EXECUTES_CODE = True"))
    with pytest.raises(UserError, match=r"its harness \(made_adding\) runs what the model writes, which must not"):
        VerifiersAgent(taskset, max_turns=2)


def test_without_the_package_one_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(UserError, match=rf"^environment\.verifiers \(gsm8k\) {NEEDS}"):
        VerifiersAgent("gsm8k", max_turns=2)
    with pytest.raises(UserError, match=rf"^prompts\.train \(verifiers:gsm8k\) {NEEDS}"):
        prompts("gsm8k")


def test_verifiers_has_no_pairs():
    with pytest.raises(UserError, match=r"data\.train \(verifiers:gsm8k\): verifiers has prompts only; name another"):
        list(read_source("verifiers:gsm8k", "data.train", seed=0))
