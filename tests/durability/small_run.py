"""A whole run in one process: the real loop, journal, learner and checkpoints, with a small sampler in vLLM's place.

The sampler's tokens follow from a hash of all published weights and of the sample id. So a run whose weights differ in
one bit writes other rollouts, and its journal says so.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections.abc import AsyncGenerator, Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.utils import logging as transformers_logging

from common.config.ppo import Config
from common.errors import BatchError, RankLostError
from common.health.health import Event
from common.model.files import load_tokenizer
from common.model.identity import model_digest
from common.types import Experience, Prompt, PromptRecord, Rollout, RolloutRef, Score, Turn, Void
from common.weights import Bucket
from deploy.policy_files import PolicyFiles
from deploy.run.critic import critic_basis
from deploy.run.leftovers import clear_leftovers
from deploy.run.summary import answers_path, write_answers
from learner.loop.answers import Answer
from learner.loop.evaluation import Evaluation
from learner.loop.prompts import PromptStream, heldout_prompts
from learner.loop.run import Run
from learner.loop.train_loop import train
from learner.ppo.critic_files import TrainedCritic, save_critic
from learner.ppo.learner import Learner
from learner.ppo.scores import RunningMoments
from tests.fakes import END, as_episode, make_rollout, save_tiny_tokenizer, tiny_config

NUM_STEPS = 5
NUM_PROMPTS = 6
UNSCORED = 4  # the prompt with this index is always void


def save_smallest_model(directory: Path) -> Path:
    """One layer of width 16, with the tokenizer of the other tests: an update takes 10 ms."""
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=END,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    save_tiny_tokenizer(directory)
    return directory


# A run that starts from `save_smallest_critic`, freezes a part of it and trains it more than the policy.
FROM_A_CRITIC = {
    "learner": {"critic": "separate", "critic_path": "next to the model", "critic_frozen": "attention"},
    "ppo": {"ppo_epochs": 1, "minibatches": 2, "value_epochs": 1},
}


# A run of episodes, whose environment rewards turns.
EPISODES: dict[str, Any] = {
    "rollouts_per_step": 4,
    "environment": {"function": "tests.tasks:NoSuchClass", "max_tokens": 15},
    "reward": {
        "sources": [
            {"name": "a_words", "function": "tests.tasks:a_words"},
            {"name": "game", "environment": True, "weight": 2},
        ]
    },
    "roles": {"episodes": True},
}


def save_smallest_critic(model: Path) -> Path:
    """A trained critic for the smallest model, in a directory next to it: random weights, and the moments of scores."""
    directory = model.parent / f"{model.name}-critic"
    if not directory.exists():
        torch.manual_seed(1)
        body = LlamaModel(LlamaConfig.from_pretrained(model))
        head = {"value_head.weight": torch.randn(1, 16), "value_head.bias": torch.randn(1)}
        cfg = tiny_config(model, learner={"critic": "separate"})
        record = TrainedCritic(critic_basis(cfg, PolicyFiles.load(str(model))), RunningMoments(9, 0.25, 3.0), [], [])
        save_critic(directory, {**body.state_dict(), **head}, record, base=model)
    return directory


def small_config(model: Path, **overrides: Any) -> Config:
    """`FROM_A_CRITIC` among the overrides: the run starts from `save_smallest_critic`."""
    if "critic_path" in (learner := overrides.get("learner", {})):
        overrides["learner"] = {**learner, "critic_path": str(save_smallest_critic(model))}
    settings: dict[str, Any] = {
        "num_steps": NUM_STEPS,
        "rollouts_per_step": 2,
        "sampling": {"max_new_tokens": 3},
        "ppo": {"ppo_epochs": 1, "minibatches": 2},
        "evaluation": {"prompts": 2, "every": 3},
        "checkpoint": {"every": 2, "keep": 2},
        "kl": {"controller": "adaptive", "coef": 0.1},
    }
    return tiny_config(model, **{**settings, **overrides})


class SmallRoles:
    """Every role of a run. The learner is real.

    `episodes`: an environment answers each turn, and rewards it. `poison`: the epoch and prompt of a rollout whose
    score is too large for float32. `torn`: those of a rollout whose batch fails in its second minibatch. `lose_at`: a
    rank is lost in the first update of this step.
    """

    def __init__(
        self,
        cfg: Config,
        *,
        poison: tuple[int, int] | None = None,
        torn: tuple[int, int] | None = None,
        lose_at: int | None = None,
        episodes: bool = False,
    ) -> None:
        self._cfg = cfg
        self.learner = Learner(cfg)
        self.version = -1
        self._weights = b""  # hash of the weights of this version
        self._poison, self._torn, self._lose_at, self._episodes = poison, torn, lose_at, episodes

    # Generators

    async def load(self, weights: AsyncGenerator[Any, None], version: int) -> dict[str, float]:
        digest = hashlib.sha256()
        async for item in weights:
            if isinstance(item, Bucket):
                item.verify()
                digest.update(item.values.tobytes())
        self._weights, self.version = digest.digest(), version
        return {}

    async def generate(self, prompt: Prompt, *, plain_tokens: int = 0) -> RolloutRef:
        seed = hashlib.sha256(self._weights + str(prompt.sample_id).encode()).digest()
        rng = np.random.default_rng(list(seed))
        tokens = [*rng.integers(4, 64, size=rng.integers(1, 4)).tolist(), END]
        rollout = make_rollout(prompt, tokens[:3], version=self.version)
        if self._episodes:
            rollout = episode(prompt, rng, version=self.version)
        for _ in range(int(rng.integers(3))):
            await asyncio.sleep(0)  # finish out of order
        return replace(RolloutRef.of(rollout), rollout=rollout)

    async def fetch(self, references: Sequence[Any]) -> list[Any]:
        return list(references)

    # Reward and reference

    async def score(self, ref: RolloutRef) -> Score | Void:
        if ref.sample_id.prompt == UNSCORED and ref.sample_id.epoch >= 0:
            return Void(ref.sample_id, "told to fail")
        share = float((ref.rollout.response_ids < 34).mean())
        if (ref.sample_id.epoch, ref.sample_id.prompt) == self._poison:
            share = 1e39
        if self._episodes:
            game = sum(turn.reward for turn in ref.rollout.turns)
            return Score(share + 2 * game, {"a_words": share, "game": game}, {"a_words": "tests.tasks:a_words"})
        return Score(share, {"a_words": share}, {"a_words": "tests.tasks:a_words"})

    judge = score

    async def logprobs(self, ref: RolloutRef) -> tuple[np.ndarray, bool]:
        return ref.rollout.rollout_logprobs + np.float32(0.01), True

    # The learner

    @property
    def step(self) -> int:
        return self.learner.step

    async def update(self, table: Any) -> dict[str, float]:
        if self.step == self._lose_at:
            self._lose_at = None
            raise RankLostError("Learner(0) died: told to")
        if self._torn in zip(table["epoch"].to_pylist(), table["prompt_index"].to_pylist()):
            with failing_second_minibatch(self.learner):
                return self.learner.update(table)
        return self.learner.update(table)

    async def credit(self) -> Any:
        return self.learner.credit()

    async def skip(self) -> None:
        self.learner.skip()

    async def reconfigure(self, cfg: Config) -> None:
        self.learner.reconfigure(cfg)

    async def rebuild(self) -> None:
        self.learner = Learner(self._cfg)

    async def unless_lost(self, work: Awaitable[Any]) -> Any:
        return await work

    async def policy_logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        return [rollout.rollout_logprobs for rollout in rollouts]

    async def publish(self) -> AsyncGenerator[Any, None]:
        for item in self.learner.publish():
            yield item

    async def restore(self, directory: Path) -> None:
        self.learner.restore(directory)

    async def save(self, directory: Path) -> Mapping[str, str]:
        return self.learner.save(directory)

    async def save_policy(self, directory: Path) -> None:
        self.learner.save_policy(directory)


def episode(prompt: Prompt, rng: np.random.Generator, *, version: int) -> Rollout:
    """One to three turns of one to three tokens; the environment says zero to two tokens after each but the last. Two
    tokens are a new context, before which the first of three turns ends a sequence."""
    tokens: list[int] = []
    turns: list[Turn] = []
    for left in reversed(range(int(rng.integers(1, 4)))):
        tokens += rng.integers(4, 64, size=rng.integers(1, 4)).tolist()
        said = rng.integers(4, 64, size=rng.integers(3)).tolist() if left else []
        info = json.dumps({"left": left})
        turn = Turn(len(tokens), len(tokens) + len(said), float(rng.integers(3)), "[]", info, 0.5)
        turns.append(replace(turn, new_context=len(said) == 2, ends=len(said) == left == 2))
        tokens += said
    row = Experience(make_rollout(prompt, tokens, version=version), Score(0.0, {}), None)
    return replace(as_episode(row, *turns).rollout, finish_reason="terminated")


@contextmanager
def failing_second_minibatch(learner: Learner) -> Iterator[None]:
    steps, whole = itertools.count(1), learner.optimizer_step

    def step() -> float:
        if next(steps) == 2:
            raise BatchError("told to fail")
        return whole()

    learner.optimizer_step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        del learner.optimizer_step


tokenizer_of = cache(load_tokenizer)


def small_run(directory: Path, model: Path, *, roles: Mapping[str, Any] | None = None, **overrides: Any) -> Run:
    """The run in this directory, new or continued, before it trains. `roles`: arguments of SmallRoles."""
    cfg, tokenizer = small_config(model, **overrides), tokenizer_of(model)
    records = [PromptRecord(f"q{i}", np.array([3, 4 + i], dtype=np.int32), {}) for i in range(NUM_PROMPTS)]
    heldout = [PromptRecord(f"h{i}", np.array([3, 40 + i], dtype=np.int32), {}) for i in range(2)]
    critic = cfg.critic_path
    every = SmallRoles(cfg, **(roles or {}))

    def evaluated(evaluation: Evaluation, answers: list[Answer], events: list[Event]) -> None:
        write_answers(answers_path(directory, evaluation), answers, tokenizer)

    run = Run(
        cfg,
        directory,
        PromptStream(records, seed=cfg.seed, rollouts_per_prompt=cfg.prompts.rollouts_per_prompt),
        heldout_prompts(heldout, cfg.evaluation.prompts),
        every,
        every,
        every,
        every,
        decode=lambda responses: tokenizer.batch_decode([ids.tolist() for ids in responses]),
        on_evaluation=evaluated,
        report=lambda message: None,
    )
    clear_leftovers(directory)
    run.journal.open_for_writing()
    if not run.journal.notes:
        run.journal.note(
            "begin",
            identity={"model": model_digest(model)} | ({"critic": model_digest(Path(critic))} if critic else {}),
            config=cfg.model_dump(mode="json", exclude_none=True),
            versions={},
            num_prompts=NUM_PROMPTS,
        )
    return run


def train_to_the_end(directory: Path, model: Path, **about: Any) -> list[Evaluation]:
    return asyncio.run(train(small_run(directory, model, **about)))
