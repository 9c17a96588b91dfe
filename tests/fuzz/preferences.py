"""Files of preference pairs give pairs that a reward model can read, or a UserError."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from common.config.reward_model import PreferencesConfig
from learner.reward_model.pair_records import tokenise_pairs
from learner.reward_model.pairs import Pairs
from tests.fuzz.data_files import byte_tokenizer, write_records
from tests.fuzz.judge import WrongAnswer, value_or_message

MAX_TOKENS = 150
PLAIN = [
    {"prompt": "Which is larger, 7 or 9?", "chosen": " 9", "rejected": " 7", "margin": 1.5},
    {"prompt": "Größe?", "chosen": " groß", "rejected": " klein"},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."},
]
CHAT = [
    {
        "prompt": [{"role": "user", "content": "Hello"}],
        "chosen": [{"role": "assistant", "content": "Hello."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
    {
        "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
        "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}],
        "margin": 2,
    },
    {"prompt": "2 + 2", "chosen": "4", "rejected": "5"},
]


def prepare(directory: Path) -> Any:
    return byte_tokenizer()


def case(rng: Random, shared: Any, scratch: Path) -> None:
    chat = rng.random() < 0.5
    path = write_records(rng, CHAT if chat else PLAIN, scratch)
    cfg = PreferencesConfig(
        train=str(path),
        format="chat" if chat else "plain",
        max_tokens=rng.choice([20, MAX_TOKENS]),
        overlong=rng.choice(["drop", "cut_start", "cut_end"]),
        last_assistant=rng.choice(["refuse", "remove", "continue"]),
        last_end_token=rng.choice(["refuse", "remove", "keep"]),
    )
    target = scratch / "pairs.arrow"
    found = value_or_message(
        lambda: tokenise_pairs(str(path), cfg, shared, target), scratch, may_write=("pairs.arrow",)
    )
    if isinstance(found, str):
        return
    pairs = Pairs(target)
    if len(pairs) != found.pairs:
        raise WrongAnswer(f"{found.pairs} pairs are counted, {len(pairs)} are in the file")
    for pair in (pairs[i] for i in range(len(pairs))):
        for rest in (pair.chosen_ids, pair.rejected_ids):
            ids = [*pair.shared_ids, *rest]
            if not len(rest) or len(ids) > cfg.max_tokens or min(ids) < 0 or max(ids) >= len(shared):
                raise WrongAnswer(f"token ids {ids}")
        if pair.margin != pair.margin or abs(pair.margin) == float("inf"):
            raise WrongAnswer(f"margin {pair.margin}")
