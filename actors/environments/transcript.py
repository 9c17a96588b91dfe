"""An episode's messages and its tokens: what the model wrote as text, and what the environment says as tokens. Runs in
each environment replica."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.environments.rendering import make_rendering
from actors.environments.steps import CheckedStep, LimitError, PolicyTurn, Restart, read_observation, reading
from common.config.actors import PromptFormat
from common.config.environment import EnvironmentConfig
from common.data.messages import Message
from common.data.prompt_records import prompt_record
from common.data.prompt_tokens import check_embedded
from common.errors import UserError
from common.types import IN_EPISODE, Prompt, Rollout, Turn
from common.user_code.errors import UserCodeError, error_text


class Transcript:
    """Reads and extends rollouts. Methods raise UserCodeError for messages that cannot become tokens."""

    def __init__(
        self,
        cfg: EnvironmentConfig,
        prompts: PromptFormat,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_tokens: int,
        end_tokens: Collection[int] = (),
        vocabulary: int | None = None,
        **options: Any,
    ) -> None:
        """`end_tokens`: all that end a response. `vocabulary`: rows of the model's embedding, if known. `options`:
        arguments of the chat template, such as `tools`."""
        self._cfg, self._prompts, self._tokenizer = cfg, prompts, tokenizer
        self.chat = prompts.format == "chat"
        self._turn_is_sequence = cfg.sequence == "turn"
        self._max_prompt_tokens, self._vocabulary = max_prompt_tokens, vocabulary
        self._end_tokens = frozenset([*end_tokens, tokenizer.eos_token_id])
        self._rendering = make_rendering(tokenizer, chat=self.chat, end_tokens=end_tokens, **options)

    def replaced(self, prompt: Prompt, said: Any, gave: str = "reset returned") -> Prompt:
        """The prompt that `reset` asked for. `gave` begins messages about it. Raises UserCodeError, and LimitError if
        it is too long."""
        options = said.options if isinstance(said, Restart) else {}
        with reading("reset"):
            messages = read_observation("reset", said.messages if isinstance(said, Restart) else said, chat=self.chat)
        if not messages:
            return prompt
        content = messages if self.chat else messages[0]["content"]
        try:
            record = prompt_record(
                f"{gave} a prompt that cannot be used",
                {self._prompts.columns.prompt: content},
                self._prompts,
                self._tokenizer,
                vocabulary=self._vocabulary,
                template_options=options,
                # The first request of an agent may have the empty answer of a tool, as later ones may.
                may_be_empty=isinstance(said, Restart),
            )
        except UserError as error:
            raise UserCodeError(str(error)) from None
        if record is None:
            raise UserCodeError("reset returned an empty prompt; return None to keep the prompt of the data")
        if (length := len(record.token_ids)) > self._max_prompt_tokens:
            raise LimitError("prompt", length, self._max_prompt_tokens)
        return replace(prompt, text=record.text, token_ids=record.token_ids, messages=record.messages)

    def newest_turn(self, rollout: Rollout, *, special_tokens: bool = False) -> str:
        """What the model wrote in its newest turn. With `special_tokens` only its end token is left out."""
        return self._text(rollout.response_ids[rollout.turn_start :], special_tokens)

    def policy_turn(self, rollout: Rollout) -> PolicyTurn:
        """The newest turn of the model, for environments that need more than its text."""
        ids = rollout.response_ids[rollout.turn_start :]
        return PolicyTurn(
            text=self._text(ids, False),
            marked_text=self._text(ids, True),
            context_ids=rollout.context_ids,
            num_sampled=len(ids),
            finish_reason=rollout.finish_reason,
        )

    def whole(self, rollout: Rollout) -> str:
        """The response with every special token, for messages."""
        return str(self._tokenizer.decode(rollout.response_ids.tolist()))

    def extended(
        self,
        rollout: Rollout,
        step: CheckedStep,
        seconds: float,
        *,
        special_tokens: bool = False,
        over: str | None = None,
        gave: str = "step returned",
    ) -> Rollout:
        """The rollout after a step. What the environment says is added only if the policy continues after it.
        `special_tokens`: see `newest_turn`. `over`: why the episode ends, if it is known already. `gave` begins
        messages about what cannot be rendered. Raises UserCodeError for that, and LimitError if the policy has no room
        to continue."""
        end, restart = len(rollout.response_ids), step.restart
        said: list[int] = []
        over = over or ("terminated" if step.terminated else "truncated" if step.truncated else None)
        if over is None:
            if len(rollout.turns) + 1 >= self._cfg.max_turns:
                raise LimitError("max_turns")
            said = self._rendered(step, rollout, special_tokens, gave)
            if len(said) > (room := self._cfg.max_tokens - end - 1):
                raise LimitError("max_tokens", len(said), max(0, room))
        turn = Turn(
            end=end,
            next_start=end + len(said),
            reward=step.reward,
            observation=json.dumps(step.messages, ensure_ascii=False),
            info=step.info,
            seconds=seconds,
            cached_tokens=rollout.cached_tokens,
            new_context=over is None and (restart is not None or self._turn_is_sequence),
            ends=over is None and restart is not None and restart.ends,
            restarts=over is None and restart is not None,
        )
        return replace(
            rollout,
            response_ids=np.concatenate([rollout.response_ids, np.asarray(said, dtype=np.int32)]),
            turns=(*rollout.turns, turn),
            finish_reason=over or IN_EPISODE,
            cached_tokens=0,
        )

    def _rendered(self, step: CheckedStep, rollout: Rollout, special_tokens: bool, gave: str) -> list[int]:
        """The tokens of the environment, of which there is at least one if they are a new context."""
        try:
            if step.restart is not None:
                ids = self._restarted(step.restart, step.messages)
            elif self._turn_is_sequence:
                conversation = [*self._conversation(rollout, special_tokens), *step.messages]
                ids = self._rendering.prompt(conversation, **step.options)
            else:
                wrote = rollout.response_ids[rollout.turn_start :]
                ids = self._rendering.continuation(
                    step.messages, int(wrote[-1]) if len(wrote) else None, **step.options
                )
            if not ids and (step.restart is not None or self._turn_is_sequence):
                raise UserError(f"{gave} a conversation without any token; it must have at least one message")
            if ids:
                check_embedded(
                    f"{gave} an observation that the model cannot read", ids, self._tokenizer, self._vocabulary
                )
        except UserError as error:
            raise UserCodeError(str(error)) from None
        except Exception as error:
            what = f"the chat template refuses what {gave}" if self.chat else f"{gave} an unusable text"
            kind = "template" if self.chat else "wrong_answer"
            raise UserCodeError(f"{what}: {error_text(error)}", fault=what, kind=kind) from error
        return ids

    def _restarted(self, restart: Restart, messages: Sequence[Message]) -> list[int]:
        if restart.token_ids is None:
            return self._rendering.prompt(messages, **restart.options)
        if self._turn_is_sequence:
            raise UserError(
                'step returned a Restart with token_ids; with environment.sequence = "turn" a later turn needs the '
                "whole conversation as messages, so return these alone"
            )
        before = [int(token) for token in restart.token_ids]
        return [*before, *self._rendering.continuation(messages, before[-1], **restart.options)]

    def _conversation(self, rollout: Rollout, special_tokens: bool) -> list[Message]:
        """All messages so far, the newest one of the policy included. They begin with the newest Restart."""
        message: Message = {"role": "assistant", "content": ""}  # the next one of the policy
        newest = max((number for number, turn in enumerate(rollout.turns, 1) if turn.restarts), default=0)
        if newest:
            restart = rollout.turns[newest - 1]
            conversation, start = json.loads(restart.observation), restart.next_start
        else:
            conversation, start = [dict(said) for said in rollout.prompt.messages or ()], 0
            if conversation and conversation[-1]["role"] == "assistant":  # the policy continued it
                message = conversation.pop()
        for turn in rollout.turns[newest:]:
            text = self._text(rollout.response_ids[start : turn.end], special_tokens)
            conversation += [_followed(message, text), *json.loads(turn.observation)]
            message, start = {"role": "assistant", "content": ""}, turn.next_start
        return [*conversation, _followed(message, self._text(rollout.response_ids[start:], special_tokens))]

    def _text(self, token_ids: np.ndarray, special_tokens: bool) -> str:
        ids = token_ids.tolist()
        if special_tokens and ids and ids[-1] in self._end_tokens:
            ids.pop()
        return str(self._tokenizer.decode(ids, skip_special_tokens=not special_tokens))


def _followed(message: Message, text: str) -> Message:
    return {**message, "content": (message.get("content") or "") + text}
