"""The experiment of docs/results.md on the question task as shipped: what training changed, and what was forgotten."""

from __future__ import annotations

from tests.results.finished import Finished
from tests.results.shipped import KL_AT_END, PASS_AT_END, QUESTION
from tests.results.works import Arm, Column, Experiment, Work, percent

SAMPLES = 128  # answers of each policy to each prompt
PROMPTS = 64
POLICIES = ("base", "trained")

_run = Work("question-curve", QUESTION, ("evaluation.every=1",))
_compared = Work(
    "question-evaluated",
    QUESTION,
    (f"evaluation.prompts={PROMPTS}",),
    command="evaluate",
    options=("--policy", "trained={question-curve}/policy", "--samples", str(SAMPLES)),
    needs=(_run,),
)


def _pass_rate(policy: str, k: int) -> Column:
    def of(run: Finished) -> float | None:
        return percent(run.compared(policy)["pass_at_k"][k - 1]["value"])

    return Column(f"{policy}, pass@{k}, %", of, "{:.1f}")


def _figure(policy: str, title: str, key: str, form: str) -> Column:
    return Column(f"{policy}, {title}", lambda run: run.compared(policy)[key]["value"], form)


def _crossover(run: Finished) -> float | None:
    return run.compared("trained")["crossover"]["value"]


LEARNED = Experiment(
    about=(
        f"The question task as shipped (`deploy/configs/{QUESTION}`), evaluated on 256 held-out prompts after every "
        "step."
    ),
    minutes=5,
    arms=(Arm("question task", _run),),
    columns=(
        Column("pass@1 before, %", lambda run: percent(run.evaluations[0]["pass_at_1"]), "{:.1f}"),
        PASS_AT_END,
        Column("responses to 90 %", lambda run: run.responses_to(0.9), "{:.0f}", "never"),
        KL_AT_END,
    ),
)


def _perplexity_ratio(run: Finished) -> float:
    return run.compared("trained")["perplexity_ratio"]["shipped"]["value"]


TRAINED = Experiment(
    about=(
        f"The policies of the runs above, in `ratchet evaluate`: {SAMPLES} answers of the base and of the trained "
        f"policy to each of {PROMPTS} held-out prompts of the question task. The crossover is the smallest k from "
        "which on the base, asked k times, has a right answer more often than the trained policy asked once. The text "
        "is the one that is shipped with `ratchet evaluate`."
    ),
    minutes=6,
    arms=(Arm("question task", _compared),),
    columns=(
        *(_pass_rate(policy, k) for k in (1, 2, 8, 32, SAMPLES) for policy in POLICIES),
        Column("crossover", _crossover, "{:.1f}", f"none up to {SAMPLES}"),
        _figure("trained", "KL from the base, nats per response", "kl_per_response", "{:.2f}"),
        Column("perplexity of the text, trained / base", _perplexity_ratio),
        *(_figure(policy, "different answers among a prompt's", "different_answers", "{:.2f}") for policy in POLICIES),
    ),
)
