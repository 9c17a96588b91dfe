"""The text of single tokens, from the tokenizer that the run kept. Runs anywhere.

A tokenizer.json alone is enough for this: transformers, which would import torch, is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

KEPT = "tokenizer.json"  # in the run directory; `ratchet train` writes it as the run begins


class TokenText:
    """Splits responses into the texts of their tokens."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def of_run(cls, directory: Path, model_path: str) -> TokenText:
        """From the tokenizer file of the run, of its policy, or of the starting model: the first that can be read."""
        places = [directory / KEPT, directory / "policy/tokenizer.json", Path(model_path) / "tokenizer.json"]
        for path in places:
            try:
                return cls(Tokenizer.from_file(str(path)))
            except Exception:  # the library raises nothing more specific, for a missing file too
                continue
        return cls(None)

    @property
    def found(self) -> bool:
        return self._tokenizer is not None

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One text for each token. A token that ends inside a character has an empty text, and the character belongs
        to the token that completes it. Without a tokenizer, the text is the token's number."""
        if self._tokenizer is None:
            return [f"[{token}]" for token in ids]
        stream = DecodeStream(skip_special_tokens=False)
        return [_piece(self._tokenizer, stream, token) for token in ids]


def _piece(tokenizer: Tokenizer, stream: DecodeStream, token: int) -> str:
    try:
        return stream.step(tokenizer, token) or ""
    except Exception:  # an id that the tokenizer lacks, or bytes that are no text
        return "\ufffd"
