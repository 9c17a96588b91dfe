"""The trees of settings: refused values and combinations, kinds of reward sources, properties, immutability."""

from datetime import date

import pytest
from pydantic import ValidationError

from common.config.base import Section
from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from common.config.sources import FunctionSourceConfig, HttpSourceConfig, ModelSourceConfig
from tests.common.config.trees import ONE_KIND

JUDGE = {
    "name": "s",
    "judge_urls": ["http://h/v1"],
    "judge_model": "m",
    "template": "{response}",
    "score_range": [0, 1],
}
FUNCTION = {"name": "short", "function": "tasks:short", "weight": -0.5}
MODEL = {"name": "helpful", "model": "runs/reward/model"}
SERVICE = {"name": "correct", "urls": ["http://h:8001/score"]}
GAME = {"function": "games:Guess"}


def ppo(**sections):
    """The smallest tree of PPO, with these sections added or replaced."""
    return {"prompts": {"train": "questions.jsonl"}, "reward": {"sources": [SERVICE, FUNCTION]}, **sections}


def reward_training(**sections):
    return {"data": {"train": "pairs.jsonl"}, **sections}


def pair_sampling(**sections):
    return {"prompts": {"source": "questions.jsonl"}, "labeller": {"sources": [FUNCTION]}, **sections}


def faults(root, tree):
    with pytest.raises(ValidationError) as caught:
        root.model_validate(tree)
    return caught.value.errors()


def broken_rules(root, tree):
    """The messages of the rules across fields, when nothing else is wrong."""
    (fault,) = faults(root, tree)
    assert (fault["type"], fault["loc"]) == ("value_error", ())
    return str(fault["ctx"]["error"]).split("\n  ")


# Rules across fields


def test_labels_that_no_ray_node_can_have_are_refused():
    assert Config.model_validate(ppo(generators={"labels": {"ray.io/market-type": "spot"}}))
    for labels in ({"group": "!spot"}, {"group": ""}, {"-group": "a"}, {"group": "a" * 64}):
        (fault,) = faults(Config, ppo(generators={"labels": labels}))
        [(key, value)] = labels.items()
        assert f"{key} = {value!r} is not a label of a Ray node" in fault["msg"]


def test_an_impossible_batch_split_names_rule_values_and_nearest():
    tree = ppo(rollouts_per_step=100, ppo={"minibatches": 16})
    assert broken_rules(Config, tree) == [
        "rollouts_per_step (100) must be a multiple of ppo.minibatches (16); nearest: 96, 112"  # 6 x, 7 x 16
    ]
    (message,) = broken_rules(Config, ppo(rollouts_per_step=3, ppo={"minibatches": 16}))
    assert message.endswith("nearest: 16")  # no rollouts at all is no batch
    tree = ppo(rollouts_per_step=64, prompts={"train": "t", "rollouts_per_prompt": 3})
    assert broken_rules(Config, tree) == [
        "rollouts_per_step (64) must be a multiple of prompts.rollouts_per_prompt (3); nearest: 63, 66"
    ]


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"sampling": {"min_new_tokens": 300}}, ["min_new_tokens (300)", "max_new_tokens (256)", "lower"]),
        ({"num_steps": 5, "optimizer": {"warmup_steps": 6}}, ["warmup_steps (6)", "num_steps (5)", "lower"]),
        ({"num_steps": 5, "learner": {"critic_warmup_steps": 5}}, ["critic_warmup_steps (5)", "num_steps (5)"]),
        ({"ppo": {"advantages": "group"}}, ["prompts.rollouts_per_prompt (1)", "at least 2", "raise it", '"returns"']),
        (
            {"learner": {"critic_frozen": "attention"}},
            ["learner.critic_frozen (attention) needs a network", '(it is "shared")', "leave it out"],
        ),
        ({"ppo": {"value_epochs": 2, "value_coef": 0}}, ["ppo.value_coef (0)", "ppo.value_epochs (2)", "raise"]),
        (
            {"ppo": {"value_coef": 0}, "learner": {"critic_warmup_steps": 3}},
            ["ppo.value_coef (0)", "learner.critic_warmup_steps (3)", "raise"],
        ),
        (
            {"learner": {"critic_frozen": ["*.mlp.*"], "critic": "separate", "lora": {}}},
            ["learner.critic_frozen (('*.mlp.*',)) must be left out with learner.lora", "learner.lora.targets"],
        ),
        ({"kl": {"controller": "adaptive", "coef": 0}}, ["kl.coef (0)", "above 0", '"fixed"']),
        ({"kl": {"controller": "adaptive", "horizon": 63}}, ["kl.horizon (63)", "rollouts_per_step (64)", "raise"]),
        ({"max_staleness": 2, "ppo": {"importance_cap": 0}}, ["ppo.importance_cap (0)", "max_staleness (2)", "raise"]),
        # 0.05 x 20 = 1
        (
            {"ppo": {"lam": "length"}, "sampling": {"max_new_tokens": 20}},
            [
                "ppo.lam_alpha (0.05) x sampling.max_new_tokens (20) must be above 1",
                'ppo.lam = "length"',
                "(above 0.05)",
            ],
        ),
        (
            {"ppo": {"value_lam": "length", "lam_alpha": 0.01}, "sampling": {"max_new_tokens": 64}},
            ["ppo.lam_alpha (0.01)", "(64)", "every lambda is 0", "(above 0.016)", "set ppo.value_lam to a number"],
        ),
        ({"learner": {"ranks": 2, "gpus": 0.5}}, ["learner.gpus (0.5)", "each of 2 learner.ranks", "0 for the CPU"]),
        ({"learner": {"ranks": 64, "gpus": 2}}, ["learner.gpus (2)", "each of 64 learner.ranks", "cannot share a GPU"]),
        ({"learner": {"ranks": 2, "min_ranks": 3}}, ["learner.min_ranks (3)", "at most learner.ranks (2)", "raise"]),
        ({"rollouts_per_step": 7, "learner": {"ranks": 8}}, ["learner.ranks (8)", "ppo.minibatches (7)", "lower"]),
        ({"ppo": {"minibatches": 8}, "learner": {"ranks": 9}}, ["learner.ranks (9)", "ppo.minibatches (8)"]),  # 64 / 8
        # 400 rollouts of 10,256 tokens, 20 bytes each: 82.0e6 bytes, 78.2 MiB
        (
            {"rollouts_per_step": 400, "prompts": {"train": "t", "max_tokens": 10_000}, "buffer_mib": 78}
            | {"reference": {"max_batch_tokens": 10_256}},
            ["buffer_mib (78)", "the 400 rollouts of a step", "79 MiB", "max_staleness (1)", "raise it"],
        ),
        (
            {"generators": {"sleep": True}},
            ["generators.sleep (true)", "max_staleness = 0 (it is 1)", "(they are 0 and 0)"],
        ),
        (
            {"max_staleness": 0, "generators": {"sleep": True, "gpus": 0.7}, "learner": {"gpus": 0.4}},
            ["generators.gpus and learner.gpus above 0 and together at most 1 (they are 0.7 and 0.4)"],
        ),
        # 512 + 256 tokens
        ({"reference": {"max_batch_tokens": 767}}, ["reference.max_batch_tokens (767)", "= 768", "raise"]),
        # 512 tokens of the prompt, 1,024 of the episode
        (
            {"reference": {"max_batch_tokens": 1535}, "environment": GAME},
            ["(1535)", "prompts.max_tokens + environment.max_tokens = 1536", "raise"],
        ),
        # 0.05 x 20 = 1, and 0.05 x 21 is more
        (
            {
                "ppo": {"lam": "length"},
                "environment": {**GAME, "max_tokens": 20},
                "sampling": {"max_new_tokens": 20},
            },
            ["ppo.lam_alpha (0.05) x environment.max_tokens (20) must be above 1"],
        ),
        (
            {"environment": {**GAME, "max_tokens": 255}},
            ["sampling.max_new_tokens (256)", "environment.max_tokens (255)", "lower the first or raise the second"],
        ),
        (
            {"environment": {"tools": ["m:add"]}},
            ["environment.tools needs", '"chat" (it is "plain")', "use environment.function"],
        ),
        (
            {"environment": {**GAME, "sequence": "turn"}},
            ['environment.sequence = "turn" needs', '"chat" (it is "plain")', "leave environment.sequence out"],
        ),
        (
            {"environment": {"agent": "m:play"}},
            ["environment.agent needs", '"chat" (it is "plain")', "use environment.function"],
        ),
        (
            {
                "environment": {"verifiers": "gsm8k"},
                "prompts": {"train": "verifiers:gsm8k", "heldout": "h.jsonl", "format": "chat"},
            },
            ['prompts.heldout (h.jsonl) must be "verifiers:gsm8k" with environment.verifiers = "gsm8k"'],
        ),
        (
            {"reward": {"sources": [FUNCTION, {"name": "game", "environment": True}]}},
            ["reward source game: environment (true) needs an environment", "add [environment] with function"],
        ),
        (
            {"evaluation": {"judges": [{"name": "game", "environment": True}]}},
            ["reward source game: environment (true) needs an environment", "use another kind of source"],
        ),
        ({"reward": {"sources": []}}, ["reward.sources is empty", "[[reward.sources]]"]),
        ({"evaluation": {"pass_source": "brief"}}, ["evaluation.pass_source (brief)", "['correct', 'short']"]),
        ({"evaluation": {"pass_score": 0.8}}, ["evaluation.pass_score (0.8) needs evaluation.pass_source", "short"]),
    ],
)
def test_each_broken_rule_of_ppo_is_refused_with_its_values(sections, parts):
    (message,) = broken_rules(Config, ppo(**sections))
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("engine", "learner", "staleness", "lent"),
    [
        ({"gpus": 0.6}, {"gpus": 0.4}, 0, 0.6),
        ({"gpus": 0.6, "sleep": True}, {"gpus": 0.3}, 0, 0.6),
        ({"gpus": 0.6, "sleep": False}, {"gpus": 0.4}, 0, 0),
        ({"gpus": 0.6}, {"gpus": 0.4}, 1, 0),  # the engine writes the next batch during the update
        ({"gpus": 0.6}, {"gpus": 0.5}, 0, 0),  # they cannot share a GPU
        ({"gpus": 1}, {"gpus": 1, "ranks": 2}, 0, 0),
        ({"gpus": 0}, {"gpus": 0.4}, 0, 0),
    ],
)
def test_an_engine_lends_its_share_where_it_has_a_gpu_with_the_learner(engine, learner, staleness, lent):
    cfg = Config.model_validate(ppo(generators=engine, learner=learner, max_staleness=staleness))
    assert cfg.lent_share == lent


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        (
            {"data": {"train": "t", "heldout": "h", "heldout_pairs": 1}},
            ["data.heldout", "data.heldout_pairs", "give one of the two"],
        ),
        ({"learner": {"ranks": 2, "gpus": 0.5}}, ["learner.gpus (0.5)", "each of 2 learner.ranks", "0 for the CPU"]),
        ({"pairs_per_step": 3, "learner": {"ranks": 4}}, ["learner.ranks (4)", "at most pairs_per_step (3)", "lower"]),
    ],
)
def test_each_broken_rule_of_reward_training_is_refused_with_its_values(sections, parts):
    (message,) = broken_rules(RewardTrainingConfig, reward_training(**sections))
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"labeller": {"sources": []}}, ["labeller.sources is empty", "[[labeller.sources]]"]),
        (
            {"labeller": {"sources": [MODEL, {**FUNCTION, "name": "helpful"}]}},
            ["labeller.sources", "['helpful', 'helpful']"],
        ),
    ],
)
def test_each_broken_rule_of_pair_sampling_is_refused_with_its_values(sections, parts):
    (message,) = broken_rules(PairSamplingConfig, pair_sampling(**sections))
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("root", "tree"),
    [
        (Config, ppo(reference={"max_batch_tokens": 768})),
        (Config, ppo(sampling={"min_new_tokens": 256})),
        (Config, ppo(rollouts_per_step=4096, buffer_mib=60)),  # 4096 of 768 tokens, 20 bytes each
        (Config, ppo(rollouts_per_step=4096, buffer_mib=1, max_staleness=0)),  # then nothing waits in the buffer
        (Config, ppo(ppo={"minibatches": 8}, learner={"ranks": 8})),
        (RewardTrainingConfig, reward_training(pairs_per_step=3, learner={"ranks": 3})),
        (Config, ppo(num_steps=5, optimizer={"warmup_steps": 5}, learner={"critic_warmup_steps": 4})),
        (Config, ppo(kl={"controller": "adaptive", "horizon": 64})),
        (Config, ppo(max_staleness=0, ppo={"importance_cap": 0})),
        (Config, ppo(max_staleness=1, learner={"lora": {}})),
        (Config, ppo(ppo={"advantages": "group"}, prompts={"train": "t", "rollouts_per_prompt": 2})),
        (Config, ppo(ppo={"advantages": "returns", "value_clip": 1}, learner={"critic": "separate"})),
        (Config, ppo(kl={"controller": "fixed", "horizon": 1})),
        (Config, ppo(ppo={"gamma": 1, "minibatches": 64})),
        (Config, ppo(reward={"sources": [{**MODEL, "max_tokens": 100, "max_batch_tokens": 100}]})),
        (Config, ppo(ppo={"lam": "length"}, sampling={"max_new_tokens": 21})),  # 1.05
        (Config, ppo(ppo={"lam": "length", "advantages": "returns"}, sampling={"max_new_tokens": 20})),  # no critic
        (Config, ppo(ppo={"policy_loss": "mask", "importance_cap": 0}, max_staleness=8)),
        (Config, ppo(learner={"micro_batch_tokens": 1})),  # a longer sequence is a micro-batch of its own
        (Config, ppo(learner={"ranks": 64, "gpus": 0})),
        (Config, ppo(learner={"ranks": 64, "gpus": 1})),
        (Config, ppo(learner={"gpus": 0.5})),
        (RewardTrainingConfig, reward_training(learner={"micro_batch_tokens": 1})),
        (RewardTrainingConfig, reward_training(learner={"ranks": 2, "gpus": 1})),
        (RewardTrainingConfig, reward_training(learner={"ranks": 1, "gpus": 0.5})),
        (RewardTrainingConfig, reward_training(data={"train": "t", "heldout": "h"})),
        (RewardTrainingConfig, reward_training(data={"train": "t", "heldout_pairs": 9})),
    ],
)
def test_settings_that_just_meet_a_rule_are_accepted(root, tree):
    root.model_validate(tree)


def test_several_broken_rules_are_all_reported_at_once():
    tree = ppo(sampling={"min_new_tokens": 300}, num_steps=5, optimizer={"warmup_steps": 6}, reward={"sources": []})
    assert [message.split()[0] for message in broken_rules(Config, tree)] == [
        "sampling.min_new_tokens",
        "optimizer.warmup_steps",
        "reward.sources",
    ]


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        (ppo(optimizer={"learning_rate": float("inf")}), "learning_rate"),
        (ppo(reward={"sources": [{**FUNCTION, "weight": float("nan")}]}), "weight"),
        (ppo(evaluation={"pass_score": float("nan")}), "pass_score"),
        (ppo(ppo={"gamma": 1.01}), "gamma"),
        (ppo(ppo={"lam": 1.01}), "lam"),
        (ppo(ppo={"lam": float("nan")}), "lam"),
        (ppo(ppo={"value_lam": -0.01}), "value_lam"),
        (ppo(ppo={"value_lam": "legnth"}), "value_lam"),
        (ppo(ppo={"lam": True}), "lam"),
        (ppo(ppo={"clip_eps_high": 0}), "clip_eps_high"),
        (ppo(max_staleness=-1), "max_staleness"),
        (ppo(learner={"ranks": 0}), "ranks"),
        (ppo(learner={"micro_batch_tokens": 0}), "micro_batch_tokens"),
        (ppo(learner={"lora": {"rank": 0}}), "rank"),
    ],
)
def test_a_number_past_its_bounds_or_not_finite_is_refused(tree, key):
    (fault,) = faults(Config, tree)
    assert fault["loc"][-1] == key


@pytest.mark.parametrize(("value", "found"), [(0, 0.0), (1, 1.0), (0.5, 0.5), (".5", 0.5), ("length", "length")])
def test_a_lambda_is_a_number_from_zero_to_one_or_the_lengths(value, found):
    cfg = Config.model_validate(ppo(ppo={"lam": value, "value_lam": value}))
    assert [cfg.ppo.lam, cfg.ppo.value_lam] == [found, found]
    (fault,) = faults(Config, ppo(ppo={"lam": [value]}))
    assert 'must be a number from 0 to 1, or "length"; it is [' in fault["msg"]


@pytest.mark.parametrize(("high", "bounds"), [(None, (0.8, 1.2)), (0.28, (0.8, 1.28))])
def test_the_upper_bound_of_the_ratio_is_the_lower_one_unless_given(high, bounds):
    assert Config.model_validate(ppo(ppo={"clip_eps": 0.2, "clip_eps_high": high})).ppo.ratio_bounds == bounds


# Reward sources


def test_the_key_of_a_source_decides_its_kind():
    sources = Config.model_validate(ppo(reward={"sources": [FUNCTION, MODEL, SERVICE]})).reward.sources
    assert sources == (
        FunctionSourceConfig(name="short", weight=-0.5, function="tasks:short"),
        ModelSourceConfig(name="helpful", model="runs/reward/model"),
        HttpSourceConfig(name="correct", urls=("http://h:8001/score",)),
    )
    assert [type(source) for source in sources] == [FunctionSourceConfig, ModelSourceConfig, HttpSourceConfig]


def test_sources_made_in_python_are_accepted():
    made = FunctionSourceConfig.model_validate(FUNCTION), HttpSourceConfig.model_validate(SERVICE)
    assert Config.model_validate(ppo(reward={"sources": made})).reward.sources == made


@pytest.mark.parametrize(
    ("root", "tree", "loc"),
    [
        (Config, lambda source: ppo(reward={"sources": [FUNCTION, source]}), ("reward", "sources", 1)),
        (Config, lambda source: ppo(evaluation={"judges": [source]}), ("evaluation", "judges", 0)),
        (PairSamplingConfig, lambda source: pair_sampling(labeller={"sources": [source]}), ("labeller", "sources", 0)),
    ],
)
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"functoin": "m:f"},
        {"function": "m:f", "model": "m"},
        {"function": "m:f", "urls": ["http://h/"]},
        {"model": "m", "urls": []},
        {"function": "m:f", "model": "m", "urls": ["http://h/"]},
    ],
)
def test_a_source_without_exactly_one_kind_is_one_fault(root, tree, loc, keys):
    (fault,) = faults(root, tree({"name": "s", **keys}))
    assert fault["loc"] == loc
    assert fault["msg"] == ONE_KIND


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ({**FUNCTION, "retries": 1}, "retries"),
        ({**FUNCTION, "dtype": "float32"}, "dtype"),
        ({**MODEL, "request_timeout_s": 3}, "request_timeout_s"),
        ({**SERVICE, "max_tokens": 3}, "max_tokens"),
    ],
)
def test_a_setting_of_another_kind_of_source_is_refused(source, key):
    (fault,) = faults(Config, ppo(reward={"sources": [source]}))
    assert (fault["type"], fault["loc"][-1]) == ("extra_forbidden", key)


@pytest.mark.parametrize("name", ["", "a b", "1st", "a.b", "-"])
@pytest.mark.parametrize("source", [FUNCTION, MODEL, SERVICE], ids=lambda source: source["name"])
def test_a_source_name_that_cannot_be_in_a_metric_key_is_refused(source, name):
    (fault,) = faults(Config, ppo(reward={"sources": [{**source, "name": name}]}))
    assert fault["loc"][-1] == "name"


@pytest.mark.parametrize(
    ("root", "tree"),
    [
        (Config, lambda source: ppo(reward={"sources": [FUNCTION, source]})),
        (Config, lambda source: ppo(evaluation={"judges": [source]})),
        (PairSamplingConfig, lambda source: pair_sampling(labeller={"sources": [source]})),
    ],
)
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"name": "s", "urls": ["https://h/", "h:8001/score"]},
            "reward source s: 'h:8001/score' in urls must begin with http:// or https://",
        ),
        (
            {"name": "s", "model": "m", "max_tokens": 4097},
            "reward source s: max_batch_tokens (4096) must hold the longest sequence, max_tokens (4097); raise the "
            "first or lower the second",
        ),
        (
            {"name": "s", "urls": ["http://me:hunter2@h:8001/score?x=1"]},
            "reward source s: the address http://h:8001/score has a user name or password in it, which the journal "
            'would show; remove it, and set headers = { Authorization = "Bearer env:NAME_OF_A_VARIABLE" }',
        ),
        (
            {"name": "s", "urls": ["http://h/score?api_key=hunter2"]},
            "reward source s: the address http://h/score has api_key in it, which the config would show; remove it, "
            'and set headers = { Authorization = "Bearer env:NAME_OF_A_VARIABLE" }',
        ),
        (
            {"name": "s", "urls": ["http://h"], "headers": {"X-Api-Key": "hunter2"}},
            "reward source s: headers.X-Api-Key must not be written in the config; put its value into an environment "
            'variable, and set headers.X-Api-Key = "env:NAME_OF_THE_VARIABLE"',
        ),
        (
            {"name": "s", "urls": ["http://h"], "headers": {"X-Key": "env:NOT A NAME"}},
            'reward source s: headers.X-Key must be of the form "env:JUDGE_KEY" or "Bearer env:JUDGE_KEY"',
        ),
        (
            {"name": "s", "urls": ["http://h"], "headers": {"X Key": "a"}},
            "reward source s: 'X Key' is not a header name; a header name has only letters, digits and -",
        ),
        (
            {**JUDGE, "judge_urls": ["h:8000/v1"]},
            "reward source s: 'h:8000/v1' in judge_urls must begin with http:// or https://",
        ),
        (
            {**JUDGE, "template": "Grade this: {prompt}"},
            "reward source s: template must have {response} in it, or the judge does not see the response",
        ),
        ({**JUDGE, "score_range": [5, 5]}, "reward source s: score_range must be [lowest, highest], not [5, 5]"),
        (
            {**JUDGE, "score_pattern": "[0-9]+"},
            "reward source s: score_pattern ([0-9]+) must have a group that matches the number; put that part in "
            "parentheses",
        ),
        (
            {**JUDGE, "score_pattern": "(["},
            "reward source s: score_pattern (([) must be a regular expression, but has a fault (unterminated character "
            "set at position 1); correct it",
        ),
        (
            {**JUDGE, "request": {"stream": True}},
            "reward source s: request must not have stream, which Ratchet sets itself; remove it",
        ),
    ],
)
def test_the_rules_of_a_source_hold_in_every_list_of_sources(root, tree, source, message):
    assert broken_rules(root, tree(source)) == [message]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "Solve it."}, "template ('Solve it.') must have {question} in it; add it"),
        ({"parameters": {"seed": 1}}, "parameters must not have seed; the seed of the run decides it: remove it"),
        (
            {"parameters": {"starting": date(2026, 11, 26)}},
            "parameters.starting must be a value of JSON (with finite numbers only), not datetime.date(",
        ),
        ({"parameters": {"bounds": [0, float("inf")]}}, "parameters.bounds must be a value of JSON (with finite"),
        ({"parameters": {"size": 1}}, "parameters must not have size; train_prompts and heldout_prompts decide it: "),
    ],
)
def test_settings_of_reasoning_gym_that_cannot_be_are_refused(settings, message):
    (fault,) = faults(Config, ppo(prompts={"train": "reasoning-gym:gcd", "reasoning_gym": settings}))
    assert message in fault["msg"]


def gym(source, prompts, isolation="thread"):
    """A tree for each place of a source: in reward.sources, in evaluation.judges and in labeller.sources."""
    named = {"train": "reasoning-gym:gcd", "heldout": prompts}
    yield Config, ppo(prompts=named, reward={"sources": [source], "isolation": isolation})
    reward = {"sources": [FUNCTION], "isolation": isolation}
    yield Config, ppo(prompts=named, reward=reward, evaluation={"judges": [source]})
    labeller = {"sources": [source], "isolation": isolation}
    yield PairSamplingConfig, pair_sampling(prompts={"source": prompts}, labeller=labeller)


@pytest.mark.parametrize("prompts", ["p.jsonl", "hf:me/reasoning-gym", "tasks:prompts", "data/reasoning-gym:gcd"])
def test_a_data_set_never_gives_the_entries_that_rules_run(prompts):
    for root, tree in gym({"name": "s", "reasoning_gym": True}, prompts):
        (message,) = broken_rules(root, tree)
        setting = "prompts.heldout" if root is Config else "prompts.source"
        assert message.startswith(f'reward source s: {setting} ({prompts}) must be "reasoning-gym:TASK", because rules')


def test_other_sources_score_records_that_look_like_reasoning_gym():
    for root, tree in gym(FUNCTION | {"name": "s"}, "p.jsonl"):
        root.model_validate(tree)


def test_answers_run_in_worker_processes_only():
    source = {"name": "s", "reasoning_gym": True, "run_answers": True}
    for root, tree in gym(source, "reasoning-gym:n_queens"):
        (message,) = broken_rules(root, tree)
        key = "reward.isolation" if root is Config else "labeller.isolation"
        assert message.startswith(
            f'reward source s: run_answers (true) needs {key} = "process" (it is "thread"), where'
        )
    for root, tree in gym(source, "reasoning-gym:n_queens", "process"):
        root.model_validate(tree)


def test_a_pattern_of_answers_has_a_group():
    for root, tree in gym({"name": "s", "reasoning_gym": True, "answer_pattern": "[0-9]+"}, "reasoning-gym:gcd"):
        (message,) = broken_rules(root, tree)
        rule = "reward source s: answer_pattern ([0-9]+) must have a group that matches the answer"
        assert message == f"{rule}; put that part in parentheses"


def test_a_service_without_an_address_is_refused():
    (fault,) = faults(Config, ppo(reward={"sources": [{"name": "s", "urls": []}]}))
    assert (fault["type"], fault["loc"][-1]) == ("too_short", "urls")


def test_names_of_sources_and_judges_differ():
    tree = ppo(evaluation={"judges": [MODEL, {**SERVICE, "name": "expert"}]})
    assert [judge.name for judge in Config.model_validate(tree).evaluation.judges] == ["helpful", "expert"]
    for sources, judges, names in (
        ([FUNCTION, MODEL], [{**SERVICE, "name": "short"}], "['short', 'helpful', 'short']"),
        ([FUNCTION, {**MODEL, "name": "short"}], [], "['short', 'short']"),
        ([FUNCTION], [MODEL, {**SERVICE, "name": "helpful"}], "['short', 'helpful', 'helpful']"),
    ):
        (message,) = broken_rules(Config, ppo(reward={"sources": sources}, evaluation={"judges": judges}))
        assert f"must have different names, not {names}; rename one" in message


def test_judges_alone_are_no_reward():
    (message,) = broken_rules(Config, ppo(reward={"sources": []}, evaluation={"judges": [MODEL]}))
    assert message.startswith("reward.sources is empty")


def test_a_judge_may_decide_who_passes():
    evaluation = {"judges": [MODEL], "pass_source": "helpful"}
    assert Config.model_validate(ppo(evaluation=evaluation)).evaluation.pass_source == "helpful"
    (message,) = broken_rules(Config, ppo(evaluation={**evaluation, "pass_source": "brief"}))
    assert message == "evaluation.pass_source (brief) must be one of ['correct', 'short', 'helpful']"


# What holds of every section


def every(cls):
    return [cls, *(nested for sub in cls.__subclasses__() for nested in every(sub))]


def test_every_section_and_every_field_has_a_description():
    fields = [
        (cls.__name__, name, field.description)
        for cls in every(Section)
        for name, field in cls.model_fields.items()
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section))
    ]
    assert len(fields) > 100
    assert [(cls, name) for cls, name, description in fields if not description] == []
    assert [cls.__name__ for cls in every(Section)[1:] if not cls.__doc__] == []


@pytest.mark.parametrize(
    ("root", "tree", "section", "in_flight"),
    [
        (Config, ppo, "generators", 128),
        (Config, ppo, "reference", 128),
        (Config, ppo, "reward", 32),
        (PairSamplingConfig, pair_sampling, "generators", 128),
        (PairSamplingConfig, pair_sampling, "labeller", 32),
        (RewardTrainingConfig, reward_training, "generators", 128),
    ],
)
def test_replicated_roles_share_their_settings(root, tree, section, in_flight):
    given = tree().get(section, {})
    role = getattr(root.model_validate(tree()), section)
    assert (role.min, role.max_replicas, role.in_flight, role.timeout_s, role.gpus, role.threads) == (
        1,
        1,
        in_flight,
        300,
        0,
        1,
    )
    for key in (
        "min",
        "max",
        "in_flight",
        "timeout_s",
        "probe_timeout_s",
        "drain_s",
        "max_shortage_s",
        "gpus",
        "threads",
    ):
        value = {"gpus": 1, "in_flight": 300}.get(key, 3)  # an engine over several GPUs wants tensor_parallel too
        changed = root.model_validate(tree(**{section: {**given, key: value}}))
        assert getattr(getattr(changed, section), key) == value
        (fault,) = faults(root, tree(**{section: {**given, key: -1}}))
        assert fault["loc"] == (section, key)


def test_engine_settings_that_are_left_out_depend_on_the_device():
    def filled(**given):
        cfg = Config.model_validate(ppo(generators=given)).generators
        return cfg.max_running, cfg.in_flight, cfg.max_batched_tokens, cfg.kv_cache_mib

    assert filled() == filled(gpus=0) == (64, 128, 256, 256)
    assert filled(gpus=0.3) == filled(gpus=2, tensor_parallel=2) == (256, 512, 8192, None)
    assert filled(max_running=200) == (200, 400, 256, 256)
    assert filled(gpus=1, max_running=8, in_flight=9, max_batched_tokens=10, kv_cache_mib=11) == (8, 9, 10, 11)
    again = Config.model_validate(Config.model_validate(ppo(generators={"gpus": 1})).model_dump(exclude_none=True))
    assert (again.generators.max_running, again.generators.kv_cache_mib) == (256, None)


def test_an_engine_that_is_sent_fewer_requests_than_it_runs_is_refused():
    (fault,) = faults(Config, ppo(generators={"max_running": 64, "in_flight": 63}))
    assert "in_flight (63) must be at least max_running (64), because" in fault["msg"]


def test_max_below_min_is_refused():
    assert Config.model_validate(ppo(generators={"min": 2, "max": 5})).generators.max_replicas == 5
    assert Config.model_validate(ppo(generators={"min": 2})).generators.max_replicas == 2
    (fault,) = faults(Config, ppo(generators={"min": 3, "max": 2}))
    assert "max (2) must be at least min (3)" in fault["msg"]


@pytest.mark.parametrize(("gpus", "parts"), [(0, 1), (0.4, 1), (1, 1), (0, 2), (2, 2), (8, 8)])
def test_an_engine_has_no_gpu_a_share_of_one_or_one_for_each_part(gpus, parts):
    for root, tree in ((Config, ppo), (PairSamplingConfig, pair_sampling), (RewardTrainingConfig, reward_training)):
        generators = root.model_validate(tree(generators={"gpus": gpus, "tensor_parallel": parts})).generators
        assert (generators.gpus, generators.tensor_parallel) == (gpus, parts)


@pytest.mark.parametrize(
    ("gpus", "parts", "allowed"),
    [
        (2, 1, "at most 1"),
        (1.5, 1, "at most 1"),
        (1, 2, "2, or 0 for the CPU,"),
        (0.5, 2, "2, or 0 for the CPU,"),
        (4, 2, "2, or 0 for the CPU,"),
    ],
)
def test_other_numbers_of_gpus_are_refused(gpus, parts, allowed):
    (fault,) = faults(Config, ppo(generators={"gpus": gpus, "tensor_parallel": parts}))
    assert fault["loc"] == ("generators",)
    assert f"gpus ({gpus}) must be {allowed} with tensor_parallel ({parts})" in fault["msg"]
    assert "make both the same, or lower gpus" in fault["msg"]


def test_every_scoring_service_has_a_limit_for_the_share_of_voids():
    for root, tree, section in ((Config, ppo, "reward"), (PairSamplingConfig, pair_sampling, "labeller")):
        given = tree()[section]
        assert getattr(root.model_validate(tree()), section).max_void_share == 0.5
        root.model_validate(tree(**{section: {**given, "max_void_share": 1}}))
        (fault,) = faults(root, tree(**{section: {**given, "max_void_share": 1.01}}))
        assert fault["loc"] == (section, "max_void_share")


@pytest.mark.parametrize(("root", "tree"), [(Config, ppo), (RewardTrainingConfig, reward_training)])
def test_a_learner_is_not_replicated(root, tree):
    (fault,) = faults(root, tree(learner={"max": 2}))
    assert (fault["type"], fault["loc"]) == ("extra_forbidden", ("learner", "max"))


def test_the_longest_sequence_is_prompt_and_response():
    sections = {"sampling": {"max_new_tokens": 70}}
    assert Config.model_validate(ppo(**sections, prompts={"train": "t", "max_tokens": 30})).max_sequence_tokens == 100
    tree = pair_sampling(**sections, prompts={"source": "t", "max_tokens": 30})
    assert PairSamplingConfig.model_validate(tree).max_sequence_tokens == 100


@pytest.mark.parametrize(("root", "tree"), [(Config, ppo), (RewardTrainingConfig, reward_training)])
def test_the_default_micro_batch_depends_on_the_device(root, tree):
    budgets = [
        root.model_validate(tree(learner=learner)).learner.token_budget
        for learner in ({}, {"gpus": 1}, {"micro_batch_tokens": 100}, {"gpus": 1, "micro_batch_tokens": 100})
    ]
    assert budgets == [512, 8192, 100, 100]


@pytest.mark.parametrize(("root", "tree"), [(Config, ppo), (RewardTrainingConfig, reward_training)])
def test_layers_are_compiled_on_gpus_unless_the_config_says_otherwise(root, tree):
    sections = ({}, {"gpus": 1}, {"compile": True}, {"gpus": 1, "compile": False})
    found = [root.model_validate(tree(learner=learner)).learner.compiles for learner in sections]
    assert found == [False, True, True, False]


def test_lora_is_off_until_its_section_is_there():
    assert Config.model_validate(ppo()).learner.lora is None
    lora = Config.model_validate(ppo(learner={"lora": {}})).learner.lora
    assert (lora.rank, lora.alpha, lora.targets) == (16, 32, "all-linear")
    (fault,) = faults(RewardTrainingConfig, reward_training(learner={"lora": {}}))
    assert (fault["type"], fault["loc"]) == ("extra_forbidden", ("learner", "lora"))


def test_only_ppo_has_a_kl_section():
    for root, tree in ((RewardTrainingConfig, reward_training), (PairSamplingConfig, pair_sampling)):
        (fault,) = faults(root, tree(kl={"coef": 0.1}))
        assert (fault["type"], fault["loc"]) == ("extra_forbidden", ("kl",))


def test_the_trees_are_frozen():
    cfg = Config.model_validate(ppo())
    reward_cfg = RewardTrainingConfig.model_validate(reward_training())
    pairs_cfg = PairSamplingConfig.model_validate(pair_sampling())
    frozen = [
        (cfg, "seed"),
        (cfg, "reward"),
        (cfg.ppo, "gamma"),
        (cfg.reward.sources[0], "weight"),
        (reward_cfg.data, "train"),
        (pairs_cfg.labeller, "min_gap"),
    ]
    for section, name in frozen:
        before = getattr(section, name)
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 0)
        assert getattr(section, name) is before


def test_headers_with_keys_name_environment_variables():
    headers = {"X-Tenant": "rl", "Authorization": "Bearer env:JUDGE_KEY", "Cookie": "env:COOKIE"}
    source = {"name": "s", "urls": ["http://h"], "headers": headers}
    assert Config.model_validate(ppo(reward={"sources": [source]})).reward.sources[0].headers == headers


def test_a_call_limit_must_leave_room_to_wait_for_a_turn():
    assert Config.model_validate(ppo()).reward.call_limit_s == 60  # a fifth of timeout_s
    assert Config.model_validate(ppo(reward={"sources": [FUNCTION], "timeout_s": 20})).reward.call_limit_s == 4
    with pytest.raises(ValidationError, match=r"call_timeout_s \(18\) must be below 0.9 \* timeout_s \(18\)"):
        Config.model_validate(ppo(reward={"sources": [FUNCTION], "timeout_s": 20, "call_timeout_s": 18}))


def test_a_name_of_a_source_is_short_enough_for_a_metric():
    with pytest.raises(ValidationError, match="at most 64"):
        FunctionSourceConfig(name="x" * 65, function="m:f")
