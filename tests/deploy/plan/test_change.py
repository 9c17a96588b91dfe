"""The smallest change that makes a run fit, and the hardware that is missing if no change does."""

import copy
import re
from dataclasses import replace

import pytest

from common.config.description import describe
from common.config.overrides import apply_override, as_overrides
from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig, RewardTrainingConfig
from common.errors import UserError
from common.memory import GIB
from common.model.size import ModelSize
from deploy.plan.change import Change, changed, changes, smallest_change
from deploy.plan.ladders import LADDERS
from deploy.plan.missing import missing_hardware
from deploy.plan.placement import Node
from tests.deploy.plan.shapes import planner
from tests.deploy.plan.test_capacity import LLAMA_2_7B
from tests.fakes import QWEN_1_5B

SMALL = ModelSize(100_000_000, 12, 768, 12, 12, 64, 50_000, 2048, 3072)
ONE_GPU = {"learner": {"gpus": 0.3}, "generators": {"gpus": 0.7}, "max_staleness": 0}


def tree(**sections):
    return {"prompts": {"train": "t"}, "reward": {"sources": [{"name": "s", "function": "m:f"}]}, **sections}


def node(gpus=0, gpu_gib=0, *, cpus=64, gib=1000):
    return Node("n", cpus, gpus, gib * GIB, gpu_gib * GIB)


@pytest.mark.parametrize(
    ("model", "sections", "nodes", "settings"),
    [
        # LoRA of 7B keeps 14 GiB between updates: 0.2 of 80 GiB has room.
        (LLAMA_2_7B, {**ONE_GPU, "learner": {"gpus": 0.1, "lora": {}}}, [node(1, 80)], {"learner.gpus": 0.2}),
        (
            LLAMA_2_7B,
            {"learner": {"gpus": 1, "lora": {}, "micro_batch_tokens": 32_768}, "generators": {"gpus": 1}},
            [node(2, 80)],
            {"learner.micro_batch_tokens": 8192},
        ),
        # All weights of 7B take 16 bytes each: no single GPU has room, four have.
        (LLAMA_2_7B, {"learner": {"gpus": 1}, "generators": {"gpus": 1}}, [node(8, 80)], {"learner.ranks": 2}),
        (LLAMA_2_7B, {"learner": {"gpus": 1}, "generators": {"gpus": 1}}, [node(2, 80)], {"learner.lora.rank": 16}),
        (
            LLAMA_2_7B,
            {"generators": {"min": 5, "gpus": 1}, "learner": {"gpus": 1, "lora": {}, "micro_batch_tokens": 512}},
            [node(4, 24)],
            {"generators.min": 3},
        ),
        (SMALL, {"generators": {"cpus": 4}, "learner": {"cpus": 4}}, [node(cpus=6)], {"learner.cpus": 2}),
    ],
)
def test_the_named_change_fits_and_no_earlier_one_does(model, sections, nodes, settings):
    given = tree(**sections)
    cfg, here = Config.model_validate(given), planner(model, nodes)
    assert not here.fits(cfg)
    change = smallest_change(cfg, here.fits, model)
    assert change.settings == settings
    after = copy.deepcopy(given)
    for override in as_overrides(change.settings):  # as a user gives it
        apply_override(after, override)
    assert here.fits(Config.model_validate(after))
    every = [each for ladder in changes(cfg, model) for each in ladder]
    for earlier in every[: every.index(change)]:
        found = changed(cfg, earlier.settings)
        assert found is None or not here.fits(found), earlier


def test_a_process_that_would_bring_no_node_reserves_a_core():
    small = node(cpus=4, gib=1)
    cfg = Config.model_validate(tree(reference={"gpus": 0}, ray={"autoscaler": True}, learner={"cpus": 1}))
    here = replace(planner(SMALL, [replace(small, memory=4 * GIB)]), starts_stores=False)
    assert [need.section for need in here.plan(cfg).placements[0].waiting] == ["generators"]
    assert not here.fits(cfg)
    assert here.remedy(cfg).startswith("the smallest change that fits: reference.cpus=1 (the autoscaler adds a node")


def test_the_engine_gives_the_learner_a_part_of_its_share():
    sections = {"learner": {"gpus": 0.3, "lora": {}, "micro_batch_tokens": 8192}, "generators": {"gpus": 0.7}}
    cfg, here = Config.model_validate(tree(**sections, max_staleness=0)), planner(LLAMA_2_7B, [node(1, 40)])
    assert not here.fits(cfg)
    change = smallest_change(cfg, here.fits, LLAMA_2_7B)
    assert {"learner.gpus", "generators.gpus"} <= set(change.settings)
    assert change.settings["learner.gpus"] + change.settings["generators.gpus"] == pytest.approx(1)
    assert "the learner gets more of its GPU, and the engine less" in change.effect


def test_if_no_single_change_fits_a_pair_is_named():
    given = tree(learner={"gpus": 0.1, "cpus": 9}, generators={"gpus": 0.7}, max_staleness=0)
    cfg, here = Config.model_validate(given), planner(QWEN_1_5B, [node(1, 80, cpus=8)])
    for ladder in changes(cfg, QWEN_1_5B):
        for change in ladder:
            found = changed(cfg, change.settings)
            assert found is None or not here.fits(found), change
    pair = smallest_change(cfg, here.fits, QWEN_1_5B)
    assert set(pair.settings) == {"learner.gpus", "learner.cpus"}
    assert here.fits(changed(cfg, pair.settings))
    assert here.remedy(cfg) == f"the smallest change that fits: {pair}"
    assert str(pair).startswith(f"learner.gpus={pair.settings['learner.gpus']} learner.cpus=4 (")


def test_a_change_that_keeps_the_ranks_margin_comes_first():
    """Of 91 GiB, 16,384 tokens take 90.1: that fits, without the 8 % that sizes filled in by the plan leave free."""
    sections = {"learner": {"gpus": 1, "lora": {}, "micro_batch_tokens": 32_768}, "generators": {"gpus": 1}}
    cfg, here = Config.model_validate(tree(**sections)), planner(LLAMA_2_7B, [node(2, 91)])
    assert smallest_change(cfg, here.fits, LLAMA_2_7B).settings == {"learner.micro_batch_tokens": 16_384}
    assert here.remedy(cfg).startswith("the smallest change that fits: learner.micro_batch_tokens=8192 (")


def test_a_run_that_continues_changes_only_what_may_change():
    cfg = Config.model_validate(tree(max_staleness=1))
    here = planner(LLAMA_2_7B, [node(gib=100)])
    assert "learner.lora.rank=16" in here.remedy(cfg)
    with pytest.raises(
        UserError, match=r"no node has room for Learner.*; no change .* the run would fit with .* memory"
    ):
        here.check(cfg, resume=True)


def test_without_any_change_the_refusal_names_the_missing_hardware():
    """The amount is enough, and one GiB less is not."""
    cfg = Config.model_validate(tree(generators={"kv_cache_mib": 1000}))
    nodes = [node(gib=30)]
    found = missing_hardware(nodes, lambda nodes: planner(LLAMA_2_7B, nodes).fits(cfg))
    memory = int(found.removeprefix("would fit with ").removesuffix(" GiB of free memory in each node"))
    assert not planner(LLAMA_2_7B, [node(gib=memory - 1)]).fits(cfg)
    assert planner(LLAMA_2_7B, [node(gib=memory)]).fits(cfg)


def test_missing_gpus_are_named_with_their_memory():
    cfg = Config.model_validate(tree(learner={"gpus": 1, "ranks": 2}, generators={"gpus": 1, "min": 2}))

    def fits(nodes):
        return planner(QWEN_1_5B, nodes).fits(cfg)

    found = missing_hardware([node()], fits)
    gpus, gib = (int(part) for part in found.replace("GPUs of", "").split() if part.isdigit())
    assert gpus == 4
    assert fits([node(4, gib)])
    assert not fits([node(3, gib)])
    assert not fits([node(4, gib - 1)])


def test_nodes_without_the_labels_of_a_role_are_told_how_to_get_them():
    """The refusal says what is short, and only the remedy says what to do."""
    cfg = Config.model_validate(tree(generators={"labels": {"group": "g"}}))
    for gib, more in ((60, ""), (1, r", and with \d+ GiB of free memory in each node")):
        nodes = [replace(node(gib=gib), labels={})]
        here = replace(planner(SMALL, nodes), starts_stores=False)
        labels = r"the labels of its roles on these nodes \(ray start --labels\)"
        assert re.fullmatch(rf".*; the run would fit with {labels}{more}; ratchet plan --suggest .*", here.remedy(cfg))
        refused = here.plan(cfg).refusal
        assert gib == 1 or refused.endswith("only nodes with the Ray label group=g may have it (generators.labels)")
    labelled = replace(here, nodes=[replace(node(gib=60), labels={"group": "g"})])
    assert labelled.fits(cfg)


def test_every_ladder_goes_from_the_smallest_change_to_the_largest():
    cfg = Config.model_validate(
        tree(
            learner={"gpus": 0.5, "micro_batch_tokens": 4096, "critic": "separate"},
            generators={"gpus": 0.5, "kv_cache_mib": 4000, "min": 3},
            max_staleness=1,
        )
    )
    by_first = {}
    for ladder in changes(cfg, QWEN_1_5B):
        by_first.setdefault(next(iter(ladder[0].settings)), [next(iter(c.settings.values())) for c in ladder])
    assert by_first["learner.micro_batch_tokens"] == [2048, 1024, 512]
    assert by_first["generators.min"] == [2, 1]
    sequence = 768 * 2 * 28 * 2 * 128 * 2  # bytes of keys and values of the longest sequence, 21 MiB
    assert by_first["generators.kv_cache_mib"] == [2000, 1000, 500, 250, 125, 62, 31, -(-sequence >> 20)]
    assert by_first["sampling.max_new_tokens"] == [128, 64]


def test_an_episode_is_shortened_down_to_one_turn():
    cfg = Config.model_validate(tree(environment={"function": "m:Game"}, sampling={"max_new_tokens": 300}))
    ladder = next(found for found in changes(cfg, QWEN_1_5B) if found[0].effect == "responses are cut earlier")
    assert [change.settings for change in ladder] == [
        {"environment.max_tokens": 512},
        {"environment.max_tokens": 300},
    ]


def test_every_ladder_changes_settings_that_exist():
    source = {"name": "s", "model": "m", "max_batch_tokens": 8192}
    on_gpu = {"gpus": 0.5, "cpus": 2, "min": 2}
    sections = {
        "learner": {"gpus": 0.5, "cpus": 2, "micro_batch_tokens": 4096, "precision": "fp32", "critic": "separate"},
        "generators": {**on_gpu, "kv_cache_mib": 4000, "dtype": "float32", "updates": "changes", "sleep": False},
        "reference": {**on_gpu, "dtype": "float32"},
        "reward": {**on_gpu, "sources": [source]},
    }
    several = Config.model_validate(tree(**sections))
    ranks = Config.model_validate(tree(learner={"ranks": 4, "gpus": 1, "min_ranks": 2}))
    labeller = PairSamplingConfig.model_validate({"prompts": {"source": "t"}, "labeller": sections["reward"]})
    nothing, ray = {"cpus": 0, "gpus": 0}, {"autoscaler": True}
    waits = tree(ray=ray, generators=nothing, reference=nothing, reward={**nothing, "sources": [source]})
    labels = {"prompts": {"source": "t"}, "labeller": {**nothing, "sources": [source]}, "ray": ray}
    added = [Config.model_validate(waits), PairSamplingConfig.model_validate(labels)]
    found = [changes(cfg, QWEN_1_5B) for cfg in (several, ranks, labeller, *added)]
    keys = {key for ladders in found for ladder in ladders for change in ladder for key in change.settings}
    known = {setting.key for root in (Config, PairSamplingConfig) for setting in describe(root)}
    assert {key.replace(".0.", "[].") for key in keys} <= known
    used = {effect for ladders in found for ladder in ladders for effect in {change.effect for change in ladder}}
    assert used == {effect for effect, _ in LADDERS}  # every kind of change is tried here


@pytest.mark.parametrize(
    "cfg",
    [
        RewardTrainingConfig.model_validate({"data": {"train": "t"}, "learner": {"gpus": 1, "ranks": 3}}),
        PairSamplingConfig.model_validate(
            {
                "prompts": {"source": "t"},
                "labeller": {"sources": [{"name": "s", "function": "m:f"}], "min": 3},
                "generators": {"gpus": 0.5},
            }
        ),
    ],
)
def test_the_other_commands_have_changes_of_their_own_settings(cfg):
    ladders = changes(cfg)
    assert ladders
    first = [change for ladder in ladders for change in ladder]
    assert any(changed(cfg, change.settings) is not None for change in first)
    keys = {key for change in first for key in change.settings}
    assert not keys & {"max_staleness", "learner.lora.rank", "rollouts_per_step", "reference.gpus"}


def test_a_rule_of_the_config_refuses_a_change():
    cfg = Config.model_validate(tree(rollouts_per_step=96, ppo={"minibatches": 3}))
    assert changed(cfg, {"rollouts_per_step": 64}) is None
    assert changed(cfg, {"rollouts_per_step": 48}).rollouts_per_step == 48
    assert str(Change({"learner.ranks": 2}, "more GPUs learn")) == "learner.ranks=2 (more GPUs learn)"


def test_nodes_start_with_the_stores_that_a_changed_config_needs():
    cfg = Config.model_validate(tree())
    here = planner(SMALL, [node(gib=60)])
    (first,) = here.plan(cfg).nodes
    stored = replace(here, phases=lambda cfg: [[replace(n, store={"x": 7 * GIB}) for n in here.phases(cfg)[0]]])
    (second,) = stored.plan(cfg).nodes
    assert (first.store, second.store) == (GIB, 7 * GIB)
    assert [n.store + n.memory for n in (first, second)] == [60 * GIB] * 2
