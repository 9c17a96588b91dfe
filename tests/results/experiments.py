"""The experiments of docs/results.md: a shipped config and settings for each arm.

The minutes of each are estimated from the seconds of single runs on two cores: 11 a step of the question task with a
shared critic, 15 with a separate one, 18 in the human-feedback demo, and a minute to start.
"""

from __future__ import annotations

from tests.results.ablations import (
    CLIPPING,
    DRIFT,
    ENTROPY,
    ENVIRONMENTS,
    PRESETS,
    PRESETS_WITH_FEEDBACK,
    UNITS,
)
from tests.results.critic_experiments import CAUSES, LEARNING
from tests.results.finished import Finished
from tests.results.shipped import (
    EXPLAINED_AT_END,
    FEEDBACK,
    GOLD_AT_END,
    JUDGE,
    KL_AT_END,
    LOST_PASS,
    PASS_AT_END,
    QUESTION,
    REWARD_MODEL,
    SEPARATE,
    WITH_REWARD_MODEL,
)
from tests.results.trained import LEARNED, TRAINED
from tests.results.works import Arm, Column, Experiment, Work, percent

GROUP = 4  # responses to each prompt
SAMPLED = 640  # responses that a critic is trained on before the run: ten steps' worth
SAME_PROMPTS = (f"prompts.rollouts_per_prompt={GROUP}",)
PRETRAINED = "learner.critic_path={NAME}/critic"
NO_CRITIC = {"group": 'ppo.advantages="group"', "returns": 'ppo.advantages="returns"'}


# The critics that are compared have a network of their own, because a head on a trunk that does not learn explains
# little (docs/results.md). At this learning rate about 500 responses teach it.
TAUGHT = (*SEPARATE, "ppo.value_lam=1")


def _critic(name: str, config: str, *settings: str, needs: tuple[Work, ...] = ()) -> Work:
    """A critic, trained on responses of the starting policy to the first prompts of the run that starts from it."""
    return Work(name, config, (*settings, *TAUGHT), "train-critic", ("--sample", str(SAMPLED)), needs)


def _compared(prefix: str, config: str, *settings: str, needs: tuple[Work, ...] = ()) -> tuple[Arm, ...]:
    """The baselines on the same prompts: every step asks the same number of prompts GROUP times each."""
    same = (*settings, *SAME_PROMPTS)
    critic = _critic(f"{prefix}-critic", config, *settings, needs=needs)
    start = PRETRAINED.replace("NAME", critic.name)
    pretrained = Work(f"{prefix}-pretrained", config, (*same, *TAUGHT, start), needs=(*needs, critic))
    return (
        Arm("pretrained critic", pretrained, critic, SAMPLED),
        Arm("fresh critic", Work(f"{prefix}-fresh", config, (*same, *TAUGHT), needs=needs)),
        Arm("fresh critic, shared trunk", Work(f"{prefix}-shared", config, same, needs=needs)),
        Arm("group baseline", Work(f"{prefix}-group", config, (*same, NO_CRITIC["group"]), needs=needs)),
        Arm("no baseline", Work(f"{prefix}-none", config, (*same, NO_CRITIC["returns"]), needs=needs)),
    )


# The question task


SHORT = ("num_steps=10", "evaluation.every=1", "evaluation.prompts=128")
_single_critic = _critic("question-critic", QUESTION, *SHORT)
_single = (
    Arm(
        "pretrained critic, 1 response to each prompt",
        Work(
            "question-pretrained-single",
            QUESTION,
            (*SHORT, *TAUGHT, PRETRAINED.replace("NAME", _single_critic.name)),
            needs=(_single_critic,),
        ),
        _single_critic,
        SAMPLED,
    ),
    Arm("fresh critic, 1 response to each prompt", Work("question-fresh-single", QUESTION, (*SHORT, *TAUGHT))),
    Arm(
        "no baseline, 1 response to each prompt",
        Work("question-none-single", QUESTION, (*SHORT, NO_CRITIC["returns"])),
    ),
)
BASELINES = Experiment(
    about=(
        f"The question task (`deploy/configs/{QUESTION}`, with 10 steps in place of 14). All rows have the same number "
        f"of responses in each step. In the first five rows every prompt gets {GROUP} responses. With one seed these "
        "rows ask the same prompts in the same order, and their first batches are the same. A row with 1 response asks "
        f"{GROUP} times as many prompts. Critics are networks of their own, with `ppo.value_lam = 1` and a learning "
        "rate of 1.5e-4; only the row with a shared trunk has the critic of the shipped config. The critic of a "
        f"pretrained row was trained with `ratchet train-critic` on {SAMPLED} responses of the starting policy to the "
        "first prompts. The column of responses does not contain these. The policy is evaluated on 128 held-out "
        "prompts after every step, and the first evaluation of at least 90 % counts. Seconds are those of the steps "
        "before it: generation, scoring, journal, learning and publication, without evaluations, start-up and the "
        "training of the critic. What a baseline leaves is the variance of realised return minus baseline over all "
        "tokens of a batch, from RUN/credit: the advantages with lambda 1, before whitening. The baseline is the "
        "critic's value, the mean of the other responses, or nothing. In the first step all rows have the same policy."
    ),
    minutes=37,
    arms=(*_compared("question", QUESTION, *SHORT), *_single),
    columns=(
        Column("responses to 90 %", lambda run: run.responses_to(0.9), "{:.0f}", "never"),
        Column("seconds to 90 %", lambda run: run.seconds_to(0.9), "{:.0f}", "never"),
        PASS_AT_END,
        Column("variance that the baseline leaves, first step", Finished.first_variance_left, "{:.3g}"),
        Column("... all steps, share of the returns' variance", Finished.share_left),
        EXPLAINED_AT_END,
    ),
)

# The human-feedback demo

LEVELS = (2.0, 4.0, 6.0)  # nats per response
FEEDBACK_BASELINES = Experiment(
    about=(
        f"The human-feedback demo (`deploy/configs/{FEEDBACK}`), against one reward model for all rows and seeds. The "
        f"baselines are those of the question task, with {GROUP} responses to each prompt. The gold score is that of "
        "the labeller on 128 held-out prompts, which the policy never sees. It is read where the KL from the reference "
        "first reaches a level, on the line between two evaluations, one every second step. The variance that the "
        "baseline leaves is that of realised return minus baseline."
    ),
    minutes=41,
    arms=_compared(
        "feedback",
        FEEDBACK,
        "evaluation.every=2",
        WITH_REWARD_MODEL,
        needs=(REWARD_MODEL,),
    ),
    columns=(
        *(
            Column(f"gold at {kl:g} nats", lambda run, kl=kl: run.judged_at_kl(JUDGE, kl), "{:.3f}", "never")
            for kl in LEVELS
        ),
        GOLD_AT_END,
        KL_AT_END,
        Column("variance that the baseline leaves, first step", Finished.first_variance_left, "{:.3g}"),
    ),
)

# Asynchronous training

_LONG = (
    "num_steps=40",
    "rollouts_per_step=32",
    "ppo.minibatches=2",
    'optimizer.schedule="constant"',
    "evaluation.every=4",
    "evaluation.prompts=128",
    "ppo.max_mismatch_kl=0",  # a policy that moves away from its data is what is measured, and must not end the run
)


def _asynchronous(staleness: int, loss: str, *bounds: str) -> Arm:
    settings = (*_LONG, f"max_staleness={staleness}", f'ppo.policy_loss="{loss}"', *bounds)
    title, name = f'max_staleness = {staleness}, "{loss}"', f"staleness-{staleness}-{loss}"
    if bounds:
        title, name = f"{title} with the bounds of SAO", f"{name}-wide"
    return Arm(title, Work(name, QUESTION, settings))


_BOUNDS_OF_SAO = ("ppo.clip_eps=0.3", "ppo.clip_eps_high=5.0")  # as in single-response-async.toml


STALENESS = Experiment(
    about=(
        f"The question task with older tokens: 40 steps of 32 responses at a constant learning rate, the bounds of the "
        f"ratio (0.8 to 1.2) and the importance weight as in `deploy/configs/{QUESTION}`. The bounds of SAO are 0.7 to "
        "6. Lost pass@1 is the best held-out figure less the last one: a policy that collapses loses much. Evaluations "
        "have 128 held-out prompts, one every fourth step."
    ),
    minutes=36,
    arms=(
        *(_asynchronous(staleness, loss) for staleness in (0, 2, 8) for loss in ("clip", "mask")),
        *(_asynchronous(staleness, "mask", *_BOUNDS_OF_SAO) for staleness in (2, 8)),
    ),
    columns=(
        PASS_AT_END,
        Column("best pass@1, %", lambda run: percent(run.best_pass_rate()), "{:.1f}"),
        LOST_PASS,
        Column("mean staleness, versions", lambda run: run.mean("staleness/mean"), "{:.2f}"),
        Column("mismatch/kl, mean", lambda run: run.mean("mismatch/kl"), "{:.4f}"),
        Column("tokens clipped or masked, %", lambda run: percent(_without_gradient(run)), "{:.1f}"),
    ),
)


def _without_gradient(run: Finished) -> float | None:
    """Share of the tokens that the rule of the policy loss stops."""
    masked = run.mean("ppo/masked")
    return run.mean("ppo/clip_frac") if masked is None else masked


EXPERIMENTS = {
    "learning": LEARNED,
    "trained": TRAINED,
    "baselines": BASELINES,
    "feedback": FEEDBACK_BASELINES,
    "staleness": STALENESS,
    "causes": CAUSES,
    "critics": LEARNING,
    "clipping": CLIPPING,
    "units": UNITS,
    "drift": DRIFT,
    "entropy": ENTROPY,
    "presets": PRESETS,
    "presets-feedback": PRESETS_WITH_FEEDBACK,
    "environments": ENVIRONMENTS,
}
