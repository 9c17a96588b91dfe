"""The settings tree: what is refused and how it is said, what loads, and that a resolved config loads back."""

from pathlib import Path

import pytest
import tomli_w
from pydantic import ValidationError

from common.config import Config, Section, UserError, describe, load_config

SHIPPED = sorted((Path(__file__).parents[2] / "deploy" / "configs").glob("*.toml"))
MINIMAL = """
[prompts]
train = "questions.jsonl"

[[reward.sources]]
name = "correct"
function = "tasks:correct"

[[reward.sources]]
name = "short"
function = "tasks:short"
weight = -0.5
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "minimal.toml"
    path.write_text(MINIMAL)
    return path


def refusal(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def leaves(tree, prefix=""):
    """Dotted keys of a nested dict, with `[]` for the items of a list of tables."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
            continue
        yield prefix + key
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield from leaves(value[0], f"{prefix}{key}[].")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_stepz=3", "num_stepz: unknown key; did you mean num_steps?"),
        ("ppo.clip_epsilon=0.1", "ppo.clip_epsilon: unknown key; did you mean clip_eps?"),
        ("reward.sources.1.wieght=2", "reward.sources.1.wieght: unknown key; did you mean weight?"),
        ("optimiser.eps=1", "optimiser: unknown key; did you mean optimizer?"),
        ("model.zzz=1", "model.zzz: unknown key; known here: path"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_valid_name(minimal, override, message):
    assert message in refusal(minimal, override).splitlines()[1]


def test_an_unknown_key_in_the_file_is_refused_as_one_in_an_override_is(minimal):
    minimal.write_text(MINIMAL + "\n[sampling]\ntemprature = 0.7\n")
    assert refusal(minimal) == (
        f"config {minimal} has 1 fault(s):\n  sampling.temprature: unknown key; did you mean temperature?"
    )


def test_an_impossible_batch_split_names_rule_values_and_nearest(minimal):
    message = refusal(minimal, "rollouts_per_step=100", "ppo.minibatches=16")
    assert "rollouts_per_step (100) must divide into ppo.minibatches (16); nearest: 96, 112" in message  # 6 x, 7 x 16
    message = refusal(minimal, "rollouts_per_step=3", "ppo.minibatches=16")
    assert message.endswith("nearest: 16")  # no rollouts at all is no batch
    message = refusal(minimal, "rollouts_per_step=64", "prompts.rollouts_per_prompt=3")
    assert "rollouts_per_step (64) must divide into prompts.rollouts_per_prompt (3); nearest: 63, 66" in message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["sampling.min_new_tokens=300"], ["min_new_tokens (300)", "max_new_tokens (256)", "lower"]),
        (["num_steps=5", "optimizer.warmup_steps=6"], ["warmup_steps (6)", "num_steps (5)", "lower"]),
        (["num_steps=5", "learner.critic_warmup_steps=5"], ["critic_warmup_steps (5)", "num_steps (5)"]),
        (["learner.micro_batch_tokens=767"], ["learner.micro_batch_tokens (767)", "= 768", "raise"]),  # 512 + 256
        (["reference.max_batch_tokens=767"], ["reference.max_batch_tokens (767)", "= 768", "raise"]),
        (["reward.sources=[]"], ["reward.sources is empty", "[[reward.sources]]"]),
        (["reward.sources.0.name=short"], ["different names", "['short', 'short']", "rename"]),
        (["evaluation.pass_source=brief"], ["evaluation.pass_source (brief)", "['correct', 'short']"]),
        (["sampling.temperature=0"], ["sampling.temperature = 0", "greater than 0"]),
        (["learner.precision=fp16"], ["learner.precision = 'fp16'", "'bf16' or 'fp32'"]),
        (["num_steps=many"], ["num_steps = 'many'", "integer"]),
        (["max_staleness=1"], ["max_staleness = 1"]),
    ],
)
def test_each_broken_rule_is_refused_with_its_values(minimal, overrides, parts):
    message = refusal(minimal, *overrides)
    assert "has 1 fault(s)" in message
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    "override", ["optimizer.learning_rate=inf", "reward.sources.0.weight=nan", "evaluation.pass_score=nan"]
)
def test_a_number_that_is_not_finite_is_refused(minimal, override):
    assert override.partition("=")[0] in refusal(minimal, override)


def test_a_rate_at_its_bound_is_accepted_and_one_past_it_refused(minimal):
    assert load_config(minimal, ["learner.micro_batch_tokens=768"]).max_sequence_tokens == 768
    assert load_config(minimal, ["ppo.gamma=1"]).ppo.gamma == 1.0
    assert "ppo.gamma = 1.01" in refusal(minimal, "ppo.gamma=1.01")


def test_overrides_win_over_the_file_at_every_depth(minimal):
    cfg = load_config(
        minimal,
        [
            "num_steps=7",
            "kl.coef=1e-3",
            "reward.sources.0.weight=0.25",
            "reward.sources.1.name=brief",
            "ppo.whiten_advantages=false",
            "optimizer.betas=[0.8, 0.9]",
            "num_steps=8",
        ],
    )
    assert (cfg.num_steps, cfg.kl.coef, cfg.ppo.whiten_advantages) == (8, 1e-3, False)  # the last one counts
    assert cfg.optimizer.betas == (0.8, 0.9)
    assert [(s.name, s.function, s.weight) for s in cfg.reward.sources] == [
        ("correct", "tasks:correct", 0.25),
        ("brief", "tasks:short", -0.5),
    ]


def test_bare_words_in_overrides_are_strings(minimal):
    cfg = load_config(minimal, ["model.path=org/model-1.5", "learner.critic=separate", 'prompts.train="a b.jsonl"'])
    assert (cfg.model.path, cfg.learner.critic, cfg.prompts.train) == ("org/model-1.5", "separate", "a b.jsonl")


@pytest.mark.parametrize("override", ["num_steps", "=3"])
def test_an_override_without_key_or_value_is_refused_with_the_form_to_use(minimal, override):
    assert refusal(minimal, override) == f"override {override!r} must read key=value, such as ppo.clip_eps=0.1"


@pytest.mark.parametrize("override", ["reward.sources.2.weight=1", "prompts.train.x=1"])
def test_an_override_inside_something_that_is_no_section_is_refused(minimal, override):
    assert f"override {override!r}" in refusal(minimal, override)


def test_broken_toml_is_refused_with_file_and_line(minimal):
    minimal.write_text("num_steps = 3\nseed = = 1\n")
    message = refusal(minimal)
    assert message.startswith(f"config file {minimal} is not valid TOML")
    assert "line 2" in message


def test_a_missing_file_and_a_directory_are_refused_by_name(tmp_path):
    assert f"config file {tmp_path / 'no.toml'} does not exist" in refusal(tmp_path / "no.toml")
    assert f"config {tmp_path} cannot be read (Is a directory)" in refusal(tmp_path)


def test_a_path_through_a_file_is_refused_by_name(minimal):
    assert str(minimal / "run.toml") in refusal(minimal / "run.toml")


def test_required_settings_are_named_when_missing(tmp_path):
    path = tmp_path / "empty.toml"
    path.write_text("")
    message = refusal(path)
    assert "prompts: required and missing" in message
    assert "reward: required and missing" in message


def test_several_faults_are_all_reported_at_once(minimal):
    lines = refusal(minimal, "num_stepz=3", "ppo.gamma=2", "reward.sources.0.name=a b").splitlines()
    assert lines[0] == f"config {minimal} has 3 fault(s):"
    assert sorted(line.split()[0].rstrip(":") for line in lines[1:]) == [
        "num_stepz",
        "ppo.gamma",
        "reward.sources.0.name",
    ]


def test_several_broken_rules_are_all_reported_at_once(minimal):
    message = refusal(minimal, "sampling.min_new_tokens=300", "num_steps=5", "optimizer.warmup_steps=6")
    assert "sampling.min_new_tokens (300)" in message
    assert "optimizer.warmup_steps (6)" in message


def test_describe_lists_every_leaf_once_with_a_description():
    cfg = Config.model_validate({"prompts": {"train": "t"}, "reward": {"sources": [{"name": "s", "function": "m:f"}]}})
    described = [(key, meaning) for key, _, _, meaning in describe()]
    assert [key for key, _ in described] == list(leaves(cfg.model_dump(mode="json")))
    assert [key for key, meaning in described if len(meaning) < 10] == []


def test_every_field_of_every_section_has_a_description():
    def sections(cls):
        return [cls, *(nested for sub in cls.__subclasses__() for nested in sections(sub))]

    fields = [
        (cls.__name__, name, field.description)
        for cls in sections(Section)
        for name, field in cls.model_fields.items()
        if cls is not Config or name in ("seed", "num_steps", "rollouts_per_step", "max_staleness")  # others: sections
    ]
    assert len(fields) > 60
    assert [(cls, name) for cls, name, description in fields if not description] == []
    assert [cls.__name__ for cls in sections(Section)[1:] if not cls.__doc__] == []


def test_describe_states_bounds_choices_and_defaults():
    rows = {key: (kind, default) for key, kind, default, _ in describe()}
    assert rows["num_steps"] == ("integer >= 1", "100")
    assert rows["ppo.gamma"] == ("number >= 0 <= 1", "1.0")
    assert rows["learner.critic"] == ("shared | separate", "shared")
    assert rows["ppo.whiten_advantages"] == ("true | false", "true")
    assert rows["prompts.train"] == ("text", "required")
    assert rows["prompts.heldout"] == ("text", "none")
    assert rows["reward.sources"] == ("list", "required")
    assert rows["reward.sources[].weight"] == ("number", "1.0")


@pytest.mark.parametrize(("section", "in_flight"), [("generators", 128), ("reference", 128), ("reward", 8)])
def test_roles_of_which_there_may_be_several_share_their_settings(minimal, section, in_flight):
    role = getattr(load_config(minimal), section)
    assert (role.replicas, role.in_flight, role.timeout_s) == (1, in_flight, 300)
    for key in ("replicas", "in_flight", "timeout_s"):
        assert getattr(getattr(load_config(minimal, [f"{section}.{key}=3"]), section), key) == 3
        assert f"{section}.{key} = 0" in refusal(minimal, f"{section}.{key}=0")


def test_the_learner_is_not_replicated(minimal):
    assert "learner.replicas: unknown key" in refusal(minimal, "learner.replicas=2")


def test_describe_does_not_call_a_pair_of_numbers_a_number():
    assert {key: kind for key, kind, _, _ in describe()}["optimizer.betas"] != "number"


def test_configs_are_shipped():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_parses(path):
    cfg = load_config(path)
    assert cfg.reward.sources


def test_the_tree_is_frozen(minimal):
    cfg = load_config(minimal)
    for section, name in ((cfg, "seed"), (cfg.ppo, "gamma"), (cfg.reward.sources[0], "weight")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 0)
    with pytest.raises(ValidationError, match="frozen"):
        cfg.reward = cfg.reward
    assert (cfg.seed, cfg.ppo.gamma, cfg.reward.sources[0].weight) == (0, 1.0, 1.0)


@pytest.mark.parametrize("source", ["minimal", *SHIPPED], ids=lambda source: getattr(source, "name", source))
def test_a_resolved_config_written_out_loads_back_equal(minimal, tmp_path, source):
    overrides = ["seed=3", "optimizer.eps=1e-9", "optimizer.betas=[0.5, 0.6]", "reward.sources.0.weight=0.1"]
    cfg = load_config(minimal if source == "minimal" else source, overrides)
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(tomli_w.dumps(cfg.model_dump(exclude_none=True, mode="json")), encoding="utf-8")
    assert load_config(resolved) == cfg


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "reward source s must have either function or urls"),
        ({"function": "m:f", "urls": ["http://h/"]}, "reward source s must have either function or urls"),
        ({"urls": ["h:8001/score"]}, "reward source s: 'h:8001/score' in urls must begin with http:// or https://"),
    ],
)
def test_a_reward_source_is_a_function_or_a_service(settings, message):
    tree = {"prompts": {"train": "t"}, "reward": {"sources": [{"name": "s", **settings}]}}
    with pytest.raises(ValueError, match=message):
        Config.model_validate(tree)
