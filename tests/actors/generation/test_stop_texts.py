"""Stop texts that begin in the tokens of another generator, with a tokenizer of bytes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers.decoders import DecodeStream

from actors.generation.stop_texts import StopTexts
from common.model.embedded import EMBEDDED
from common.model.files import load_tokenizer, resolve_model

TEXT = "Ünï 🙂 </answer> 東京 <|im_end|> done"
STOPS = ("r> 東", "🙂 </", "<|im_end|> d")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_model(EMBEDDED))


def begun_text(tokenizer, tokens: list[int], stops=STOPS) -> str:
    detokenizer, logprobs = SimpleNamespace(output_text=""), SimpleNamespace(tokenizer=tokenizer)
    state = SimpleNamespace(detokenizer=detokenizer, logprobs_processor=logprobs)
    StopTexts(tokenizer, stops).prepare(state, np.array(tokens, dtype=np.int32))
    assert logprobs.tokenizer is None
    return detokenizer.output_text


def test_wherever_a_response_is_cut_every_stop_text_is_found(tokenizer):
    """vLLM's stream of text continues after the tokens that it takes for the prompt."""
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(tokens) > 15
    partial_characters = 0
    for cut in range(len(tokens) + 1):
        begun, rest = tokens[:cut], tokens[cut:]
        stream = DecodeStream(ids=begun, skip_special_tokens=False)
        added = "".join(stream.step(tokenizer.backend_tokenizer, token) or "" for token in rest)
        before = begun_text(tokenizer, begun)
        assert TEXT.endswith(before + added)
        assert len(before) == min(len(TEXT) - len(added), max(map(len, STOPS)) - 1)
        for stop in STOPS:  # vLLM looks for those that end in what was added
            found = (before + added).find(stop) + len(stop) > len(before) and stop in before + added
            assert found == (TEXT.index(stop) + len(stop) > len(TEXT) - len(added))
        partial_characters += "\ufffd" in tokenizer.decode(begun)
    assert partial_characters > 0


def test_a_stop_text_of_one_character_needs_nothing_of_what_was_begun(tokenizer):
    tokens = tokenizer.encode("some text", add_special_tokens=False)
    assert begun_text(tokenizer, tokens, stops=("x",)) == ""
    assert begun_text(tokenizer, [], stops=("xyz",)) == ""
