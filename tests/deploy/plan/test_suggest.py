"""`ratchet plan --suggest`: a config that fits, or the resource that is missing."""

import re
import tomllib
from dataclasses import replace

import pytest

from common.config.loading import load_config
from common.config.ppo import Config
from common.errors import UserError
from common.memory import GIB
from deploy.plan.needs import needs
from deploy.plan.overlap import one_gpu
from deploy.plan.placement import Node
from deploy.plan.rates import H100, ZEN5_CORE
from deploy.plan.seconds import step_seconds
from deploy.plan.step import Typical, cache_bytes
from deploy.plan.suggest import DoesNotFit, suggest
from tests.deploy.plan.shapes import CONFIGS, MACHINES, model_directory, planner, size_of
from tests.deploy.plan.test_command import plan

TREE = {
    "rollouts_per_step": 128,
    "prompts": {"train": "t"},
    "sampling": {"max_new_tokens": 512},
    "reward": {"sources": [{"name": "s", "function": "m:f"}]},
}
# How all weights, adapters, or neither fit; without an entry, all weights.
ADAPTERS = {("1.5B", "1 x 24 GB"), ("7B", "1 x 80 GB"), ("13B", "1 x 80 GB")}
NEITHER = {("1.5B", "2 cores"), ("7B", "2 cores"), ("13B", "2 cores"), ("7B", "1 x 24 GB"), ("13B", "1 x 24 GB")}


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    return {name: size_of(tmp_path_factory.mktemp("models"), name) for name in CONFIGS}


def test_sizes_come_from_a_models_config_alone(sizes):
    """The published numbers of weights."""
    published = {"135M": 134_515_008, "1.5B": 1_543_714_304, "7B": 7_615_616_512, "13B": 13_015_864_320}
    assert {name: size.parameters for name, size in sizes.items()} == published


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("model", CONFIGS)
def test_a_suggestion_fits_or_says_what_is_missing(model, machine, sizes, tmp_path):
    size, here = sizes[model], planner(sizes[model], MACHINES[machine])
    if (model, machine) in NEITHER:
        with pytest.raises(DoesNotFit, match=r"it would fit with .* GiB"):
            suggest(TREE, here, size)
        return
    found = suggest(TREE, here, size)
    path = tmp_path / "suggested.toml"
    path.write_text(found.to_toml("a title"))
    cfg = load_config(path, [], Config)
    assert here.fits(cfg)
    assert cfg == found.plan.cfg
    assert (cfg.learner.lora is not None) == ((model, machine) in ADAPTERS)
    # What is learned is the user's: everything but the layout.
    assert (cfg.rollouts_per_step, cfg.prompts, cfg.sampling, cfg.reward.sources, cfg.ppo) == (
        *(128, Config.model_validate(TREE).prompts, Config.model_validate(TREE).sampling),
        *(Config.model_validate(TREE).reward.sources, Config.model_validate(TREE).ppo),
    )


def test_every_suggested_value_has_its_reason_next_to_it(sizes):
    found = suggest(TREE, planner(sizes["7B"], MACHINES["8 x 80 GB"]), sizes["7B"])
    lines = found.to_toml("a title").splitlines()
    assert lines[0] == "# a title"
    assert "ranks = 5  # of 8 GPUs: with these engines, about the shortest predicted step" in lines
    assert "# generators.kv_cache_mib is left out: the rest of the engine's share" in lines
    cfg = tomllib.loads("\n".join(lines))
    given = {f"{name}.{key}" for name in ("learner", "generators", "reference") for key in cfg[name]}
    assert given <= set(found.reasons)


def test_one_gpu_is_shared_and_the_engine_sleeps(sizes):
    cfg = suggest(TREE, planner(sizes["1.5B"], MACHINES["1 x 80 GB"]), sizes["1.5B"]).plan.cfg
    assert cfg.lent_share == cfg.generators.gpus > 0
    assert cfg.max_staleness == 0
    assert 0.95 < cfg.learner.gpus + cfg.generators.gpus + cfg.reference.gpus <= 1


def step_s(cfg, size, nodes):
    """The predicted seconds of a step, with engines at half of the data sheet: each number of GPUs twice as slow."""
    plan = planner(size, nodes).plan(cfg)
    if not plan.fits:
        return float("inf")
    sheet = H100.decoding
    halves = {name: getattr(sheet, name) / 2 for name in ("prefill_per_s", "decode_per_s", "read_bytes_per_s")}
    cache = cache_bytes(cfg, size, nodes)
    rates = {"gpu": replace(H100, decoding=replace(sheet, **halves)), "cpu": ZEN5_CORE}
    return step_seconds(cfg, size, (), rates, cache_bytes=cache, gpus=one_gpu(plan.placements[0])).step.seconds


def with_counts(cfg, ranks, engines):
    """The same with other numbers of ranks and engines, and services on the same kind of place."""
    replicas = cfg.reference.min if cfg.reference.gpus == 1 else engines
    return cfg.model_copy(
        update={
            "learner": cfg.learner.model_copy(update={"ranks": ranks}),
            "generators": cfg.generators.model_copy(update={"min": engines}),
            "reference": cfg.reference.model_copy(update={"min": replicas}),
        }
    )


@pytest.mark.parametrize("model", ["1.5B", "7B"])
def test_no_gpu_idles_and_no_other_division_has_much_shorter_steps(model, sizes):
    size, before = sizes[model], float("inf")
    for gpus in (3, 5, 6, 7, 12):
        nodes = [Node("n", 64, gpus, 510 * GIB, 80 * GIB)]
        cfg = suggest(TREE, planner(size, nodes), size).plan.cfg
        whole = cfg.reference.min if cfg.reference.gpus == 1 else 0
        ranks, engines = cfg.learner.ranks, cfg.generators.min
        assert ranks + engines + whole == gpus
        assert cfg.max_staleness == 1  # so that engines and ranks work at the same time
        seconds = step_s(cfg, size, nodes)
        assert seconds <= before  # than with fewer GPUs
        for moved in (-2, -1, 1, 2):
            if ranks + moved > 0 and engines - moved > 0:
                other = step_s(with_counts(cfg, ranks + moved, engines - moved), size, nodes)
                assert other * (1.1 if moved < 0 else 1) >= seconds  # with fewer ranks, an equal step is no reason
        before = seconds


def test_services_share_the_gpus_of_engines_unless_a_step_gets_longer(sizes):
    """On 5 GPUs the reference of 1.5B takes little of each engine's time. A GPU of its own would be a rank less."""
    size, nodes = sizes["1.5B"], [Node("n", 64, 5, 510 * GIB, 80 * GIB)]
    cfg = suggest(TREE, planner(size, nodes), size).plan.cfg
    assert cfg.reference.min == cfg.generators.min
    assert cfg.reference.gpus + cfg.generators.gpus == 1
    own = cfg.model_copy(
        update={
            "learner": cfg.learner.model_copy(update={"ranks": cfg.learner.ranks - 1}),
            "generators": cfg.generators.model_copy(update={"gpus": 1.0}),
            "reference": cfg.reference.model_copy(update={"gpus": 1.0, "min": 1}),
        }
    )
    assert planner(size, nodes).fits(own)
    assert step_s(own, size, nodes) > step_s(cfg, size, nodes)


def test_ranks_stay_on_one_node_and_more_staleness_stays(sizes):
    found = suggest(TREE, planner(sizes["7B"], MACHINES["2 x 8 x 80 GB"]), sizes["7B"]).plan
    assert len({place.node for place in found.placements[0].places if place.need.section == "learner"}) == 1
    more = {**TREE, "max_staleness": 3}
    assert suggest(more, planner(sizes["7B"], MACHINES["8 x 80 GB"]), sizes["7B"]).plan.cfg.max_staleness == 3


def test_without_rates_of_a_precision_gpus_are_divided_as_with_rates(sizes):
    """All in float32 instead of bfloat16: no seconds are known, and learning still takes most of a step."""
    size, nodes = sizes["135M"], [Node("n", 64, 8, 510 * GIB, 80 * GIB)]
    single = {"learner": {"precision": "fp32"}, "reference": {"dtype": "float32"}, "generators": {"dtype": "float32"}}
    half, whole = (suggest({**TREE, **more}, planner(size, nodes), size).plan.cfg for more in ({}, single))
    assert whole.learner.precision == "fp32"
    assert (whole.learner.ranks, whole.generators.min) == (half.learner.ranks, half.generators.min)


def suggested_with_reward_model(size, nodes, reward_size):
    """The plan of a suggestion for a run with a reward model."""
    tree = {**TREE, "reward": {"sources": [{"name": "rm", "model": "org/rm"}]}}
    models = [(Config.model_validate(tree).reward.sources[0], reward_size)]
    here = replace(planner(size, nodes), phases=lambda cfg: [needs(cfg, size, models)])
    plan = suggest(tree, here, size, reward_models=[reward_size]).plan
    assert here.fits(plan.cfg)
    return plan


# Ranks and engines that an engineer would choose on GPUs of 80 GB, with a reward model of the policy's size. Learning
# takes at least as long as generation, so at least half of the GPUs learn; with two nodes, one of them. 7B trains
# adapters where fewer than two GPUs learn: its weights, gradients and moments take 113 GiB.
CHOSEN = {
    "1.5B": {1: (1, 1), 2: (1, 1), 3: (2, 1), 4: (2, 2), 6: (3, 3), 8: (4, 4), 16: (8, 8)},
    "7B": {1: (1, 1), 2: (1, 1), 3: (2, 1), 4: (3, 1), 6: (4, 1), 8: (5, 3), 16: (8, 8)},
}


@pytest.mark.parametrize(("model", "gpus"), [(model, gpus) for model, rows in CHOSEN.items() for gpus in rows])
def test_a_suggestion_is_what_an_engineer_would_choose(model, gpus, sizes):
    count = min(gpus, 8)
    nodes = [Node(f"n{index}", 128, count, 1000 * GIB, 80 * GIB) for index in range(gpus // count)]
    plan = suggested_with_reward_model(sizes[model], nodes, sizes[model])
    cfg, [placement] = plan.cfg, plan.placements
    assert (cfg.learner.ranks, cfg.generators.min) == CHOSEN[model][gpus]
    assert (cfg.learner.lora is not None) == (model == "7B" and gpus <= 2)
    assert cfg.max_staleness == (gpus > 1)
    assert len(one_gpu(placement)) == gpus  # none idles
    alone = [one for one in one_gpu(placement) if {"reference", "reward"} & set(one) and "generators" not in one]
    # Services share an engine's GPU. Only 7B on six GPUs gives them one: there it helps more than another engine.
    assert len(alone) == (1 if (model, gpus) == ("7B", 6) else 0)
    assert cfg.reward.min == cfg.generators.min
    assert cfg.learner.lora is not None or cfg.reference.min == cfg.generators.min


def test_services_that_fill_more_than_a_gpu_have_one_each(sizes):
    """A 7B reference takes 16.7 GiB of a GPU of 24 GB, and so does a reward model."""
    nodes = [Node(name, 128, 8, 1000 * GIB, 24 * GIB) for name in "ab"]
    plan = suggested_with_reward_model(sizes["7B"], nodes, sizes["7B"])
    assert plan.cfg.learner.lora is None
    assert (plan.cfg.reference.min, plan.cfg.reference.gpus) == (plan.cfg.reward.min, plan.cfg.reward.gpus) == (1, 1)
    assert sorted(map(sorted, one_gpu(plan.placements[0])))[-2:] == [["reference"], ["reward"]]
    assert len(one_gpu(plan.placements[0])) == 16


def test_services_share_one_gpu_if_no_engine_has_room_next_to_it(sizes):
    """On a GPU of 40 GB, a 7B engine leaves too little for a reference and a reward model of 16.7 GiB each."""
    plan = suggested_with_reward_model(sizes["7B"], [Node("n", 128, 6, 1000 * GIB, 40 * GIB)], sizes["7B"])
    assert (plan.cfg.learner.ranks, plan.cfg.generators.min, plan.cfg.learner.lora) == (4, 1, None)
    assert (plan.cfg.reference.gpus, plan.cfg.reward.gpus) == (0.5, 0.5)
    assert ["reference", "reward"] in [sorted(sections) for sections in one_gpu(plan.placements[0])]


def test_reward_models_sit_next_to_engines_too(sizes):
    """Each of three processes has its part of every engine's GPU."""
    nodes = [Node("n", 64, 5, 510 * GIB, 80 * GIB)]
    cfg = suggested_with_reward_model(sizes["1.5B"], nodes, sizes["1.5B"]).cfg
    assert cfg.reward.min == cfg.reference.min == cfg.generators.min
    assert cfg.reward.gpus + cfg.reference.gpus + cfg.generators.gpus == pytest.approx(1)


def test_lengths_and_rates_of_the_user_decide(sizes):
    """Short responses take engines less time, so more GPUs learn."""
    size, nodes = sizes["1.5B"], [Node("n", 64, 12, 510 * GIB, 80 * GIB)]
    long = suggest(TREE, planner(size, nodes), size).plan.cfg
    short = suggest(TREE, planner(size, nodes), size, typical=Typical(response_tokens=16)).plan.cfg
    assert short.generators.min < long.generators.min


def test_settings_of_the_command_line_stay(sizes):
    tree = {**TREE, "learner": {"ranks": 2, "gpus": 1}, "generators": {"min": 9}}
    here = planner(sizes["1.5B"], MACHINES["8 x 80 GB"])
    assert suggest(tree, here, sizes["1.5B"]).plan.cfg.learner.ranks == 4
    found = suggest(tree, here, sizes["1.5B"], ["learner.ranks", "learner.gpus"])
    assert (found.plan.cfg.learner.ranks, found.plan.cfg.learner.gpus) == (2, 1)
    assert "learner.ranks" not in found.reasons


def test_numbers_of_processes_that_the_config_gives_are_replaced(sizes):
    tree = {**TREE, "generators": {"max": 2}, "reference": {"min": 2}, "learner": {"ranks": 9, "min_ranks": 9}}
    tree["ray"] = {"object_store_mib": 100}
    cfg = suggest(tree, planner(sizes["7B"], MACHINES["8 x 80 GB"]), sizes["7B"]).plan.cfg
    assert (cfg.generators.min, cfg.generators.max_replicas, cfg.reference.min) == (3, 3, 3)
    assert (cfg.learner.ranks, cfg.learner.fewest_ranks) == (5, 5)
    assert cfg.ray.object_store_mib is None


def test_values_that_exclude_every_layout_are_named(sizes):
    tree, here = {**TREE, "learner": {"ranks": 2, "gpus": 1}}, planner(sizes["1.5B"], MACHINES["1 x 80 GB"])
    with pytest.raises(
        UserError, match=r"obeys the rules of the config: .*learner.gpus \(0.27\) must be 1 for each of 2"
    ):
        suggest(tree, here, sizes["1.5B"], ["learner.ranks"])


def test_a_reward_model_gets_a_share(sizes):
    tree = {**TREE, "reward": {"sources": [{"name": "rm", "model": "org/rm"}]}}
    size, here = sizes["1.5B"], planner(sizes["1.5B"], MACHINES["1 x 80 GB"])
    assert suggest(tree, here, size).plan.cfg.reward.gpus > 0


def test_a_fault_of_the_config_is_no_lack_of_memory(sizes):
    with pytest.raises(ValueError, match="rollouts_per_step"):
        suggest({**TREE, "ppo": {"minibatches": 3}}, planner(sizes["135M"], MACHINES["1 x 24 GB"]), sizes["135M"])


def test_the_command_writes_a_config_whose_plan_fits(tmp_path, capsys, monkeypatch):
    config, out = tmp_path / "mine.toml", tmp_path / "suggested.toml"
    model = model_directory(tmp_path / "model", "1.5B")
    config.write_text('[prompts]\ntrain = "t"\n[[reward.sources]]\nname = "s"\nfunction = "m:f"\n')
    machine = ("--gpus", 1, "--gpu-memory", 24, "--cpus", 8, "--memory", 48)
    options = (config, f"model.path={model}", *machine)
    code, shown = plan(capsys, monkeypatch, *options, "--suggest", "--out", out)
    assert code == 0
    assert "learner.lora.rank: all weights fit these machines in no layout" in shown
    code, shown = plan(capsys, monkeypatch, out, *machine)
    assert code == 0
    assert "It fits." in shown
    small = (*options[:2], "--gpus", 1, "--gpu-memory", 4, "--cpus", 8, "--memory", 48)
    code, shown = plan(capsys, monkeypatch, *small, "--suggest")
    assert code == 1
    assert "no layout of this run fits these machines" in shown


def test_suggest_overwrites_no_file(tmp_path, capsys, monkeypatch):
    config = tmp_path / "mine.toml"
    config.write_text('[prompts]\ntrain = "t"\n[[reward.sources]]\nname = "s"\nfunction = "m:f"\n')
    before = config.read_text()
    code, _ = plan(capsys, monkeypatch, config, "--cpus", 2, "--memory", 16, "--suggest", "--out", config)
    assert code == 2
    assert config.read_text() == before


def test_a_plan_that_does_not_fit_ends_with_the_smallest_change(tmp_path, capsys, monkeypatch):
    config, model = tmp_path / "mine.toml", model_directory(tmp_path / "model", "7B")
    config.write_text(
        '[prompts]\ntrain = "t"\n[[reward.sources]]\nname = "s"\nfunction = "m:f"\n'
        f'[model]\npath = "{model}"\n[generators]\ngpus = 1\n'
        "[learner]\ngpus = 1\nlora.rank = 16\nmicro_batch_tokens = 32768\n"
    )
    machine = ("--gpus", 2, "--gpu-memory", 80, "--cpus", 8, "--memory", 400)
    code, shown = plan(capsys, monkeypatch, config, *machine)
    assert code == 1
    (change,) = re.findall(r"The smallest change that fits: (\S+) \(the same gradient in more passes\)", shown)
    assert change.startswith("learner.micro_batch_tokens=")
    assert plan(capsys, monkeypatch, config, change, *machine)[0] == 0
