"""docs/coming-from.md names Ratchet's settings and defaults correctly, and its translations agree with its commands."""

from __future__ import annotations

import math
import re
import shlex
import tomllib
from itertools import pairwise
from types import SimpleNamespace

import pytest

from common.config.description import describe
from common.config.ppo import Config
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs/coming-from.md"
TEXT = PAGE.read_text(encoding="utf-8")
DEFAULTS = {setting.key: setting.default for setting in describe(Config)}


def parts(cell: str) -> list[str]:
    """The entries of a cell, between commas: code without its backticks; "" for anything else."""
    codes: list[str] = []
    marked = re.sub(r"`([^`]*)`", lambda found: codes.append(found[1]) or f"<{len(codes) - 1}>", cell.strip())
    marks = [re.fullmatch(r"\s*<(\d+)>", part) for part in marked.split(",")] if marked else []
    return [codes[int(mark[1])] if mark else "" for mark in marks]


def rows() -> list[tuple[list[str], list[str]]]:
    """Ratchet's settings and their defaults, of each row of each table."""
    lines = [line.strip("|").split("|") for line in TEXT.splitlines() if line.startswith("|")]
    return [
        (parts(cells[2]), parts(cells[3])) for cells in lines if "---" not in cells[0] and cells[2].strip() != "Ratchet"
    ]


def test_every_setting_in_the_tables_exists():
    named = [key for keys, _ in rows() for key in keys]
    assert len(named) > 100
    assert set(named) <= DEFAULTS.keys()


def test_every_default_in_the_tables_is_the_real_one():
    for keys, defaults in rows():
        shown = defaults or [""] * len(keys)
        for key, default in zip(keys, shown, strict=True):
            assert default == (DEFAULTS[key] if default or DEFAULTS[key] not in ("required", "none") else "")


def test_every_setting_in_the_sentences_exists():
    prose = "\n".join(line for line in re.sub(r"```.*?```", "", TEXT, flags=re.S).splitlines() if line[:1] != "|")
    sections = {key.partition(".")[0] for key in DEFAULTS if "." in key}
    named = {code.partition(" = ")[0] for code in re.findall(r"`([^`]*)`", prose) if code.partition(".")[0] in sections}
    assert {"kl.target", "ppo.value_lam", "learner.critic"} <= named
    assert named <= DEFAULTS.keys()


def given(command: str) -> dict[str, str]:
    """The settings of a command: --name value, or name=value."""
    words = shlex.split(command.replace("\\\n", " "))
    options = {word[2:]: value for word, value in pairwise(words) if word.startswith("--")}
    return options | dict(word.split("=", 1) for word in words if re.match(r"[\w.]+=", word))


def translations() -> list[tuple[dict[str, str], Config]]:
    """Each command of the page, with the config that follows it."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.M | re.S)
    commands = [block for language, block in fenced if not language]
    configs = [Config.model_validate(tomllib.loads(block)) for block in blocks(PAGE, "toml")]
    return [(given(command), cfg) for command, cfg in zip(commands, configs, strict=True)]


def test_the_trl_command_and_its_translation_agree():
    theirs, cfg = translations()[0]
    batch = int(theirs["per_device_train_batch_size"]) * int(theirs["gradient_accumulation_steps"])
    assert (cfg.rollouts_per_step, cfg.num_steps) == (batch, math.ceil(int(theirs["total_episodes"]) / batch))
    assert (cfg.ppo.ppo_epochs, cfg.ppo.minibatches) == (int(theirs["num_ppo_epochs"]), int(theirs["num_mini_batches"]))
    assert {float(theirs["learning_rate"])} == {
        cfg.optimizer.learning_rate,
        cfg.optimizer.critic_learning_rate,
        cfg.optimizer.value_head_learning_rate,
    }
    assert cfg.optimizer.schedule == theirs["lr_scheduler_type"]
    assert cfg.sampling.max_new_tokens == int(theirs["response_length"])
    assert [source.weight for source in cfg.reward.sources] == [1, -float(theirs["missing_eos_penalty"])]


def test_the_openrlhf_command_and_its_translation_agree():
    theirs, cfg = translations()[1]
    batch = int(theirs["rollout.batch_size"])
    assert (cfg.rollouts_per_step, cfg.num_steps) == (batch, int(theirs["data.max_samples"]) // batch)
    assert cfg.rollouts_per_step // cfg.ppo.minibatches == int(theirs["train.batch_size"])
    assert cfg.optimizer.learning_rate == float(theirs["actor.adam.lr"])
    assert cfg.optimizer.critic_learning_rate == float(theirs["critic.adam.lr"])
    assert cfg.optimizer.warmup_steps == round(0.03 * cfg.num_steps)
    assert cfg.max_sequence_tokens == int(theirs["data.max_len"])
    assert cfg.kl.coef == float(theirs["algo.kl.init_coef"])
    assert (cfg.learner.ranks, cfg.generators.min) == (4, int(theirs["vllm.num_engines"]))
    assert cfg.learner.ranks * cfg.learner.gpus + cfg.generators.min + cfg.reference.gpus + cfg.reward.gpus == 8


def test_the_verl_command_and_its_translation_agree():
    theirs, cfg = translations()[2]
    assert cfg.rollouts_per_step == int(theirs["data.train_batch_size"])
    actor = "actor_rollout_ref.actor."
    assert cfg.rollouts_per_step // cfg.ppo.minibatches == int(theirs[f"{actor}ppo_mini_batch_size"])
    assert cfg.optimizer.learning_rate == float(theirs[f"{actor}optim.lr"])
    assert cfg.optimizer.critic_learning_rate == float(theirs["critic.optim.lr"])
    assert cfg.kl.coef == float(theirs["algorithm.kl_ctrl.kl_coef"])
    assert cfg.num_steps == int(theirs["trainer.total_training_steps"])
    assert cfg.generators.gpus == float(theirs["actor_rollout_ref.rollout.gpu_memory_utilization"])
    assert cfg.generators.gpus + cfg.reference.gpus + cfg.learner.gpus == pytest.approx(1)
    assert cfg.may_sleep


def test_the_verl_reward_function_reads_verls_columns():
    names: dict = {}
    exec(next(block for block in blocks(PAGE, "python") if "solution_str" in block), names)
    row = {"data_source": "gsm8k", "reward_model": {"style": "rule", "ground_truth": "18"}, "extra_info": {"index": 0}}
    for response, score in ((" 18\n", 1.0), ("17", 0.0)):
        assert names["before"]("gsm8k", response, row["reward_model"]["ground_truth"], row["extra_info"]) == score
        assert names["compute_score"](SimpleNamespace(response=response, fields=row)) == score
