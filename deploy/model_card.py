"""The model card of an exported policy: its README.md, which model hubs show. Runs wherever `ratchet export` runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from common.config.ppo import Config
from deploy.run.provenance import VERSION


def model_card(cfg: Config, step: int, evaluations: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> str:
    """`evaluations` are the records of RUN/evaluations.jsonl, `record` is RUN/run.json. The card names no path and no
    address: they may tell more than its readers should know."""
    base = os.path.basename(cfg.model.path.rstrip("/"))
    is_path = os.path.isabs(cfg.model.path) or os.path.exists(cfg.model.path)
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [ppo, rlhf, ratchet]"]
    if not is_path and ":" not in cfg.model.path:
        front.append(f"base_model: {json.dumps(cfg.model.path)}")
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {base}, trained with PPO",
        "",
        f"This is `{base}` after {step} of {cfg.num_steps} steps of PPO with Ratchet {VERSION}. A step learns from "
        f"{cfg.rollouts_per_step} responses. Weights are in bfloat16.",
        "",
        "## Reward",
        "",
        "| source | kind | weight |",
        "|---|---|---|",
        *(f"| {source.name} | {source.key} | {source.weight:g} |" for source in cfg.reward.sources),
        "",
        "## Settings",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| `{key}` | {value} |" for key, value in _settings(cfg).items()),
        "",
    ]
    lines += _evaluation_lines(step, evaluations)
    if versions := _versions(record):
        lines += ["## Versions", "", ", ".join(f"{name} {number}" for name, number in versions.items()), ""]
    return "\n".join(lines)


def _settings(cfg: Config) -> dict[str, Any]:
    return {
        "seed": cfg.seed,
        "optimizer.learning_rate": cfg.optimizer.learning_rate,
        "optimizer.schedule": cfg.optimizer.schedule,
        "kl.coef": cfg.kl.coef,
        "ppo.advantages": cfg.ppo.advantages,
        "ppo.policy_loss": cfg.ppo.policy_loss,
        "ppo.clip_eps": cfg.ppo.clip_eps,
        "ppo.ppo_epochs": cfg.ppo.ppo_epochs,
        "sampling.temperature": cfg.sampling.temperature,
        "sampling.max_new_tokens": cfg.sampling.max_new_tokens,
        "max_staleness": cfg.max_staleness,
        "learner.lora": "none" if cfg.learner.lora is None else f"rank {cfg.learner.lora.rank}",
    }


def _evaluation_lines(step: int, evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The held-out evaluations before training and of this step, if they were made."""
    by_version = {evaluation.get("policy_version"): evaluation for evaluation in evaluations}
    shown = [by_version[version] for version in dict.fromkeys((0, step)) if version in by_version]
    if not shown:
        return []
    rows = {
        "score": lambda e: f"{e['score']:.3f}",
        "pass@1": lambda e: "" if e["pass_at_1"] is None else f"{e['pass_at_1']:.1%}",
        "KL from the base, nats per response": lambda e: f"{e['kl_per_response']:.2f}",
        "tokens per response": lambda e: f"{e['response_tokens']:.1f}",
    }
    heads = [f"after {e['policy_version']} steps" for e in shown]
    return [
        "## Held-out evaluation",
        "",
        f"One sampled answer to each of {shown[-1]['prompts']} prompts that were not trained on.",
        "",
        f"| | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
        *(f"| {name} | {' | '.join(map(cell, shown))} |" for name, cell in rows.items()),
        "",
    ]


def _versions(record: Mapping[str, Any]) -> Mapping[str, str]:
    """The versions of the libraries that the run was started with."""
    starts = record.get("starts")
    newest = starts[-1] if isinstance(starts, list) and starts else {}
    versions = newest.get("versions") if isinstance(newest, dict) else None
    return versions if isinstance(versions, dict) else {}
