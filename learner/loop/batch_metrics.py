"""The metrics of one batch: what its rollouts scored, how long and how old they are. Runs in the driver."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby, islice, pairwise
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa

from common.environment import VOID_KINDS
from common.turns import CACHE_BLOCK
from common.types import FINISHED, oldest_version, staleness
from common.user_code.results import MAX_FIGURES


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


def _prefixes(table: pa.Table, rows: Sequence[Sequence[Mapping[str, Any]]], episodes: int) -> dict[str, float]:
    """What engines found in their caches before the later turns of these episodes, and what they had computed with the
    same weights and did not find. `rows`: the turns of each row. Empty if no episode has a second turn."""
    before = cached = recomputed = longest = 0  # tokens
    for prompt, response, of_tokens, row in zip(
        *(table[name] for name in ("prompt_ids", "response_ids", "policy_versions")), rows, strict=True
    ):
        if not row:
            continue
        num_prompt = len(prompt)
        tokens = np.concatenate([prompt.values.to_numpy(), response.values.to_numpy()])
        versions = of_tokens.values.to_numpy()  # of sampled tokens alone
        lengths: list[int] = []  # of earlier contexts
        turn_start = num_prompt
        start = first = 0  # the newest context, and the newest turn's first sampled token, among `versions`
        for earlier, turn in pairwise(row):
            end, next_start = num_prompt + earlier["end"], num_prompt + earlier["next_start"]
            context, kept = tokens[start:end], end - start
            if earlier["new_context"]:
                lengths.append(kept)
                start = end
                kept = _common(context, tokens[start:next_start])
            before += next_start - start
            cached += turn["cached_tokens"]
            following = first + end - turn_start
            if first < following < len(versions) and versions[first] == versions[following]:
                # The last token of a turn is sampled, not computed. A cache keeps whole blocks.
                whole = min(kept, len(context) - 1) // CACHE_BLOCK * CACHE_BLOCK
                recomputed += max(0, whole - turn["cached_tokens"])
            first, turn_start = following, next_start
        longest += max([*lengths, len(tokens) - start])
    if not before:
        return {}
    return {
        "environment/cached": cached / before,
        "environment/recomputed": recomputed / episodes,
        "environment/context_tokens": longest / episodes,
    }


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
