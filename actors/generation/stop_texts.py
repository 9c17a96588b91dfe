"""Texts that end a response (`sampling.stop`): what vLLM needs to find them. Runs in each generator.

vLLM adds the text of every sampled token to the text of its response, and looks for stop texts at the end of that. It
starts without a tokenizer, because nothing else needs one. It then gets the tokenizer that all other processes use.
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
        self._kept = max(map(len, texts)) - 1  # characters of a stop text before its last one

    def prepare(self, state: Any, prompt: Sequence[int], begun: Sequence[int]) -> None:
        """Prepares `state`, vLLM's state of the output of a new request, which answers these tokens of the prompt and
        continues a response that has begun with others. A stop text may begin in the latter. vLLM takes them for a part
        of the prompt, so it would miss that stop text. Here it gets the end of their text as the beginning of its own
        text, which has no other use."""
        state.logprobs_processor.tokenizer = None  # it would make a text of every log-probability, which nobody reads
        if not begun:
            return
        output = state.detokenizer
        if hasattr(output, "stream"):
            # Token by token, as the first generator did. If the last token is a part of a character, a new stream with
            # all these tokens would later give the text of the whole prompt.
            output.stream = DecodeStream(ids=list(prompt), skip_special_tokens=False)
            text = "".join(map(output.decode_next, begun))
        else:  # a tokenizer in Python code
            text = self.tokenizer.decode(list(begun), clean_up_tokenization_spaces=False)
        output.output_text = text[max(0, len(text) - self._kept) :]
