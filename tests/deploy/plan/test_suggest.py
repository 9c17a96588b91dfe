"""`ratchet plan --suggest`: a config that fits, or the resource that is missing."""

import re
import tomllib

import pytest

from common.config.loading import load_config
from common.config.ppo import Config
from common.errors import UserError
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
    assert "ranks = 4  # of 8 GPUs; weights, gradients and optimizer state are split over them" in lines
    assert "# generators.kv_cache_mib is left out: the rest of the engine's share" in lines
    cfg = tomllib.loads("\n".join(lines))
    given = {f"{name}.{key}" for name in ("learner", "generators", "reference") for key in cfg[name]}
    assert given <= set(found.reasons)


def test_one_gpu_is_shared_and_the_engine_sleeps(sizes):
    cfg = suggest(TREE, planner(sizes["1.5B"], MACHINES["1 x 80 GB"]), sizes["1.5B"]).plan.cfg
    assert cfg.lent_share == cfg.generators.gpus > 0
    assert cfg.max_staleness == 0
    assert 0.95 < cfg.learner.gpus + cfg.generators.gpus + cfg.reference.gpus <= 1


def test_all_gpus_have_work(sizes):
    cfg = suggest(TREE, planner(sizes["7B"], MACHINES["2 x 8 x 80 GB"]), sizes["7B"]).plan.cfg
    assert cfg.learner.ranks + cfg.generators.min + cfg.reference.gpus == 16
    assert cfg.max_staleness == 1  # so that engines and ranks work at the same time
    more = {**TREE, "max_staleness": 3}
    assert suggest(more, planner(sizes["7B"], MACHINES["8 x 80 GB"]), sizes["7B"]).plan.cfg.max_staleness == 3


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
    assert (cfg.generators.min, cfg.generators.max_replicas, cfg.reference.min) == (3, 3, 1)
    assert (cfg.learner.ranks, cfg.learner.fewest_ranks) == (4, 4)
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
