"""The published configs of some models, and the machines that plans in tests are made for."""

from __future__ import annotations

import json

from common.config.base import ModelConfig
from common.errors import UserError
from common.memory import GIB
from common.model.size import ModelSize
from deploy.plan.capacity import refusal
from deploy.plan.models import policy_size
from deploy.plan.needs import needs
from deploy.plan.placement import Node, place
from deploy.plan.planner import Planner

QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "max_position_embeddings": 32_768,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
CONFIGS = {
    "135M": LLAMA
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "1.5B": QWEN
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "7B": QWEN
    | {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
    "13B": LLAMA
    | {
        "hidden_size": 5120,
        "intermediate_size": 13_824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32_000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
MACHINES = {
    "2 cores": [Node("n", 2, 0, 12 * GIB)],
    "1 x 24 GB": [Node("n", 8, 1, 46 * GIB, 24 * GIB)],
    "1 x 80 GB": [Node("n", 16, 1, 190 * GIB, 80 * GIB)],
    "8 x 80 GB": [Node("n", 64, 8, 510 * GIB, 80 * GIB)],
    "2 x 8 x 80 GB": [Node(name, 64, 8, 510 * GIB, 80 * GIB) for name in "ab"],
}


def model_directory(directory, name):
    """A directory with the config of a model, and nothing else."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIGS[name]))
    return directory


def size_of(directory, name) -> ModelSize:
    return policy_size(ModelConfig(path=str(model_directory(directory / name, name))))


def check_fits(wanted, nodes):
    """Raises UserError, with the reason, if a process finds no room."""
    if (why := refusal(place(wanted, nodes))) is not None:
        raise UserError(why)


def planner(model, nodes) -> Planner:
    """Plans PPO runs of this model on these nodes, which start with stores of the size that a config needs."""
    return Planner(nodes, lambda cfg: [needs(cfg, model)], trains=model, engines=model, starts_stores=True)
