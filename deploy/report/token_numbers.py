"""The numbers and the texts of tokens, as the page has them. Runs anywhere."""

from __future__ import annotations

import base64

import numpy as np

from deploy.report.token_text import TokenText

# Token numbers of the page, and where each is read: the credit file or the journal.
CREDIT = (
    *("kl", "rewards", "values", "td_errors", "advantages", "whitened_advantages", "returns", "entropy"),
    *("old_logprobs", "importance_weight", "ratio", "clipped"),
)
JOURNAL = ("rollout_logprobs", "ref_logprobs", "policy_versions")
BYTES_PER_NUMBER = 8 / 3  # a float16 in base64; numbers that need float32 are rare
LARGEST = 65_504  # of float16
EXACT = 2_048  # float16 holds every whole number up to this one


class Pieces:
    """The different token texts. Responses refer to them by index."""

    def __init__(self, text: TokenText) -> None:
        self._text = text
        self._index: dict[str, int] = {}

    def of(self, ids: list[int]) -> list[int]:
        return [self._index.setdefault(piece, len(self._index)) for piece in self._text.pieces(ids)]

    @property
    def texts(self) -> list[str]:
        return list(self._index)


def packed(values: np.ndarray | None, length: int) -> str | float | None:
    """The numbers of a response in base64, or one number if all are equal. None if they are not known. The numbers are
    float16, or float32 if one of them is too large for float16. The number of bytes tells the page which."""
    if values is None or len(values) != length or not length:
        return None
    if (values == values[0]).all():
        return short(float(values[0]))
    largest = np.abs(values[np.isfinite(values)].astype(np.float64)).max(initial=0)
    is_small = largest <= (EXACT if np.issubdtype(values.dtype, np.integer) else LARGEST)
    return base64.b64encode(values.astype("<f2" if is_small else "<f4").tobytes()).decode()


def short(value: float | None) -> float | None:
    """The value with five significant digits, because the page has many of these. None if it is not finite."""
    if value is None or not np.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.5g}")
