"""A policy on disk: its checks, its size, and its prompts as tokens. Runs in the driver."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.config.actors import PromptFormat, SamplingConfig
from common.data.prompt_records import PromptRecord, load_records
from common.errors import UserError
from common.files import write_whole
from common.model.files import check_policy_files, check_trainable_kind, end_token_ids, load_tokenizer, resolve_model
from common.model.kernels import install
from common.model.reward_head import is_reward_model
from common.model.size import ModelSize, model_size
from deploy.report.token_text import KEPT
from deploy.screen.console import complain


@dataclass(frozen=True)
class PolicyFiles:
    """A policy on disk, its tokenizer and its size."""

    path: str
    directory: Path
    tokenizer: PreTrainedTokenizerBase
    size: ModelSize
    trust_remote_code: bool = False

    @classmethod
    def load(
        cls, path: str, setting: str = "model.path", *, trust_remote_code: bool = False, packed: bool = True
    ) -> PolicyFiles:
        """Raises UserError if there is no such policy or, with `packed`, if learner and reference cannot compute it.
        For a classifier it reads only the config; the command that uses the classifier checks the rest."""
        directory = resolve_model(path, setting, trust_remote_code=trust_remote_code)
        size = model_size(directory, setting)
        if not is_reward_model(directory):
            check_policy_files(directory, setting)
            if packed:
                check_trainable_kind(directory, setting, install=install)
        tokenizer = load_tokenizer(directory, setting)
        if not end_token_ids(directory, tokenizer, size.vocabulary, setting):
            print(
                f"warning: {setting} ({path}) has no end token, so every response runs to sampling.max_new_tokens; set "
                "eos_token in its tokenizer_config.json, or eos_token_id in its generation_config.json",
                file=sys.stderr,
            )
        return cls(path, directory, tokenizer, size, trust_remote_code)

    @property
    def model_type(self) -> str:
        """The kind of model, such as llama."""
        config = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        return str(config.get("model_type", "unknown"))

    def decode(self, responses: Sequence[np.ndarray]) -> list[str]:
        """The texts without special tokens, as reward functions get them."""
        return list(self.tokenizer.batch_decode([ids.tolist() for ids in responses], skip_special_tokens=True))

    def keep_tokenizer(self, run: Path) -> None:
        """Writes the tokenizer into the run directory, so that `ratchet report` can show tokens without the model."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:  # only tokenizers in Python code have none
            write_whole(run / KEPT, backend.to_str())

    def load_prompts(
        self,
        source: str,
        cfg: PromptFormat,
        *,
        room: int,
        seed: int,
        setting: str,
        response_setting: str = "sampling.max_new_tokens",
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[PromptRecord]:
        """Every prompt of a source as tokens of this policy. Prints how many were dropped or cut. `room`: the longest
        prompt in tokens, from `prompt_room`. For the other arguments see load_records."""
        return load_records(
            source,
            cfg,
            self.tokenizer,
            seed=seed,
            max_tokens=room,
            vocabulary=self.size.vocabulary,
            setting=setting,
            response_setting=response_setting,
            tools=tools,
            report=complain,
        )

    def check_stop_tokens(self, sampling: SamplingConfig) -> None:
        """Raises UserError for a stop token that the policy does not have: vLLM would refuse every request."""
        rows = self.size.vocabulary
        if unknown := [token for token in sampling.stop_token_ids if token >= rows]:
            raise UserError(
                f"sampling.stop_token_ids ({unknown[0]}) must be tokens of the model, from 0 to {rows - 1}; name one "
                "of these, or give its text in sampling.stop"
            )

    def prompt_room(self, max_tokens: int, response_tokens: int, *, setting: str = "sampling.max_new_tokens") -> int:
        """Longest prompt in tokens that leaves room for the longest response, which `setting` bounds. Raises UserError
        if there is no room."""
        room = min(max_tokens, self.size.context - response_tokens)
        if room < 1:
            raise UserError(
                f"{setting} ({response_tokens}) leaves no room for a prompt in the model's "
                f"context of {self.size.context} tokens; lower it"
            )
        return room
