"""The size of micro-batches that a run on GPUs gets if it is left out."""

from dataclasses import replace

import pytest

from common.config.ppo import Config
from common.config.reward_model import RewardTrainingConfig
from common.errors import UserError
from common.memory import GIB
from deploy.plan.micro_batches import with_micro_batches
from deploy.plan.needs import needs, trainer_needs
from deploy.plan.placement import Node
from tests.deploy.plan.shapes import check_fits
from tests.deploy.plan.test_capacity import H100, LLAMA_2_7B, MODEL
from tests.fakes import QWEN_1_5B


def config(**learner):
    rewards = {"sources": [{"name": "s", "function": "m:f"}]}
    return Config.model_validate({"prompts": {"train": "t"}, "reward": rewards, "learner": learner})


def node(gpu_memory):
    return Node("n", 64, 8, 1000 * GIB, gpu_memory)


def chosen(model, gpu_memory, **learner):
    phases = lambda cfg: [needs(cfg, model)]  # noqa: E731
    return with_micro_batches(config(**learner), model, [node(gpu_memory)], phases).learner.micro_batch_tokens


@pytest.mark.parametrize(
    ("parameters", "tokens"), [(1_000_000, 32_768), (999_999_999, 32_768), (1_000_000_000, 16_384)]
)
def test_small_models_get_larger_micro_batches(parameters, tokens):
    assert chosen(replace(MODEL, parameters=parameters), H100, gpus=1) == tokens


def test_on_the_cpu_and_where_it_is_given_the_size_stays():
    assert chosen(MODEL, H100) is None
    assert chosen(MODEL, H100, gpus=1, micro_batch_tokens=100) == 100


def test_where_nobody_knows_the_gpus_memory_the_size_is_moderate():
    assert chosen(MODEL, 0, gpus=1) == 8192


# Llama 2 7B with LoRA: frozen weights 13.48e9 bytes, adapters of rank 16 0.64e9 (16 bytes each), CUDA 0.63e9; and 11 *
# 4096 + 3 * 11,008 + 7 * 16 bf16 values for each token and each of 32 layers, 5.00e6 bytes.
@pytest.mark.parametrize(
    ("gib", "learner", "tokens"),
    [
        # 92 % of 80 GiB are 79.0e9 bytes, and of 40 GiB 39.5e9.
        (80, {}, 8192),  # 14.7e9 + 41.0e9; 16,384 tokens take 82.0e9
        (40, {}, 4096),  # 14.7e9 + 20.5e9
        (91, {}, 8192),  # 96.7e9 of 97.7e9 for 16,384 tokens would leave too little
        (98, {}, 16_384),  # 96.7e9 of 96.8e9
        (80, {"gpus": 0.5}, 4096),
        (80, {"gradient_checkpointing": True}, 16_384),  # of a layer only its input
        (16, {}, 512 // 2),  # none fits
    ],
)
def test_micro_batches_are_halved_until_the_plan_fits_the_share(gib, learner, tokens):
    found = chosen(LLAMA_2_7B, gib * GIB, **{"gpus": 1, "lora": {}, **learner})
    assert found == max(tokens, 512)
    cfg = config(**{"gpus": 1, "lora": {}, **learner, "micro_batch_tokens": found})
    if tokens >= 512:
        check_fits(needs(cfg, LLAMA_2_7B), [node(gib * GIB)])
    else:
        with pytest.raises(UserError, match="no node has room for Learner"):
            check_fits(needs(cfg, LLAMA_2_7B), [node(gib * GIB)])


@pytest.mark.parametrize(
    ("model", "gib", "sleep", "tokens"),
    [
        (QWEN_1_5B, 24, True, 4096),
        (QWEN_1_5B, 24, False, 1024),
        (LLAMA_2_7B, 80, True, 8192),
        (LLAMA_2_7B, 80, False, 1024),
    ],
)
def test_a_learner_has_room_for_more_tokens_while_the_engine_sleeps(model, gib, sleep, tokens):
    """LoRA on one GPU. Of 92 % of 24 GiB the learner has 6.6, or all but the 2 that a sleeping engine keeps; 2.2 GiB
    for 1,024 tokens of Qwen2.5 1.5B, next to 3.7 that do not depend on them. Of 80 GiB it has 22.1; 4.8 GiB, next to
    13.7."""
    tree = config(gpus=0.3, lora={}).model_dump()
    tree |= {"max_staleness": 0, "generators": {"gpus": 0.7, "sleep": sleep}}
    one_gpu = Node("n", 64, 1, 1000 * GIB, gib * GIB)
    cfg = with_micro_batches(Config.model_validate(tree), model, [one_gpu], lambda cfg: [needs(cfg, model)])
    assert cfg.learner.micro_batch_tokens == tokens
    check_fits(needs(cfg, model), [one_gpu])


def test_reward_training_gets_its_size_in_the_same_way():
    def phases(cfg):
        return [trainer_needs(cfg.learner, QWEN_1_5B, row=1024)]

    cfg = RewardTrainingConfig.model_validate({"data": {"train": "pairs"}, "learner": {"gpus": 1}})
    # 16 bytes a weight are 24.7e9, the output embedding 0.93e9, CUDA 0.63e9; 2.05e6 bytes a token, of 39.5e9.
    assert with_micro_batches(cfg, QWEN_1_5B, [node(40 * GIB)], phases).learner.micro_batch_tokens == 4096
    assert with_micro_batches(cfg, QWEN_1_5B, [node(H100)], phases).learner.micro_batch_tokens == 16_384
