"""The figures of a run: every key of a step record, with its unit and how it is reduced.

docs/metrics.md says what each means; tests hold records, list and docs together.
"""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    key: str
    unit: str
    reduced_by: str

    @property
    def metric(self) -> str:
        """Its name in Prometheus."""
        if self.key == "reward/NAME/KEY":
            return "ratchet_reward_figure"
        return "ratchet_" + self.key.replace("/NAME", "").replace("/", "_")


# NAME stands for one key per reward source, KEY for one per further figure of its results. Both have a path of their
# own: no name that a user chooses is that of another figure.
FIGURES = (
    Figure("step", "count", "-"),
    Figure("time", "seconds since 1970", "last"),
    Figure("rollout/score/mean", "reward units", "mean over rollouts"),
    Figure("rollout/score/std", "reward units", "over rollouts"),
    Figure("rollout/score/zero_std", "share", "mean over prompts"),
    Figure("reward/NAME/score", "raw units of the source", "mean over rollouts"),
    Figure("reward/NAME/KEY", "as the source gives it", "mean over rollouts that have it"),
    Figure("rollout/response_tokens/mean", "tokens", "mean over rollouts"),
    Figure("rollout/finished", "share", "mean over rollouts"),
    Figure("rollout/voids", "rollouts", "sum"),
    Figure("staleness/min", "versions", "min over rollouts"),
    Figure("staleness/mean", "versions", "mean over rollouts"),
    Figure("staleness/max", "versions", "max over rollouts"),
    Figure("staleness/generating_s", "seconds", "mean over rollouts"),
    Figure("staleness/buffered_s", "seconds", "mean over rollouts"),
    Figure("wait/learner_s", "seconds", "last"),
    Figure("wait/generators_s", "seconds", "sum since the last step"),
    Figure("kl/per_token", "nats", "mean over tokens"),
    Figure("kl/per_response", "nats", "mean over rollouts"),
    Figure("kl/coef", "reward per nat", "last"),
    Figure("mismatch/kl", "nats", "mean over tokens"),
    Figure("mismatch/capped", "share", "mean over tokens"),
    Figure("ppo/policy_loss", "-", "mean over tokens"),
    Figure("ppo/entropy", "nats", "mean over tokens"),
    Figure("ppo/clip_frac", "share", "mean over tokens"),
    Figure("ppo/approx_kl", "nats", "mean over tokens"),
    Figure("ppo/ratio", "-", "mean over tokens"),
    Figure("ppo/grad_norm", "-", "max over optimizer steps"),
    Figure("ppo/learning_rate", "-", "last"),
    Figure("ppo/optimizer_steps", "count", "last"),
    Figure("value/loss", "reward units squared", "mean over tokens"),
    Figure("value/clip_frac", "share", "mean over tokens"),
    Figure("value/mean", "reward units", "mean over tokens"),
    Figure("value/returns_var", "reward units squared", "over tokens"),
    Figure("value/advantages_var", "reward units squared", "over tokens"),
    Figure("value/variance_ratio", "share", "last"),
    Figure("reward/running_mean", "reward units", "last"),
    Figure("reward/running_std", "reward units", "last"),
    Figure("value/explained_variance", "share", "last"),
    Figure("learner/tokens", "tokens", "last"),
    Figure("weights/bytes", "bytes", "sum over replicas"),
    Figure("weights/pause_s", "seconds", "max over replicas"),
    Figure("time/generate_s", "seconds", "last"),
    Figure("time/score_s", "seconds", "last"),
    Figure("time/journal_s", "seconds", "last"),
    Figure("time/learn_s", "seconds", "last"),
    Figure("time/old_logprobs_s", "seconds", "last"),
    Figure("time/optimise_s", "seconds", "last"),
    Figure("time/publish_s", "seconds", "last"),
    Figure("time/checkpoint_s", "seconds", "last"),
)
