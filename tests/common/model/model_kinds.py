"""A tiny random model of any type that transformers has, and the types that docs/models.md lists."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 5,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}

# Further settings of types for which the sizes above do not fit together.
_LATENT = {"num_key_value_heads": 4}  # each head has its own keys, made from one latent
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_CONV = {"layer_types": ["conv", "full_attention"]}
NEEDED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"),
        _LATENT,
    ),
    "dots1": {**_LATENT, "n_shared_experts": 1},
    "phimoe": {"sliding_window": None},
    "bamba": _MAMBA,
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_chunk_size": 8, "mamba_d_state": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "zamba2": {"num_hidden_layers": 6, "hybrid_layer_ids": [2], "layer_types": ["mamba"] * 6},
    "lfm2": _CONV,
    "lfm2_moe": {**_CONV, "num_dense_layers": 1},
    "zaya": {"num_experts_per_tok": 1},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
}


def tiny_config(kind: str, **changes: Any) -> PretrainedConfig:
    """A config of a few thousand parameters. For a composite type `changes` apply to its text part."""
    config_class = CONFIG_MAPPING[kind]
    changes = {**NEEDED.get(kind, {}), **changes}
    if "text_config" in config_class.sub_configs:
        text = config_class.sub_configs["text_config"]
        small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return config_class(text_config={**_sizes(text), **changes}, vision_config=small)
    return config_class(**{**_sizes(config_class), **changes})


def _sizes(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    known = {*inspect.signature(config_class.__init__).parameters}
    for parent in config_class.__mro__:
        known |= set(getattr(parent, "__annotations__", ()))
    aliases = config_class.attribute_map
    return {aliases.get(k, k): v for k, v in SIZES.items() if k in known or aliases.get(k) in known}


def listed(heading: str) -> dict[str, str]:
    """The types in the table under a heading of docs/models.md, each with the cell next to it."""
    text = (Path(__file__).parents[3] / "docs/models.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    return {kind: row[1] for row in rows for kind in re.findall(r"`([^`]+)`", row[0])}
