"""Seconds of phases from round rates and hand-counted work; which phases overlap; what has no number."""

from dataclasses import replace

import pytest

from common.model.size import ModelSize
from deploy.plan.needs import Need
from deploy.plan.overlap import one_gpu, overlapping
from deploy.plan.placement import Node, place
from deploy.plan.rates import Decoding, Rates, Speed
from deploy.plan.seconds import step_seconds
from deploy.plan.work import Lengths
from tests.bench.batch import config

# Weights without the output embedding (20 x 10): 800. Two layers with two heads of five: 40 operations of attention for
# each pair of tokens. A rollout has 30 + 10 tokens.
SIZE = ModelSize(parameters=1000, layers=2, hidden=10, heads=2, kv_heads=1, head_dim=5, vocabulary=20, context=99)
LENGTHS = Lengths(30, 10)
PASS = 2 * 800 * 40 + 2 * 200 * 10 + 40 * 40**2  # of a rollout
PREFILL = 2 * 800 * 30 + 2 * 200 + 40 * 30**2
STEP_BYTES = 2 * 1000 + 8 * 40 * 35  # eight running, 40 bytes for each token of the cache, 35 tokens on average

CPU = Rates(
    kind="round",
    device="cpu",
    origin="made up",
    passes=(Speed(1000, 1, 1000.0),),
    training=(Speed(1000, 1, 500.0),),
    decoding=Decoding(prefill_per_s=4000.0, decode_per_s=2000.0, read_bytes_per_s=100.0),
    publish_bytes_per_s=10.0,
    optimizer_bytes_per_s=50.0,
    gain=0.5,
)
GPU = Rates(**{**vars(CPU), "device": "gpu", "optimizer_bytes_per_s": None})
SHEET = Rates(**{**vars(GPU), "decoding": Decoding(4000.0, 4000.0, 100.0, data_sheet=True), "publish_whole": False})


def plan(rates=CPU, *, cores=None, gpus=None, reward_models=(), **sections):
    """The seconds of each phase of a step with eight rollouts, and which of them are the least possible."""
    tree = {
        "rollouts_per_step": 8,
        "prompts": {"train": "tests.bench.task:prompts", "max_tokens": 30},
        "sampling": {"max_new_tokens": 10},
        "ppo": {"ppo_epochs": 1, "minibatches": 2},
    }
    cfg, of_device = config("", **(tree | sections)), {rates.device: rates}
    found = step_seconds(cfg, SIZE, reward_models, of_device, lengths=LENGTHS, cores=cores, gpus=gpus)
    phases = (*found.phases, found.step)
    return {p.name: p.seconds for p in phases}, {p.name for p in phases if p.at_least}


GAME = {"environment": {"function": "tests.environments:Counting", "max_tokens": 10}}


def test_the_time_in_which_environments_answer_is_left_out():
    plain, least = plan()
    assert "generate" not in least
    seconds, least = plan(**GAME)
    assert seconds["generate"] == plain["generate"]
    assert {"generate", "step"} <= least
    cfg = config("", sampling={"max_new_tokens": 10}, prompts={"train": "t", "max_tokens": 30}, **GAME)
    generate = step_seconds(cfg, SIZE, (), {"cpu": CPU}, lengths=LENGTHS).phases[0]
    assert "the time in which environments answer is not counted" in generate.detail


REWARD_MODEL = {"name": "model", "model": "x"}
ON_GPUS = {name: {"gpus": 1} for name in ("generators", "reference", "learner")}
GENERATE = 8 * PREFILL / 4000 + 8 * (PASS - PREFILL) / 2000 + 10 * STEP_BYTES / 100
LEARN = 8 * PASS / 1000 + 3 * 8 * PASS / 500 + 2 * 40 * 1000 / 50  # before; forward and backward; two optimizer steps


def test_phases_divide_their_work_by_the_rates():
    seconds, least = plan()
    assert seconds["generate"] == pytest.approx(GENERATE)
    assert seconds["score"] == pytest.approx(8 * PASS / 1000)
    assert seconds["learn"] == pytest.approx(LEARN)
    assert seconds["publish"] == 2 * 1000 / 10
    assert seconds["step"] == pytest.approx(GENERATE + 8 * PASS / 1000 + LEARN + 200)  # max_staleness is 0
    assert not least


def test_threads_and_replicas_divide_the_seconds():
    seconds, _ = plan(generators={"threads": 2}, reference={"min": 4}, learner={"threads": 3})
    assert seconds["generate"] == pytest.approx(GENERATE / 1.5)  # a second thread gains half
    assert seconds["score"] == pytest.approx(8 * PASS / 1000 / 4)
    passes = seconds["old log-probabilities"] + seconds["passes"]
    assert passes == pytest.approx((8 * PASS / 1000 + 24 * PASS / 500) / 2)
    assert seconds["optimizer"] == 2 * 40 * 1000 / 50  # the memory is not faster


def test_a_data_sheet_gives_the_least_seconds():
    seconds, least = plan(SHEET, **ON_GPUS)
    assert seconds["generate"] == pytest.approx(max(8 * PASS / 4000, 10 * STEP_BYTES / 100))
    assert least == {"generate", "publish", "step"}


def test_vllms_own_time_is_added_and_not_divided_among_gpus():
    slow_host = replace(SHEET, decoding=replace(SHEET.decoding, step_s=3.0, rollout_s=0.5))
    for engine in ({"gpus": 1}, {"gpus": 2, "tensor_parallel": 2}):
        without, found = (
            plan(rates, **ON_GPUS | {"generators": engine})[0]["generate"] for rates in (SHEET, slow_host)
        )
        assert found == pytest.approx(without + 10 * 3.0 + 10 * 8 * 0.5)


def test_roles_on_different_devices_work_at_the_same_time():
    assert plan(GPU, **ON_GPUS, max_staleness=1)[0]["step"] == pytest.approx(
        max(GENERATE, 8 * PASS / 1000, LEARN - 1600) + 200
    )
    one_gpu = {"generators": {"gpus": 0.5}, "reference": {"gpus": 0.5}, "learner": {"gpus": 0.5}}
    assert plan(GPU, **one_gpu, max_staleness=1)[0]["step"] == pytest.approx(
        GENERATE + 8 * PASS / 1000 + (LEARN - 1600) + 200
    )


def test_roles_on_one_gpu_take_turns():
    sections = {**ON_GPUS, "generators": {"gpus": 0.8}, "reference": {"gpus": 0.2}, "max_staleness": 1}
    score = 8 * PASS / 1000
    beside_an_engine = plan(GPU, **sections, gpus=[{"learner"}, {"generators", "reference"}, {"generators"}])
    assert beside_an_engine[0]["step"] == pytest.approx(max(GENERATE + score, LEARN - 1600) + 200)
    apart = plan(GPU, **sections, gpus=[{"learner"}, {"generators"}, {"reference"}])
    assert apart[0]["step"] == pytest.approx(max(GENERATE, LEARN - 1600) + 200)
    with_learner = plan(GPU, **sections, gpus=[{"learner", "reference"}, {"generators"}])
    assert with_learner[0]["step"] == pytest.approx(max(GENERATE, score + LEARN - 1600) + 200)


def test_reference_and_reward_model_on_one_gpu_take_turns():
    sections = {**ON_GPUS, "reference": {"gpus": 0.5}, "reward": {"gpus": 0.5, "sources": [REWARD_MODEL]}}
    alone, both = (
        plan(GPU, **sections, reward_models=[SIZE], gpus=[{"learner"}, {"generators"}, *scorers])[0]["score"]
        for scorers in ([{"reference"}, {"reward"}], [{"reference", "reward"}])
    )
    score, reward = 8 * PASS / 1000, 8 * (2 * 800 * 40 + 40 * 40**2) / 1000
    assert (alone, both) == (pytest.approx(score), pytest.approx(score + reward))


def test_two_processes_of_one_role_on_one_gpu_take_turns():
    """Each has half of the rollouts. Side by side they take half of the time, on one GPU as long as a single one."""
    sections = {**ON_GPUS, "reference": {"gpus": 0.5, "min": 2}, "max_staleness": 1}
    engines = [["generators"], ["generators"]]
    apart, together = (
        plan(GPU, **sections, gpus=[["learner"], *engines, *scorers])[0]
        for scorers in ([["reference"], ["reference"]], [["reference", "reference"]])
    )
    assert (apart["score"], together["score"]) == (pytest.approx(4 * PASS / 1000), pytest.approx(8 * PASS / 1000))
    busy = {"generators": 3.0, "reference": 2.0, "learner": 1.0}
    cfg = config("", **sections)
    for gpus, seconds in (([["generators", "reference"]], 5), ([["generators", "reference", "reference"]], 7)):
        assert overlapping(cfg, busy, gpus, cores=None)[0] == seconds


def test_the_plan_finds_the_roles_that_share_a_gpu():
    shares = {"Learner(0)": ("learner", 1), "Generator(0)": ("generators", 0.8), "Generator(1)": ("generators", 0.8)}
    shares |= {"ReferencePolicy(0)": ("reference", 0.2)}
    needs = [Need(name, section, 0, gpus, {}) for name, (section, gpus) in shares.items()]
    found = one_gpu(place(needs, [Node("n", 8, 3, 1)]))
    assert sorted(map(sorted, found)) == [["generators"], ["generators", "reference"], ["learner"]]
    in_use = one_gpu(place(needs, [Node("n", 8, 3, 1, gpus_in_use=0.5)]))  # nobody knows which
    assert list(map(set, in_use)) == [{"generators", "reference"}]


def test_roles_on_the_cpu_share_its_cores():
    work = GENERATE + 8 * PASS / 1000 + LEARN  # of one thread in each role
    assert plan(max_staleness=1, cores=2)[0]["step"] == pytest.approx(max(work / 2, LEARN) + 200)
    assert plan(max_staleness=1, cores=64)[0]["step"] == pytest.approx(LEARN + 200)


def test_adapters_make_the_learner_its_own_reference():
    sections = {"learner": {"lora": {"rank": 2}, "threads": 3}, "reference": {"threads": 64, "min": 64}}
    seconds, _ = plan(**sections)
    score, learn = 8 * PASS / 1000 / 2, (8 * PASS / 1000 + 2 * 8 * PASS / 500) / 2  # no gradients of weights
    assert seconds["score"] == pytest.approx(score)
    assert seconds["optimizer"] == 0
    together = {**sections, "max_staleness": 1}  # the same ranks score and learn
    assert plan(**together, cores=64)[0]["step"] == pytest.approx(max(GENERATE, score + learn) + 200)
    work = GENERATE + 3 * (score + learn)  # of one thread
    assert plan(**together, cores=2)[0]["step"] == pytest.approx(work / 2 + 200)


def test_the_slower_of_reward_model_and_reference_counts():
    sources = [REWARD_MODEL, {"name": "variety", "function": "tests.bench.task:reward"}]
    large = ModelSize(**{**vars(SIZE), "parameters": 3200})
    seconds, _ = plan(reward_models=[large], reward={"sources": sources})
    assert seconds["score"] == pytest.approx(8 * (2 * 3000 * 40 + 40 * 40**2) / 1000)


def test_a_device_without_a_rate_gets_a_sentence_and_no_number():
    found = step_seconds(config("", **ON_GPUS), SIZE, [], {"cpu": CPU})
    learn = next(phase for phase in found.phases if phase.name == "learn")
    assert learn.seconds is None
    assert "--rate h100" in learn.detail
    assert "tests.bench.rates" in learn.detail
    assert found.step.seconds is None
    assert found.step.detail == "no number for generate, score, learn, publish"


def test_only_rates_that_a_phase_used_have_an_origin():
    both = {"cpu": CPU, "gpu": Rates(**{**vars(GPU), "kind": "card"})}

    def origins(**sections):
        return [o.partition(":")[0] for o in step_seconds(config("", **sections), SIZE, [], both).origins]

    assert origins() == ["round"]
    assert origins(learner={"gpus": 1, "lora": {"rank": 2}}, generators={"gpus": 1}) == ["card"]  # no reference
    assert origins(learner={"gpus": 1}, generators={"gpus": 1}) == ["round", "card"]
    in_float32 = {"learner": {"gpus": 1, "lora": {"rank": 2}, "precision": "fp32"}, "generators": {"gpus": 1}}
    assert origins(**in_float32, max_staleness=1) == ["card"]


def test_no_rate_of_bfloat16_serves_float32():
    seconds, _ = plan(generators={"dtype": "float32"}, learner={"precision": "fp32"})
    assert seconds["generate"] is seconds["learn"] is seconds["step"] is None
    assert seconds["score"] is not None


def test_several_ranks_take_at_least_their_share():
    seconds, least = plan(GPU, **{**ON_GPUS, "learner": {"gpus": 1, "ranks": 4}})
    assert seconds["learn"] == pytest.approx((LEARN - 1600) / 4)
    assert least == {"learn", "old log-probabilities", "passes", "step"}


def test_smaller_passes_than_measured_take_at_least_their_seconds():
    few = Rates(**{**vars(CPU), "training": (Speed(1000, 512, 500.0),), "passes": (Speed(1000, 512, 1000.0),)})
    seconds, least = plan(few)
    assert seconds["learn"] == pytest.approx(LEARN)
    assert {"learn", "step"} < least
    assert "score" not in least  # its passes have up to 4,096 tokens
    assert "score" in plan(few, reference={"max_batch_tokens": 256})[1]
