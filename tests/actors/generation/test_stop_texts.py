"""Stop texts that begin in the tokens of another generator, with a tokenizer of bytes."""

from __future__ import annotations

from types import SimpleNamespace

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


class Detokenizer:
    """vLLM's, as far as a new request needs it."""

    def __init__(self, tokenizer, context: list[int]) -> None:
        self._backend, self.output_text = tokenizer.backend_tokenizer, ""
        self.stream = DecodeStream(ids=context, skip_special_tokens=False)

    def decode_next(self, token: int) -> str:
        return self.stream.step(self._backend, token) or ""


def prepared(tokenizer, prompt: list[int], begun: list[int], stops=STOPS, detokenizer=None):
    logprobs = SimpleNamespace(tokenizer=tokenizer)
    detokenizer = detokenizer or Detokenizer(tokenizer, prompt + begun)
    state = SimpleNamespace(detokenizer=detokenizer, logprobs_processor=logprobs)
    StopTexts(tokenizer, stops).prepare(state, prompt, begun)
    assert logprobs.tokenizer is None
    return detokenizer


def test_wherever_a_response_is_cut_every_stop_text_is_found(tokenizer):
    """Also where the cut goes through a character."""
    prompt = tokenizer.encode(f"What is{TEXT}?")  # what the prompt has does not count
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(tokens) > 15
    partial_characters = 0
    for cut in range(len(tokens) + 1):
        begun, rest = tokens[:cut], tokens[cut:]
        detokenizer = prepared(tokenizer, prompt, begun)
        before = detokenizer.output_text
        added = "".join(map(detokenizer.decode_next, rest))
        assert TEXT.endswith(before + added)
        assert len(before) == min(len(TEXT) - len(added), max(map(len, STOPS)) - 1)
        for stop in STOPS:  # vLLM looks for those that end in what was added
            found = stop in before + added and (before + added).index(stop) + len(stop) > len(before)
            assert found == (TEXT.index(stop) + len(stop) > len(TEXT) - len(added))
        partial_characters += tokenizer.decode(begun).endswith("\ufffd")
    assert partial_characters > 2


def test_a_stop_text_of_one_character_needs_nothing_of_what_was_begun(tokenizer):
    tokens = tokenizer.encode("some text", add_special_tokens=False)
    assert prepared(tokenizer, tokens, tokens, stops=("x",)).output_text == ""
    assert prepared(tokenizer, tokens, [], stops=("xyz",)).output_text == ""


def test_a_tokenizer_in_python_code_gives_the_text_at_once(tokenizer):
    tokens = tokenizer.encode("some text", add_special_tokens=False)
    assert prepared(tokenizer, [], tokens, ("abcd",), SimpleNamespace(output_text="")).output_text == "ext"
