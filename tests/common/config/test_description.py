"""What `ratchet config --describe` lists, and which settings may change when a run continues."""

import pytest

from common.config.base import MAY_CHANGE, RECORDED
from common.config.description import changeable, describe, recorded
from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from tests.common.config.trees import TREES, leaves, root_of

POOLED = "cores labels min max timeout_s probe_timeout_s drain_s max_shortage_s"
SCORING = f"{POOLED} in_flight isolation workers call_timeout_s max_void_share"
RANKS = "ranks min_ranks room_wait_s timeout_s probe_timeout_s"
COMPUTING = f"cpus gpus threads cores labels micro_batch_tokens gradient_checkpointing compile deterministic {RANKS}"
# Per root: section -> its settings that may change. "*": all; "" is the root itself.
CHANGEABLE = {
    Config: {
        "": "num_steps",
        "generators": "*",
        "reference": "*",
        "reward": SCORING,
        "environment": f"{POOLED} step_timeout_s concurrent",
        "ppo": "max_mismatch_kl max_mismatch_steps",
        "learner": f"{COMPUTING} critic_path max_losses",
        "evaluation": "*",
        "checkpoint": "*",
        "credit": "*",
        "critic_training": "*",
        "ray": "*",
        "logging": "*",
        "monitoring": "*",
    },
    RewardTrainingConfig: {
        "": "epochs",
        "learner": COMPUTING,
        "checkpoint": "*",
        "scale": "*",
        "sampling": "*",
        "generators": "*",
        "ray": "*",
        "logging": "*",
    },
    PairSamplingConfig: {"generators": "*", "labeller": SCORING, "ray": "*"},
}
# The same for PPO's settings that may change if the journal records it.
RECORDED_SETTINGS = {
    "reward": "clip",
    "ppo": "clip_eps clip_eps_high value_clip value_coef entropy_coef target_kl importance_cap",
    "kl": "coef target",
    "optimizer": "learning_rate value_head_learning_rate critic_learning_rate max_grad_norm",
}


@pytest.mark.parametrize("root", CHANGEABLE, ids=lambda root: root.__name__)
def test_only_the_listed_settings_may_change_on_resume(root):
    """Walks every setting of the root, so a new one has to be listed here, or be fixed."""
    for setting in describe(root):
        section, _, name = setting.key.rpartition(".")
        allowed = CHANGEABLE[root].get(section, "").split()
        with_record = RECORDED_SETTINGS.get(section, "").split() if root is Config else []
        expected = MAY_CHANGE if name in allowed or allowed == ["*"] else RECORDED if name in with_record else ""
        assert setting.change == expected, setting.key


@pytest.mark.parametrize("root", CHANGEABLE, ids=lambda root: root.__name__)
def test_changeable_names_whole_sections_with_a_dot(root):
    expected = {
        f"{section}." if names == "*" else f"{section}.{name}".lstrip(".")
        for section, names in CHANGEABLE[root].items()
        for name in names.split()
    }
    assert set(changeable(root)) == expected


def test_recorded_names_the_settings_that_only_a_record_may_change():
    expected = {f"{section}.{name}" for section, names in RECORDED_SETTINGS.items() for name in names.split()}
    assert set(recorded(Config)) == expected
    assert [list(recorded(root)) for root in (RewardTrainingConfig, PairSamplingConfig)] == [[], []]


@pytest.mark.parametrize("name", TREES)
def test_describe_lists_every_setting_once_in_order_with_a_meaning(name):
    root = root_of(TREES[name])
    tree = root.model_validate(TREES[name]).model_dump(mode="json")
    if root is Config:
        tree["evaluation"]["judges"] = []  # described with the sources
    # The kinds of sources are described for every root, and pairs are refused one of them.
    refused = [] if root is Config else ["labeller.sources[].environment"]
    described = [(key, meaning) for key, _, _, meaning, _ in describe(root) if key not in refused]
    assert [key for key, _ in described] == list(leaves(tree))
    assert [key for key, meaning in described if len(meaning) < 10] == []


@pytest.mark.parametrize(("root", "key"), [(Config, "reward.sources[]"), (PairSamplingConfig, "labeller.sources[]")])
def test_describe_lists_the_fields_of_every_kind_of_source_once(root, key):
    fields = [row[0].removeprefix(f"{key}.") for row in describe(root) if row[0].startswith(f"{key}.")]
    assert fields == [
        *("name", "weight"),
        *("function", "takes", "batch", "concurrency"),
        *("model", "trust_remote_code", "dtype", "max_tokens", "max_batch_tokens", "batch_window_ms"),
        *("headers", "request_timeout_s", "max_answer_kib", "retries", "backoff_s", "follow_redirects"),
        *("urls", "send_tokens"),
        *("judge_urls", "judge_model", "template", "system", "score_range", "score_pattern", "score_field", "request"),
        *("reasoning_gym", "answer_pattern", "run_answers"),
        "environment",
    ]


def test_describe_states_bounds_choices_and_defaults():
    rows = {key: (kind, default) for key, kind, default, *_ in describe(Config)}
    assert rows["num_steps"] == ("integer >= 1", "100")
    assert rows["ppo.gamma"] == ("number >= 0 <= 1", "1.0")
    assert rows["ppo.lam"] == ("number >= 0 <= 1 | length", "0.95")
    assert rows["ppo.value_lam"] == ("number >= 0 <= 1 | length", "none")
    assert rows["ppo.clip_eps_high"] == ("number > 0", "none")
    assert rows["learner.critic"] == ("shared | separate", "shared")
    assert rows["ppo.whiten_advantages"] == ("true | false", "true")
    assert rows["prompts.train"] == ("text", "required")
    assert rows["prompts.heldout"] == ("text", "none")
    assert rows["optimizer.betas"][0] == "list"  # not a number
    assert rows["learner.micro_batch_tokens"] == ("integer >= 1", "none")
    assert rows["learner.lora.rank"] == ("integer >= 1", "16")  # of a section that may stay out
    assert rows["learner.lora.targets"] == ("text | list", "all-linear")
    assert rows["reward.sources"] == ("list", "required")
    assert rows["reward.sources[].weight"] == ("number", "1.0")
    assert rows["reward.sources[].function"] == ("text", "required")
    assert rows["reward.sources[].dtype"] == ("bfloat16 | float32", "bfloat16")
    assert rows["reward.sources[].reasoning_gym"] == ("true", "required")
    assert rows["reward.sources[].urls"] == ("list", "required")
    assert rows["reward.sources[].request_timeout_s"] == ("number > 0", "10")
    assert rows["evaluation.judges"][0] == "list"
    assert {key: default for key, _, default, *_ in describe(RewardTrainingConfig)}["data.train"] == "required"
