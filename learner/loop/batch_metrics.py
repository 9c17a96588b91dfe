"""The metrics of one batch: what its rollouts scored, how long and how old they are. Runs in the driver."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice, pairwise
from statistics import fmean
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

from common.environment import VOID_KINDS
from common.turns import CACHE_BLOCK, context_starts
from common.types import FINISHED, oldest_version, staleness
from common.user_code.results import MAX_FIGURES

Turn: TypeAlias = Mapping[str, Any]  # as the journal has it


def batch_metrics(table: pa.Table, void_kinds: Sequence[str], *, policy_version: int) -> dict[str, float]:
    """The metrics of a batch in its journal form. `void_kinds`: the `Void.kind` of each void since the batch before.
    `policy_version`: the learner's version when the batch was taken from the buffer."""
    scores = table["score"].to_numpy()
    components = [dict(row) for row in table["components"].to_pylist()]
    versions = [row.values.to_numpy() for row in table["policy_versions"]]
    ages = [staleness(oldest_version(row), policy_version) for row in versions]
    return {
        "rollout/score/mean": float(scores.mean()),
        "rollout/score/std": float(scores.std()) if scores.min() < scores.max() else 0.0,
        "rollout/score/zero_std": _equally_scored(table),
        "rollout/response_tokens/mean": sum(map(len, versions)) / len(scores),
        "rollout/finished": sum(reason in FINISHED for reason in table["finish_reason"].to_pylist()) / len(scores),
        "rollout/voids": len(void_kinds),
        "staleness/min": min(ages),
        "staleness/mean": sum(ages) / len(ages),
        "staleness/max": max(ages),
        **{f"reward/{name}/score": sum(row[name] for row in components) / len(scores) for name in components[0]},
        **_mean_figures(table),
        **_environment(table, void_kinds),
    }


def _environment(table: pa.Table, void_kinds: Sequence[str]) -> dict[str, float]:
    """The metrics of the environment in these episodes; none without an environment."""
    rows = [turns or [] for turns in table["turns"].to_pylist()]
    turns = [turn for row in rows for turn in row]
    if not turns:
        return {}
    episodes = sum(map(bool, rows))
    found = {
        "environment/turns": len(turns) / episodes,
        "environment/contexts": 1 + sum(turn["new_context"] for turn in turns) / episodes,
        "environment/tokens": sum(turn["next_start"] - turn["end"] for turn in turns) / episodes,
        "environment/step_s/mean": fmean(turn["seconds"] for turn in turns),
        "environment/step_s/max": max(turn["seconds"] for turn in turns),
        **{f"environment/voids/{kind}": void_kinds.count(kind) for kind in VOID_KINDS},
    }
    found |= _prefixes(table, rows, episodes)
    infos = [json.loads(turn["info"]) for turn in turns]
    for key in ("tool_calls", "failed_calls"):
        if counts := [info[key] for info in infos if key in info]:
            found[f"environment/{key}"] = sum(counts) / episodes
    return found


def _prefixes(table: pa.Table, rows: Sequence[Sequence[Turn]], episodes: int) -> dict[str, float]:
    """What engines found in their caches before the later turns of these episodes, and what they had computed with the
    same weights and did not find. `rows`: the turns of each row. Empty if no episode has a second turn."""
    later: list[_LaterTurn] = []
    longest = 0
    columns = (table[name] for name in ("prompt_ids", "response_ids", "policy_versions"))
    for prompt, response, versions, turns in zip(*columns, rows, strict=True):
        if turns:
            tokens = np.concatenate([prompt.values.to_numpy(), response.values.to_numpy()])
            later += _later_turns(tokens, len(prompt), versions.values.to_numpy(), turns)
            longest += _longest_context(len(tokens), len(prompt), turns)
    before = sum(len(turn.context) for turn in later)
    if not before:
        return {}
    return {
        "environment/cached": sum(turn.cached for turn in later) / before,
        "environment/recomputed": sum(_recomputed(turn) for turn in later) / episodes,
        "environment/context_tokens": longest / episodes,
    }


class _LaterTurn(NamedTuple):
    """A turn of the policy after the first one of its episode."""

    earlier: np.ndarray  # all tokens of the turn before: its context, and what the policy sampled
    context: np.ndarray  # the tokens before this turn
    cached: int  # tokens of `context` that the engine found in its cache
    same_weights: bool  # as the turn before: both begin with the same policy version


def _later_turns(
    tokens: np.ndarray, num_prompt: int, versions: np.ndarray, turns: Sequence[Turn]
) -> Iterator[_LaterTurn]:
    """`tokens` of one episode: `num_prompt` of the prompt, and the response. `versions`: of each sampled token."""
    context_start, turn_start = 0, num_prompt  # places in `tokens`
    first = 0  # place in `versions` of a turn's first token
    for turn, next_turn in pairwise(turns):
        turn_end, next_start = num_prompt + turn["end"], num_prompt + turn["next_start"]
        next_first = first + turn_end - turn_start
        earlier = tokens[context_start:turn_end]
        if turn["new_context"]:
            context_start = turn_end
        same_weights = first < next_first < len(versions) and versions[first] == versions[next_first]
        yield _LaterTurn(earlier, tokens[context_start:next_start], next_turn["cached_tokens"], same_weights)
        turn_start, first = next_start, next_first


def _recomputed(turn: _LaterTurn) -> int:
    """Tokens that the engine had computed with the same weights, and did not find in its cache."""
    if not turn.same_weights:
        return 0
    # The last token of a turn is sampled, not computed. A cache keeps whole blocks.
    computed = min(_common(turn.earlier, turn.context), len(turn.earlier) - 1)
    return max(0, computed // CACHE_BLOCK * CACHE_BLOCK - turn.cached)


def _longest_context(num_tokens: int, num_prompt: int, turns: Sequence[Turn]) -> int:
    """Tokens of an episode's longest context, with what the policy sampled in it."""
    starts = context_starts((turn["end"], turn["new_context"]) for turn in turns[:-1])
    places = [0, *(num_prompt + start for start in starts), num_tokens]
    return max(end - start for start, end in pairwise(places))


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """The number of tokens that both begin with."""
    length = min(len(one), len(other))
    return int(np.argmin(np.append(one[:length] == other[:length], False)))


def _mean_figures(table: pa.Table) -> dict[str, float]:
    """Means of the figures that sources return with their scores, each over the rollouts that have it. Keeps the first
    MAX_FIGURES names of a source: a function could invent a new name for every response."""
    values: dict[str, list[float]] = {}
    for row in table["figures"].to_pylist():
        for key, value in row:
            values.setdefault(key, []).append(value)
    kept: list[str] = []
    for _, keys in groupby(sorted(values), key=lambda key: key.partition("/")[0]):
        kept.extend(islice(keys, MAX_FIGURES))
    return {f"reward/{key}": fmean(values[key]) for key in kept}


def _equally_scored(table: pa.Table) -> float:
    """Share of prompts whose responses all score the same. With one response per prompt, the batch is one prompt."""
    by_prompt: dict[tuple[int, int], set[float]] = {}
    keys = zip(table["epoch"].to_pylist(), table["prompt_index"].to_pylist())
    for key, score in zip(keys, table["score"].to_pylist(), strict=True):
        by_prompt.setdefault(key, set()).add(score)
    if len(by_prompt) == table.num_rows:
        return float(len(set(table["score"].to_pylist())) == 1)
    return sum(len(scores) == 1 for scores in by_prompt.values()) / len(by_prompt)
