"""RUN/answers/NAME.jsonl: every answer of one policy, in the order of arrival. Runs in the driver.

A batch of answers is written at once and synced. A killed evaluation leaves at most one unfinished line, which readers
skip. All figures are computed from these files, so they do not depend on how often the evaluation was stopped.

    {"prompt": 3, "sample": 0, "response": "...", "finish_reason": "stop", "score": 1.0, "components": {...},
     "origins": {...}, "tokens": [...], "logprobs": [...], "ref_logprobs": [...]}

An answer in several turns has them under "turns", each with the fields of `common.types.Turn`. Then `tokens` are those
of the whole response, and `logprobs` and `ref_logprobs` are of the tokens that the policy sampled. If the environment
replaced the prompt, "asked" is its text.

`prompt` counts the lines of RUN/prompts.jsonl. `prompt` and `sample` come first in the line, so a reader of a few
answers need not parse the others. An answer without a score has the reason as "void" instead of score, components and
origins. If only a judge gave no score, the reason is under "judge_voids", by judge. In both cases a continued
evaluation asks the question again. The newest line counts, but a line without a score never replaces one with a score.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.data.questions import question
from common.experience_table import Decode
from common.files import read_record, sync, write_durably
from common.types import HELDOUT_EPOCH, Prompt, Rollout, SampleId, Score, Turn, Void
from deploy.run.directory import make_private
from learner.loop.answers import Answered, score_record

DIRECTORY, PROMPTS = "answers", "prompts.jsonl"
_PLACE = re.compile(rb'\{"prompt": (\d{1,9}), "sample": (\d{1,9}),')
_GENERATOR = ""  # the files do not say which replica wrote an answer


class AnswerFile:
    """The answers of one policy."""

    def __init__(self, run: Path, name: str, prompts: Sequence[Prompt], decode: Decode) -> None:
        self.path = run / DIRECTORY / f"{name}.jsonl"
        self._prompts = {prompt.sample_id.prompt: prompt for prompt in prompts}
        self._decode = decode
        self._known: dict[SampleId, Answered] | None = None  # None: the file was not read yet

    def read(self, samples: int) -> dict[SampleId, Answered]:
        """The newest answer of each sample below `samples`, with a score if there is one, in the order of prompts and
        samples. Lines that are no answer to one of the prompts are left out. The file is parsed once, and `append` adds
        the later answers."""
        if self._known is None:
            self._known = {}
            if self.path.exists():
                with open(self.path, "rb") as lines:
                    for line in lines:
                        self._take(self._known, read_record(line) or {})
        return {place: answer for place, answer in sorted(self._known.items()) if place.replica < samples}

    def append(self, answers: Sequence[Answered]) -> None:
        """Writes the answers. When it returns, they survive a loss of power."""
        texts = self._decode([rollout.response_ids for rollout, _, _ in answers])
        records = [self._record(*pair) for pair in zip(answers, texts, strict=True)]
        lines = [json.dumps(record).encode() + b"\n" for record in records]
        is_new = not self.path.exists()
        with open(self.path, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a kill left an unfinished line
                    file.write(b"\n")
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync(self.path.parent)
        if self._known is not None:
            for record in records:  # not the answers: their arrays keep memory of the object store
                self._take(self._known, record)

    def _record(self, answer: Answered, text: str) -> dict[str, Any]:
        rollout, score, ref_logprobs = answer
        _, prompt, sample = rollout.prompt.sample_id
        record: dict[str, Any] = {"prompt": prompt, "sample": sample}
        if rollout.prompt.text != self._prompts[prompt].text:
            record["asked"] = rollout.prompt.text
        record |= {"response": text, "finish_reason": rollout.finish_reason, **score_record(score)}
        if rollout.turns:
            record["turns"] = [asdict(turn) for turn in rollout.turns]
        return {
            **record,
            "tokens": rollout.response_ids.tolist(),
            "logprobs": _short(rollout.rollout_logprobs),
            "ref_logprobs": _short(ref_logprobs),
        }

    def _take(self, known: dict[SampleId, Answered], record: Mapping[str, Any]) -> None:
        answer = self._answer(record)
        if answer is not None:
            place = answer.rollout.prompt.sample_id
            if place not in known or not isinstance(answer.score, Void):
                known[place] = answer

    def _answer(self, record: Mapping[str, Any]) -> Answered | None:
        try:
            prompt = self._prompts[record["prompt"]]
            sample_id = SampleId(HELDOUT_EPOCH, record["prompt"], int(record["sample"]))
            tokens = np.asarray(record["tokens"], np.int32)
            logprobs, ref_logprobs = (np.asarray(record[key], np.float32) for key in ("logprobs", "ref_logprobs"))
            score: Score | Void
            if "void" in record:
                score = Void(sample_id, str(record["void"]))
            else:
                voids = {judge: Void(sample_id, str(why)) for judge, why in record.get("judge_voids", {}).items()}
                components, origins = dict(record["components"]), dict(record["origins"])
                score = Score(float(record["score"]), components, origins, judge_voids=voids)
            turns = tuple(map(_turn, record.get("turns", [])))
            question = replace(prompt, sample_id=sample_id, text=str(record.get("asked", prompt.text)))
            versions, reason = np.zeros(logprobs.shape, np.int32), str(record["finish_reason"])
            rollout = Rollout(question, tokens, logprobs, versions, reason, _GENERATOR, turns)
            if not rollout.sampled_ids.shape == logprobs.shape == ref_logprobs.shape or not _follow(turns, len(tokens)):
                return None
            return Answered(rollout, score, ref_logprobs)
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError):  # OverflowError: an infinite number
            return None


def place_of(line: bytes) -> tuple[int, int] | None:
    """Prompt and sample of the answer in a line, from its beginning. None if the line is no answer."""
    found = _PLACE.match(line)
    return (int(found[1]), int(found[2])) if found else None


def _turn(record: Mapping[str, Any]) -> Turn:
    return Turn(
        end=int(record["end"]),
        next_start=int(record["next_start"]),
        reward=float(record["reward"]),
        observation=str(record["observation"]),
        info=str(record["info"]),
        seconds=float(record["seconds"]),
        cached_tokens=int(record["cached_tokens"]),
        new_context=bool(record["new_context"]),
        ends=bool(record["ends"]),
    )


def _follow(turns: Sequence[Turn], length: int) -> bool:
    """True if the turns are in order in a response of this length, and every new context has a prompt."""
    places = [0, *(place for turn in turns for place in (turn.end, turn.next_start)), length]
    return places == sorted(places) and all(turn.end < turn.next_start for turn in turns if turn.new_context)


def _short(values: np.ndarray) -> list[float]:
    """float32 numbers, written with as few digits as identify them."""
    return [float(str(value)) for value in values.astype(np.float32)]


def write_prompts(run: Path, prompts: Sequence[Prompt]) -> None:
    """Writes RUN/prompts.jsonl, and makes RUN/answers. A question is the prompt without its chat template."""
    make_private(run / DIRECTORY)
    lines = [json.dumps({"prompt": prompt.text, "question": question(prompt)}) + "\n" for prompt in prompts]
    write_durably(run / PROMPTS, "".join(lines))
