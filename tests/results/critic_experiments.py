"""The experiments of docs/results.md on critics alone: why those of the demos explain little, and what makes one learn.

Minutes as in tests/results/experiments.py.
"""

from __future__ import annotations

from tests.results.finished import Finished
from tests.results.shipped import EXPLAINED, EXPLAINED_AT_END, PASS_AT_END, QUESTION, REVIEWS, SEPARATE
from tests.results.works import Arm, Column, Experiment, Work

# The critic of the question task


def _run(name: str, title: str, *settings: str, needs: tuple[Work, ...] = ()) -> Arm:
    return Arm(title, Work(f"causes-{name}", QUESTION, ("evaluation.prompts=128", *settings), needs=needs))


CAUSES = Experiment(
    about=(
        f"The question task as shipped (`deploy/configs/{QUESTION}`), and with one setting changed. With one seed the "
        "rows ask the same prompts in the same order. Explained variance is that against realised returns, before a "
        "step has learned from them. In steps 1 to 4 the scores still differ. The last column but one takes all steps "
        "together: the variance that the critic explains, as a share of the variance of the returns."
    ),
    minutes=26,
    arms=(
        _run("shipped", "as shipped: a head on the policy's trunk, learning rate of the head 1e-3"),
        _run("head-rate", "... of 1e-2", "optimizer.value_head_learning_rate=1e-2"),
        _run("value-epochs", "four more passes of the head over each batch", "ppo.value_epochs=4"),
        _run("value-coef", "weight of the value loss 5 instead of 0.5", "ppo.value_coef=5"),
        _run("value-lam", "lambda of the value targets 1 instead of 0.95", "ppo.value_lam=1"),
        _run("normalised", "normalised scores", 'reward.normalise="mean_std"'),
        _run("warm-up", "four first steps for the critic alone", "learner.critic_warmup_steps=4"),
        _run("separate", "a network of its own, learning rate 1.5e-4", *SEPARATE),
        _run("separate-passes", "... and two more passes over each batch", *SEPARATE, "ppo.value_epochs=2"),
    ),
    columns=(
        Column("explained variance, steps 1 to 4", lambda run: run.mean(EXPLAINED, slice(1, 5))),
        EXPLAINED_AT_END,
        Column("variance of the returns, last 5 steps / first 5", lambda run: _left_of_returns(run)),
        Column("explained in all steps together", lambda run: _explained_share(run)),
        PASS_AT_END,
    ),
)


def _left_of_returns(run: Finished) -> float | None:
    start, end = run.summary.get("returns_var_start"), run.summary.get("returns_var_end")
    return end / start if start else None


def _explained_share(run: Finished) -> float | None:
    left = run.share_left()
    return None if left is None else 1 - left


# Critics that learn from a journal: the policy does not move

BATCH = "rollouts_per_step=16"  # responses of one update
PASSES = "critic_training.passes=2"
RATES = ("optimizer.critic_learning_rate=1.5e-4", "optimizer.value_head_learning_rate=1e-3")
_journal = Work(
    "critic-reviews", REVIEWS, (BATCH, PASSES, *RATES), command="train-critic", options=("--sample", "1408")
)


def _from_journal(name: str, title: str, *settings: str, options: tuple[str, ...] = ()) -> Arm:
    """Another training on the responses of the first one."""
    options = ("--from", "{critic-reviews}", *options)
    settings = (BATCH, PASSES, *RATES, *settings)
    return Arm(title, Work(f"critic-{name}", REVIEWS, settings, "train-critic", options, needs=(_journal,)))


def _sampled(name: str, title: str, config: str, *settings: str) -> Arm:
    settings = (BATCH, PASSES, *settings, *RATES)
    return Arm(title, Work(f"critic-{name}", config, settings, "train-critic", ("--sample", "1408")))


def _at(position: str) -> Column:
    key = f"value/explained_variance/{position}"
    return Column(position.replace("_", " "), lambda run: run.summary.get(key))


LEARNING = Experiment(
    about=(
        "Critics that `ratchet train-critic` trains on 1,408 responses of the starting policy: at most two passes, a "
        "tenth of the prompts held out. The policy does not move, so only the critic learns. The "
        f"responses of the first rows are those to the prompts of `deploy/configs/{REVIEWS}`. The table shows the best "
        "pass on the held-out prompts. R2 is 1 - mean squared error / variance of the returns."
    ),
    minutes=38,
    arms=(
        Arm("separate network, learning rate 1.5e-4, 16 responses to an update", _journal),
        _from_journal("rate-low", "learning rate 1.5e-5", "optimizer.critic_learning_rate=1.5e-5"),
        _from_journal("rate-middle", "learning rate 5e-5", "optimizer.critic_learning_rate=5e-5"),
        _from_journal("rate-high", "learning rate 5e-4", "optimizer.critic_learning_rate=5e-4"),
        _from_journal("batch-64", "64 responses to an update", "rollouts_per_step=64"),
        _from_journal("quarter", "a quarter of the responses", options=("--steps", "0:22")),
        _from_journal("normalised", "normalised scores", 'reward.normalise="mean_std"'),
        _from_journal("head", "the head alone, on a shared trunk", 'learner.critic="shared"'),
        _sampled("question", f"separate network, question task (`{QUESTION}`)", QUESTION, 'learner.critic="separate"'),
    ),
    columns=(
        Column("R2", lambda run: run.summary.get("r2")),
        Column("explained variance, all tokens", lambda run: run.summary.get("explained_variance")),
        *map(_at, ("first", "quarter_1", "quarter_2", "quarter_3", "quarter_4", "last")),
        Column("after pass 1", lambda run: run.summary["explained_variance_by_pass"].get("1")),
    ),
)
