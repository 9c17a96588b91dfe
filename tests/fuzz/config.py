"""Config files and `key=value` settings give a config that loads back equal, or a UserError."""

from __future__ import annotations

import tomllib
from pathlib import Path
from random import Random

import tomli_w

from common.config.loading import load_config
from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from tests.fuzz.judge import WrongAnswer, value_or_message
from tests.fuzz.mutate import ODD_TEXTS, mutate_bytes, mutate_text, mutate_tree, odd_value, places

SHIPPED = sorted((Path(__file__).parents[2] / "deploy/configs").glob("*.toml"))
ROOTS = {"data": RewardTrainingConfig, "labeller": PairSamplingConfig}


def prepare(directory: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in SHIPPED]


def case(rng: Random, shared: list[str], scratch: Path) -> None:
    given = rng.choice(shared)
    tree = tomllib.loads(given)
    root = next((kind for section, kind in ROOTS.items() if section in tree), Config)
    path = scratch / "given.toml"
    overrides: list[str] = []
    way = rng.randrange(4)
    if way == 0:
        path.write_bytes(mutate_bytes(rng, given.encode()))
    elif way == 1:
        path.write_text(mutate_text(rng, given), encoding="utf-8", errors="surrogatepass")
    elif way == 2:
        changed = mutate_tree(rng, tree, changes=3)
        path.write_text(tomli_w.dumps(changed if isinstance(changed, dict) else {"a": changed}), encoding="utf-8")
    else:
        path.write_text(given, encoding="utf-8")
        overrides = [override(rng, tree) for _ in range(rng.randint(1, 3))]
    found = value_or_message(lambda: load_config(path, overrides, root), scratch)
    if isinstance(found, str):
        return
    resolved = scratch / "resolved.toml"
    resolved.write_text(found.to_toml(), encoding="utf-8")
    if load_config(resolved, [], root) != found:
        raise WrongAnswer("the config does not load back equal from what it resolves to")


def override(rng: Random, tree: dict) -> str:
    key = ".".join(map(str, rng.choice(places(tree))))
    value = odd_value(rng)
    text = tomli_w.dumps({"a": value}).partition("=")[2].strip() if rng.random() < 0.5 else str(value)
    return rng.choice([f"{key}={text}", f"{key}={text}", f"{key}{text}", f"{key}.x={text}", rng.choice(ODD_TEXTS)])
