"""Updates of a tiny real model against a slow derivation, and changes that must not matter."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from common.config.ppo import Config
from common.credit_table import DERIVED_SCHEMA
from common.errors import BatchError
from common.experience_table import experience_table
from common.model.lengths import Lengths
from common.model.logprobs import chosen_logprobs
from common.weights import IncomingWeights, Manifest
from learner.ppo import policy
from learner.ppo.learner import Learner
from learner.ranks import device
from tests.contexts import contexts_of, ends_of, sampled_places
from tests.critic_figures import figures
from tests.fakes import make_experience, save_tiny_model, tiny_config
from tests.saving import save_checkpoint_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def batch(seed: int = 0, count: int = 8) -> pa.Table:
    """Ragged rollouts; those that begin with token 4 score 1, the others 0."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        first = 4 if index % 2 else 40
        response = [first, *rng.integers(4, 60, rng.integers(0, 6)).tolist(), 1]
        rows.append(make_experience(index, response, score=float(first == 4)))
    return experience_table(rows)


def make_learner(model, **overrides) -> Learner:
    return Learner(tiny_config(model, rollouts_per_step=8, num_steps=10, **overrides))


def parameters(learner: Learner) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learner.network.parameters()])


def first_token_logprob(learner: Learner, token: int) -> float:
    with torch.no_grad():
        logits = learner.network.policy(torch.tensor([[3, 4]]), lengths=Lengths([2])).logits[0, -1]
    return logits.log_softmax(-1)[token].item()


def test_updates_raise_what_scores_and_lower_what_does_not(model):
    learner = make_learner(model)
    before = {token: first_token_logprob(learner, token) for token in (4, 40)}
    for _ in range(3):
        learner.update(batch())
    assert first_token_logprob(learner, 4) > before[4] + 0.1
    assert first_token_logprob(learner, 40) < before[40] - 0.1
    assert learner.policy_version == 3


class SlowLearner:
    """PPO from the definitions in docs/ppo.md, token by token, without padding, masks or micro-batches."""

    def __init__(self, model: Path, cfg: Config) -> None:
        self.cfg, self.step, self.kl_coef, self.scores = cfg, 0, cfg.kl.coef, []
        self.policy = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.critic = self.policy.model
        self.value_head = [torch.zeros(1, 64, requires_grad=True), torch.zeros(1, requires_grad=True)]
        opt = cfg.optimizer
        parts = [(list(self.policy.parameters()), opt.learning_rate)]
        if cfg.learner.critic == "separate":
            self.critic = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).model
            parts.append((list(self.critic.parameters()), opt.critic_learning_rate))
        if cfg.ppo.has_critic:
            parts.append((self.value_head, opt.value_head_learning_rate))
        self.parameters = [p for part, _ in parts for p in part]
        self.rates = [rate for part, rate in parts for _ in part]
        groups = [{"params": [p], "weight_decay": opt.weight_decay if p.ndim == 2 else 0.0} for p in self.parameters]
        self.optimizer = torch.optim.AdamW(groups, betas=opt.betas, eps=opt.eps, foreach=False)

    def tokens(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The network's present outputs for each token that the policy sampled, by a pass over each context."""
        found = []
        for ids, sampled in contexts_of(row):
            logits, states = self.policy(torch.tensor([ids])).logits[0], self.critic(torch.tensor([ids]))[0][0]
            for t in sampled:
                log_probs = torch.log(torch.softmax(logits[t - 1] / self.cfg.sampling.temperature, dim=0))
                value = (self.value_head[0][0] * states[t - 1]).sum() + self.value_head[1][0]
                found.append({"logprob": log_probs[ids[t]], "entropy": -(log_probs.exp() @ log_probs), "value": value})
        return found

    def shaped(self, score: float) -> float:
        how = self.cfg.reward
        if how.normalise == "none":
            return score
        mean, deviation = np.mean(self.scores), np.std(self.scores)
        bounded = min(max(score, mean - how.clip * deviation), mean + how.clip * deviation)
        return (bounded - (mean if how.normalise == "mean_std" else 0)) / deviation

    def earned(self, row: dict[str, Any]) -> list[float]:
        """What each sampled token gets of the score: each turn's reward at its end. The last token of a sequence gets
        the score less the rewards of turns that ended before."""
        places = sampled_places(row)
        parts = [0.0] * len(places)
        unit = 1.0 if self.cfg.reward.normalise == "none" else np.std(self.scores)
        weight = sum(source.weight for source in self.cfg.reward.sources if source.key == "environment")
        for turn in row["turns"] or ():
            before = sum(place < turn["end"] for place in places)
            if 0 < before < len(places):
                parts[before - 1] += weight * turn["reward"] / unit
        left = {t: self.shaped(row["score"]) - sum(parts[:t]) for t in ends_of(row)}
        return [left.get(t, part) for t, part in enumerate(parts)]

    def targets(self, rows: list[dict[str, Any]]) -> list[list[dict[str, float]]]:
        """Per row and token, all that stays fixed during the update."""
        ppo = self.cfg.ppo
        self.scores += [row["score"] for row in rows]
        batch = []
        for row in rows:
            with torch.no_grad():
                old = [{key: x.item() for key, x in token.items()} for token in self.tokens(row)]
            earned, ends = self.earned(row), ends_of(row)
            for t, token in enumerate(old):
                token["end"] = t in ends
                token["base"] = row["rollout_logprobs"][t] if ppo.policy_loss == "mask" else token["logprob"]
                x = row["ref_logprobs"][t] - token["base"]
                token["kl"] = {"k1": -x, "k2": x * x / 2, "k3": math.exp(x) - 1 - x}[self.cfg.kl.estimator]
                token["reward"] = -self.kl_coef * token["kl"] + earned[t]
                token["mismatch"] = math.exp(token["base"] - row["rollout_logprobs"][t])
                corrected = ppo.importance_cap and ppo.policy_loss != "mask"
                token["weight"] = min(token["mismatch"], ppo.importance_cap) if corrected else 1.0
            batch.append(old)
        for index, old in enumerate(batch):
            if ppo.advantages == "group":
                self.compare_with_the_group(index, rows, batch)
            else:
                self.look_ahead(old)
        return batch

    def look_ahead(self, old: list[dict[str, float]]) -> None:
        """Advantages and returns with a critic, or with none whose values would be zero."""
        for sequence in self.sequences(old):
            self.look_ahead_in(sequence)

    def look_ahead_in(self, old: list[dict[str, float]]) -> None:
        """The same for one sequence, after whose last token nothing follows."""
        ppo = self.cfg.ppo
        lam = self.number(ppo.lam, old) if ppo.has_critic else 1.0
        value_lam = self.number(ppo.value_lam, old) if ppo.has_critic and ppo.value_lam is not None else lam
        next_value = next_advantage = next_gain = 0.0
        for token in reversed(old):
            error = token["reward"] + ppo.gamma * next_value - token["value"]
            next_advantage = error + ppo.gamma * lam * next_advantage
            next_gain = error + ppo.gamma * value_lam * next_gain
            next_value = token["value"]
            token["advantage"], token["return"] = next_advantage, next_gain + next_value
        for t, token in enumerate(old):
            token["realised"] = sum(ppo.gamma**n * later["reward"] for n, later in enumerate(old[t:]))

    def number(self, lam: float | str, old: list[dict[str, float]]) -> float:
        """A lambda, or that of a sequence of this length."""
        return max(0.0, 1 - 1 / (self.cfg.ppo.lam_alpha * len(old))) if lam == "length" else lam

    def compare_with_the_group(self, index: int, rows: list[dict[str, Any]], batch: list[list[dict]]) -> None:
        """Advantage: the sequence's whole reward minus the mean of the prompt's other responses."""
        prompt = rows[index]["epoch"], rows[index]["prompt_index"]
        others = [
            np.mean([sum(t["reward"] for t in sequence) for sequence in self.sequences(batch[j])])
            for j, row in enumerate(rows)
            if j != index and (row["epoch"], row["prompt_index"]) == prompt and batch[j]
        ]
        for sequence in self.sequences(batch[index]):
            whole = sum(t["reward"] for t in sequence)
            for token in sequence:
                token["advantage"], token["return"] = whole - np.mean(others) if others else 0.0, whole

    def sequences(self, tokens: list[dict[str, float]]) -> list[list[dict[str, float]]]:
        found: list[list[dict[str, float]]] = [[]]
        for token in tokens:
            found[-1].append(token)
            if token["end"]:
                found.append([])
        return found[:-1]

    def update(self, rows: list[dict[str, Any]], minibatches: list[list[int]], scale: float) -> dict[str, float]:
        cfg, targets = self.cfg, self.targets(rows)
        every = [token for row in targets for token in row]
        self.derived = targets
        kl, per_response = sum(t["kl"] for t in every), sum(t["kl"] for t in every) / len(rows)
        advantages_var, returns_var = (np.var([t[key] for t in every]) for key in ("advantage", "return"))
        stats = {
            "kl/coef": self.kl_coef,
            "kl/per_token": kl / len(every),
            "kl/per_response": per_response,
            "value/mean": np.mean([t["value"] for t in every]),
            "value/returns_var": returns_var,
            "value/advantages_var": advantages_var,
            "value/variance_ratio": advantages_var / returns_var,
            "value/explained_variance": 1 - np.var([t["return"] - t["value"] for t in every]) / returns_var,
            **self.critic_figures(targets, [self.shaped(row["score"]) for row in rows]),
            "mismatch/kl": np.mean([t["mismatch"] - 1 - math.log(t["mismatch"]) for t in every]),
            "mismatch/capped": np.mean([t["mismatch"] > (cfg.ppo.importance_cap or math.inf) for t in every]),
            "reward/running_mean": np.mean(self.scores),
            "reward/running_std": np.std(self.scores),
            "ppo/learning_rate": cfg.optimizer.learning_rate * scale,
            "ppo/optimizer_steps": len(minibatches),
            "learner/tokens": sum(len(row["prompt_ids"] + row["response_ids"]) for row in rows),
        }
        if cfg.kl.controller == "adaptive":
            self.kl_coef *= 1 + max(-0.2, min(0.2, per_response / cfg.kl.target - 1)) * len(rows) / cfg.kl.horizon
        if cfg.ppo.whiten_advantages:
            mean = np.mean([t["advantage"] for t in every])
            for token in every:
                token["plain_advantage"] = token["advantage"]
                token["advantage"] = (token["advantage"] - mean) / math.sqrt(advantages_var)
        seen, norms, first = [], [], len(minibatches) // cfg.ppo.ppo_epochs
        for place, minibatch in enumerate(minibatches):
            parts = [
                self.losses(now, fixed, first=place < first)
                for index in minibatch
                for now, fixed in zip(self.tokens(rows[index]), targets[index], strict=True)
            ]
            loss = sum(
                part["ppo/policy_loss"] + cfg.ppo.value_coef * part["value/loss"]
                - cfg.ppo.entropy_coef * part["ppo/entropy"] for part in parts
            ) / len(parts)  # fmt: skip
            gradients = torch.autograd.grad(loss, self.parameters)
            norms.append(math.sqrt(sum((g**2).sum().item() for g in gradients)))
            for parameter, gradient in zip(self.parameters, gradients):
                parameter.grad = gradient * min(1.0, cfg.optimizer.max_grad_norm / norms[-1])
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * scale
            self.optimizer.step()
            seen += [{key: float(torch.as_tensor(x).detach()) for key, x in part.items()} for part in parts]
        if cfg.ppo.policy_loss == "mask":  # k3 from the sampler in the first minibatch
            early = [s["ppo/approx_kl"] for s in seen[: sum(len(targets[index]) for index in minibatches[0])]]
            stats = {key: x for key, x in stats.items() if key != "mismatch/capped"} | {"mismatch/kl": np.mean(early)}
        found = {**stats, **{key: np.mean([s[key] for s in seen]) for key in seen[0]}, "ppo/grad_norm": max(norms)}
        return {key: x for key, x in found.items() if cfg.ppo.has_critic or not key.startswith("value/")}

    def critic_figures(self, targets: list[list[dict[str, float]]], scores: list[float]) -> dict[str, float]:
        if not self.cfg.ppo.has_critic:
            return {}
        return figures([[(token["value"], token["realised"]) for token in row] for row in targets], scores)

    def losses(self, now: dict[str, torch.Tensor], fixed: dict[str, float], *, first: bool) -> dict[str, Any]:
        """The terms and statistics of one token."""
        ppo, advantage, value = self.cfg.ppo, fixed["advantage"], now["value"]
        log_ratio = now["logprob"] - fixed["base"]
        ratio = log_ratio.exp()
        low, high = 1 - ppo.clip_eps, 1 + (ppo.clip_eps_high or ppo.clip_eps)
        if ppo.policy_loss == "mask":
            share = "ppo/masked"
            stopped = not low <= ratio <= high
            gain = 0 * ratio if stopped else advantage * ratio
            if first:
                fixed["entropy"] = float(now["entropy"].detach())
        else:
            share = "ppo/clip_frac"
            gain = min(advantage * ratio, advantage * min(max(ratio, low), high))
            stopped = bool(gain < advantage * ratio)
        fixed |= {"ratio": float(ratio.detach()), "clipped": stopped}  # of the newest pass
        error = (value - fixed["return"]) ** 2
        too_far = ppo.value_clip > 0 and abs(value - fixed["value"]) > ppo.value_clip
        near = (
            fixed["value"] + math.copysign(ppo.value_clip, float(value.detach()) - fixed["value"]) if too_far else value
        )
        near_error = (near - fixed["return"]) ** 2 + 0 * value  # a clipped value passes no gradient on
        return {
            "ppo/policy_loss": -gain * fixed["weight"],
            "value/loss": max(error, near_error) / 2,
            "ppo/entropy": now["entropy"],
            share: stopped,
            "ppo/approx_kl": ratio - 1 - log_ratio,
            "ppo/ratio": ratio,
            "value/clip_frac": near_error > error,
        }


# The names that SlowLearner has for columns of the learner's credit.
SLOW_NAMES = {
    "values": "value",
    "rewards": "reward",
    "returns": "return",
    "old_logprobs": "logprob",
    "importance_weight": "weight",
}


def slow_credit(slow: SlowLearner) -> list[dict[str, Any]]:
    """Per response, each column of the learner's credit from its definition."""
    ppo = slow.cfg.ppo
    found = []
    for tokens in slow.derived:
        row: dict[str, Any] = {
            name: [token[SLOW_NAMES.get(name, name)] for token in tokens]
            for name in ("values", "kl", "rewards", "returns", "entropy", "old_logprobs", "importance_weight")
        }
        row |= {name: [token[name] for token in tokens] for name in ("ratio", "clipped")}
        row["advantages"] = [token.get("plain_advantage", token["advantage"]) for token in tokens]
        row["whitened_advantages"] = [token["advantage"] for token in tokens] if ppo.whiten_advantages else None
        row["ends"] = [token["end"] for token in tokens]
        next_values = [0.0 if end else value for end, value in zip(row["ends"], [*row["values"][1:], 0.0])]
        steps = zip(row["rewards"], next_values, row["values"])
        row["td_errors"] = [reward + ppo.gamma * after - value for reward, after, value in steps]
        if not ppo.has_critic:
            row["values"] = row["td_errors"] = None
        if ppo.policy_loss == "mask":
            row["old_logprobs"] = None
        found.append(row)
    return found


def check_credit(learner: Learner, slow: SlowLearner) -> None:
    found, expected = learner.credit(), slow_credit(slow)
    assert found.schema == DERIVED_SCHEMA
    for name in found.column_names:
        for mine, slows in zip(found[name].to_pylist(), [row[name] for row in expected], strict=True):
            assert mine == (slows if slows is None else pytest.approx(slows, rel=1e-4, abs=2e-6)), name


def varied_batch(seed: int) -> pa.Table:
    """Rollouts whose tokens all have log-probabilities of their own, one of them empty."""
    rng = np.random.default_rng(seed)
    rows = []
    for index, length in enumerate([0, 1, 7, *rng.integers(1, 8, 5)]):
        plain = make_experience(index, rng.integers(2, 60, length).tolist(), score=rng.normal(1, 2))
        sampled, ref = (rng.uniform(low, low + 1.0, length).astype(np.float32) for low in (-4.7, -4.2))
        rows.append(replace(plain, rollout=replace(plain.rollout, rollout_logprobs=sampled), ref_logprobs=ref))
    return experience_table(rows)


UNUSUAL = {
    "seed": 7,
    "num_steps": 5,
    "sampling": {"temperature": 0.7},
    "ppo": {"gamma": 0.9, "lam": 0.6, "clip_eps": 0.03, "value_clip": 0.04, "value_coef": 0.3, "entropy_coef": 0.2,
            "whiten_advantages": False, "importance_cap": 1.2, "ppo_epochs": 2, "minibatches": 2},
    "kl": {"coef": 0.3, "estimator": "k3", "controller": "adaptive", "target": 0.4, "horizon": 20},
    # Such an eps keeps the size of the gradient in Adam's step, which otherwise almost cancels.
    "optimizer": {"learning_rate": 4e-3, "value_head_learning_rate": 2e-2, "critic_learning_rate": 8e-3, "eps": 1e-3,
                  "betas": (0.8, 0.9), "weight_decay": 0.1, "max_grad_norm": 0.2, "schedule": "linear",
                  "warmup_steps": 1},
    "reward": {"normalise": "std", "clip": 1.1},
    "learner": {"precision": "fp32", "micro_batch_tokens": 24},
}  # fmt: skip
OTHERWISE = {
    "sampling": {"temperature": 1.3},
    "ppo": {"value_clip": 0.0, "whiten_advantages": True, "importance_cap": 0.0, "clip_eps_high": 0.05,
            "value_lam": 0.9},
    "kl": {"estimator": "k2", "controller": "fixed"},
    "reward": {"normalise": "mean_std"},
}  # fmt: skip
MASK = {
    "ppo": {"policy_loss": "mask", "clip_eps": 0.25, "clip_eps_high": 0.35, "importance_cap": 0.5, "lam": 0.6,
            "value_lam": "length", "lam_alpha": 0.4},
}  # fmt: skip


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("other", [{}, OTHERWISE, MASK], ids=["unusual", "otherwise", "mask"])
def test_three_updates_agree_with_a_slow_derivation(model, critic, other):
    settings = {key: {**old, **other.get(key, {})} if isinstance(old, dict) else old for key, old in UNUSUAL.items()}
    settings["reward"]["sources"] = [{"name": "a_words", "function": "tests.tasks:a_words"}]
    settings["learner"]["critic"] = critic
    learner = Learner(tiny_config(model, rollouts_per_step=8, **settings))
    slow = SlowLearner(model, learner.cfg)
    for seed, scale in enumerate([1 / 2, 1, 3 / 4]):  # one step of warm-up, then four down to zero
        minibatches = [rows.tolist() for rows in learner._minibatches(8)]
        assert [len(rows) for rows in minibatches] == [4] * 4
        assert sorted(minibatches[0] + minibatches[1]) == list(range(8))
        expected = slow.update(varied_batch(seed).to_pylist(), minibatches, scale)
        found = learner.update(varied_batch(seed))
        found = {key: x for key, x in found.items() if not key.startswith("time/")}
        assert found == pytest.approx(expected, rel=2e-5, abs=2e-6)
        check_credit(learner, slow)
        assert torch.allclose(parameters(learner), torch.cat([p.flatten() for p in slow.parameters]), atol=1e-6)
    # Every part above had an effect.
    assert 0.1 < expected["ppo/masked" if other is MASK else "ppo/clip_frac"] < 0.9
    assert expected["ppo/grad_norm"] > 2 * learner.cfg.optimizer.max_grad_norm
    assert other or (expected["value/clip_frac"] > 0.02 and 0.1 < expected["mismatch/capped"] < 0.9)
    assert other or expected["kl/coef"] != learner.cfg.kl.coef


def grouped(table: pa.Table) -> pa.Table:
    """The same rollouts as responses to four prompts: three, the first one empty, then two, one, and two."""
    index = table.schema.get_field_index("prompt_index")
    return table.set_column(index, table.schema.field(index), pa.array([0, 0, 0, 1, 1, 2, 3, 3], pa.int32()))


WITHOUT_CRITIC = {
    "group": {"ppo": {"advantages": "group"}, "prompts": {"rollouts_per_prompt": 2}},
    "returns": {"ppo": {"advantages": "returns"}},
}


@pytest.mark.parametrize("advantages", WITHOUT_CRITIC)
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_updates_without_a_critic_agree_with_a_slow_derivation(model, advantages, critic):
    settings = {**UNUSUAL, "ppo": {**UNUSUAL["ppo"], **WITHOUT_CRITIC[advantages]["ppo"]}}
    settings["prompts"] = WITHOUT_CRITIC[advantages].get("prompts", {})
    settings["reward"] = {**UNUSUAL["reward"], "sources": [{"name": "a_words", "function": "tests.tasks:a_words"}]}
    settings["learner"] = {**UNUSUAL["learner"], "critic": critic}
    learner = Learner(tiny_config(model, rollouts_per_step=8, **settings))
    assert [name for name, _ in learner.network.named_parameters() if not name.startswith("policy.")] == []
    slow = SlowLearner(model, learner.cfg)
    for seed, scale in enumerate([1 / 2, 1]):
        minibatches = [rows.tolist() for rows in learner._minibatches(8)]
        table = grouped(varied_batch(seed))
        expected = slow.update(table.to_pylist(), minibatches, scale)
        found = {key: x for key, x in learner.update(table).items() if not key.startswith("time/")}
        assert found == pytest.approx(expected, rel=2e-5, abs=2e-6)
        check_credit(learner, slow)
        weights = torch.cat([p.detach().flatten() for p in slow.policy.parameters()])
        assert torch.allclose(parameters(learner), weights, atol=1e-6)


def without_critic(model, advantages: str, lora: dict[str, int] | None) -> Learner:
    rates = {"learning_rate": 1e-2 if lora else 1e-3}
    return make_learner(model, **WITHOUT_CRITIC[advantages], learner={"lora": lora}, optimizer=rates)


def two_to_a_prompt(seed: int) -> pa.Table:
    """A batch whose prompts have two responses each, of which one scores 1 and the other 0."""
    table = batch(seed)
    index = table.schema.get_field_index("prompt_index")
    return table.set_column(index, table.schema.field(index), pa.array([0, 0, 1, 1, 2, 2, 3, 3], pa.int32()))


LORA = pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])


@pytest.mark.parametrize("advantages", WITHOUT_CRITIC)
@LORA
def test_a_learner_without_a_critic_learns_and_resumes_bit_for_bit(model, tmp_path, advantages, lora):
    learner = without_critic(model, advantages, lora)
    before = first_token_logprob(learner, 4) - first_token_logprob(learner, 40)
    for seed in range(3):
        stats = learner.update(two_to_a_prompt(seed))
        assert not [key for key in stats if key.startswith("value/")]
    assert first_token_logprob(learner, 4) - first_token_logprob(learner, 40) > before + 0.2
    save_checkpoint_of(learner, tmp_path / "step-000003")
    learner.update(two_to_a_prompt(3))
    restored = without_critic(model, advantages, lora)
    assert restored.restore(tmp_path / "step-000003") == 3
    restored.update(two_to_a_prompt(3))
    assert torch.equal(parameters(restored), parameters(learner))


@LORA
def test_a_learner_without_a_critic_publishes_and_exports_its_policy(model, tmp_path, lora):
    learner = without_critic(model, "returns", lora)
    learner.update(two_to_a_prompt(0))
    save_checkpoint_of(learner, tmp_path / "step-000001")
    exported = without_critic(model, "returns", lora)
    assert exported.restore_network(tmp_path / "step-000001") == 1
    exported.save_policy(tmp_path / "policy")
    loaded = dict(LlamaForCausalLM.from_pretrained(tmp_path / "policy").named_parameters())
    published = dict(learner.network.policy_tensors())
    assert loaded.keys() == published.keys()
    assert all(torch.equal(tensor, published[name].bfloat16()) for name, tensor in loaded.items())


@pytest.mark.parametrize(("staleness", "share", "given_back"), [(0, 0.9, 2), (1, 0.3, 0)])
def test_a_learner_gives_the_memory_that_an_engine_lent_back(model, monkeypatch, staleness, share, given_back):
    shares, emptied = [], []
    monkeypatch.setattr(device, "find_device", lambda gpus: shares.append(gpus) or torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    gpus = {"learner": {"precision": "fp32", "gpus": 0.3, "compile": False}, "generators": {"gpus": 0.6}}
    learner = make_learner(model, max_staleness=staleness, **gpus)
    learner.update(batch())
    learner.update(batch(1))
    assert shares == [pytest.approx(share)]
    assert len(emptied) == given_back
    emptied.clear()
    learner.skip()  # after a batch that it could not take
    assert len(emptied) == given_back // 2


def test_the_first_pass_over_a_batch_has_ratio_one(model):
    learner = make_learner(model, ppo={"ppo_epochs": 1, "minibatches": 1}, sampling={"temperature": 0.7})
    for seed in range(2):
        stats = learner.update(varied_batch(seed))
        assert stats["ppo/approx_kl"] == pytest.approx(0.0, abs=1e-6)
        assert stats["ppo/ratio"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_micro_batches_do_not_change_the_update(model, critic):
    results = []
    for tokens in (16, 40, 2048):
        learner = make_learner(model, learner={"precision": "fp32", "critic": critic, "micro_batch_tokens": tokens},
                               reference={"max_batch_tokens": 2048})  # fmt: skip
        stats = learner.update(batch())
        results.append((parameters(learner), stats))
    for found, stats in results[1:]:
        # Adam divides by the gradient's size, so rounding shows in the weights at the scale of the learning rate.
        assert torch.allclose(found, results[0][0], atol=2e-5)
        for key in ("ppo/policy_loss", "value/loss", "ppo/entropy", "ppo/grad_norm", "kl/per_token", "ppo/approx_kl"):
            assert stats[key] == pytest.approx(results[0][1][key], rel=1e-4, abs=1e-6), key


def test_a_deterministic_learner_asks_torch_for_it_and_learns_the_same(model):
    learners = []
    for deterministic in (True, False):
        learners.append(make_learner(model, learner={"precision": "fp32", "deterministic": deterministic}))
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        learners[-1].update(batch())
    assert torch.equal(*map(parameters, learners))  # a CPU adds in a fixed order anyway


def test_two_learners_on_one_journal_agree_bit_for_bit(model):
    one, other = make_learner(model), make_learner(model)
    for seed in range(2):
        assert {k: v for k, v in one.update(batch(seed)).items() if not k.startswith("time/")} == {
            k: v for k, v in other.update(batch(seed)).items() if not k.startswith("time/")
        }
    assert torch.equal(parameters(one), parameters(other))


@pytest.mark.parametrize("controller", ["fixed", "adaptive"])
def test_a_restored_learner_continues_bit_for_bit(model, tmp_path, controller):
    kl = {"controller": controller, "horizon": 100}
    whole = make_learner(model, kl=kl)
    whole.update(batch(0))
    save_checkpoint_of(whole, tmp_path / "step-000001")
    whole.update(batch(1))
    restored = make_learner(model, kl=kl)
    assert restored.restore(tmp_path / "step-000001") == 1
    restored.update(batch(1))
    assert torch.equal(parameters(restored), parameters(whole))
    assert restored.kl_controller.coef == whole.kl_controller.coef


def test_the_first_values_are_zero_and_the_critic_learns_the_score(model):
    learner = make_learner(model, kl={"coef": 0.0}, optimizer={"value_head_learning_rate": 3e-2})
    first = learner.update(batch())
    assert first["value/mean"] == 0.0
    assert first["value/explained_variance"] == pytest.approx(0.0, abs=1e-6)
    for _ in range(8):
        last = learner.update(batch())
    assert last["value/explained_variance"] > 0.5


def test_critic_warmup_leaves_the_policy_alone(model):
    learner = make_learner(model, learner={"precision": "fp32", "critic_warmup_steps": 1})
    before = [p.detach().clone() for p in learner.network.policy.parameters()]
    learner.update(batch())
    assert all(torch.equal(old, new) for old, new in zip(before, learner.network.policy.parameters()))
    assert learner.network.value_head.weight.abs().max() > 0
    learner.update(batch())
    assert not all(torch.equal(old, new) for old, new in zip(before, learner.network.policy.parameters()))


def test_a_step_that_has_moved_too_far_ends_early(model):
    ppo = {"ppo_epochs": 4, "minibatches": 1}
    free = make_learner(model, ppo=ppo)
    assert free.update(batch())["ppo/optimizer_steps"] == 4
    single = make_learner(model, ppo={**ppo, "ppo_epochs": 1})
    bound = make_learner(model, ppo={**ppo, "target_kl": 1e-5})
    passes: list[None] = []
    bound.network.register_forward_pre_hook(lambda *_: passes.append(None))
    for seed in range(2):  # the second update would show a gradient left over from the first
        single.update(batch(seed))
        stats = bound.update(batch(seed))
        assert len(passes) == 2 * (seed + 1)  # the first step shares its pass with the targets; the second went too far
        assert stats["ppo/optimizer_steps"] == 1
        assert stats["ppo/approx_kl"] > 1e-5
        assert torch.equal(parameters(bound), parameters(single))


def test_rollouts_that_no_pass_reached_have_no_ratio(model):
    """The second of four minibatches went too far; it was passed, and the last two were not."""
    learner = make_learner(
        model, ppo={"minibatches": 4, "ppo_epochs": 1, "target_kl": 1e-5}, optimizer={"learning_rate": 1e-2}
    )
    passed = [set(rows.tolist()) for rows in learner._minibatches(8)]
    assert learner.update(batch())["ppo/optimizer_steps"] == 1
    credit = learner.credit()
    for name in ("ratio", "clipped"):
        reached = {row for row, values in enumerate(credit[name].to_pylist()) if values is not None}
        assert reached == passed[0] | passed[1]
    assert credit["advantages"].null_count == credit["values"].null_count == 0
    ratios = credit["ratio"].to_pylist()
    assert all(ratios[row] == pytest.approx([1.0] * len(ratios[row]), abs=1e-6) for row in passed[0])
    assert all(abs(ratio - 1) > 1e-4 for row in passed[1] for ratio in ratios[row])


def test_credit_is_that_of_the_newest_update_and_is_given_once(model):
    learner = make_learner(model)
    learner.update(batch(0))
    learner.update(varied_batch(1))
    credit = learner.credit()
    assert [len(row) for row in credit["kl"].to_pylist()] == [len(row) for row in varied_batch(1)["response_ids"]]
    with pytest.raises(RuntimeError, match="no update whose values"):
        learner.credit()
    learner.update(batch(0))
    with pytest.raises(BatchError):
        learner.update(with_score(batch(1), math.nan))
    with pytest.raises(RuntimeError, match="no update whose values"):
        learner.credit()


def with_score(table: pa.Table, score: float) -> pa.Table:
    index = table.schema.get_field_index("score")
    return table.set_column(index, table.schema.field(index), pa.array([score] * len(table), pa.float64()))


def gradients(learner: Learner, table: pa.Table) -> tuple[torch.Tensor, dict[str, float]]:
    """The gradients of all optimizer steps of one update, in a row, and its metrics."""
    taken = []
    learner.optimizer.register_step_pre_hook(
        lambda *_: taken.extend(p.grad.flatten().clone() for p in learner.network.parameters())
    )
    stats = learner.update(table)
    return torch.cat(taken), stats


def test_bf16_stays_near_float32(model):
    exact, exact_stats = gradients(make_learner(model), varied_batch(1))
    learner = make_learner(model, learner={"precision": "bf16"})
    rounded, rounded_stats = gradients(learner, varied_batch(1))
    assert not torch.equal(rounded, exact)
    assert torch.cosine_similarity(rounded, exact, dim=0) > 0.999
    for key in ("ppo/policy_loss", "value/loss", "ppo/entropy", "ppo/approx_kl", "kl/per_token", "ppo/grad_norm"):
        assert abs(exact_stats[key]) > 0.1, key
        assert rounded_stats[key] == pytest.approx(exact_stats[key], rel=0.01), key
    assert all(p.dtype == torch.float32 for p in learner.network.parameters())


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_gradient_checkpointing_changes_neither_the_update_nor_dropout(model, tmp_path, critic):
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    found, passes = [], []
    for on in (False, True):
        learner = make_learner(tmp_path / "model", learner={"critic": critic, "gradient_checkpointing": on})
        trunks = [learner.network.policy, learner.network.critic_body][: 1 + (critic == "separate")]
        training = [m for trunk in trunks for m in trunk.modules() if m.training]
        assert len(training) == (2 * len(trunks) if on else 0)
        assert all(isinstance(module, GradientCheckpointingLayer) for module in training)
        calls: list[None] = []
        for trunk in trunks:
            trunk.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        found.append(gradients(learner, varied_batch(0))[0])
        found.append(parameters(learner))
        passes.append(len(calls) // len(trunks))
    # Old log-probabilities, then two epochs of two minibatches; the backward pass runs each of these again.
    assert passes == [1 + 4, 1 + 4 + 4]
    assert torch.allclose(found[2], found[0], atol=1e-7)
    assert torch.allclose(found[3], found[1], atol=1e-6)


def test_empty_and_one_token_responses_are_harmless(model):
    rows = [make_experience(0, [], score=5.0), make_experience(1, [1], score=1.0), make_experience(2, [4, 5, 1])]
    learner = Learner(tiny_config(model, rollouts_per_step=3, ppo={"minibatches": 3}))
    stats = learner.update(experience_table(rows))
    assert all(np.isfinite(value) for value in stats.values())
    assert torch.isfinite(parameters(learner)).all()


def test_published_weights_are_the_policy_rounded_to_bf16(model):
    learner = make_learner(model)
    learner.update(batch())
    *buckets, manifest = learner.publish()
    sizes = tuple(bucket.values.nbytes for bucket in buckets)
    assert manifest == Manifest(sizes, sizes)
    incoming = IncomingWeights()
    for bucket in buckets:
        incoming.add(bucket)
    incoming.check_complete(1)
    named = dict(learner.network.policy.named_parameters())
    tensors = dict(pair for bucket in buckets for pair in bucket.tensors())
    assert tensors.keys() == named.keys()
    assert all(torch.equal(t, named[name].detach().bfloat16()) for name, t in tensors.items())


def test_deltas_are_published_against_a_base(model):
    learner = make_learner(model, optimizer={"learning_rate": 1e-6})
    *base, _ = learner.publish()
    learner.update(batch())
    *published, manifest = learner.publish(*base)
    new, deltas = published[::2], published[1::2]
    assert [delta.apply(old).checksum for old, delta in zip(base, deltas, strict=True)] == [b.checksum for b in new]
    changed = [int((old.values != bucket.values).sum()) for old, bucket in zip(base, new, strict=True)]
    assert manifest.best_bytes == tuple(6 * count for count in changed)
    assert 0 < sum(manifest.best_bytes) < sum(manifest.full_bytes) / 4


def test_the_saved_policy_is_a_hugging_face_directory(model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    learner = make_learner(model)
    learner.update(batch())
    learner.save_policy(tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert loaded.dtype == torch.bfloat16
    for (name, found), kept in zip(loaded.named_parameters(), learner.network.policy.parameters(), strict=True):
        assert torch.equal(found, kept.detach().bfloat16()), name
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").decode([4, 5]) == "a0 a1"


def scaled(table: pa.Table, factor: float, offset: float) -> pa.Table:
    """The same rollouts, scored in another unit."""
    scores = pa.array(table["score"].to_numpy() * factor + offset)
    return table.set_column(table.schema.get_field_index("score"), "score", scores)


def curve_in_unit(model, factor: float, offset: float, **reward) -> tuple[list[dict[str, float]], torch.Tensor]:
    sources = [{"name": "a_words", "function": "tests.tasks:a_words"}]
    learner = make_learner(model, reward={"sources": sources, **reward})
    stats = [learner.update(scaled(batch(seed), factor, offset)) for seed in range(4)]
    skipped = ("time/", "reward/")  # the clock, and the statistics in the score's own unit
    return [{k: v for k, v in s.items() if not k.startswith(skipped)} for s in stats], parameters(learner)


@pytest.mark.parametrize(("factor", "offset"), [(1000.0, 0.0), (5e8, 3e8), (1e-6, -2.0)])
def test_learning_does_not_depend_on_the_unit_or_origin_of_the_score(model, factor, offset):
    expected, weights = curve_in_unit(model, 1.0, 0.0)
    found, found_weights = curve_in_unit(model, factor, offset)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert torch.allclose(found_weights, weights, atol=1e-4)


def test_without_normalisation_the_unit_does_matter(model):
    expected, _ = curve_in_unit(model, 1.0, 0.0, normalise="none")
    found, _ = curve_in_unit(model, 1000.0, 0.0, normalise="none")
    assert found[0]["value/returns_var"] > 1e4 * expected[0]["value/returns_var"]


def test_score_statistics_are_restored_with_the_learner(model, tmp_path):
    learner = make_learner(model)
    learner.update(batch(0))
    save_checkpoint_of(learner, tmp_path / "step-000001")
    restored = make_learner(model)
    restored.restore(tmp_path / "step-000001")
    assert restored.score_moments == learner.score_moments
    assert restored.score_moments.count == 8


# The pass that the targets and the first gradient share


def passes_of(learner: Learner) -> list[int]:
    """Sequences in each forward pass from here on."""
    passes: list[int] = []
    learner.network.register_forward_pre_hook(lambda _, args: passes.append(len(args[0].lengths)))
    return passes


def assert_same_update(one: tuple[torch.Tensor, dict[str, float]], other: tuple[torch.Tensor, dict[str, float]]):
    """Gradients and metrics of two updates, to 1e-5 of their size."""
    assert float((one[0] - other[0]).norm()) < 1e-5 * float(other[0].norm())
    metrics = [{k: v for k, v in stats.items() if not k.startswith("time/")} for _, stats in (one, other)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize(
    "more", [{}, {"ppo": {"entropy_coef": 0.1, "value_clip": 0.04}}, MASK], ids=["usual", "more", "mask"]
)
def test_sharing_the_first_pass_does_not_change_the_update(model, critic, epochs, more):
    updates, passes = [], []
    for tokens in (4096, 12):
        learner = make_learner(
            model,
            ppo={"minibatches": 1, "ppo_epochs": epochs, **more.get("ppo", {})},
            learner={"critic": critic, "micro_batch_tokens": tokens},
        )
        passes.append(passes_of(learner))
        updates.append(gradients(learner, varied_batch(3)))
    assert passes[0] == [8] * epochs
    assert len(passes[1]) > 2 * (1 + epochs)
    assert sum(passes[1]) == 8 * (1 + epochs)  # once more for the old log-probabilities, or the values alone
    assert_same_update(*updates)


def test_with_minibatches_the_batch_has_a_pass_of_its_own(model):
    learner = make_learner(model, ppo={"minibatches": 2, "ppo_epochs": 1}, learner={"micro_batch_tokens": 4096})
    passes = passes_of(learner)
    learner.update(varied_batch(3))
    assert passes == [8, 4, 4]


@pytest.mark.parametrize(
    ("settings", "trunk", "critic"),  # sequences in the passes through the policy's network, and through the critic's
    [
        ({"ppo": {"advantages": "returns"}}, [4, 4], []),
        ({}, [8, 4, 4], []),
        ({"learner": {"critic": "separate"}}, [4, 4], [8, 4, 4]),
    ],
    ids=["no critic", "shared", "separate"],
)
def test_with_the_mask_only_the_critic_makes_a_pass_before_learning(model, monkeypatch, settings, trunk, critic):
    heads: list[int] = []
    monkeypatch.setattr(
        policy, "chosen_logprobs", lambda *args, **options: heads.append(1) or chosen_logprobs(*args, **options)
    )
    ppo = {**MASK["ppo"], **settings.get("ppo", {}), "minibatches": 2, "ppo_epochs": 1}
    more = {"micro_batch_tokens": 4096, **settings.get("learner", {})}
    learner = make_learner(model, ppo=ppo, learner=more)
    found: tuple[list[int], list[int]] = [], []
    for body, passes in zip((learner.network.policy.base_model, learner.network.critic_body), found, strict=True):
        if body is not None:
            body.register_forward_pre_hook(
                lambda *args, passes=passes: passes.append(len(args[2]["lengths"].each)), with_kwargs=True
            )
    learner.update(varied_batch(3))
    assert found == (trunk, critic)
    assert len(heads) == 2  # the output embedding works for gradients only


def test_the_first_pass_measures_the_mismatch_that_a_pass_before_would(model):
    ppo = {"minibatches": 1, "ppo_epochs": 3}
    masked, clipped = (
        make_learner(model, ppo={**MASK["ppo"], **ppo, "policy_loss": name}).update(varied_batch(0))
        for name in ("mask", "clip")
    )
    assert masked["mismatch/kl"] == pytest.approx(clipped["mismatch/kl"], rel=1e-5)
    assert "mismatch/capped" not in masked
    assert "ppo/clip_frac" not in masked
    assert "ppo/masked" not in clipped


def test_a_batch_too_far_from_its_sampler_trains_nothing_under_the_mask(model):
    learner = make_learner(model, ppo={**MASK["ppo"], "minibatches": 4, "ppo_epochs": 1, "target_kl": 1e-4})
    before = parameters(learner)
    passed = set(next(learner._minibatches(8)).tolist())
    stats = learner.update(varied_batch(0))
    assert stats["ppo/optimizer_steps"] == 0
    assert stats["mismatch/kl"] == stats["ppo/approx_kl"] > 1e-4
    assert torch.equal(parameters(learner), before)
    credit = learner.credit()
    for name in ("ratio", "clipped", "entropy"):
        assert {row for row, values in enumerate(credit[name].to_pylist()) if values is not None} == passed
    assert credit["old_logprobs"].null_count == 8


@pytest.mark.parametrize("tokens", [4096, 24], ids=["one micro-batch", "several"])
def test_the_order_of_rollouts_in_the_table_does_not_change_the_gradient(model, tokens):
    table = varied_batch(2)
    orders = [np.arange(8), np.arange(8)[::-1], np.random.default_rng(0).permutation(8)]
    updates = [
        gradients(
            make_learner(model, ppo={"minibatches": 1, "ppo_epochs": 2}, learner={"micro_batch_tokens": tokens}),
            table.take(order),
        )
        for order in orders
    ]
    for update in updates[1:]:
        assert_same_update(update, updates[0])


# Rollouts without ref_logprobs


def with_ref_logprobs(table: pa.Table, rows: list[list[float] | None]) -> pa.Table:
    index = table.schema.get_field_index("ref_logprobs")
    return table.set_column(index, table.schema.field(index), pa.array(rows, type=table.schema.field(index).type))


def own_logprobs(model: Path, table: pa.Table, temperature: float) -> list[list[float]]:
    """Log-probabilities of each response under the starting weights, row by row."""
    policy = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    for row in table.to_pylist():
        ids, first = row["prompt_ids"] + row["response_ids"], len(row["prompt_ids"])
        with torch.no_grad():
            log_probs = (policy(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)
        found.append([log_probs[t - 1, ids[t]].item() for t in range(first, len(ids))])
    return found


def test_under_the_mask_missing_ref_logprobs_are_the_samplers(model):
    table = with_ref_logprobs(varied_batch(4), [None] * 8)
    stats = make_learner(model, **MASK, kl={"coef": 0.5}).update(table)
    assert stats["kl/per_token"] == 0.0
    assert stats["mismatch/kl"] > 0.01


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("tokens", [4096, 24], ids=["shared pass", "pass of its own"])
@pytest.mark.parametrize("nulls", [range(8), [1, 2, 5]], ids=["all", "some"])
def test_in_step_0_missing_ref_logprobs_are_the_policys_own(model, estimator, tokens, nulls):
    table = varied_batch(4)
    own = own_logprobs(model, table, 0.7)
    settings = {
        "kl": {"coef": 0.5, "estimator": estimator},
        "sampling": {"temperature": 0.7},
        "ppo": {"minibatches": 1},
        "learner": {"micro_batch_tokens": tokens},
    }
    given = table["ref_logprobs"].to_pylist()
    given = [own[i] if i in nulls else given[i] for i in range(8)]
    without = [None if i in nulls else given[i] for i in range(8)]
    updates = [gradients(make_learner(model, **settings), with_ref_logprobs(table, rows)) for rows in (without, given)]
    assert_same_update(*updates)
    if len(nulls) == 8:
        assert updates[0][1]["kl/per_token"] == 0.0
        assert updates[0][1]["kl/per_response"] == 0.0
    else:
        assert abs(updates[0][1]["kl/per_token"]) > 0.01


def test_after_step_0_rollouts_without_ref_logprobs_are_refused(model):
    learner = make_learner(model)
    learner.update(with_ref_logprobs(varied_batch(4), [None] * 8))
    before, moments = parameters(learner), replace(learner.score_moments)
    table = varied_batch(5)
    rows = table["ref_logprobs"].to_pylist()
    with pytest.raises(RuntimeError, match="step 1 has rollouts without ref_logprobs; only those of step 0"):
        learner.update(with_ref_logprobs(table, [*rows[:7], None]))
    assert torch.equal(parameters(learner), before)
    assert (learner.step, learner.score_moments) == (1, moments)
    learner.update(with_ref_logprobs(table, [None, *rows[1:]]))  # the first response is empty
    assert learner.step == 2
