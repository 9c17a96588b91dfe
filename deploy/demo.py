"""`ratchet demo rlhf`: human feedback from beginning to end, each stage from its shipped config.

Runs in the driver. Pairs sampled from the base policy -> a labeller's preferences -> reward model -> PPO against it ->
the labeller's scores of held-out answers, before and after.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from common.config.base import Root
from common.config.loading import AnyRoot, load_config
from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from common.errors import UserError
from common.files import read_records, write_json
from deploy.report.report import run_report
from deploy.run.directory import refuse_overwriting
from deploy.sample_pairs import run_pair_sampling
from deploy.screen.console import Output, complain
from deploy.shipped import shipped_configs
from deploy.train import run_training
from deploy.train_reward import run_reward_training

EXAMPLES = 3


def run_rlhf_demo(directory: Path, settings: Sequence[str] = (), *, force: bool = False) -> dict[str, Any]:
    """Runs each stage in a subdirectory of `directory`. Returns the contents of directory/summary.json."""
    started = time.perf_counter()
    console = Output()
    directory = directory.absolute()  # stages name each other's files
    pairs_config, reward_config, ppo_config = stage_configs(directory, settings)
    pairs, reward, ppo = directory / "pairs", directory / "reward", directory / "ppo"
    if directory.exists() and not directory.is_dir():
        raise UserError(f"run directory {directory} is a file; name another")
    for part in (pairs, reward, ppo):
        refuse_overwriting(part, force=force, can_resume=False)

    console.rule("1 of 3: pairs from the base policy, and the labeller's preferences")
    run_pair_sampling(pairs_config, pairs, force=force)
    console.rule("2 of 3: a reward model from the pairs")
    trained = run_reward_training(reward_config, reward, force=force)
    console.rule("3 of 3: PPO against the reward model, judged by the labeller")
    result = run_training(ppo_config, ppo, force=force)

    source, judge = ppo_config.reward.sources[0].name, ppo_config.evaluation.judges[0].name
    seconds = round(time.perf_counter() - started, 1)
    summary = {"seed": ppo_config.seed, **_figures(trained, result, source, judge), "seconds": seconds}
    write_json(directory / "summary.json", summary)
    console.rule("held-out answers")
    _show_answers(console, ppo, judge)
    _show_figures(console, summary)
    console.print(f"summary: {directory / 'summary.json'}", markup=False)
    _report(ppo)
    return summary


def stage_configs(directory: Path, settings: Sequence[str]) -> tuple[PairSamplingConfig, RewardTrainingConfig, Config]:
    """The configs of the stages. A setting goes to every stage that has it. Raises UserError for one that none has."""

    def config(name: str, root: type[AnyRoot], *own: str) -> AnyRoot:
        return load_config(shipped_configs()[name], [*own, *(s for s in settings if has_setting(root, s))], root)

    data, model = json.dumps(str(directory / "pairs/pairs.jsonl")), json.dumps(str(directory / "reward/model"))
    pairs = config("positive-pairs", PairSamplingConfig)
    reward = config("positive-reward", RewardTrainingConfig, f"data.train={data}")
    ppo = config("positive", Config, f"reward.sources.0.model={model}")
    if unused := [s for s in settings if not any(has_setting(type(stage), s) for stage in (pairs, reward, ppo))]:
        raise UserError(f"{', '.join(unused)}: no stage of the demo has such a setting; see ratchet config --describe")
    if not (reward.data.heldout or reward.data.heldout_pairs) or not ppo.evaluation.prompts:
        raise UserError(
            "the demo compares held-out pairs and prompts: data.heldout_pairs and evaluation.prompts must be > 0"
        )
    return pairs, reward, ppo


def has_setting(root: type[Root], setting: str) -> bool:
    """True if the tree has the key of a `key=value` setting."""
    section: Any = root
    for part in setting.partition("=")[0].split("."):
        if part not in getattr(section, "model_fields", {}):
            return False
        section = section.model_fields[part].annotation
    return True


def _figures(trained: Mapping[str, Any], result: Mapping[str, Any], source: str, judge: str) -> dict[str, Any]:
    """The figures of the summary: the labeller's score is called gold, the reward model's rm."""
    before, after = result["before"], result["after"]
    return {
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
    }


def _report(ppo: Path) -> None:
    """Writes the report of the PPO run. The demo has succeeded already, so a fault in the report must not fail it."""
    try:
        run_report(ppo)
    except Exception as error:
        complain(f"the report could not be written ({type(error).__name__}: {error})")


def _show_answers(console: Output, ppo: Path, judge: str) -> None:
    """Prints some held-out answers before and after training."""
    answers = [read_records(path) for path in sorted((ppo / "answers").glob("version-*.jsonl"))]
    scored = [(old, new) for old, new in zip(answers[0], answers[-1]) if "score" in old and "score" in new]
    for old, new in scored[:EXAMPLES]:
        console.print(f"[bold]{escape(old['prompt'])}[/]")
        for label, answer in (("before", old), ("after ", new)):
            text = " ".join(answer["response"].split())
            gold = answer["components"].get(judge, math.nan)  # nan: the judge gave no score
            console.print(f"  {label} {gold:+.2f}  {escape(text)}", soft_wrap=True)


def _show_figures(console: Output, summary: Mapping[str, Any]) -> None:
    console.print(
        f"gold score {summary['gold_before']:+.3f} -> [bold]{summary['gold_after']:+.3f}[/] (-1 to 1) · reward model "
        f"{summary['rm_score_before']:+.2f} -> {summary['rm_score_after']:+.2f} (deviations) · KL "
        f"{summary['kl_per_response']:.1f} nats per response · tokens {summary['response_tokens_before']:.1f} -> "
        f"{summary['response_tokens_after']:.1f} · distinct-2 {summary['distinct_2_before']:.2f} -> "
        f"{summary['distinct_2_after']:.2f} · reward model right on {summary['rm_accuracy']:.1%} of held-out pairs · "
        f"{summary['seconds']:.0f} s",
        soft_wrap=True,
    )
