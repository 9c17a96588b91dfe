"""`ratchet demo rlhf`: human feedback from beginning to end, each stage from its shipped config.

Pairs sampled from the base policy -> a labeller's preferences -> reward model -> PPO against it -> the labeller's
verdict on held-out prompts, before and after.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from common.config.base import Root
from common.config.loading import AnyRoot, load_config
from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from common.errors import UserError
from common.files import write_json
from deploy.run.directory import refuse_overwriting
from deploy.sample_pairs import run_pair_sampling
from deploy.screen.console import Output
from deploy.train import run_training
from deploy.train_reward import run_reward_training

CONFIGS = Path(__file__).parent / "configs"
EXAMPLES = 3


def run_rlhf_demo(directory: Path, settings: Sequence[str] = (), *, force: bool = False) -> dict[str, Any]:
    """Runs every stage below `directory` and returns what its summary.json says. A setting goes to each stage that has
    a section or field of that name."""
    started = time.perf_counter()
    console = Output()
    directory = directory.absolute()  # the stages name each other's files
    pairs, reward, ppo = directory / "pairs", directory / "reward", directory / "ppo"

    def config(name: str, root: type[AnyRoot], *own: str) -> AnyRoot:
        return load_config(CONFIGS / name, [*own, *_settings_of(root, settings)], root)

    stages = (
        config("positive-pairs.toml", PairSamplingConfig),
        config("positive-reward.toml", RewardTrainingConfig, f"data.train={json.dumps(str(pairs / 'pairs.jsonl'))}"),
        config("positive.toml", Config, f"reward.sources.0.model={json.dumps(str(reward / 'model'))}"),
    )
    if unused := [s for s in settings if not any(_settings_of(type(stage), [s]) for stage in stages)]:
        raise UserError(f"{', '.join(unused)}: no stage of the demo has such a setting; see ratchet config --describe")
    if not (stages[1].data.heldout or stages[1].data.heldout_pairs) or not stages[2].evaluation.prompts:
        raise UserError(
            "the demo compares held-out pairs and prompts: data.heldout_pairs and evaluation.prompts must be > 0"
        )
    if directory.exists() and not directory.is_dir():
        raise UserError(f"run directory {directory} is a file; name another")
    for part in (pairs, reward, ppo):
        refuse_overwriting(part, force=force, can_resume=False)

    console.rule("1 of 3: pairs from the base policy, and the labeller's preferences")
    run_pair_sampling(stages[0], pairs, force=force)
    console.rule("2 of 3: a reward model from the pairs")
    trained = run_reward_training(stages[1], reward, force=force)
    console.rule("3 of 3: PPO against the reward model, judged by the labeller")
    result = run_training(stages[2], ppo, force=force)

    before, after = result["before"], result["after"]
    source, judge = stages[2].reward.sources[0].name, stages[2].evaluation.judges[0].name
    summary = {
        "seed": stages[2].seed,
        "gold_before": before["components"][judge],
        "gold_after": after["components"][judge],
        "rm_accuracy": trained["accuracy"],
        "rm_accuracy_interval": trained["accuracy_interval"],
        "rm_score_before": before["components"][source],
        "rm_score_after": after["components"][source],
        "kl_per_response": after["kl_per_response"],
        "response_tokens_before": before["response_tokens"],
        "response_tokens_after": after["response_tokens"],
        "distinct_2_before": before["distinct_2"],
        "distinct_2_after": after["distinct_2"],
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(directory / "summary.json", summary)
    _show(console, ppo, summary, judge)
    console.print(f"summary: {directory / 'summary.json'}", markup=False)
    return summary


def _settings_of(root: type[Root], settings: Sequence[str]) -> list[str]:
    """Those that name a section and field, or a field, of the tree."""

    def known(key: str) -> bool:
        section: Any = root
        for part in key.split("."):
            if part not in getattr(section, "model_fields", {}):
                return False
            section = section.model_fields[part].annotation
        return True

    return [setting for setting in settings if known(setting.partition("=")[0])]


def _show(console: Output, ppo: Path, summary: dict[str, Any], judge: str) -> None:
    """Some held-out answers before and after, and the figures."""
    answers = [
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted((ppo / "answers").glob("version-*.jsonl"))
    ]
    console.rule("held-out answers")
    scored = [(old, new) for old, new in zip(answers[0], answers[-1]) if "score" in old and "score" in new]
    for old, new in scored[:EXAMPLES]:
        console.print(f"[bold]{escape(old['prompt'])}[/]")
        for label, answer in (("before", old), ("after ", new)):
            text = " ".join(answer["response"].split())
            console.print(f"  {label} {answer['components'][judge]:+.2f}  {escape(text)}", soft_wrap=True)
    console.print(
        f"gold score {summary['gold_before']:+.3f} -> [bold]{summary['gold_after']:+.3f}[/] (-1 to 1) · reward model "
        f"{summary['rm_score_before']:+.2f} -> {summary['rm_score_after']:+.2f} (deviations) · KL "
        f"{summary['kl_per_response']:.1f} nats per response · tokens {summary['response_tokens_before']:.1f} -> "
        f"{summary['response_tokens_after']:.1f} · distinct-2 {summary['distinct_2_before']:.2f} -> "
        f"{summary['distinct_2_after']:.2f} · reward model right on {summary['rm_accuracy']:.1%} of held-out pairs · "
        f"{summary['seconds']:.0f} s",
        soft_wrap=True,
    )
