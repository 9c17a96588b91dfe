"""Plays the environment's side of episodes. Runs in each environment replica.

A plain class: `actors.pool.ray_actor` makes it a Ray actor. For each episode the driver calls

    begin     makes an instance of the user's class; may replace the prompt
    step      answers a turn of the model and adds what it says to the rollout; the last one closes the instance
    end       closes the instance of an episode that is not played to its end

The driver holds no tokens: a rollout stays in the process that extended it last.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from actors.environments.instance import BlocksLoopError, Deadline, Instance
from actors.environments.kinds import Kind, Make, episode_kind
from actors.environments.steps import LimitError, read_step
from actors.environments.transcript import Transcript
from actors.environments.user_threads import UserLoop
from common.config.actors import PromptFormat, SamplingConfig
from common.config.environment import EnvironmentConfig
from common.environment import VOID_KINDS, EpisodePrompt
from common.metrics import meters
from common.model.files import end_token_ids, load_tokenizer, resolve_model
from common.model.size import model_size
from common.plain_text import one_line
from common.types import IN_EPISODE, Prompt, Rollout, RolloutRef, SampleId, ScoringError, Void
from common.user_code.errors import UserCodeError, error_text

MAX_STUCK = 8  # with this many threads in calls that are far past their limit, the process is replaced
END_AFTER_S = 2.0  # before the process ends, so that its last answers reach the driver
POLL_S = 0.05


class _Saved(NamedTuple):
    """The prompt and the state from which an episode continues in another process."""

    prompt: Prompt  # of its rollout: `reset` may have replaced the first one
    state: Any


class Environments:
    """The episodes of one replica. A failure of the user's code costs one episode, which is void.

    Python cannot end a thread from outside. If an async method blocks the event loop that all episodes share, or if
    MAX_STUCK plain methods, tools or agents still run after twice their limit, the process ends, and the pool replaces
    it. Its other episodes begin again, or continue from their states.
    """

    CLOSE_S = 10.0  # longest time for `close` of the user's objects, seconds

    def __init__(
        self,
        name: str,
        cfg: EnvironmentConfig,
        *,
        model: str | PreTrainedTokenizerBase,
        prompts: PromptFormat,
        seed: int = 0,
        trust_remote_code: bool = False,
        sampling: SamplingConfig | None = None,
        make: Make | None = None,
        end_process: Callable[[], None] = lambda: os._exit(1),
    ) -> None:
        """`model` is the policy: its tokenizer reads and writes tokens. `seed` and `sampling` are of the run; without
        `sampling`, the defaults. `make` makes the object of an episode; None: as `cfg` says. `end_process` ends this
        process. Raises UserError for an environment that cannot be used."""
        self._name, self._cfg, self._seed = name, cfg, seed
        known: dict[str, Any] = {"max_prompt_tokens": prompts.max_tokens}
        if isinstance(model, str):
            directory = resolve_model(model, trust_remote_code=trust_remote_code)
            model, size = load_tokenizer(directory), model_size(directory)
            known["max_prompt_tokens"] = min(prompts.max_tokens, size.context - cfg.max_tokens)
            known |= {"vocabulary": size.vocabulary, "end_tokens": end_token_ids(directory, model)}
        kind = Kind(make) if make else episode_kind(cfg, model, sampling or SamplingConfig())
        self._make, self._close_kind = kind.make, kind.close
        self._transcript = Transcript(cfg, prompts, model, **known, **kind.template_options)
        self._loop = UserLoop()
        self._episodes: dict[SampleId, Instance] = {}
        self._stuck: list[Instance] = []  # closed ones whose thread may still run
        self._end_process, self._ends, self._checks_stuck = end_process, False, False
        self._warned: set[str] = set()
        # step_timeout_s is below 0.9 * timeout_s, and a request must be answered before timeout_s.
        self._close_s = min(0.9 * self.CLOSE_S, 0.05 * cfg.timeout_s)
        self._num_closing = 0  # instances whose `close` runs
        meters.count("ratchet_environment_steps_total", 0)
        for reason in VOID_KINDS:
            meters.count("ratchet_environment_voids_total", 0, reason=reason)

    async def ready(self) -> str:
        """Returns the replica's name."""
        return self._name

    async def begin(self, prompt: Prompt, state: bytes | None = None) -> tuple[Prompt | Void, bool]:
        """Makes the instance of an episode and resets it. Returns the prompt that the model gets, and False.

        `state` is of an earlier `step` of this episode, in this process or another one. If the class can restore it,
        the episode continues after that step. Then the result is the prompt of its rollout, and True."""
        await self.end(prompt.sample_id)
        self._episodes[prompt.sample_id] = instance = Instance(self._make, self._loop, prompt.sample_id)
        deadline = self._deadline()
        try:
            await instance.create(deadline)
            said = await self._reset(instance, prompt, deadline)
            if state is not None and instance.has("restore"):
                saved = _unpickled(state)
                await instance.call("restore", saved.state, deadline=deadline)
                return saved.prompt, True
            return await self._replaced(instance, prompt, said, deadline), False
        except UserCodeError as error:
            return await self._void(instance, prompt, "", error), False

    async def _replaced(self, instance: Instance, prompt: Prompt, said: Any, deadline: Deadline) -> Prompt:
        """The prompt that `reset` asked for. An object with `refuse_prompt` is asked again if it is too long."""
        while True:
            try:
                return self._transcript.replaced(prompt, said, instance.gave("reset"))
            except LimitError as error:
                if not instance.has("refuse_prompt"):
                    raise UserCodeError(
                        f"reset returned a prompt of {error.num_tokens} tokens, but prompts.max_tokens and the model's "
                        f"context allow {error.room}",
                        fault="reset returned a prompt that is too long",
                    ) from None
                said = await instance.call("refuse_prompt", error, deadline=deadline)

    async def _reset(self, instance: Instance, prompt: Prompt, deadline: Deadline) -> Any:
        if not instance.has("reset"):
            return None
        # A copy: a game may change its board in place, and the reward and the journal must get the record's.
        messages, fields = copy.deepcopy((prompt.messages, dict(prompt.fields)))
        seed = episode_seed(self._seed, prompt.sample_id)
        argument = EpisodePrompt(prompt.text, messages, fields, seed)
        return await instance.call("reset", argument, deadline=deadline)

    async def step(self, rollout: Rollout) -> tuple[Rollout | None, RolloutRef | Void, bytes | None]:
        """Answers the newest turn of a rollout. Returns three values: the rollout with the environment's answer, which
        stays in this process until it is fetched; the facts about it that the loop needs; and the environment's state,
        if the episode continues and the class has a state. A generator continues a rollout that is not finished."""
        prompt = rollout.prompt
        instance = self._episodes.get(prompt.sample_id)
        if instance is None:
            meters.count("ratchet_environment_voids_total", reason="died")
            reason = f"environment {self._cfg.name}: this process has no such episode"
            return None, Void(prompt.sample_id, reason, kind="died"), None
        deadline, state = self._deadline(), None
        try:
            extended = await self._extended(instance, rollout, deadline)
            if extended.finish_reason == IN_EPISODE and instance.has("state"):
                state = _pickled(_Saved(prompt, await instance.call("state", deadline=deadline)))
        except UserCodeError as error:
            return None, await self._void(instance, prompt, self._transcript.whole(rollout), error), None
        meters.count("ratchet_environment_steps_total")
        if extended.finish_reason != IN_EPISODE:
            await self.end(prompt.sample_id)
        return extended, RolloutRef.of(extended), state

    async def _extended(self, instance: Instance, rollout: Rollout, deadline: Deadline) -> Rollout:
        """The rollout with the answer to its newest turn. An answer that reaches a limit ends the episode, unless the
        object has `refuse_step`, which gives another answer."""
        started, special_tokens = time.perf_counter(), instance.needs_special_tokens
        said: Any = self._transcript.policy_turn(rollout)
        if not instance.needs_turn:
            said = {"role": "assistant", "content": said.marked_text if special_tokens else said.text}
        answer, limit = await instance.call("step", said, deadline=deadline), None
        while True:
            step = read_step(answer, chat=self._transcript.chat)
            seconds = time.perf_counter() - started
            options: Any = {"special_tokens": special_tokens, "gave": instance.gave("step")}
            extend = partial(self._transcript.extended, rollout, step, seconds, **options)
            try:
                return extend(over=limit if step.terminated else None)
            except LimitError as error:
                limit = error.limit
                if not instance.has("refuse_step"):
                    return extend(over=limit)
                answer = await instance.call("refuse_step", error, deadline=deadline)

    async def end(self, sample_id: SampleId) -> None:
        """Closes an episode's instance, if it has one."""
        if (instance := self._episodes.pop(sample_id, None)) is not None:
            await self._close(instance)

    async def close_all(self) -> None:
        """Closes the instances of all episodes. The pool calls it before it ends a process that still answers, so that
        nothing outside stays open, such as a container."""
        await asyncio.gather(*map(self.end, list(self._episodes)))
        while self._num_closing:
            await asyncio.sleep(POLL_S)

    async def _close(self, instance: Instance, *, loop_blocked: bool = False) -> None:
        """A failure of `close` changes nothing about the episode. Each kind of failure is reported once."""
        self._num_closing += 1
        try:
            error = await instance.close(self._close_s, loop_blocked=loop_blocked)
        finally:
            self._num_closing -= 1
        if error is not None and error.fault not in self._warned:
            self._warned.add(error.fault)
            print(f"warning: environment {self._cfg.name}: {one_line(error.reason)}", file=sys.stderr)
        if instance.stuck and instance.is_running:
            self._stuck = [other for other in self._stuck if other.is_running] + [instance]
            if len(self._stuck) >= MAX_STUCK and not self._checks_stuck:
                # A slow service makes many calls late at once, but they return. So look again before the process ends.
                self._checks_stuck = True
                loop = asyncio.get_running_loop()
                loop.call_later(self._cfg.step_timeout_s, self._end_if_stuck, self._stuck)

    def _end_if_stuck(self, instances: Sequence[Instance]) -> None:
        """Ends this process if MAX_STUCK of these closed instances still run."""
        self._checks_stuck = False
        if sum(instance.is_running for instance in instances) >= MAX_STUCK:
            self._end_soon()

    async def _void(self, instance: Instance, prompt: Prompt, response: str, error: UserCodeError) -> Void:
        """The void of an episode whose environment failed. Closes its instance."""
        if blocks := isinstance(error, BlocksLoopError):
            self._end_soon()
        if self._episodes.get(prompt.sample_id) is instance:
            del self._episodes[prompt.sample_id]
        await self._close(instance, loop_blocked=blocks)
        meters.count("ratchet_environment_voids_total", reason=error.kind)
        reason, fault = (f"environment {self._cfg.name}: {one_line(text)}" for text in (error.reason, error.fault))
        kept = ScoringError(fault, error.details, prompt.text, response)
        return Void(prompt.sample_id, reason, response=response, kind=error.kind, error=kept)

    def _end_soon(self) -> None:
        """Ends this process after END_AFTER_S, so that its last answers reach the driver."""
        if not self._ends:
            self._ends = True
            what = f"environment {self._cfg.name}: {self._name} ends its process"
            print(f"{what}, because calls in it have not returned in time", file=sys.stderr)
            timer = threading.Timer(END_AFTER_S, self._end_process)
            timer.daemon = True
            timer.start()

    def _deadline(self) -> Deadline:
        return Deadline(self._cfg.step_timeout_s, "environment.step_timeout_s", most_s=0.9 * self._cfg.timeout_s)

    def close(self) -> None:
        """Ends the thread of the event loop, and the server of the agents."""
        self._close_kind()
        self._loop.close()


def episode_seed(run_seed: int, sample_id: SampleId) -> int:
    """A seed of 63 bits for the environment of an episode."""
    digest = hashlib.blake2b(f"environment {run_seed}/{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _pickled(saved: _Saved) -> bytes:
    try:
        return pickle.dumps(saved)
    except Exception as error:
        what = "state returned something that cannot be pickled"
        raise UserCodeError(f"{what}: {error_text(error)}", fault=what) from error


def _unpickled(state: bytes) -> _Saved:
    try:
        return pickle.loads(state)
    except Exception as error:
        what = "the pickled result of state cannot be read"
        raise UserCodeError(f"{what}: {error_text(error)}", fault=what) from error
