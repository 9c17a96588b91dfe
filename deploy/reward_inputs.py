"""The data of `ratchet train-reward`: pairs, checked and tokenised, and prompts for the reference policy.

Runs in the driver, before the cluster is started.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from common.config.actors import PromptFormat
from common.config.reward_model import RewardTrainingConfig
from common.data.prompt_records import PromptRecord, prompt_record
from common.errors import UserError
from common.files import write_json
from common.model.checks import read_config
from common.model.reward_head import is_reward_model, scored_padding_id
from common.types import HELDOUT_EPOCH, Prompt, SampleId
from deploy.plan.capacity import check_engine_build, check_kv_cache
from deploy.policy_files import PolicyFiles
from learner.reward_model.pair_batch import check_window
from learner.reward_model.pair_records import PairCounts, tokenise_pairs
from learner.reward_model.pairs import Pairs, split, without_prompts_of
from learner.reward_model.training import steps_per_epoch


@contextmanager
def prepared_pairs(cfg: RewardTrainingConfig, base: PolicyFiles, directory: Path, *, resume: bool) -> Iterator[Path]:
    """Yields a directory with train.arrow, heldout.arrow and counts.json: all records, checked and tokenised.

    With `resume` it is the run's own directory. Otherwise it is a temporary one on the same disk, so that it can be
    moved into the run directory.
    """
    if resume:
        yield directory / "pairs"
        return
    existing = next(parent for parent in directory.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(dir=existing, prefix=".ratchet-") as staging:
        target = Path(staging) / "pairs"
        target.mkdir()
        pad_id = scored_padding_id(base.directory)
        counts: dict[str, Any] = {}
        for name, source in (("train", cfg.data.train), ("heldout", cfg.data.heldout)):
            if source is not None:
                path = target / f"{name}.arrow"
                counts[name] = tokenise_pairs(
                    source,
                    cfg.data,
                    base.tokenizer,
                    path,
                    pad_id=pad_id,
                    seed=cfg.seed,
                    vocabulary=base.size.vocabulary,
                    setting=f"data.{name}",
                ).record()
        if cfg.data.heldout is not None:
            counts["heldout"]["prompt_in_train"] = counts["heldout"]["pairs"] - len(load_pairs(cfg, target)[1])
        write_json(target / "counts.json", counts)
        yield target


def load_pairs(cfg: RewardTrainingConfig, directory: Path) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs; no prompt is in both."""
    pairs = Pairs(directory / "train.arrow")
    if cfg.data.heldout is not None:
        return pairs, without_prompts_of(Pairs(directory / "heldout.arrow"), pairs)
    return split(pairs, cfg.data.heldout_pairs, seed=cfg.seed)


def check_pairs(
    cfg: RewardTrainingConfig, base: PolicyFiles, train: Pairs, heldout: Pairs, counts: Mapping[str, Any]
) -> None:
    """Raises UserError if there are too few pairs, or if they may be too long for the model."""
    if not train:
        held = f", of which {len(heldout)} are held out with all pairs of their prompts" if heldout else ""
        raise UserError(
            f"data.train ({cfg.data.train}) leaves no pair to train on: it has {_counted(counts['train'])}{held}; give "
            "more, or hold out fewer (data.heldout_pairs)"
        )
    if (steps := cfg.epochs * steps_per_epoch(len(train), cfg)) <= cfg.optimizer.warmup_steps:
        raise UserError(
            f"optimizer.warmup_steps ({cfg.optimizer.warmup_steps}) must be below the {steps} steps that {len(train)} "
            f"pairs make; lower it, or lower pairs_per_step ({cfg.pairs_per_step})"
        )
    if cfg.data.max_tokens > base.size.context:
        raise UserError(
            f"data.max_tokens ({cfg.data.max_tokens}) exceeds the model's context of {base.size.context}; lower it"
        )
    check_window(read_config(base.directory), cfg.data.max_tokens)
    if (cfg.data.heldout or cfg.data.heldout_pairs) and not heldout:
        found = counts.get("heldout", counts["train"])
        shared = found.get("prompt_in_train", 0)
        raise UserError(
            f"no held-out pair is left: the data has {_counted(found)}, and {shared} pairs have their prompt in "
            "data.train too; give others"
        )


def _counted(counts: Mapping[str, int]) -> str:
    return str(PairCounts(**{key: count for key, count in counts.items() if key != "prompt_in_train"}))


def longest_answered(cfg: RewardTrainingConfig, reference: PolicyFiles) -> int:
    """Tokens of the longest prompt with its response by the reference policy."""
    return reference.prompt_room(cfg.data.max_tokens, cfg.sampling.max_new_tokens) + cfg.sampling.max_new_tokens


def reference_prompts(cfg: RewardTrainingConfig, reference: PolicyFiles, pairs: Pairs) -> list[Prompt]:
    """`scale.responses` prompts of the pairs, in seeded order; if there are fewer, they repeat. Raises UserError if
    none fits, or if the reference policy cannot answer them."""
    if is_reward_model(reference.directory):
        raise UserError(
            f"scale.policy ({reference.path}) is itself a reward model and cannot answer; name the policy that PPO "
            "will start from, or set scale.responses = 0"
        )
    reference.check_stop_tokens(cfg.sampling)
    room = reference.prompt_room(cfg.data.max_tokens, cfg.sampling.max_new_tokens)
    check_engine_build(cfg.generators)
    check_kv_cache(cfg.generators, reference.size, max_tokens=longest_answered(cfg, reference))
    records = _fitting_prompts(cfg, reference, pairs, room)
    if not records:
        raise UserError(
            "scale.responses needs prompts for the reference policy, but no pair has one that fits; give the records "
            "a `prompt`, or set scale.responses = 0"
        )
    return [
        Prompt(SampleId(HELDOUT_EPOCH, i % len(records), i // len(records)), r.text, r.token_ids, r.fields, r.messages)
        for i, r in zip(range(cfg.scale.responses), cycle(records))
    ]


def _fitting_prompts(
    cfg: RewardTrainingConfig, reference: PolicyFiles, pairs: Pairs, max_tokens: int
) -> list[PromptRecord]:
    """Up to `scale.responses` different prompts of the pairs, as the reference policy reads them."""
    form = PromptFormat(
        format=cfg.data.format,
        max_tokens=max_tokens,
        roles=cfg.data.roles,
        last_assistant=cfg.data.last_assistant,
        last_end_token=cfg.data.last_end_token,
    )
    _, firsts = np.unique(pairs.prompt_hashes(), return_index=True)
    records: list[PromptRecord] = []
    for index in np.random.default_rng([cfg.seed, 2]).permutation(firsts):
        if prompt := pairs.prompt(int(index)):
            with suppress(UserError):  # the reference's template may refuse a prompt that the model's accepts
                record = prompt_record(
                    "", {"prompt": prompt}, form, reference.tokenizer, vocabulary=reference.size.vocabulary
                )
                if record is not None and len(record.token_ids) <= max_tokens:
                    records.append(record)
        if len(records) == cfg.scale.responses:
            break
    return records
