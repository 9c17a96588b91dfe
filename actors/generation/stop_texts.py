"""Texts that end a response (`sampling.stop`): what vLLM needs to find them. Runs in each generator.

vLLM adds the text of every sampled token to the text of its response, and looks for stop texts at the end of that. It
starts without a tokenizer, because nothing else needs one. It then gets the tokenizer that all other processes use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase


class StopTexts:
    """The stop texts of all requests."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self._kept = max(map(len, texts)) - 1  # characters of a stop text before its last one

    def prepare(self, state: Any, begun: np.ndarray) -> None:
        """Prepares `state`, vLLM's state of the output of a new request, which continues the response `begun`, int32
        [N]. A stop text may begin in these tokens. vLLM takes them for a part of the prompt, so it would miss that stop
        text. Here it gets the end of their text as the beginning of its own text, which has no other use."""
        state.logprobs_processor.tokenizer = None  # it would make a text of every log-probability, which nobody reads
        if len(begun):
            text = self.tokenizer.decode(begun.tolist(), clean_up_tokenization_spaces=False)
            text = text.rstrip("\ufffd")  # the first bytes of a character, which comes whole with its last token
            state.detokenizer.output_text = text[max(0, len(text) - self._kept) :]
