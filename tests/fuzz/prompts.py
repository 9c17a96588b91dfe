"""Prompt files give prompts that can be sampled, journalled and read back, or a UserError."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from common.config.actors import PromptsConfig
from common.data.prompt_records import load_records
from common.experience_table import experience_table
from common.types import Experience, Score
from learner.loop.prompts import PromptStream
from tests.fakes import make_rollout
from tests.fuzz.data_files import byte_tokenizer, write_records
from tests.fuzz.judge import WrongAnswer, value_or_message

MAX_TOKENS = 200
PLAIN = [
    {"prompt": "Which is larger, 7 or 9?", "answer": 9},
    {"prompt": "Größe?", "answer": None, "tags": ["a", {"b": 1.5}]},
    {"prompt": "2 + 2<|im_end|>", "id": "x-1", "answer": "4"},
]
CHAT = [
    {"prompt": [{"role": "user", "content": "Which is larger?"}], "answer": 9},
    {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "And now?"},
        ]
    },
    {"prompt": "2 + 2", "answer": "4"},
]


def prepare(directory: Path) -> Any:
    return byte_tokenizer()


def case(rng: Random, shared: Any, scratch: Path) -> None:
    chat = rng.random() < 0.5
    path = write_records(rng, CHAT if chat else PLAIN, scratch)
    cfg = PromptsConfig(
        train=str(path),
        format="chat" if chat else "plain",
        overlong=rng.choice(["refuse", "drop", "cut_start"]),
        last_assistant=rng.choice(["refuse", "remove", "continue"]),
        last_end_token=rng.choice(["refuse", "remove", "keep"]),
    )
    most = rng.choice([15, MAX_TOKENS])
    found = value_or_message(lambda: load_records(str(path), cfg, shared, seed=0, max_tokens=most), scratch)
    if isinstance(found, str):
        return
    stream = PromptStream(found, seed=0, rollouts_per_prompt=1)
    for record in found:
        ids = record.token_ids
        if not 1 <= len(ids) <= most or ids.min() < 0 or ids.max() >= len(shared):
            raise WrongAnswer(f"token ids {ids}")
        if len(ids) > 1 and ids[-1] == shared.eos_token_id and cfg.last_end_token != "keep":
            raise WrongAnswer(f"a prompt that ends with the end token: {record.text!r}")
        prompt = replace(stream.next(), text=record.text, fields=record.fields)
        row = experience_table([Experience(make_rollout(prompt, [5]), Score(1.0, {"s": 1.0}), None)]).to_pylist()[0]
        if row["prompt"] != record.text or json.dumps(json.loads(row["fields"])) == "":
            raise WrongAnswer(f"the journal gives back {row}")
