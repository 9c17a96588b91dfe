"""What is checked of reward sources before anything starts. Runs in the driver."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from tempfile import TemporaryFile
from typing import IO

from transformers import PreTrainedTokenizerBase

from actors.scoring.function_processes import Worker, WorkerDiedError
from actors.scoring.judge_source import check_template
from actors.scoring.model_source import answer_ids
from actors.scoring.secrets import read_secrets
from common.config.actors import SourcesConfig
from common.config.sources import FunctionSourceConfig, JudgeSourceConfig, ModelSourceConfig, RewardSource
from common.data.prompt_records import PromptRecord
from common.data.prompt_tokens import check_embedded
from common.errors import UserError
from common.model.files import load_tokenizer, resolve_model
from common.model.reward_head import read_scale, reward_model_size
from common.model.size import ModelSize
from common.plain_text import one_line
from common.reward_input import RewardInput
from common.user_code.calls import Outcome, UserCodeError
from common.user_code.functions import explain_import
from deploy.screen.console import complain

MADE_UP = "(A made-up response, to try the reward function.)"
TRY_S = 30.0  # longest try of one function, seconds
# Numbers all the same, and perhaps only this response's.
_NO_SCORE_HERE = re.compile(r"returned (nan|-?inf)|.*float32")
_NO_SUCH_FIELD = "raised AttributeError: 'RewardInput' object has no attribute "


def check_sources(sources: Iterable[RewardSource], *, chat: bool) -> Sequence[ModelSize]:
    """The sizes of the reward models among them. Raises UserError for a model that is not there, or that reads text
    where the prompts are chat messages (`chat`), and for a service whose key is not in the environment."""
    sources = list(sources)
    read_secrets(sources)
    sizes = []
    for source in sources:
        if isinstance(source, ModelSourceConfig):
            setting = f"reward source {source.name}"
            directory = resolve_model(source.model, setting, trust_remote_code=source.trust_remote_code)
            sizes.append(reward_model_size(directory, setting))
            if chat and read_scale(directory).chat is False:
                raise UserError(
                    f"reward source {source.name} ({source.model}) was trained on plain text, but prompts.format is "
                    'chat; train it with data.format = "chat", or set prompts.format = "plain"'
                )
    return sizes


def try_functions(
    service: SourcesConfig, sources: Iterable[RewardSource], record: PromptRecord, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Has every reward model's tokenizer read the first prompt and a made-up response, and calls every function once on
    them, in a process of its own: nothing of it stays in this one. Raises UserError for a model that cannot read them,
    and for a function that cannot be imported or called, or whose result is no score. A function that raises or takes
    long is only warned of: it may do so for this response alone."""
    response_ids = tokenizer(MADE_UP, add_special_tokens=False)["input_ids"]
    answer = RewardInput(
        prompt=record.text,
        response=MADE_UP,
        response_tokens=len(response_ids),
        finish_reason="stop",
        fields=record.fields,
        messages=record.messages,
        raw_response=MADE_UP,
        prompt_ids=record.token_ids.tolist(),
        response_ids=response_ids,
    )
    for source in sources:
        if isinstance(source, FunctionSourceConfig):
            _try_function(source, service, answer)
        elif isinstance(source, JudgeSourceConfig):
            check_template(source, record.fields)
        elif isinstance(source, ModelSourceConfig):
            _try_reading(source, answer)


def _try_reading(source: ModelSourceConfig, answer: RewardInput) -> None:
    """Raises UserError if the reward model's tokenizer or chat template cannot read the answer, or does not end."""
    setting = f"reward source {source.name}"
    directory = resolve_model(source.model, setting, trust_remote_code=source.trust_remote_code)
    tokenizer = load_tokenizer(directory, setting)
    try:
        ids = answer_ids(tokenizer, answer, chat=read_scale(directory).chat, pad_id=None)
    except Exception as error:
        raise UserError(
            f"{setting} ({source.model}): its tokenizer or chat template refuses the first prompt: {error}; give the "
            "model's tokenizer a template that can read it, or use another model"
        ) from error
    where = f"{setting} ({source.model}), tried on the first prompt"
    check_embedded(where, ids, tokenizer, reward_model_size(directory, setting).vocabulary)


def import_functions(service: SourcesConfig, sources: Iterable[RewardSource]) -> None:
    """Raises UserError for a function that cannot be imported, or whose signature does not fit."""
    for source in sources:
        if isinstance(source, FunctionSourceConfig):
            _try_function(source, service, None)


def _try_function(source: FunctionSourceConfig, service: SourcesConfig, answer: RewardInput | None) -> None:
    setting, own_process = f"reward source {source.name}", service.isolation == "process"
    with TemporaryFile() as output:
        try:
            worker = Worker(
                source.function,
                takes=source.takes,
                limit_s=min(service.call_limit_s, TRY_S),
                ours_first=not own_process,
                output=output,
            )
        except UserCodeError as error:
            raise UserError(
                explain_import(source.function, setting, error, ours_last=own_process) + _last_line(output)
            ) from None
        if answer is None:
            worker.kill()
            return
        tried = f"{setting} ({source.function}), tried on the first prompt with a made-up response,"
        fault = UserCodeError("")
        try:
            [outcome] = asyncio.run(_call(worker, answer))
            if not isinstance(outcome, UserCodeError):
                return
            fault = outcome
            if not _NO_SCORE_HERE.match(fault.reason):
                raise UserError(f"{tried} {one_line(fault.reason)}; return the score as a number, or a dict with it")
        except UserCodeError as failed:
            fault = failed
            if not (fault.details or fault.reason.startswith("took longer")):  # a result of another form
                raise UserError(f"{tried} {one_line(fault.reason)}") from None
            if fault.reason.startswith(_NO_SUCH_FIELD):  # whatever the response
                known = ", ".join(field.name for field in fields(answer))
                raise UserError(f"{tried} {one_line(fault.reason)}; it has {known}") from None
        except WorkerDiedError as died:
            fault = UserCodeError(f"ended its process: it {died.how}{_last_line(output)}")
            if not own_process:
                raise UserError(
                    f'{tried} {fault.reason}; mend it, or set reward.isolation = "process" (labeller.isolation for a '
                    "labeller), where that costs one rollout"
                ) from None
    complain(f"warning: {tried} {one_line(fault.reason)}; a response for which it does so gets no score")


async def _call(worker: Worker, answer: RewardInput) -> list[Outcome]:
    try:
        return await worker.call([answer])
    finally:
        worker.kill()


def _last_line(output: IO[bytes]) -> str:
    """The last line that the function's process has printed."""
    output.seek(0)
    lines = output.read()[-10_000:].decode(errors="replace").strip().splitlines()
    return f" (its last words: {one_line(lines[-1], 200)})" if lines else ""
