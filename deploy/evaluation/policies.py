"""The policies of an evaluation: their names, their files, and RUN/evaluated.json, which has the plan.

Runs in the driver. model.path is the base: the reference of every KL, and the first policy. It is left out if there is
one policy with one sample of each prompt, because then nothing is compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.scoring.kinds import kind_of
from common.config.ppo import Config
from common.config.sources import RewardSource
from common.errors import UserError
from common.files import write_json
from common.model.identity import model_digest
from common.types import PromptRecord
from deploy.evaluation.names import BASE
from deploy.policy_files import PolicyFiles
from deploy.run.identity import code_digest, prompts_digest
from deploy.run.record import read_record

RECORD = "evaluated.json"
_POLICY = "policy "  # prefix of the names of policies' digests


@dataclass(frozen=True)
class EvaluationPlan:
    """Which policies are asked, and how often each prompt."""

    paths: Mapping[str, str]  # of each policy, by name, in the order of their evaluation
    samples: int

    @classmethod
    def of(cls, cfg: Config, policies: Mapping[str, str], samples: int) -> EvaluationPlan:
        """`policies`: the paths of --policy, by name. Raises UserError."""
        if samples == 1 and len(policies) == 1:
            [(name, path)] = policies.items()  # the base keeps its name when the evaluation gets more samples
            return cls({BASE if path == cfg.model.path else name: path}, samples)
        if cfg.model.path in policies.values():
            raise UserError(f"--policy ({cfg.model.path}) is model.path, which is evaluated as the base; leave it out")
        return cls({BASE: cfg.model.path, **policies}, samples)

    @classmethod
    def read(cls, run: Path) -> EvaluationPlan:
        """The plan of an evaluation that continues. Raises UserError."""
        unrecorded = "evaluate" if (run / RECORD).exists() else "train"
        if (command := read_record(run).get("command", unrecorded)) != "evaluate":
            raise UserError(f"{run} was made by ratchet {command}; continue it with that command")
        try:
            record = json.loads((run / RECORD).read_text(encoding="utf-8"))
            return cls({str(name): str(path) for name, path in record["policies"].items()}, int(record["samples"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{run / RECORD} cannot be read ({type(error).__name__}: {error}), so the evaluation cannot continue; "
                "restore it, or begin again with --force"
            ) from None

    def extended(self, cfg: Config, policies: Mapping[str, str], samples: int | None) -> EvaluationPlan:
        """This evaluation with more policies, or more samples. Raises UserError."""
        for name, path in policies.items():
            if (known := self.paths.get(name, path)) != path:
                raise UserError(f"--policy {path}: {name} is {known} in this evaluation; choose a name: NAME={path}")
            if others := [other for other, its in self.paths.items() if its == path and other not in (name, BASE)]:
                raise UserError(f"--policy {path}: it is {others[0]} in this evaluation; leave it out")
        if samples is not None and samples < self.samples:
            raise UserError(f"--samples ({samples}) is below the {self.samples} of this evaluation; it can only rise")
        before = {name: path for name, path in self.paths.items() if name != BASE}
        return EvaluationPlan.of(cfg, {**before, **policies}, samples or self.samples)

    def write(self, run: Path, identity: Mapping[str, str]) -> None:
        record = {"policies": self.paths, "samples": self.samples, "identity": identity}
        write_json(run / RECORD, record)

    @property
    def is_single(self) -> bool:
        """One answer of one policy to each prompt."""
        return self.samples == 1 and len(self.paths) == 1

    @property
    def base(self) -> str | None:
        """The name of the base, if it is evaluated."""
        return BASE if BASE in self.paths else None


def load_policies(cfg: Config, plan: EvaluationPlan) -> tuple[PolicyFiles, dict[str, PolicyFiles]]:
    """The reference, and the policies by name. Raises UserError if their tokenizers differ."""
    trust = cfg.model.trust_remote_code
    reference = PolicyFiles.load(cfg.model.path, trust_remote_code=trust)
    policies = {}
    for name, path in plan.paths.items():
        is_reference = path == cfg.model.path
        policy = reference if is_reference else PolicyFiles.load(path, "--policy", trust_remote_code=trust)
        if policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
            raise UserError(
                f"--policy ({path}) and model.path ({cfg.model.path}) have different tokenizers, so there is no KL "
                "between them; set model.path to the policy's own reference"
            )
        policies[name] = policy
    return reference, policies


def check_room(
    policies: Mapping[str, PolicyFiles],
    records: Sequence[PromptRecord],
    response_tokens: int,
    *,
    setting: str = "sampling.max_new_tokens",
) -> None:
    """Raises UserError if the context of a policy is too short for the longest prompt with its response. (The records
    fit the first policy.) `response_tokens`: the longest response; `setting` bounds it."""
    longest = max(len(record.token_ids) for record in records) + response_tokens
    for policy in policies.values():
        if policy.size.context < longest:
            raise UserError(
                f"--policy ({policy.path}) has a context of {policy.size.context} tokens, and the longest prompt with "
                f"its response needs {longest}; lower prompts.max_tokens or {setting}"
            )


def identity_of(
    cfg: Config, reference: PolicyFiles, policies: Mapping[str, PolicyFiles], records: Sequence[PromptRecord]
) -> dict[str, str]:
    """Digests of everything that the answers and their scores depend on, by name: the policies, the reference
    (model.path), prompts, sampling, the environment, and the reward functions and models."""
    found = {f"{_POLICY}{name}": model_digest(policy.directory) for name, policy in policies.items() if name != BASE}
    found["model.path"] = model_digest(reference.directory)
    found["prompts.heldout"] = prompts_digest(records)
    found["sampling"] = _digest(cfg.sampling.model_dump(mode="json"))
    found["seed"] = _digest(cfg.seed)
    found["generators.dtype"], found["reference.dtype"] = _digest(cfg.generators.dtype), _digest(cfg.reference.dtype)
    if cfg.environment is not None:
        found["environment"] = _digest([cfg.environment.fixed, code_digest(cfg.environment.code)])
    for number, source in enumerate(cfg.reward.sources):
        found[f"reward.sources.{number}"] = _digest([source.weight, *_scoring(source)])
    for number, judge in enumerate(cfg.evaluation.judges):
        found[f"evaluation.judges.{number}"] = _digest(_scoring(judge))
    return found


def _scoring(source: RewardSource) -> list[Any]:
    return [source.name, source.scoring, kind_of(source).identity(source)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def check_identity(run: Path, now: Mapping[str, str]) -> None:
    """Raises UserError if the evaluation began with other contents: old and new answers could not be compared. New
    policies are allowed."""
    before: Mapping[str, str] = json.loads((run / RECORD).read_text(encoding="utf-8")).get("identity", {})
    new = {name for name in now if name.startswith(_POLICY) and name not in before}
    if different := [name for name in (now.keys() | before.keys()) - new if now.get(name) != before.get(name)]:
        raise UserError(
            f"the evaluation in {run} began with other contents of {', '.join(sorted(different))}; restore them, or "
            "begin again with --force"
        )
