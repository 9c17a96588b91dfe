"""The work that a plan counts, against the operations that torch really executes in an update of a tiny model."""

from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from common.model.size import ModelSize, model_size
from deploy.plan.work import OPTIMIZER_BYTES, Lengths, generation, published_bytes, scoring, update
from learner.ppo.learner import Learner
from tests.bench.batch import batch, config
from tests.fakes import save_tiny_tokenizer

ROWS, TOKENS = 8, 24  # every rollout has 12 tokens of prompt and 12 of response
SIZE = ModelSize(parameters=1000, layers=2, hidden=10, heads=2, kv_heads=1, head_dim=5, vocabulary=20, context=99)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Wide layers and few tokens to choose from: then hardly anything but the weights takes operations."""
    directory = tmp_path_factory.mktemp("wide")
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    named = {"vocab_size": 64, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**shape, **named, max_position_embeddings=128)).save_pretrained(directory)
    save_tiny_tokenizer(directory)
    return str(directory)


CASES = {
    "one trunk": {},
    "mask": {"ppo": {"policy_loss": "mask", "clip_eps": 0.3}},
    "no critic, mask": {"ppo": {"advantages": "returns", "policy_loss": "mask", "clip_eps": 0.3}},
    "one micro-batch": {"ppo": {"minibatches": 1}, "learner": {"micro_batch_tokens": 512}},
    "critic passes": {"ppo": {"value_epochs": 2}, "learner": {"critic": "separate"}},
    "head passes": {"ppo": {"value_epochs": 2}},
    "checkpointing": {"learner": {"gradient_checkpointing": True}},
    "adapters": {"learner": {"lora": {"rank": 1}}},
    "frozen": {"learner": {"critic": "separate", "critic_frozen": "attention"}},
}


@pytest.mark.parametrize("case", CASES)
def test_an_update_takes_the_operations_that_are_counted(model, case):
    sections = CASES[case]
    ppo = {"ppo_epochs": 1, "minibatches": 2} | sections.get("ppo", {})
    learner = {"micro_batch_tokens": 2 * TOKENS} | sections.get("learner", {})
    cfg = config(model, rollouts_per_step=ROWS, ppo=ppo, learner=learner)
    table = batch(model, rollouts=ROWS, shortest=TOKENS, longest=TOKENS)
    trained = Learner(cfg)
    with FlopCounterMode(display=False) as counter:
        trained.update(table)
    done = update(cfg, model_size(Path(model)), Lengths(TOKENS / 2, TOKENS / 2))
    assert done.before + done.training == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_optimizer_moves_forty_bytes_for_each_trained_weight_and_step(model):
    size = model_size(Path(model))
    plain = update(config(model, ppo={"ppo_epochs": 3, "minibatches": 4}), size, Lengths(12, 12))
    assert plain.optimizer_bytes == 3 * 4 * 40 * size.parameters
    both = {"ppo": {"ppo_epochs": 1, "minibatches": 1, "value_epochs": 2}, "learner": {"critic": "separate"}}
    separate = update(config(model, **both), size, Lengths(12, 12))
    assert separate.optimizer_bytes == OPTIMIZER_BYTES * (2 + 2) * size.parameters  # both; then the critic twice


def test_an_engine_reads_weights_and_cache_in_each_step():
    sections = {
        "rollouts_per_step": 20,
        "prompts": {"train": "tests.bench.task:prompts", "max_tokens": 30},
        "sampling": {"max_new_tokens": 10},
    }
    done = generation(config("", **sections, generators={"min": 2}), SIZE, Lengths(30, 10), cache_bytes=None)
    assert (done.rollouts, done.running) == (10, 10)
    assert done.steps == 10  # one token for all ten in each
    token = 2 * 2 * 1 * 5 * 2  # bytes: keys and values, two layers, one head of five numbers in bfloat16
    assert done.step_bytes == 2 * 1000 + 10 * token * 35  # half of a response is there on average
    # Weights without the output embedding (20 x 10): 800. Two layers with two heads of five: 2 x 2 x 2 x 5 = 40.
    assert done.prefill == 10 * (2 * 800 * 30 + 2 * 200 + 40 * 30**2)
    assert done.prefill + done.decode == 10 * (2 * 800 * 40 + 2 * 200 * 10 + 40 * 40**2)

    short_of_cache = generation(config("", **sections), SIZE, Lengths(30, 10), cache_bytes=4 * 40 * token + 1)
    assert (short_of_cache.rollouts, short_of_cache.running, short_of_cache.steps) == (20, 4, 50)

    # 20 rollouts, eight at once: 8, 8 and 4 of them, so 3 x 10 steps, and 20 / 3 rollouts in each on average.
    three_waves = generation(config("", **sections), SIZE, Lengths(30, 10), cache_bytes=8 * 40 * token + 1)
    assert (three_waves.running, three_waves.steps) == (8, 30)
    assert three_waves.step_bytes == pytest.approx(2 * 1000 + 20 / 3 * token * 35)


def test_reward_models_pass_no_output_embedding():
    assert scoring(config("", rollouts_per_step=3), [SIZE, SIZE], Lengths(4, 6)) == 3 * 2 * (1600 * 10 + 40 * 100)


def test_a_publication_has_the_bytes_that_runs_record():
    # weights/bytes of every step of deploy/configs/larger.toml, whose model has 134,515,008 weights
    assert published_bytes(ModelSize(134_515_008, 30, 576, 9, 3, 64, 49152, 2048)) == 269_030_016
