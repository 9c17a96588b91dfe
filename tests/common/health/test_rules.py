"""Each health rule has a made series in which it holds, and one that looks alike and in which no rule holds."""

from __future__ import annotations

import math

import pytest

from common.health.health import RULES, Health
from tests.common.health.series import ROLLOUTS, config, series, steady

REALISED = "value__explained_variance__realised"
WEIGHT_0 = {
    "sources": [
        {"name": name, "function": "tests.tasks:a_words", "weight": w} for name, w in (("exact", 1), ("judge", 0))
    ]
}

GAME = {
    "environment": {"function": "tests.environments:Counting", "max_turns": 4, "concurrent": 24},
    "generators": {"kv_cache_mib": 256, "min": 1},
}
LOST = {"environment__recomputed": 205.0, "environment__context_tokens": 400.0}


def flat(value):
    """A mean that only chance moves."""
    return lambda step: value + 0.01 * (-1) ** step


# Rule: (config, the series in which it holds at the end), (config, the series that looks alike).
CASES = {
    # -3 nats, and rounding explains 0.002 * 40 | -1.4 with noisy engines: 0.02 nats on each of 40 tokens explain 0.8
    "kl_negative": (
        ({}, series(8, kl__per_response=-3.0)),
        ({}, series(8, kl__per_response=-1.4, mismatch__kl=0.02)),
    ),
    # 1.5 * 1.15**n: 4.2, 3 steps 12 later: 20 nats, and the score stays | the same KL, but each nat pays 0.3
    "kl_exploding": (
        ({}, series(20, kl__per_response=lambda s: 1.5 * 1.15**s, rollout__score__mean=flat(0.3))),
        ({}, series(20, kl__per_response=lambda s: 1.5 * 1.15**s, rollout__score__mean=lambda s: 0.3 * 1.15**s)),
    ),
    # 40 steps without a move | without a move, as long as only the critic is trained
    "kl_pinned": (
        ({}, series(40, kl__per_response=lambda s: 0.001 * (-1) ** s, rollout__score__mean=flat(0.3))),
        (
            {"learner": {"critic_warmup_steps": 30}},
            series(40, kl__per_response=lambda s: 0.001 * (-1) ** s, rollout__score__mean=flat(0.3)),
        ),
    ),
    # 0.8**20 = 1 % of the entropy is left, and the score is what it was | the score went from 0.2 to 0.95 meanwhile
    "entropy_collapsing": (
        ({}, series(20, ppo__entropy=lambda s: 1.5 * 0.8**s, rollout__score__mean=flat(0.3))),
        (
            {},
            series(
                30,
                ppo__entropy=lambda s: 1.5 * 0.8**s,
                rollout__score__mean=lambda s: min(0.95, 0.2 + 0.05 * s),
                rollout__score__std=lambda s: math.sqrt(max(0.05, 0.8 - 0.05 * s) * min(0.95, 0.2 + 0.05 * s)),
            ),
        ),
    ),
    # in every step | in one of three
    "clip_frac_high": (
        ({}, series(6, ppo__clip_frac=0.6)),
        ({}, series(6, ppo__clip_frac=lambda s: 0.6 if s % 3 == 0 else 0.2)),
    ),
    # twice the usual bound | the same, below 1.5 times a target that the user set
    "approx_kl_high": (
        ({}, series(6, ppo__approx_kl=0.4)),
        ({"ppo": {"target_kl": 0.3}}, series(6, ppo__approx_kl=0.4)),
    ),
    # worse than a constant | the same once all but a tenth of the variance is gone
    "critic_useless": (
        ({}, series(25, **{REALISED: -0.2})),
        ({}, series(25, **{REALISED: -0.2}, value__returns_var__realised=lambda s: 0.2 if s < 10 else 0.02)),
    ),
    # worse than a constant at the first tokens alone | a constant there, but for chance: prompts say nothing
    "critic_late": (
        ({}, series(25, value__explained_variance__first=-0.2)),
        ({}, series(25, value__explained_variance__first=lambda s: -0.05 + 0.1 * (-1) ** s)),
    ),
    # sqrt(2 / pi * 10 / 64) = 0.315, and half a deviation, of sqrt(0.2) = 0.447: 0.365 | what chance explains, twice
    "critic_miscalibrated": (
        ({}, series(25, value__calibration_error=0.4)),
        ({}, series(25, value__calibration_error=0.28)),
    ),
    # three equal batches in a row | two of three, as chance makes them near the top
    "scores_constant": (
        ({}, series(6, rollout__score__mean=0.0, rollout__score__std=0.0, rollout__score__zero_std=1.0)),
        ({}, series(8, rollout__score__zero_std=lambda s: float(s % 3 > 0))),
    ),
    # 99.9 % right: sqrt(0.001) = 0.03 | 97 % right: sqrt(0.03 * 0.97) = 0.17
    "scores_saturated": (
        ({}, series(12, rollout__score__std=lambda s: 0.45 if s < 5 else 0.03)),
        ({}, series(12, rollout__score__std=lambda s: 0.45 if s < 5 else 0.17)),
    ),
    # tokens as they are, next to 0 and 1 | a penalty of 0.5 that one rollout of 64 gets in every fourth step
    "score_dominated": (
        ({}, series(15, reward__long__score=lambda s: 40 + 3 * (-1) ** s)),
        (
            {},
            series(
                15,
                reward__exact__score=lambda s: 0.5 + 0.05 * (-1) ** s,
                reward__long__score=lambda s: (s % 4 == 0) / ROLLOUTS,
            ),
        ),
    ),
    # the score rises by 0.2 while the judge loses 0.1 | while the judge stays within chance
    "judge_falls": (
        ({"reward": WEIGHT_0}, series(40, reward__judge__score=lambda s: 0.5 - 0.003 * s + 0.01 * (-1) ** s)),
        ({"reward": WEIGHT_0}, series(40, reward__judge__score=lambda s: 0.5 + 0.02 * math.sin(s * s))),
    ),
    # 40 to 90 tokens of 100, half of them cut off | as long and as often cut off from the start
    "length_at_limit": (
        (
            {},
            series(
                20,
                rollout__response_tokens__mean=lambda s: min(90.0, 40.0 + 3 * s),
                rollout__finished=lambda s: 1 - min(0.5, 0.03 * s),
            ),
        ),
        ({}, series(20, rollout__response_tokens__mean=95.0, rollout__finished=0.1)),
    ),
    # 0.08, where a stale step explains 0.01 + 6 * 0.008 = 0.058 | 0.05
    "engine_mismatch": (({}, series(6, mismatch__kl=0.08)), ({}, series(6, mismatch__kl=0.05))),
    # in every step | in two of five
    "importance_capped": (
        ({}, series(8, mismatch__capped=0.1)),
        ({}, series(10, mismatch__capped=lambda s: 0.1 if s % 5 > 2 else 0.0)),
    ),
    # 20 s of 25.6 s | the same where the roles take turns
    "learner_starving": (
        ({}, series(6, wait__learner_s=20.0)),
        ({"max_staleness": 0}, series(6, wait__learner_s=20.0, staleness__max=0)),
    ),
    # 6 s of 7.6 s | three quarters of a step that takes half a second
    "generators_starving": (
        ({}, series(6, wait__generators_s=6.0)),
        (
            {},
            series(
                6, wait__generators_s=0.4, time__learn_s=0.4, wait__learner_s=0.05, time__journal_s=0, time__publish_s=0
            ),
        ),
    ),
    # 16 s of 25.6 s, in which the learner waits | the same while the learner works
    "environments_slow": (
        ({}, series(6, wait__learner_s=20.0, wait__environments_s=16.0)),
        ({}, series(6, wait__learner_s=2.0, wait__environments_s=6.0)),
    ),
    # 5 * 41 = 205 tokens, 5 for each sampled one; the learner waits 4 of 9.6 s | the same while the learner works
    "prefixes_lost": (
        (GAME, series(6, **LOST, wait__learner_s=4.0)),
        (GAME, series(6, **LOST, wait__learner_s=1.0)),
    ),
    # 8 of 72 in every step | 64 at once, when a node died
    "voids_rising": (
        ({}, series(12, rollout__voids=lambda s: 8 if s > 6 else 0)),
        ({}, series(12, rollout__voids=lambda s: 64 if s == 8 else 0)),
    ),
}


def held(cfg_and_series) -> list[set[str]]:
    """The rules that hold after each record."""
    overrides, records = cfg_and_series
    health = Health(config(**overrides))
    return [{event.rule for event in health.step(record)} for record in records]


def test_every_rule_has_its_two_series():
    assert list(CASES) == list(RULES)


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_holds_where_its_fault_is(rule):
    assert held(CASES[rule][0])[-1] == {rule}


@pytest.mark.parametrize("rule", CASES)
def test_no_rule_holds_where_something_looks_alike(rule):
    assert set().union(*held(CASES[rule][1])) == set()


def test_a_steady_run_has_no_events():
    assert set().union(*held(({}, series(200)))) == set()


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_says_its_numbers_and_what_to_try_in_one_line(rule):
    overrides, records = CASES[rule][0]
    [event] = Health(config(**overrides)).follow(records[:-1]).step(records[-1])
    assert str(event) == f"{rule}: {event.message}; {RULES[rule][1]} (docs/health.md#{rule})"
    assert "\n" not in str(event)
    assert any(character.isdigit() for character in event.message)


def test_messages_have_the_numbers_of_their_series():
    def message(rule):
        overrides, records = CASES[rule][0]
        return Health(config(**overrides)).follow(records[:-1]).step(records[-1])[0].message

    # -1 - 0.002 * (41 - 1/3); steps 5 to 7 have 39, 41 and 39 tokens
    assert message("kl_negative").endswith("is -3.00 nats per response; noise explains no less than -1.08")
    # 1.5 * 1.15**8 = 4.59 and 1.5 * 1.15**18 = 18.56; 0.05 * 13.97 = 0.70
    assert "went from 4.6 to 18.6 nats" in message("kl_exploding")
    assert "the penalty rose by 0.7, the score by 0" in message("kl_exploding")
    assert message("voids_rising").startswith("11% of the rollouts of 5 steps are void, 0% were before")  # 8 / 72
    assert "78% of the time" in message("learner_starving")  # 20 / 25.6
    assert "79% of the time" in message("generators_starving")  # 6 / 7.6
    assert message("generators_starving").endswith("(the time of held-out evaluations counts too)")
    assert message("environments_slow").startswith("62% of the time no generator writes")  # 16 / 25.6
    # Steps 1 to 5 have a median of 39 tokens: 205 / 39 = 5.3. Of 2 * 64 episodes at most 24 play at once.
    lost = "205 tokens of each episode again, 5.3 for each token that they sample"
    assert lost in message("prefixes_lost")
    assert "up to 24 episodes of 400 tokens at once, 9600 tokens" in message("prefixes_lost")
    assert "older weights explain 0.058" in message("engine_mismatch")
    assert "explains -20% of" in message("critic_useless")
    assert "explains 30% of" in message("critic_late")
    assert "-20% at the first tokens" in message("critic_late")
    assert "differ by 0.4 on average" in message("critic_miscalibrated")
    assert message("critic_miscalibrated").endswith("deviation is 0.45, and chance explains 0.14")


@pytest.mark.parametrize("rule", ["critic_useless", "critic_late", "critic_miscalibrated"])
def test_no_critic_is_judged_when_the_variance_has_nearly_gone(rule):
    [records] = [records for _, records in CASES[rule][:1]]
    gone = [{**r, "value/returns_var/realised": 0.2 if r["step"] < 5 else 0.09} for r in records]
    assert set().union(*held(({}, gone))) == set()
    back = [{**r, "value/returns_var/realised": 0.11} for r in records[15:]]
    assert held(({}, [*gone[:15], *back]))[-1] == {rule}


@pytest.mark.parametrize("rule", ["critic_useless", "critic_late", "critic_miscalibrated"])
def test_a_void_batch_in_ten_does_not_silence_the_critics_rules(rule):
    _, records = CASES[rule][0]
    voids = [{"step": r["step"]} if r["step"] % 10 == 4 else r for r in records]
    # A verdict needs ten steps with figures, from step 10 on. Step 14 has none, so the tenth is step 20.
    assert next(step for step, rules in enumerate(held(({}, voids))) if rule in rules) == 20


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "a lot", True, [1.0]])
def test_a_value_that_is_no_number_causes_no_event(value):
    for key in steady(0):
        assert set().union(*held(({}, [{**record, key: value} for record in series(45)]))) == set(), key


@pytest.mark.parametrize(
    ("wait_s", "overrides", "expected"),
    [
        (8.5, {"max_staleness": 0}, set()),  # 8.5 of 25.6 s is below a third
        (8.6, {"max_staleness": 0}, {"environments_slow"}),
        (8.6, {}, {"environments_slow"}),  # and not learner_starving
        (8.5, {}, {"learner_starving"}),
    ],
)
def test_environments_may_take_a_third_of_a_step(wait_s, overrides, expected):
    records = series(6, wait__learner_s=20.0, wait__environments_s=wait_s, staleness__max=0)
    assert held((overrides, records))[-1] == expected


def test_waits_of_less_than_a_second_for_environments_are_no_fault():
    short = {"time__learn_s": 0.5, "time__journal_s": 0.1, "time__publish_s": 0.1}
    assert held(({}, series(6, wait__learner_s=1.0, wait__environments_s=0.99, **short)))[-1] == set()
    assert held(({}, series(6, wait__learner_s=1.1, wait__environments_s=1.1, **short)))[-1] == {"environments_slow"}


def test_voids_of_an_environment_that_fails_from_the_start_are_named():
    """They count as any void: the first five steps are enough."""
    found = held(({}, series(12, rollout__voids=16)))
    assert found[4] == {"voids_rising"}
    assert found[3] == set()


def test_records_without_figures_of_the_learner_are_skipped():
    faulty = series(9, ppo__clip_frac=0.6)
    void = {
        key: value for key, value in steady(4).items() if not key.startswith(("ppo/", "kl/", "value/", "mismatch/"))
    }
    assert held(({}, [*faulty[:2], void, faulty[3]]))[-1] == {"clip_frac_high"}  # the third step that has it


def test_the_first_records_cause_no_event():
    assert held(({}, [{}, {"step": 1}, {"step": 2, "rollout/score/mean": 1.0}])) == [set(), set(), set()]


MASK = {"ppo": {"policy_loss": "mask"}}


def test_under_the_mask_its_own_share_is_watched():
    assert "clip_frac_high" not in held((MASK, series(6, ppo__clip_frac=0.6)))[-1]
    assert held((MASK, series(6, ppo__masked=0.6)))[-1] == {"clip_frac_high"}
    assert held(({}, series(6, ppo__masked=0.6)))[-1] == set()


def test_under_the_mask_the_distance_from_the_sampler_is_no_move_of_the_step():
    """ppo/approx_kl begins at mismatch/kl there."""
    far = series(6, ppo__approx_kl=0.4, mismatch__kl=0.3, staleness__max=8)
    assert held((MASK, far))[-1] == set()  # 0.1 in the step; and 0.01 + 6 * 0.1 * 64 explain the mismatch
    assert held(({}, far))[-1] == {"approx_kl_high"}
    still = series(6, ppo__approx_kl=0.3, mismatch__kl=0.3, staleness__max=8)
    assert held((MASK, still))[-1] == {"engine_mismatch"}  # a policy that does not move grows no older


@pytest.mark.parametrize(("staleness", "expected"), [(0, {"engine_mismatch"}), (8, set())])
def test_a_single_pass_does_not_tell_what_older_weights_explain(staleness, expected):
    records = series(6, ppo__approx_kl=0.0, mismatch__kl=0.3, staleness__max=staleness)
    assert held(({"ppo": {"ppo_epochs": 1, "minibatches": 1}}, records))[-1] == expected


def test_under_the_mask_no_mismatch_explains_a_negative_kl():
    records = series(8, kl__per_response=-1.4, mismatch__kl=0.02)
    assert held((MASK, records))[-1] - {"engine_mismatch"} == {"kl_negative"}


def lost(overrides=GAME, **changed):
    """The rules that hold after the last of six steps."""
    return held((overrides, series(6, **{**LOST, "wait__learner_s": 4.0, **changed})))[-1]


@pytest.mark.parametrize(("tokens", "expected"), [(77.9, set()), (78.1, {"prefixes_lost"})])
def test_lost_prefixes_count_from_twice_the_sampled_tokens(tokens, expected):
    assert lost(environment__recomputed=tokens) == expected  # the median of the last five steps is 39


@pytest.mark.parametrize(("wait_s", "expected"), [(1.39, set()), (1.41, {"prefixes_lost"})])
def test_lost_prefixes_cost_nothing_while_the_learner_works(wait_s, expected):
    assert lost(wait__learner_s=wait_s) == expected  # 1.4 of 7 s are a fifth


def test_lost_prefixes_of_single_steps_are_no_fault():
    assert lost(environment__recomputed=lambda step: 205.0 if step % 3 == 0 else 0.0) == set()
    found = held((GAME, series(6, **LOST, wait__learner_s=4.0)))
    assert found[3:5] == [set(), {"prefixes_lost"}]  # five steps are needed


def test_lost_prefixes_are_never_seen_in_runs_of_one_turn():
    assert lost({}) == set()  # no environment
    records = series(6, wait__learner_s=4.0)  # with one, but without a second turn there are no figures
    assert held((GAME, records))[-1] == set()
    assert lost(environment__recomputed=0.0, rollout__response_tokens__mean=0.0) == set()


def test_slow_environments_hide_lost_prefixes():
    assert lost(wait__learner_s=20.0, wait__environments_s=16.0) == {"environments_slow"}


@pytest.mark.parametrize(
    ("sections", "setting", "room"),
    [
        ({"generators": {"kv_cache_mib": 256, "min": 3}}, "kv_cache_mib (256)", "8 episodes of 400 tokens"),
        ({"environment": {**GAME["environment"], "max": 3}}, "kv_cache_mib (256)", "72 episodes"),
        ({"environment": {**GAME["environment"], "concurrent": 900}}, "kv_cache_mib (256)", "128 episodes"),
        ({"generators": {"kv_cache_mib": 256, "gpus": 1}}, "kv_cache_mib (256)", "24 episodes"),
        ({"generators": {"gpus": 0.4, "kv_cache_mib": None}}, "generators.gpus (0.4)", "24 episodes"),
        # More GPUs alone would be refused.
        (
            {"generators": {"gpus": 1, "kv_cache_mib": None, "min": 2}},
            "generators.min (2) and generators.tensor_parallel (1)",
            "12 episodes",
        ),
        (
            {"generators": {"gpus": 2, "kv_cache_mib": None, "tensor_parallel": 2}},
            "generators.min (1) and generators.tensor_parallel (2)",
            "24 episodes",
        ),
    ],
)
def test_lost_prefixes_name_a_setting_that_can_be_raised_and_the_room(sections, setting, room):
    records = series(6, **LOST, wait__learner_s=4.0)
    [event] = Health(config(**{**GAME, **sections})).follow(records[:-1]).step(records[-1])
    assert event.message.endswith(setting)
    assert f"up to {room}" in event.message
    assert "lose episodes before their next turn, or turns move to other generators" in event.message


def test_voids_from_the_first_step_on_are_compared_with_no_earlier_steps():
    records = series(5, rollout__voids=8)
    [event] = Health(config()).follow(records[:-1]).step(records[-1])
    assert event.message == "11% of the rollouts of the first 5 steps are void"  # 8 of 72


def test_the_length_of_an_episode_includes_the_environments_tokens():
    """The policy writes 20 to 26 tokens of 200, and the environment says the rest."""
    grow = {"rollout__response_tokens__mean": lambda s: 20.0 + 0.3 * s, "environment__tokens": lambda s: 30.0 + 6 * s}
    cut = {"rollout__finished": lambda s: 1 - min(0.5, 0.03 * s)}
    game = {"environment": {**GAME["environment"], "max_tokens": 200}}
    records = series(20, **grow, **cut)
    [event] = Health(config(**game)).follow(records[:-1]).step(records[-1])
    assert event.rule == "length_at_limit"
    # steps 0 to 2 have 50.0, 56.3 and 62.6 tokens; steps 17 to 19 have 157.1, 163.4 and 169.7
    said = "episodes grew from 56 to 163 tokens with those of the environment, and 50% are cut off at"
    assert event.message.startswith(f"{said} environment.max_tokens (200)")
    assert held((game, series(20, **grow)))[-1] == set()  # none is cut off
