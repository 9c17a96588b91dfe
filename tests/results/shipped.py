"""What several experiments share: the shipped configs that they change, the reward model, and columns."""

from __future__ import annotations

from tests.results.finished import Finished
from tests.results.works import Column, Work, percent

QUESTION = "larger.toml"  # which of two numbers is larger; scores 0, 0.5 and 1
FEEDBACK = "positive.toml"  # the human-feedback demo
REVIEWS = "reviews.toml"  # the demo of a critic that was trained before the run
JUDGE = "gold"  # the labeller of FEEDBACK

_pairs = Work("feedback-pairs", "positive-pairs.toml", command="sample-pairs", seeded=False)
REWARD_MODEL = Work(
    "feedback-reward",
    "positive-reward.toml",
    ("data.train={feedback-pairs}/pairs.jsonl",),
    "train-reward",
    needs=(_pairs,),
    seeded=False,
)
WITH_REWARD_MODEL = "reward.sources.0.model={feedback-reward}/model"  # a setting of FEEDBACK, which needs REWARD_MODEL

EXPLAINED = "value/explained_variance/realised"
SEPARATE = ('learner.critic="separate"', "optimizer.critic_learning_rate=1.5e-4")
LAST_FIVE = slice(-5, None)

PASS_AT_END = Column("pass@1 at the end, %", lambda run: percent(run.last_pass_rate()), "{:.1f}")
LOST_PASS = Column("lost pass@1, points", lambda run: percent(run.lost_pass_rate()), "{:.1f}")
KL_AT_END = Column("KL at the end, nats per response", Finished.last_kl, "{:.2f}")
GOLD_AT_END = Column("gold at the end", lambda run: run.last_judged(JUDGE), "{:.3f}")
EXPLAINED_AT_END = Column("explained variance, last 5 steps", lambda run: run.mean(EXPLAINED, LAST_FIVE))
