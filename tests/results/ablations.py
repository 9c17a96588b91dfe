"""The experiments of docs/results.md that test what the theory of PPO predicts, by one change of a shipped config.

All rows of a table have the same number of responses. Minutes as in tests/results/experiments.py.
"""

from __future__ import annotations

from tests.results.shipped import (
    FEEDBACK,
    GOLD_AT_END,
    JUDGE,
    KL_AT_END,
    LAST_FIVE,
    LOST_PASS,
    PASS_AT_END,
    QUESTION,
    REWARD_MODEL,
    WITH_REWARD_MODEL,
)
from tests.results.works import Arm, Column, Experiment, Work, percent

DISTINCT = Column("distinct-2 at the end", lambda run: run.last("distinct_2"))


def _question(name: str, title: str, *settings: str) -> Arm:
    return Arm(title, Work(f"question-{name}", QUESTION, settings))


# Clipping

NEVER = 1e9  # a bound of the ratio that no token reaches


def _epochs(count: int, clip: float) -> Arm:
    what = "no clipping" if clip == NEVER else f"clip {clip:g}"
    name = f"epochs-{count}-{'none' if clip == NEVER else f'{clip:g}'}"
    # The bound on the mismatch would end a run whose policy breaks, which is what is measured.
    settings = (f"ppo.ppo_epochs={count}", f"ppo.clip_eps={clip:g}", "evaluation.every=2", "ppo.max_mismatch_kl=0")
    return _question(name, f"{count} epoch{'s' if count > 1 else ''}, {what}", *settings)


CLIPPING = Experiment(
    about=(
        f"The question task (`deploy/configs/{QUESTION}`): passes over each batch, and the bound of the ratio. Lost "
        "pass@1 is the best held-out figure less the last one, with an evaluation every second step. approx_kl is the "
        "mean distance from the policy before the step, over all passes; the largest step counts."
    ),
    minutes=26,
    arms=tuple(_epochs(*arm) for arm in ((1, 0.2), (1, NEVER), (4, 0.05), (4, 0.2), (4, NEVER))),
    columns=(
        PASS_AT_END,
        LOST_PASS,
        Column("approx_kl, largest", lambda run: run.largest("ppo/approx_kl"), "{:.4f}"),
        Column("tokens clipped, %", lambda run: percent(run.mean("ppo/clip_frac")), "{:.1f}"),
        Column("gradient norm, largest", lambda run: run.largest("ppo/grad_norm"), "{:.1f}"),
        KL_AT_END,
    ),
)

# The unit of the reward

CORRECT = '{name="correct", function="deploy.tasks.larger:correct", weight=WEIGHT}'
UNFINISHED = '{name="unfinished", function="actors.penalties:unfinished", weight=PENALTY}'
OFFSET = '{name="offset", function="tests.results.rewards:one", weight=OFFSET}'


def _scaled(scale: float, offset: float, normalise: str) -> Arm:
    """The score of the shipped config, times `scale`, plus `offset`."""
    sources = f"[{CORRECT}, {UNFINISHED}, {OFFSET}]".replace("WEIGHT", f"{scale:g}")
    sources = sources.replace("PENALTY", f"{-scale / 2:g}").replace("OFFSET", f"{offset:g}")
    unit = f"score x {scale:g}" + (f" + {offset:g}" if offset else "")
    how = "normalised" if normalise == "mean_std" else "as it is"
    settings = (f"reward.sources={sources}", f'reward.normalise="{normalise}"')
    return _question(f"unit-{scale:g}-{normalise.replace('_', '-')}", f"{unit}, {how}", *settings)


UNITS = Experiment(
    about=(
        f"The question task (`deploy/configs/{QUESTION}`) with other units of its score; nothing else differs. "
        'Rows "as it is" have `reward.normalise = "none"`, the others "mean_std". The KL penalty stays as '
        "shipped, so next to a large score it vanishes."
    ),
    minutes=18,
    arms=tuple(
        _scaled(*unit, normalise) for unit in ((1, 0), (1000, 0), (5e8, 3e8)) for normalise in ("none", "mean_std")
    ),
    columns=(
        PASS_AT_END,
        KL_AT_END,
        Column("loss of the values, mean", lambda run: run.mean("value/loss"), "{:.3g}"),
        Column("gradient norm, mean", lambda run: run.mean("ppo/grad_norm"), "{:.3g}"),
    ),
)

# The KL penalty

_LONG = ("num_steps=32", "evaluation.every=4", WITH_REWARD_MODEL)

DRIFT = Experiment(
    about=(
        f"The human-feedback demo (`deploy/configs/{FEEDBACK}`, against one reward model for all rows and seeds) with "
        "32 steps instead of 16. The reward model is the proxy: its score is what PPO raises. The gold score is that "
        "of the labeller on 128 held-out prompts, which the policy never sees."
    ),
    minutes=25,
    arms=tuple(
        Arm(title, Work(f"drift-{coef}", FEEDBACK, (*_LONG, f"kl.coef={coef}"), needs=(REWARD_MODEL,)))
        for coef, title in (("0", "no KL penalty"), ("0.03", "KL coefficient 0.03, as shipped"), ("0.1", "0.1"))
    ),
    columns=(
        Column("proxy at the end", lambda run: run.last_judged("reward_model"), "{:.2f}"),
        GOLD_AT_END,
        Column("best gold", lambda run: run.best_judged(JUDGE), "{:.3f}"),
        KL_AT_END,
        DISTINCT,
    ),
)

# Presets


def _presets(task: str, config: str, *settings: str, needs: tuple[Work, ...] = ()) -> tuple[Arm, ...]:
    """The shipped config, and the same with each preset."""
    return (
        Arm("as shipped", Work(f"presets-{task}-none", config, settings, needs=needs)),
        *(
            Arm(f"`{name}`", Work(f"presets-{task}-{name}", config, settings, options=("--preset", name), needs=needs))
            for name in ("careful", "balanced", "fast")
        ),
    )


_ENTROPY_AT_END = Column("entropy in the last 5 steps, nats per token", lambda run: run.mean("ppo/entropy", LAST_FIVE))

PRESETS = Experiment(
    about=(
        f"The question task (`deploy/configs/{QUESTION}`), whose score cannot be fooled. The policy is evaluated on "
        "128 held-out prompts after every step, and the first evaluation of at least 90 % counts."
    ),
    minutes=14,
    arms=_presets("question", QUESTION, "evaluation.every=1", "evaluation.prompts=128"),
    columns=(
        Column("responses to 90 %", lambda run: run.responses_to(0.9), "{:.0f}", "never"),
        PASS_AT_END,
        KL_AT_END,
        _ENTROPY_AT_END,
    ),
)

PRESETS_WITH_FEEDBACK = Experiment(
    about=(
        f"The human-feedback demo (`deploy/configs/{FEEDBACK}`, against one reward model for all rows and seeds). The "
        "reward model is the proxy: PPO raises its score, and it can be fooled. The gold score is that of the labeller "
        "on 128 held-out prompts, which the policy never sees."
    ),
    minutes=20,
    arms=_presets("feedback", FEEDBACK, WITH_REWARD_MODEL, needs=(REWARD_MODEL,)),
    columns=(
        Column("proxy at the end", lambda run: run.last_judged("reward_model"), "{:.2f}"),
        GOLD_AT_END,
        KL_AT_END,
        DISTINCT,
        _ENTROPY_AT_END,
    ),
)

# Tools and conversations

_SUMS = "deploy.tasks.calculator"
_WITHOUT_TOOL = (
    f"prompts.train={_SUMS}:train_sums",
    f"prompts.heldout={_SUMS}:heldout_sums",
    "environment.max_turns=1",
)

ENVIRONMENTS = Experiment(
    about=(
        "Sums of three numbers with a calculator as a tool (`deploy/configs/calculator.toml`, which is `make "
        "demo-tools`), the same sums with one turn and an example that has no call, and the guessing game "
        "(`deploy/configs/guessing.toml`), whose reward comes with the last turn. Turns are those of an episode. "
        "Seconds are those of the whole command."
    ),
    minutes=30,
    arms=(
        Arm("sums, with the tool", Work("sums-tool", "calculator.toml")),
        Arm("sums, without the tool", Work("sums-alone", "calculator.toml", _WITHOUT_TOOL)),
        Arm("guessing game", Work("guessing", "guessing.toml")),
    ),
    columns=(
        Column("pass@1 before, %", lambda run: percent(run.first_pass_rate()), "{:.1f}"),
        PASS_AT_END,
        Column("turns, first step", lambda run: run.mean("environment/turns", slice(1))),
        Column("turns, last 5 steps", lambda run: run.mean("environment/turns", LAST_FIVE)),
        KL_AT_END,
        Column("seconds", lambda run: run.summary["seconds"], "{:.0f}"),
    ),
)

# The entropy bonus

ENTROPY = Experiment(
    about=f"The question task (`deploy/configs/{QUESTION}`) with and without an entropy bonus.",
    minutes=6,
    arms=tuple(
        _question(f"entropy-{coef}", f"`ppo.entropy_coef = {coef}`", f"ppo.entropy_coef={coef}")
        for coef in ("0", "0.01")
    ),
    columns=(
        PASS_AT_END,
        _ENTROPY_AT_END,
        DISTINCT,
        KL_AT_END,
    ),
)
