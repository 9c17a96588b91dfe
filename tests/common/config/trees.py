"""Trees of settings with every kind of source, and with something in every section that may be left out."""

from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig

ONE_KIND = "a source must have exactly one of function, model, urls, judge_urls, reasoning_gym and environment"
ROOTS = {"reward": Config, "data": RewardTrainingConfig, "labeller": PairSamplingConfig}  # by a section only it has
SOURCES = [
    {"name": "short", "function": "tasks:short", "weight": -0.5},
    {"name": "helpful", "model": "runs/reward/model", "dtype": "float32", "max_tokens": 700, "batch_window_ms": 0.0},
    {"name": "correct", "urls": ["http://a/score", "https://b/score"], "retries": 0, "request_timeout_s": 2.5},
    {
        "name": "kind",
        "judge_urls": ["http://a/v1"],
        "judge_model": "m",
        "template": "{response}",
        "score_range": [0, 1],
    },
    {"name": "solved", "reasoning_gym": True, "answer_pattern": "=(.*)"},
]
TREES = {
    "ppo": {
        "seed": 3,
        "prompts": {"train": 'reasoning-gym:a "b" ü', "heldout": "reasoning-gym:h", "format": "chat"},
        "reward": {"sources": [*SOURCES, {"name": "game", "environment": True}], "min": 2, "normalise": "none"},
        "environment": {"tools": ["tasks:add"], "concurrent": 5, "labels": {"group": "games"}},
        "evaluation": {"judges": [{**source, "name": f"judge_{i}"} for i, source in enumerate(SOURCES)]},
        "optimizer": {"eps": 1e-9, "betas": [0.5, 0.6]},
        "learner": {"lora": {"rank": 4, "targets": ["q_proj", "v_proj"]}},
        "ray": {"address": "10.0.0.1:6379"},
    },
    "reward training": {
        "model": {"path": "org/model"},
        "data": {"train": "data/*.parquet", "heldout_pairs": 20, "overlong": "drop"},
        "loss": {"centre_coef": 0.01},
        "optimizer": {"head_learning_rate": 1e-2},
    },
    "pair sampling": {
        "prompts": {"source": "reasoning-gym:a", "pairs": 7},
        "labeller": {"sources": SOURCES, "min_gap": 0.25, "gpus": 0.5},
        "sampling": {"temperature": 0.7},
    },
}


def root_of(tree):
    (root,) = (root for section, root in ROOTS.items() if section in tree)
    return root


def leaves(tree, prefix=""):
    """Dotted keys of a nested dict; of a list of tables those of any of them, with `[]` for its index."""
    for key, value in tree.items():
        if isinstance(value, dict) and key not in (
            "headers",
            "labels",
            "parameters",
            "request",
        ):  # tables of the user's own keys
            yield from leaves(value, f"{prefix}{key}.")
            continue
        yield prefix + key
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield from dict.fromkeys(leaf for item in value for leaf in leaves(item, f"{prefix}{key}[]."))
