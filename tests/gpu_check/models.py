"""Random models on disk, and batches for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from common.config.ppo import Config
from tests.bench.batch import config
from tests.gpu_check.run import Run

SHAPES: dict[str, dict[str, Any]] = {
    "135M": {  # SmolLM2-135M
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1.2B": {  # Llama-3.2-1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "7B": {  # Llama-2-7B
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
}


def random_llama(run: Run, name: str) -> str:
    """Writes a Llama of that shape once, in bf16, and returns its directory."""
    directory = run.scratch / name
    if not directory.exists():
        torch.manual_seed(0)
        settings = LlamaConfig(**SHAPES[name], max_position_embeddings=8192)
        with run.device:
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
        model.save_pretrained(directory)
    return str(directory)


def learner_config(run: Run, model: str | Path, *, gpus: int | None = None, **sections: Any) -> Config:
    """On the run's device, one epoch of one minibatch; `gpus` overrides the device."""
    learner = {"gpus": run.gpus if gpus is None else gpus, **sections.pop("learner", {})}
    ppo = {"ppo_epochs": 1, **sections.pop("ppo", {})}
    return config(str(model), learner=learner, ppo=ppo, **sections)
