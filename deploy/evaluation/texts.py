"""The texts whose perplexity is measured, cut into windows of tokens. Runs in the driver."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.config.ppo import Config
from common.data.prompt_tokens import bare_ids, check_embedded, with_beginning
from common.data.texts import read_texts
from common.errors import UserError
from common.types import HELDOUT_EPOCH, Prompt, Rollout, SampleId
from deploy.policy_files import PolicyFiles

SHIPPED, OWN = "shipped", "own"  # names of texts
_SETTING = "evaluation.text"


@dataclass(frozen=True)
class Text:
    """A text in windows of tokens. All policies get the same windows, because they share a tokenizer."""

    name: str
    windows: Sequence[Rollout]

    @property
    def tokens(self) -> np.ndarray:
        """The number of measured tokens of each window, int64 [W]."""
        return np.array([len(window.response_ids) for window in self.windows])


def load_texts(cfg: Config, policies: Sequence[PolicyFiles]) -> list[Text]:
    """The shipped text and, if one is set, the user's. Raises UserError."""
    if not cfg.evaluation.text_tokens:
        return []
    shipped = (files("deploy.evaluation") / "held-out-text.txt").read_text(encoding="utf-8")
    sources: dict[str, Iterator[tuple[str, str]]] = {SHIPPED: iter([("the shipped text", shipped)])}
    if (own := cfg.evaluation.text) is not None:
        column = cfg.evaluation.text_column
        sources[OWN] = read_texts(own, column=column, setting=_SETTING, seed=cfg.seed)
    longest = min(cfg.evaluation.text_window, cfg.reference.max_batch_tokens, *(p.size.context for p in policies))
    texts = []
    for name, source in sources.items():
        windows = list(_windows(source, policies, longest=longest, limit=cfg.evaluation.text_tokens))
        if not windows:
            raise UserError(f"{_SETTING} ({own}) has no text of two tokens or more; name a longer one, or leave it out")
        texts.append(Text(name, windows))
    return texts


def _windows(
    texts: Iterator[tuple[str, str]], policies: Sequence[PolicyFiles], *, longest: int, limit: int
) -> Iterator[Rollout]:
    """The windows of all texts, with up to `limit` tokens to predict in all."""
    tokenizer, number = policies[0].tokenizer, 0
    for where, text in texts:
        bare, beginning = _tokens(tokenizer, text)
        if bare:
            for policy in policies:
                check_embedded(where, bare, tokenizer, policy.size.vocabulary)
        for context, ids in cut(bare, beginning, longest):
            if not (ids := ids[:limit]):
                return
            limit -= len(ids)
            prompt = Prompt(SampleId(HELDOUT_EPOCH, number, 0), where, np.array(context, dtype=np.int32))
            zeros = np.zeros(len(ids), dtype=np.int32)
            yield Rollout(prompt, np.array(ids, dtype=np.int32), zeros.astype(np.float32), zeros, "length", "")
            number += 1


def cut(bare: list[int], beginning: list[int], longest: int) -> Iterator[tuple[list[int], list[int]]]:
    """Windows of up to `longest` tokens: the context, and the tokens to predict. Every token is predicted once. If no
    tokens begin a sequence, the first token has no context and is not predicted. Later windows have the last token of
    the previous window as context."""
    first, step = (0 if beginning else 1), max(1, longest - len(beginning) - 1)
    for start in range(first, len(bare), step):
        yield [*beginning, *bare[max(0, start - 1) : start]], bare[start : start + step]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """The text's tokens, and the tokens that begin a sequence."""
    [bare] = bare_ids(tokenizer, [text])
    whole = with_beginning(tokenizer, text, bare, chat=False)
    return bare, whole[: max(0, len(whole) - len(bare))]
