"""Model directories give a policy or reward model that can be loaded, or a UserError."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import torch

from common.model.files import end_token_ids, load_policy
from common.model.reward_head import load_reward_model, read_scale, reward_model_size
from deploy.policy_files import PolicyFiles
from tests.fakes import save_tiny_model
from tests.fuzz.judge import WrongAnswer, value_or_message
from tests.fuzz.mutate import mutate_bytes, mutate_text, mutate_tree, odd_value

CPU = torch.device("cpu")
SETTINGS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "max_position_embeddings", "model_type", "architectures", "eos_token_id", "pad_token_id", "bos_token_id",
            "intermediate_size", "rope_scaling", "rope_parameters", "hidden_act", "torch_dtype", "dtype",
            "tie_word_embeddings", "quantization_config", "auto_map", "num_labels", "id2label", "layer_types",
            "sliding_window", "attention_bias", "rms_norm_eps", "initializer_range", "ratchet")  # fmt: skip


def prepare(directory: Path) -> dict[str, Path]:
    policy = save_tiny_model(directory / "policy")
    reward = directory / "reward"
    shutil.copytree(policy, reward)
    make_reward_model(policy, reward)
    return {"policy": policy, "reward": reward}


def make_reward_model(policy: Path, target: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1, pad_token_id=0)
    model.save_pretrained(target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ratchet": {"mean": 0.5, "deviation": 2.0}}))


def case(rng: Random, shared: dict[str, Path], scratch: Path) -> None:
    kind = rng.choice(["policy", "policy", "reward"])
    directory = scratch / "model"
    shutil.copytree(shared[kind], directory)
    for _ in range(rng.choice([1, 1, 2])):
        change_one(rng, directory)
    load = load_policy_files if kind == "policy" else load_reward_files
    value_or_message(lambda: load(directory, whole=rng.random() < 0.3), scratch)


def change_one(rng: Random, directory: Path) -> None:
    """Changes the text, the bytes or one value of one of the model's files, or removes the file."""
    names = sorted(path.name for path in directory.iterdir())
    if not names:
        return
    name = "config.json" if rng.random() < 0.5 and "config.json" in names else rng.choice(names)
    path = directory / name
    way = rng.randrange(10)
    data = path.read_bytes()
    if way == 0:
        path.unlink()
    elif way == 1 or path.suffix != ".json":
        path.write_bytes(mutate_bytes(rng, data))
    elif way == 2:
        path.write_bytes(mutate_text(rng, data.decode("utf-8", "replace")).encode("utf-8", "surrogatepass"))
    else:
        try:
            tree = json.loads(data)
        except ValueError:  # an earlier change broke it
            return
        if way < 6 and name == "config.json" and isinstance(tree, dict):
            tree[rng.choice(SETTINGS)] = rng.choice([odd_value(rng, json_only=True), -1, 0, 3, 1000, None, "llama", {}])
        else:
            tree = mutate_tree(rng, tree, json_only=True)
        path.write_text(json.dumps(tree), encoding="utf-8")


def load_policy_files(directory: Path, *, whole: bool) -> Any:
    files = PolicyFiles.load(str(directory))
    sizes = [getattr(files.size, field.name) for field in fields(files.size) if field.name != "body"]
    if not all(size is None or (isinstance(size, int) and size > 0) for size in sizes):
        raise WrongAnswer(f"sizes {files.size}")
    ends = end_token_ids(files.directory, files.tokenizer)
    if not all(isinstance(token, int) and 0 <= token < files.size.vocabulary for token in ends):
        raise WrongAnswer(f"end tokens {ends} of {files.size.vocabulary}")
    if whole and files.size.parameters < 10**7:
        load_policy(files.directory, dtype=torch.float32, device=CPU)
    return files


def load_reward_files(directory: Path, *, whole: bool) -> Any:
    size = reward_model_size(directory)
    scale = read_scale(directory)
    if not (isinstance(scale.mean, float) and isinstance(scale.deviation, float)):
        raise WrongAnswer(f"scale {scale}")
    if whole and size.parameters < 10**7:
        load_reward_model(directory, dtype=torch.float32, device=CPU)
    return scale
