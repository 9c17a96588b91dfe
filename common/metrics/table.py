"""The table of all metrics: name, unit, reducer, meaning, and where each is shown. Runs anywhere.

A step metric is a key of RUN/metrics.jsonl. Its row says under which heading the screen shows it. The run's Prometheus
endpoint exports it as `Metric.prometheus`. A process metric is counted inside an actor, and Ray exports it as
`ray_<name>`.
The tables of docs/metrics.md are made from these rows (`python -m tests.metrics_tables`), and a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.environment import VOID_KINDS

Reducer = Literal["mean", "max", "min", "sum", "std", "var", "last"]
_WORDS = {"std": "standard deviation", "var": "variance"}


@dataclass(frozen=True)
class Metric:
    """One value of a step record. In a key, NAME stands for a reward source and KEY for a figure that it returns."""

    key: str
    unit: str
    reducer: Reducer  # how partial values of a step become one
    over: str  # what the values belong to, such as tokens; "" for a value that a step has once
    meaning: str  # ... and what a bad value means
    screen: str = ""  # heading of its column, or its word in the line of seconds

    @property
    def reduced_by(self) -> str:
        """Its reducer in words, for the docs."""
        return f"{_WORDS.get(self.reducer, self.reducer)} over {self.over}" if self.over else self.reducer

    @property
    def prometheus(self) -> str:
        """Its name at the run's endpoint."""
        if self.key == "reward/NAME/KEY":
            return "ratchet_reward_figure"
        return "ratchet_" + self.key.replace("/NAME", "").replace("/", "_")


# Sources have their own path, `reward/NAME/`, so that no name of a source equals another key.
STEP = (
    Metric("step", "count", "last", "", "number of the step, from 0", "step"),
    Metric(
        "time",
        "seconds since 1970",
        "last",
        "",
        "when the record was written; for a step that a resumed run replayed, when its batch entered the journal",
    ),
    Metric(
        "rollout/score/mean",
        "reward units",
        "mean",
        "rollouts",
        "what is optimised; flat for long: no signal, or steps that are too small",
        "score",
    ),
    Metric(
        "rollout/score/std",
        "reward units",
        "std",
        "rollouts",
        "0: every response scores the same, so there is nothing to learn from",
        "std",
    ),
    Metric(
        "rollout/score/zero_std",
        "share",
        "mean",
        "prompts",
        "prompts whose responses all score the same; with one response per prompt the whole batch counts as one prompt."
        " 1: these scores teach nothing. Near 1 for long: the task is too hard or too easy, or the reward is broken",
    ),
    Metric(
        "reward/NAME/score", "raw units of the source", "mean", "rollouts", "one per reward source, before its weight"
    ),
    Metric(
        "reward/NAME/KEY",
        "as the source gives it",
        "mean",
        "rollouts that have it",
        "what a reward function returns in addition to `score` ([rewards.md](rewards.md))",
    ),
    Metric(
        "rollout/response_tokens/mean",
        "tokens",
        "mean",
        "rollouts",
        "a steady rise often means that the reward likes length",
        "tokens",
    ),
    Metric(
        "rollout/finished",
        "share",
        "mean",
        "rollouts",
        "responses that ended with their end token or a stop of `sampling`, or episodes that their environment ended; "
        "low: a limit such as `max_new_tokens` cuts them off",
    ),
    Metric(
        "rollout/voids",
        "rollouts",
        "sum",
        "",
        "voided since the previous step; should be 0. The journal has each reason. Prompts of rollouts that were too "
        "old are sent again",
    ),
    Metric("environment/turns", "turns", "mean", "rollouts", "turns of the policy in an episode", "turns"),
    Metric(
        "environment/contexts",
        "contexts",
        "mean",
        "rollouts",
        "prompts that the policy reads in an episode; 1: every turn continues the one before. More, with an agent that "
        "has one conversation: it changes earlier messages in its requests",
    ),
    Metric(
        "environment/tokens",
        "tokens",
        "mean",
        "rollouts",
        "what the environment says in an episode; the policy reads these tokens, and does not learn from them",
    ),
    Metric("environment/step_s/mean", "seconds", "mean", "turns", "the environment's answer to a turn"),
    Metric(
        "environment/step_s/max",
        "seconds",
        "max",
        "turns",
        "near `environment.step_timeout_s`, beyond which the episode is void",
    ),
    *(
        Metric(f"environment/voids/{kind}", "rollouts", "sum", "", f"the part of `rollout/voids` in which {meaning}")
        for kind, meaning in VOID_KINDS.items()
    ),
    Metric(
        "environment/cached",
        "share",
        "mean",
        "tokens before later turns",
        "found in the engine's cache; low: turns go to other generators, or the weights change between the turns",
    ),
    Metric(
        "environment/recomputed",
        "tokens",
        "mean",
        "rollouts",
        "of an episode, which an engine had computed with the same weights and did not find again before a later turn; "
        "should be near 0. High: the KV cache has no room for all episodes (health rule `prefixes_lost`)",
    ),
    Metric(
        "environment/context_tokens",
        "tokens",
        "mean",
        "rollouts",
        "of the longest context of an episode, prompt included: what the KV cache should have room for, times the "
        "episodes at once",
    ),
    Metric("environment/tool_calls", "calls", "mean", "rollouts", "calls of tools in an episode"),
    Metric(
        "environment/failed_calls",
        "calls",
        "mean",
        "rollouts",
        "calls that were answered with an error; should fall as the policy learns to call",
    ),
    Metric("staleness/min", "versions", "min", "rollouts", "age of a rollout's oldest token when it is learned from"),
    Metric("staleness/mean", "versions", "mean", "rollouts", "0 when training is synchronous"),
    Metric("staleness/max", "versions", "max", "rollouts", "never above `max_staleness`"),
    Metric(
        "staleness/generating_s",
        "seconds",
        "mean",
        "rollouts",
        "from the time a rollout gets a slot until it has a response, a score and reference log-probabilities",
    ),
    Metric(
        "staleness/buffered_s",
        "seconds",
        "mean",
        "rollouts",
        "a finished rollout waited until a step took it",
    ),
    Metric(
        "wait/learner_s",
        "seconds",
        "last",
        "",
        "the learner waited for rollouts; with staleness allowed: generation is the bottleneck",
    ),
    Metric(
        "wait/generators_s",
        "seconds",
        "sum",
        "the time since the previous step",
        "no training rollout was being written or scored, because no slot was free or the buffer was full "
        "(`buffer_mib`); held-out evaluations count too. High: learning is the bottleneck, or `max_staleness` is 0",
    ),
    Metric(
        "wait/environments_s",
        "seconds",
        "sum",
        "the time since the previous step",
        "environments were answering and no generator was writing. Long: the environment is the bottleneck; make it "
        "faster, or allow more episodes at once (`max_staleness`, `environment.max`)",
    ),
    Metric("kl/per_token", "nats", "mean", "tokens", "distance from the reference by the configured estimator"),
    Metric(
        "kl/per_response",
        "nats",
        "mean",
        "rollouts",
        "`kl/per_token`, summed over a response; tens of nats: the policy is far from the reference",
        "KL",
    ),
    Metric("kl/coef", "reward per nat", "last", "", "changes only with the adaptive controller"),
    Metric(
        "mismatch/kl",
        "nats",
        "mean",
        "tokens",
        "k3 between learner and generator on the sampled tokens (a token counts with at most 10 nats); above 0.01 "
        "without staleness: the two disagree about the model. The run stops when it stays above "
        "`ppo.max_mismatch_kl` for `ppo.max_mismatch_steps` steps in a row. With `mask` it is that of the first "
        "minibatch, before it moves the policy",
        "mismatch",
    ),
    Metric(
        "mismatch/capped",
        "share",
        "mean",
        "tokens",
        "tokens whose importance weight reached `importance_cap`; absent with `mask`, which has no such weight",
    ),
    Metric("ppo/policy_loss", "-", "mean", "tokens", "near 0 with whitened advantages; its trend means little"),
    Metric(
        "ppo/entropy",
        "nats",
        "mean",
        "tokens",
        "spread of the policy; a sudden fall to 0: it has collapsed to few responses",
        "entropy",
    ),
    Metric(
        "ppo/clip_frac",
        "share",
        "mean",
        "tokens",
        "tokens whose gradient the clip removed; above 0.3: the learning rate is too high for `clip_eps`. Absent with "
        "`mask`",
        "clip",
    ),
    Metric(
        "ppo/masked",
        "share",
        "mean",
        "tokens",
        'with `policy_loss = "mask"`: tokens without a gradient, because their ratio to the sampler is out of bounds; '
        "high from the first step on: `clip_eps` is too small for rounding or old weights",
        "mask",
    ),
    Metric(
        "ppo/approx_kl",
        "nats",
        "mean",
        "tokens",
        "k3 between the policy at the start of the step (with `mask`: the sampler) and the policy during it; compare "
        "`target_kl`",
    ),
    Metric("ppo/ratio", "-", "mean", "tokens", "near 1"),
    Metric("ppo/grad_norm", "-", "max", "optimizer steps", "before clipping to `max_grad_norm`"),
    Metric("ppo/learning_rate", "-", "last", "", "after warm-up and schedule"),
    Metric(
        "ppo/optimizer_steps",
        "count",
        "last",
        "",
        "fewer than `ppo_epochs` x `minibatches`: `target_kl` ended the step early; 0, with no other figure of the "
        "learner: the batch is void, and the journal has the reason",
    ),
    Metric("value/loss", "reward units squared", "mean", "tokens", "half the squared error to the returns"),
    Metric("value/clip_frac", "share", "mean", "tokens", "tokens that `value_clip` held back"),
    Metric(
        "value/epochs/first_loss",
        "reward units squared",
        "mean",
        "tokens",
        "with `value_epochs`: `value/loss` during the first of these passes",
    ),
    Metric(
        "value/epochs/last_loss",
        "reward units squared",
        "mean",
        "tokens",
        "the same during the last of them; hardly below the first: more passes gain nothing, or the critic's learning "
        "rate is too low; above it: too high",
    ),
    Metric("value/epochs/grad_norm", "-", "max", "optimizer steps", "of these passes, before clipping"),
    Metric(
        "value/mean",
        "reward units",
        "mean",
        "tokens",
        'what the critic expects; should approach the mean return. With `reward.normalise = "mean_std"` that of a '
        "mean score is 0. A run without a critic has no `value/*`",
    ),
    Metric(
        "value/returns_var",
        "reward units squared",
        "var",
        "tokens",
        "of the value targets. Below a lambda of 1 they contain the critic's own predictions: see "
        "`value/returns_var/realised`",
    ),
    Metric(
        "value/returns_var/realised",
        "reward units squared",
        "var",
        "tokens",
        "of the realised returns: for each token the discounted sum of the rewards from it on. This is the "
        "variance that a critic could explain. With hardly any of it left, no figure of the critic means anything",
    ),
    Metric(
        "value/advantages_var",
        "reward units squared",
        "var",
        "tokens",
        "the variance that is left for the policy gradient, before whitening",
    ),
    Metric(
        "value/variance_ratio",
        "share",
        "last",
        "",
        "variance of advantages over variance of value targets. With `lam` = `value_lam`: the share of the variance "
        "that the critic does not predict; above 1 it adds noise. With a smaller `lam` it is small even for a "
        "critic that knows nothing",
    ),
    Metric(
        "reward/running_mean",
        "reward units",
        "last",
        "",
        "mean of every score of the run so far, and of the scores that `learner.critic_path` was trained with",
    ),
    Metric(
        "reward/running_std",
        "reward units",
        "last",
        "",
        "standard deviation of these scores: the unit of normalised scores",
    ),
    Metric(
        "value/explained_variance",
        "share",
        "last",
        "",
        "1 - Var(targets - values) / Var(targets): how well the critic predicts the value targets. Below a lambda of 1 "
        "they contain its own predictions",
    ),
    Metric(
        "value/explained_variance/realised",
        "share",
        "last",
        "",
        "1 - Var(returns - values) / Var(returns) over all tokens, of realised returns; 1: perfect, 0: no better than "
        "a constant, below 0: worse than one, or the returns hardly vary (`value/returns_var/realised`)",
        "critic",
    ),
    Metric(
        "value/explained_variance/first",
        "share",
        "last",
        "",
        "the same at the first tokens alone: what the critic knows from the prompt. 0 where prompts say nothing about "
        "the score",
        "first",
    ),
    *(
        Metric(
            f"value/explained_variance/quarter_{number}",
            "share",
            "last",
            "",
            f"the same in the {name} quarter of each response",
        )
        for number, name in enumerate(("first", "second", "third", "last"), 1)
    ),
    Metric(
        "value/explained_variance/last",
        "share",
        "last",
        "",
        "the same at the last tokens alone, whose return is the score less one KL penalty; low: the critic does not "
        "know a good response when it has nearly read it",
    ),
    Metric(
        "value/calibration_error",
        "reward units",
        "last",
        "",
        "tokens in ten bins of equal size by predicted value: mean distance between predicted and realised return of a "
        "bin; far above 0 with few rollouts, because chance moves ten small groups",
    ),
    Metric(
        "value/score_correlation",
        "-",
        "last",
        "",
        "between the value of a response's first token and its score (normalised); 0: the critic cannot tell promising "
        "prompts from others",
    ),
    Metric("learner/tokens", "tokens", "last", "", "prompt and response tokens of the batch"),
    Metric(
        "weights/bytes",
        "bytes",
        "sum",
        "replicas",
        'sent to generators for the new version. With `generators.updates = "changes"` and as many bytes as a full set:'
        " too many values change, or replicas refuse deltas",
    ),
    Metric(
        "weights/pause_s",
        "seconds",
        "max",
        "replicas",
        "an engine sampled nothing while it took the new weights; longer where vLLM's own reload is used",
    ),
    Metric(
        "time/generate_s",
        "seconds",
        "last",
        "",
        "from the start of the step until the last response was written",
        "generate",
    ),
    Metric(
        "time/score_s",
        "seconds",
        "last",
        "",
        "from the end of `time/generate_s` until the batch was complete; other scoring ran during generation",
        "reward",
    ),
    Metric("time/journal_s", "seconds", "last", "", "writing the batch to disk"),
    Metric(
        "time/learn_s",
        "seconds",
        "last",
        "",
        "the update; includes `time/old_logprobs_s`, `time/optimise_s` and `time/credit_s`",
        "learn",
    ),
    Metric(
        "time/old_logprobs_s",
        "seconds",
        "last",
        "",
        "the pass for old log-probabilities and values; where the first optimizer step shares it, its forward half. "
        "With `mask` for values only",
    ),
    Metric("time/optimise_s", "seconds", "last", "", "all other passes with gradients, and the optimizer"),
    Metric("time/value_epochs_s", "seconds", "last", "", "with `value_epochs`: their part of `time/optimise_s`"),
    Metric("time/credit_s", "seconds", "last", "", "writing the values of each token, if `credit.every` asks for it"),
    Metric(
        "time/publish_s",
        "seconds",
        "last",
        "",
        "new weights packed, sent, verified, staged and swapped in on every generator",
        "publish",
    ),
    Metric(
        "time/checkpoint_s",
        "seconds",
        "last",
        "",
        "writing a checkpoint, if one was due; on the screen and at the endpoint only, since `metrics.jsonl` is "
        "written first",
        "save",
    ),
)

# Shown at the run's endpoint next to the newest step; RUN/evaluations.jsonl and the journal have the same values.
ENDPOINT = (
    Metric("evaluation/score", "reward units", "mean", "answers", "score of the newest held-out evaluation"),
    Metric("evaluation/pass_at_1", "share", "mean", "prompts", "pass@1 of the newest held-out evaluation"),
    Metric("policy_version", "publications", "last", "", "version that the generators hold"),
    Metric("health", "0 or 1", "last", "", "1 for each rule of docs/health.md that holds now; the label is `rule`"),
)

# The record of an optimizer step of `ratchet train-reward`.
REWARD_STEP = (
    Metric("step", "count", "last", "", "number of the step, from 0", "step"),
    Metric("time", "seconds since 1970", "last", "", "when the record was written"),
    Metric("epoch", "epochs", "last", "", "passes over the pairs when the step was done", "epoch"),
    Metric(
        "preference/loss",
        "nats",
        "mean",
        "pairs",
        "ln 2 = 0.693: the model knows nothing. Includes margins and centring, if configured. Far below the held-out "
        "loss, which has neither: overfitting",
        "loss",
    ),
    Metric(
        "preference/accuracy",
        "share",
        "mean",
        "pairs",
        "pairs whose chosen response scores higher, before the step learned from them",
        "accuracy",
    ),
    Metric(
        "preference/margin",
        "head units",
        "mean",
        "pairs",
        "chosen minus rejected score; large with a poor held-out loss: overconfident",
        "margin",
    ),
    Metric(
        "preference/score",
        "head units",
        "mean",
        "responses",
        "pairs do not determine the zero point: it may drift, unless `loss.centre_coef` holds it",
    ),
    Metric("preference/grad_norm", "-", "last", "", "before clipping to `max_grad_norm`", "grad"),
    Metric("preference/learning_rate", "-", "last", "", "after warm-up and schedule"),
    Metric(
        "learner/tokens",
        "tokens",
        "last",
        "",
        "tokens of the step; the part that the two responses share counts once",
        "tokens",
    ),
    Metric("time/learn_s", "seconds", "last", "", "the step", "seconds"),
)

# The record of an optimizer step of `ratchet train-critic`.
CRITIC_STEP = (
    Metric("step", "count", "last", "", "number of the step, from 0", "step"),
    Metric("time", "seconds since 1970", "last", "", "when the record was written"),
    Metric("epoch", "passes", "last", "", "passes over the rollouts when the step was done", "pass"),
    Metric(
        "value/loss",
        "reward units squared",
        "mean",
        "tokens",
        "half the squared error to the realised returns, before the step learned from them. Far below the held-out "
        "loss: overfitting",
        "loss",
    ),
    Metric(
        "value/explained_variance/realised",
        "share",
        "last",
        "",
        "what the critic explains of the step's returns, before the step learned from them",
        "explained",
    ),
    Metric("critic/grad_norm", "-", "last", "", "before clipping to `max_grad_norm`", "grad"),
    Metric(
        "critic/learning_rate",
        "-",
        "last",
        "",
        "of a separate critic's network, or of the head on a shared trunk, after warm-up and schedule",
    ),
    Metric("learner/tokens", "tokens", "last", "", "prompt and response tokens of the step", "tokens"),
    Metric("time/learn_s", "seconds", "last", "", "the step", "seconds"),
)

# For the trainers, which reduce partial values. The tables agree where they share a key, and a test checks it.
REDUCERS: dict[str, Reducer] = {metric.key: metric.reducer for metric in (*STEP, *REWARD_STEP, *CRITIC_STEP)}


@dataclass(frozen=True)
class Meter:
    """One value that a process counts. Prometheus' conventions: base units, and a counter ends in _total."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    tags: tuple[str, ...]
    meaning: str
    buckets: tuple[float, ...] = ()  # upper ends, of a histogram


OWN = ("role", "replica")  # tags that the recording process fills in: its role, and its name in the pool
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_TOKENS = (64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)

METERS = {
    meter.name: meter
    for meter in (
        Meter(
            "ratchet_generator_rollouts_total",
            "counter",
            "rollouts",
            OWN,
            "finished responses; a replica that falls behind the others is slow or has no work",
        ),
        Meter(
            "ratchet_generator_tokens_total",
            "counter",
            "tokens",
            OWN,
            "sampled tokens, those of handed-over responses included; the rate is the throughput",
        ),
        Meter(
            "ratchet_generator_prompt_tokens_total",
            "counter",
            "tokens",
            OWN,
            "tokens of prompts, earlier turns included; only of engines that cache prefixes",
        ),
        Meter(
            "ratchet_generator_cached_tokens_total",
            "counter",
            "tokens",
            OWN,
            "prompt tokens whose states were in the cache; few with several turns: the KV cache is too small, or turns "
            "go to other replicas",
        ),
        Meter(
            "ratchet_generator_nonfinite_total",
            "counter",
            "rollouts",
            OWN,
            "rollouts with a log-probability that is not finite; should stay 0",
        ),
        Meter(
            "ratchet_generator_requests",
            "gauge",
            "requests",
            (*OWN, "state"),
            "in the engine now; `state` is running or waiting. Many waiting for long: `max_running` or the KV cache is "
            "too small",
        ),
        Meter(
            "ratchet_generator_weights_version",
            "gauge",
            "versions",
            OWN,
            "policy version it samples from; replicas differ only during an update",
        ),
        Meter(
            "ratchet_generator_stage_seconds",
            "histogram",
            "seconds",
            OWN,
            "verifying and storing one update, during generation",
            _SECONDS,
        ),
        Meter(
            "ratchet_generator_swap_seconds",
            "histogram",
            "seconds",
            OWN,
            "pause for one update, in which no token is sampled",
            _SECONDS,
        ),
        Meter(
            "ratchet_scored_rollouts_total",
            "counter",
            "rollouts",
            OWN,
            "given a score (Reward) or log-probabilities (ReferencePolicy), evaluations included",
        ),
        Meter(
            "ratchet_reward_voids_total",
            "counter",
            "rollouts",
            (*OWN, "source"),
            "rollouts without a score because this source or judge failed; should stay 0",
        ),
        Meter(
            "ratchet_environment_steps_total",
            "counter",
            "turns",
            OWN,
            "turns that an environment has answered, evaluations included",
        ),
        Meter(
            "ratchet_environment_voids_total",
            "counter",
            "rollouts",
            (*OWN, "reason"),
            "episodes that ended without a score because their environment failed; should stay 0. `reason` is the last "
            "part of a key `environment/voids/...`; the driver counts those that died, without a replica",
        ),
        Meter(
            "ratchet_batch_rollouts",
            "histogram",
            "rollouts",
            OWN,
            "in one forward pass of a reward model or the reference; 1: no two rollouts share a pass",
            _COUNTS,
        ),
        Meter(
            "ratchet_batch_tokens",
            "histogram",
            "tokens",
            OWN,
            "in one forward pass; far below `max_batch_tokens`: the service waits for work",
            _TOKENS,
        ),
        Meter(
            "ratchet_pool_replicas",
            "gauge",
            "replicas",
            ("role", "state"),
            "in each state: pending (waits for room), starting, ready, leaving",
        ),
        Meter("ratchet_pool_joins_total", "counter", "replicas", ("role",), "became ready to be called"),
        Meter(
            "ratchet_pool_leaves_total",
            "counter",
            "replicas",
            ("role", "reason"),
            "left the pool; `reason` says why they were told to leave, or is `died`",
        ),
        Meter(
            "ratchet_pool_reissues_total",
            "counter",
            "calls",
            ("role",),
            "sent again to another replica, because the first one was lost",
        ),
        Meter(
            "ratchet_pool_waiting_calls",
            "gauge",
            "calls",
            ("role",),
            "wait for a replica with room; 0 for long: more replicas would have no work",
        ),
        Meter(
            "ratchet_pool_startup_seconds",
            "histogram",
            "seconds",
            ("role",),
            "from getting room on the cluster until ready to be called",
            _SECONDS,
        ),
    )
}
