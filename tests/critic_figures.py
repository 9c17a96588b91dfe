"""The figures of a critic from their definitions, with loops over responses and tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Response = Sequence[tuple[float, float]]  # predicted and realised return of each token
PARTS = ("realised", "first", "quarter_1", "quarter_2", "quarter_3", "quarter_4", "last")


def figures(responses: Sequence[Response], scores: Sequence[float]) -> dict[str, float]:
    tokens = [token for response in responses for token in response]
    found = {"value/returns_var/realised": float(np.var([realised for _, realised in tokens]))}
    for part in PARTS:
        chosen = [r[t] for r in responses for t in range(len(r)) if part in parts_of(t, len(r))]
        found[f"value/explained_variance/{part}"] = explained(chosen)
    bins = [part for part in split(tied(sorted(tokens)), 10) if part]
    found["value/calibration_error"] = sum(abs(sum(v - r for v, r in part)) for part in bins) / len(tokens)
    first = [(response[0][0], score) for response, score in zip(responses, scores, strict=True) if response]
    varies = all(np.std(x) > 1e-6 * abs(np.mean(x)) for x in zip(*first, strict=True))
    found["value/score_correlation"] = float(np.corrcoef(np.transpose(first))[0, 1]) if varies else 0.0
    return found


def parts_of(token: int, length: int) -> set[str]:
    """The parts that a token is in, by the share of the response that is before it."""
    quarter = 1 + sum(token / length >= bound for bound in (0.25, 0.5, 0.75))
    ends = {"first"} if token == 0 else set()
    return {"realised", f"quarter_{quarter}"} | ends | ({"last"} if token == length - 1 else set())


def explained(tokens: Response) -> float:
    values, realised = np.transpose(tokens) if tokens else np.zeros((2, 1))
    if np.std(realised) <= 1e-6 * np.abs(realised).max():
        return 0.0
    return float(1 - np.var(realised - values) / np.var(realised))


def tied(tokens: Response) -> list[tuple[float, float]]:
    """Tokens in order of their values; those with nearly equal values have their mean return."""
    near = 1e-5 * max(abs(value) for value, _ in tokens)
    groups: list[list[tuple[float, float]]] = []
    for token in tokens:
        if groups and token[0] - groups[-1][0][0] <= near / 2:
            groups[-1].append(token)
        else:
            groups.append([token])
    return [(value, float(np.mean([r for _, r in group]))) for group in groups for value, _ in group]


def split(tokens: list, parts: int) -> list[list]:
    """Parts of equal size; the first ones have one more, where it does not divide."""
    size, longer = divmod(len(tokens), parts)
    found = []
    for part in range(parts):
        count = size + (part < longer)
        found.append(tokens[:count])
        tokens = tokens[count:]
    return found
