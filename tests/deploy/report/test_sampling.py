"""Which rollouts a page keeps when it has no room for all."""

import numpy as np
import pytest

from deploy.report import sampling
from deploy.report.sampling import Facts, details_kept, extremes, rows_kept


def made_facts(steps=200, rollouts=10, *, size=100.0, prompt_size=0, clipped=0.0, void=0.0, seed=0):
    rng, n = np.random.default_rng(seed), steps * rollouts
    prompts = n // 4  # each is asked four times
    return Facts(
        step=np.repeat(np.arange(steps), rollouts),
        ids=[f"{i // prompts}/{i % prompts}/0" for i in range(n)],
        score=rng.normal(size=n),
        tokens=rng.integers(1, 50, n),
        kl=rng.normal(size=n),
        clipped=np.where(rng.random(n) < clipped, rng.random(n), 0.0),
        void=rng.random(n) < void,
        size=np.full(n, size),
        shared=[str(i % prompts) for i in range(n)],
        prompt_size=dict.fromkeys(map(str, range(prompts)), prompt_size),
    )


def test_everything_is_kept_if_there_is_room():
    facts = made_facts()
    assert rows_kept(facts) == details_kept(facts, range(len(facts)), 200_000) == list(range(2000))


def test_the_extremes_of_each_window_are_found():
    facts = made_facts(void=0.2)
    found = set(extremes(facts))
    for first in range(0, 200, 2):  # 200 steps in 100 windows
        window = [i for i in range(len(facts)) if first <= facts.step[i] < first + 2 and not facts.void[i]]
        assert max(window, key=lambda i: facts.score[i]) in found
        assert min(window, key=lambda i: facts.score[i]) in found
        assert max(window, key=lambda i: facts.kl[i]) in found
        assert max(window, key=lambda i: facts.tokens[i]) in found
    assert len(found) <= 5 * 100
    assert not any(facts.void[i] for i in found)


def test_a_number_that_no_rollout_has_makes_no_extreme():
    facts = made_facts(steps=2)
    facts.kl[:], facts.clipped[:] = np.nan, np.nan
    assert 1 <= len(extremes(facts)) <= 2 * 3


@pytest.mark.parametrize("budget", [500, 20_000, 90_000])
def test_details_stay_within_their_budget(budget):
    facts = made_facts(clipped=0.3, void=0.05)
    kept = details_kept(facts, range(len(facts)), budget)
    assert len(kept) * 100 <= budget
    assert len(kept) * 100 > 0.9 * budget


@pytest.mark.parametrize("budget", [4000, 200_000, 699_000])
def test_a_shared_prompt_counts_once(budget):
    facts = made_facts(prompt_size=1000)

    def spent(kept):
        return 100 * len(kept) + 1000 * len({facts.shared[i] for i in kept})

    kept = details_kept(facts, range(len(facts)), budget)
    assert 0.5 * budget < spent(kept) <= budget
    assert len(details_kept(facts, range(len(facts)), 700_000)) == 2000 > len(kept)  # 2,000 rollouts, 500 prompts


def test_void_extreme_and_clipped_rollouts_are_kept_first():
    facts = made_facts(clipped=0.02, void=0.01)
    kept = set(details_kept(facts, range(len(facts)), 130_000))
    first = {*np.flatnonzero(facts.void).tolist(), *extremes(facts), *np.flatnonzero(facts.clipped > 0).tolist()}
    assert len(first) > 400
    assert first <= kept


def test_many_clipped_rollouts_leave_room_for_others():
    facts = made_facts(clipped=1.0)
    kept = details_kept(facts, range(len(facts)), 100_000)
    shares = facts.clipped[kept]
    assert len([s for s in shares if s < np.median(facts.clipped)]) > 100


def test_prompts_are_kept_early_and_late():
    facts = made_facts()
    chosen = [facts.ids[i] for i in details_kept(facts, range(len(facts)), 120_000)]
    asked = {}
    for name in chosen:
        epoch, prompt, _ = name.split("/")
        asked.setdefault(prompt, set()).add(int(epoch))
    both = [prompt for prompt, epochs in asked.items() if {0, 3} <= epochs]
    assert len(both) > 50


def test_a_huge_run_keeps_the_rows_that_stand_out():
    facts = made_facts(clipped=0.02, void=0.01)
    rows = rows_kept(facts, 1000)
    assert len(rows) == len(set(rows)) == 1000
    assert {*np.flatnonzero(facts.void).tolist(), *extremes(facts)} <= set(rows)
    assert rows == sorted(rows)
    assert set(details_kept(facts, rows, 50_000)) <= set(rows)


def test_the_same_run_keeps_the_same_rollouts():
    assert details_kept(made_facts(), range(2000), 70_000) == details_kept(made_facts(), range(2000), 70_000)


def test_a_run_without_rollouts_keeps_none():
    facts = made_facts(steps=0)
    assert extremes(facts) == rows_kept(facts) == details_kept(facts, [], 1000) == []


def test_the_shares_of_the_budget_rise():
    assert 0 < sampling.ALWAYS < sampling.PAIRS < sampling.ALL == 1
