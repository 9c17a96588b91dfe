"""The identity of everything that a run depends on: digests by name, for the journal. Runs in the driver.

    model             weights, config and tokenizer of the model that training starts from
    critic            all files of the trained critic that a run starts from (learner.critic_path)
    prompts.train     prompts in order: text, messages, token ids and other fields; the seed and rollouts_per_prompt
    prompts.heldout   the same for the held-out prompts, if the run evaluates
    reward.sources.N  files of a reward model; the file with a reward function. None for a service
    environment       the files with the environment's class, or with its tools

The settings are compared one by one (deploy/run/settings.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.scoring.kinds import kind_of
from common.config.ppo import Config
from common.errors import UserError
from common.model.identity import file_digest, model_digest
from common.types import PromptRecord
from common.user_code.import_path import module_file
from deploy.policy_files import PolicyFiles

_SHOWN = 12  # hex digits of a digest in messages


def identity_of(
    cfg: Config,
    policy: PolicyFiles,
    train: Sequence[PromptRecord],
    heldout: Sequence[PromptRecord],
    *,
    critic: str | None = None,
) -> dict[str, str]:
    """The digests of a run with these settings and inputs, and with the trained critic in the directory `critic`."""
    found = {
        "model": model_digest(policy.directory),
        "prompts.train": prompts_digest(train, cfg.seed, cfg.prompts.rollouts_per_prompt),
    }
    if critic is not None:
        found["critic"] = model_digest(Path(critic))
    if heldout:
        found["prompts.heldout"] = prompts_digest(heldout)
    for number, source in enumerate(cfg.reward.sources):
        if (digest := kind_of(source).identity(source)) is not None:
            found[f"reward.sources.{number}"] = digest
    if cfg.environment is not None and (digest := code_digest(cfg.environment.code)) is not None:
        found["environment"] = digest
    return found


def code_digest(names: Sequence[str]) -> str | None:
    """SHA-256 over the files that have these functions or classes (`module:name`). Modules that they import are not
    looked at. None if none has a file."""
    files = [module_file(name.partition(":")[0]) for name in names]
    digests = [file_digest(file) for file in dict.fromkeys(files) if file is not None]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest() if digests else None


def prompts_digest(records: Sequence[PromptRecord], *numbers: int) -> str:
    """SHA-256 over all prompts in order, and over the numbers that decide which of them is asked when."""
    digest = hashlib.sha256(json.dumps(numbers).encode())
    for record in records:
        parts = [record.text, record.messages, record.fields]
        known = json.dumps(parts, sort_keys=True, default=_text).encode()
        digest.update(len(known).to_bytes(8, "little") + known)
        ids = record.token_ids.astype("<i4").tobytes()
        digest.update(len(ids).to_bytes(8, "little") + ids)
    return digest.hexdigest()


def accepted_differences(
    now: Mapping[str, str],
    before: Mapping[str, str],
    accepted: Sequence[str],
    shown: Mapping[str, str],
    kept: Mapping[str, str],
) -> dict[str, str]:
    """The digests to record because they differ from the journal's: of inputs that the user accepts by name, and of
    inputs that are new in the run. Raises UserError for any other difference. `shown`: the file or setting behind each
    name. `kept`: see `kept_names`."""
    if unknown := [name for name in accepted if name not in now]:
        raise UserError(f"--accept {unknown[0]}: the run depends on {', '.join(now)}; name one of them")
    if names := [name for name in accepted if name in kept]:
        raise UserError(
            f"--accept {names[0]} is refused: {kept[names[0]]}, so the learner could not be rebuilt with other ones. "
            f"Restore {shown[names[0]]} as it was, or start a new run"
        )
    different = [name for name in now if name in before and before[name] != now[name]]
    if refused := [name for name in different if name not in accepted]:
        parts = "; ".join(
            f"{name} ({shown[name]}) has SHA-256 {now[name][:_SHOWN]}, in the journal {before[name][:_SHOWN]}"
            for name in refused
        )
        accept = " ".join(f"--accept {name}" for name in refused)
        can_accept = not any(name in kept for name in refused)
        remedy = f"or continue with what is there now: add {accept}, which the journal records; " if can_accept else ""
        raise UserError(f"the run began with other contents: {parts}. Restore them, {remedy}or start a new run")
    return {name: now[name] for name in now if before.get(name) != now[name]}


def kept_names(cfg: Config) -> dict[str, str]:
    """The names whose contents may never change, each with the reason. Checkpoints have only trained weights, so a
    restored learner reads all other weights from these files again."""
    reasons = {"critic": "the run begins with the weights of its trained critic"}
    if cfg.learner.lora is not None:
        reasons["model"] = "the weights below the adapters (learner.lora) are the model's, and in no checkpoint"
    elif cfg.learner.critic_frozen is not None and cfg.ppo.has_critic:
        reasons["model"] = "the frozen weights of the critic (learner.critic_frozen) are in no checkpoint"
    return reasons


def shown_names(cfg: Config) -> dict[str, str]:
    """The file or setting behind the name of each digest, for messages."""
    names = {
        "model": cfg.model.path,
        "critic": str(cfg.critic_path),
        "prompts.train": cfg.prompts.train,
        "prompts.heldout": str(cfg.prompts.heldout),
        "environment": cfg.environment.name if cfg.environment else "",
    }
    return names | {f"reward.sources.{number}": source.name for number, source in enumerate(cfg.reward.sources)}


def _text(value: Any) -> str:
    """A text for a value that JSON cannot write. If the value prints its memory address, which changes, this is the
    name of its class."""
    prints_address = type(value).__str__ is object.__str__ and type(value).__repr__ is object.__repr__
    return type(value).__qualname__ if prints_address else str(value)
