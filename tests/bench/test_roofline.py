"""The arithmetic behind docs/performance.md, worked by hand on a model small enough for it."""

import pytest

from tests.bench.roofline import (
    LLAMA_2_7B,
    MISTRAL_7B,
    Machine,
    Model,
    Work,
    activation_bytes,
    collective_bytes,
    decode_seconds,
    forward_flops,
    gathered_bytes,
    layer_activation_bytes,
    rank_bytes,
    running,
    state_bytes,
    step_seconds,
    training_flops,
)

# Head size 2, so k and v are 2 x 2 = 4 wide.
TOY = Model("toy", layers=2, hidden=8, heads=4, kv_heads=2, intermediate=16, vocabulary=10)
SLOW = Machine(
    flops=1e6,
    memory=10_000,
    memory_rate=1000,
    link_rate=1000,
    host_rate=1000,
    compute_share=0.5,
    memory_share=0.5,
    link_share=0.5,
    host_share=0.5,
    usable_memory=0.9,
)


def test_parameters_are_those_of_the_published_checkpoints():
    assert LLAMA_2_7B.parameters == 6_738_415_616
    assert MISTRAL_7B.parameters == 7_241_732_096


def test_parameters_of_the_toy():
    # q, o: 2 x 8 x 8 = 128; k, v: 2 x 8 x 4 = 64; MLP: 3 x 8 x 16 = 384; norms: 16.
    assert TOY.layer_parameters == 592
    # Two layers, two embeddings of 10 x 8, the last norm.
    assert TOY.parameters == 2 * 592 + 160 + 8 == 1352
    # k and v, two layers, 4 wide, two bytes.
    assert TOY.kv_bytes == 32


def test_flops_of_a_token():
    # Matrices 2 x 2 x 576 = 2304; attention 4 x 2 x 8 x 6/2 = 192; half a head 0.5 x 2 x 80 = 80.
    assert forward_flops(TOY, 6, head_share=0.5) == 2304 + 192 + 80
    assert training_flops(TOY, 6, head_share=0.5, checkpointing=False) == 3 * 2576
    assert training_flops(TOY, 6, head_share=0.5, checkpointing=True) == 4 * 2576


def test_memory_of_a_rank():
    assert state_bytes(TOY, 4) == 16 * 1352 / 4
    # Three layers' worth and both embeddings, two bytes each.
    assert gathered_bytes(TOY) == 2 * (3 * 592 + 160)
    # 6 x 8 + 2 x 4 + 4 x 16 = 120 numbers of two bytes.
    assert layer_activation_bytes(TOY) == 240
    assert activation_bytes(TOY, 10, checkpointing=False) == 10 * 2 * 240
    # Two layer inputs of 16 bytes, and one layer whole.
    assert activation_bytes(TOY, 10, checkpointing=True) == 10 * (2 * 16 + 240)


def test_a_rank_receives_what_it_does_not_hold():
    gathered, scattered = collective_bytes(TOY, 4)
    assert gathered == 2 * 2 * 1352 * 3 / 4  # bf16, for forward and again for backward
    assert scattered == 4 * 1352 * 3 / 4
    assert collective_bytes(TOY, 1) == (0, 0)


def test_decoding_waits_for_memory_or_for_compute():
    # Weights without the input embedding 2 x 1272 = 2544 bytes, cache 3 x 7 x 32 = 672; at 500 bytes a second.
    assert decode_seconds(TOY, SLOW, batch=3, context=7) == pytest.approx((2544 + 672) / 500)
    # Matrices 2304, attention to 7 tokens 4 x 2 x 8 x 7 = 448, head 160; three sequences; 50 FLOP a second.
    slower = Machine(**{**vars(SLOW), "flops": 100})
    assert decode_seconds(TOY, slower, batch=3, context=7) == pytest.approx(3 * 2912 / 50)


def test_the_cache_gets_what_the_weights_leave():
    # 9000 usable, 2704 of weights; 32 bytes for each of 10 tokens.
    own = Work(prompt=4, response=6)
    assert running(TOY, SLOW, own) == (9000 - 2704) // 320 == 19
    # Shared with a reference of 2704 and a rank: 16 x 1352 / 32 = 676, gathered 3872, activations of a token 272.
    roomy = Machine(**{**vars(SLOW), "memory": 20_000})
    shared = Work(prompt=4, response=6, micro_batch_tokens=1, learners=32, shared=True)
    assert rank_bytes(TOY, shared) == 676 + 3872 + 272
    assert running(TOY, roomy, shared) == (18_000 - 2 * 2704 - 4820) // 320 == 24


def test_a_step_by_hand():
    work = Work(
        rollouts=4,
        prompt=4,
        response=4,
        epochs=2,
        minibatches=1,
        micro_batch_tokens=8,
        checkpointing=False,
        learners=2,
        generators=1,
        references=1,
    )
    phases = step_seconds(TOY, Machine(**{**vars(SLOW), "link_rate": 1e9}), work)
    # All 4 at once: 4 tokens, each bringing 2544 + 4 x 6 x 32 = 3312 bytes at 500 a second. Prefill: 16 tokens of
    # 2304 + 4 x 2 x 8 x 4/2 = 2432 at 500,000 a second.
    assert phases["generate"] == pytest.approx(4 * 3312 / 500 + 16 * 2432 / 5e5)
    assert phases["reference, beyond generation"] == 0
    # 32 tokens on two ranks; each costs 2304 + 4 x 2 x 8 x 8/2 + 0.5 x 160 = 2640.
    assert phases["old log-probabilities"] == pytest.approx(32 * 2640 / 2 / 5e5)
    assert phases["forward and backward"] == pytest.approx(2 * 32 * 3 * 2640 / 2 / 5e5)
    # Two optimizer steps, 28 bytes a parameter, half of them on a rank.
    assert phases["optimizer"] == pytest.approx(2 * 28 * 1352 / 2 / 500)
    # Off one GPU and onto others, 2 bytes a parameter.
    assert phases["publish"] == pytest.approx(2 * 2704 / 500)
    assert phases["step"] == pytest.approx(sum(phases.values()) / 2)


def test_communication_that_takes_longer_than_compute_sets_the_pace():
    work = Work(rollouts=4, prompt=4, response=4, micro_batch_tokens=8, epochs=1, learners=2)
    phases = step_seconds(TOY, SLOW, work)
    # Two micro-batches, each 4056 x 2/3 bytes in and as many out: 2 x 2 x 1352 / 2 and 4 x 1352 / 2, at 500 a second.
    assert phases["forward and backward"] == pytest.approx(2 * (2704 + 2704) / 500)
