"""A reward source that asks a language model behind an OpenAI-compatible service, and reads the score from its text.

Runs in each reward replica, and in the driver for the check of the template.

The judge reads the policy's responses, so the policy may learn to persuade the judge instead of answering better.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from actors.scoring.http_service import AnswerError, HttpService
from actors.scoring.http_source import read_entry, read_model_name, read_number
from actors.scoring.secrets import Secrets
from common.config.actors import SourcesConfig
from common.config.sources import JudgeSourceConfig
from common.errors import UserError
from common.types import RawScore, RewardInput

JUDGEMENT_CHARS = 4000  # score_pattern is searched in this many last characters of a judge's text
_PLACEHOLDER = re.compile(r"\{(prompt|response|fields\.([^{}]+))\}")
_FENCED = re.compile(r"```(?:json)?(.*?)```", re.DOTALL)


class JudgeSource:
    """Asks for one chat completion per answer. The origin of a score is the judge's model and address."""

    def __init__(self, cfg: JudgeSourceConfig, secrets: Secrets | None = None) -> None:
        self._cfg = cfg
        self._service = HttpService(cfg, secrets or {}, path="/chat/completions")
        self._pattern = re.compile(cfg.score_pattern)

    async def __call__(self, answer: RewardInput) -> RawScore:
        """The judge's score. Raises HttpSourceError if no try gives a score within score_range."""
        texts = [("system", self._cfg.system), ("user", self._cfg.template)]
        messages = [{"role": role, "content": fill(text, answer)} for role, text in texts if text is not None]
        payload = {**self._cfg.request, "model": self._cfg.judge_model, "messages": messages, "stream": False}
        (score, model), where = await self._service.ask(payload, self._read)
        return RawScore(score, f"{model or self._cfg.judge_model} at {where}")

    async def close(self) -> None:
        """Closes its connections."""
        await self._service.close()

    def _read(self, found: Any) -> tuple[float, str]:
        choices = read_entry(found, "choices")
        choice = choices[0] if isinstance(choices, list) and choices else {}
        message = read_entry(choice, "message")
        if choice.get("finish_reason") == "length":  # a score in such a text may be one that the judge would correct
            limit = "max_completion_tokens" if "max_completion_tokens" in self._cfg.request else "max_tokens"
            raise AnswerError(f"the judge's text was cut off; raise request.{limit}")
        text = read_entry(message, "content")
        if not isinstance(text, str):
            raise AnswerError("the judge wrote no text, but ", shown=repr(text))
        score = self._score(text)
        low, high = self._cfg.score_range
        if not low <= score <= high:
            raise AnswerError(f"the judge's score {score:g} is outside score_range ({low:g} to {high:g})")
        return score, read_model_name(found)

    def _score(self, text: str) -> float:
        if self._cfg.score_field is not None:
            fenced = _FENCED.findall(text)
            try:
                found = json.loads(fenced[-1] if fenced else text)
            except (ValueError, RecursionError):
                raise AnswerError("the judge's text is no JSON object: ", shown=text, limit=120) from None
            return read_number(read_entry(found, self._cfg.score_field), f"{self._cfg.score_field!r}")
        end = text[-JUDGEMENT_CHARS:]
        matches = list(self._pattern.finditer(end))
        if not matches:
            raise AnswerError("score_pattern is not in the judge's text: ", shown=end, limit=120)
        try:
            return float(matches[-1][1])
        except (TypeError, ValueError):
            raise AnswerError("score_pattern found no number, but ", shown=repr(matches[-1][1])) from None


def fill(template: str, answer: RewardInput) -> str:
    """The template with its placeholders filled in. A placeholder inside a filled-in text stays unchanged. Raises
    AnswerError for a field that the prompt's record lacks."""

    def value(found: re.Match[str]) -> str:
        if found[2] is None:
            return _prompt_text(answer) if found[1] == "prompt" else answer.response
        if found[2] not in answer.fields:
            raise AnswerError(f"the prompt's record has no field {found[2]!r}, which the template names")
        field = answer.fields[found[2]]
        return field if isinstance(field, str) else json.dumps(field, ensure_ascii=False)

    return _PLACEHOLDER.sub(value, template)


def _prompt_text(answer: RewardInput) -> str:
    """The prompt as a judge reads it: without the special tokens of the policy's chat template."""
    if not answer.messages:
        return answer.prompt
    if len(answer.messages) == 1 and answer.messages[0]["role"] == "user":
        return _message_text(answer.messages[0])
    return "\n\n".join(f"{message['role']}: {_message_text(message)}" for message in answer.messages)


def _message_text(message: Mapping[str, Any]) -> str:
    """The message's content, followed by its tool calls as JSON if it has any."""
    calls = json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""
    return "\n".join(filter(None, (message.get("content"), calls)))


def try_template(cfg: JudgeSourceConfig, service: SourcesConfig, answer: RewardInput) -> str:
    """Raises UserError if the template or the system message names a field that the first prompt's record lacks."""
    for text in filter(None, (cfg.template, cfg.system)):
        for found in _PLACEHOLDER.finditer(text):
            if found[2] is not None and found[2] not in answer.fields:
                raise UserError(
                    f"reward source {cfg.name}: the template names {{fields.{found[2]}}}, but the first prompt's "
                    f"record has {', '.join(answer.fields) or 'no fields'}; correct the name"
                )
    return ""
