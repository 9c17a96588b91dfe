"""Texts that end a response (`sampling.stop`): what vLLM needs to find them. Runs in each generator.

vLLM appends the text of every sampled token to the text of the response, and looks for stop texts at the end of it.
The engine starts without a tokenizer, because nothing else needs one. For stop texts it gets the tokenizer that all
other processes use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class StopTexts:
    """The stop texts of all requests."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self._kept = max(map(len, texts)) - 1  # most characters of a stop text that come before the newest token

    def prepare(self, state: Any, prompt: Sequence[int], begun: Sequence[int]) -> None:
        """Prepares `state`, vLLM's output state of a new request. `prompt` and `begun` are token ids: the request
        continues a response whose first tokens are `begun`.

        vLLM treats `begun` as a part of the prompt, so it would miss a stop text that starts there. So this puts the
        end of the text of `begun` before vLLM's text of the response. Only the search for stop texts reads that."""
        state.logprobs_processor.tokenizer = None  # otherwise vLLM decodes a token for every log-probability
        if not begun:
            return
        output = state.detokenizer
        if hasattr(output, "stream"):
            # Decode one token at a time, as the first generator did. A new stream that starts with all these tokens
            # would later return the text of the whole prompt, if the last token is only a part of a character.
            output.stream = DecodeStream(ids=list(prompt), skip_special_tokens=False)
            text = "".join(map(output.decode_next, begun))
        else:  # a tokenizer in Python code
            text = self.tokenizer.decode(list(begun), clean_up_tokenization_spaces=False)
        output.output_text = text[max(0, len(text) - self._kept) :]
