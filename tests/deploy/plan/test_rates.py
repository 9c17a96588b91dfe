"""Rates: which measurement counts, what `--rate` takes, and the file that a measurement writes."""

from pathlib import Path

import pytest
from pydantic import TypeAdapter

from actors.pool.ray_actor import worker_environment
from common.config.loading import load_config
from common.config.ppo import Config
from common.errors import UserError
from common.model.size import ModelSize, model_size
from deploy.plan.rates import H100, KINDS, ZEN5_CORE, Decoding, Rates, Speed, find_rates, own_rates, speed
from deploy.plan.seconds import step_seconds
from deploy.plan.work import Lengths
from tests.bench.batch import MODEL, config
from tests.bench.rates import decoding, learning, measure
from tests.fakes import save_tiny_model

LLAMA_1B = ModelSize(1_235_814_400, 16, 2048, 32, 8, 64, 128256, 131072)
SMOL = ModelSize(134_515_008, 30, 576, 9, 3, 64, 49152, 2048)


def made(**changes) -> Rates:
    one = Speed(10, 10, 1e9)
    return Rates(
        **{
            "kind": "own",
            "device": "cpu",
            "origin": "made up",
            "passes": (one,),
            "training": (one,),
            "decoding": Decoding(1, 1, 1),
            "publish_bytes_per_s": 1.0,
        }
        | changes
    )


def test_the_measurement_of_the_next_smaller_model_and_pass_counts():
    rows = [Speed(100, 8, 1.0), Speed(100, 16, 2.0), Speed(1000, 8, 3.0), Speed(1000, 16, 4.0)]
    wanted = {(100, 16): 2.0, (999, 15): 1.0, (5000, 99): 4.0, (1000, 8): 3.0, (1, 99): 2.0, (1000, 2): 3.0}
    assert {key: speed(rows, parameters=key[0], tokens=key[1]).per_s for key in wanted} == wanted


@pytest.mark.parametrize(
    ("size", "tokens", "seconds"),
    [
        (SMOL, 8192, 1.43),
        (SMOL, 16384, 0.68),
        (SMOL, 32768, 0.62),
        (LLAMA_1B, 8192, 1.15),
        (LLAMA_1B, 16384, 1.04),
        (LLAMA_1B, 32768, 1.02),
    ],
)
def test_the_rates_of_an_h100_give_back_its_measured_updates(size, tokens, seconds):
    # docs/performance.md: 64 rollouts of 256 to 1,024 tokens, half of them prompt, one epoch of one minibatch
    sections = {"ppo": {"ppo_epochs": 1}, "learner": {"gpus": 1, "micro_batch_tokens": tokens}}
    cfg = config("", **sections, rollouts_per_step=64, reference={"gpus": 1}, generators={"gpus": 1})
    found = step_seconds(cfg, size, [], {"gpu": H100}, lengths=Lengths(320, 320))
    learn = next(phase for phase in found.phases if phase.name == "learn")
    assert learn.seconds == pytest.approx(seconds, rel=0.03)  # lengths of one size have less attention


# Medians of the steps after the first of two runs on the machine of zen5-core, next to other programs: the config, the
# tokens of its prompts and responses, and seconds.
RECORDED = {
    "larger": (18.0, 6.97, {"generate": 1.66, "score": 1.08, "learn": 5.55, "publish": 0.23, "step": 8.53}),
    "reviews": (13.3, 15.9, {"generate": 2.03, "score": 1.58, "learn": 15.5, "publish": 0.21, "step": 19.3}),
}


@pytest.mark.parametrize("name", RECORDED)
def test_a_shipped_config_takes_about_the_seconds_of_recorded_steps(name):
    prompt, response, recorded = RECORDED[name]
    cfg = load_config(Path(f"deploy/configs/{name}.toml"), [], Config)
    found = step_seconds(cfg, SMOL, [], {"cpu": ZEN5_CORE}, lengths=Lengths(prompt, response), cores=2)
    seconds = {phase.name: phase.seconds for phase in (*found.phases, found.step)}
    assert {key: seconds[key] for key in recorded} == pytest.approx(recorded, rel=0.4)  # docs/plan.md says why
    assert seconds["step"] == pytest.approx(recorded["step"], rel=0.2)


def test_a_rate_is_named_by_its_kind_or_its_file(tmp_path):
    file = tmp_path / "rates.json"
    file.write_bytes(TypeAdapter(Rates).dump_json(made()))
    assert find_rates(["h100", str(file)]) == {"gpu": H100, "cpu": made()}
    assert find_rates([]) == {}


def test_a_rate_that_is_not_known_is_refused_with_the_list(tmp_path):
    with pytest.raises(UserError, match=f"--rate b300 must be one of {', '.join(KINDS)}, or a file"):
        find_rates(["b300"])
    (tmp_path / "other.json").write_text('{"kind": "own"}')
    with pytest.raises(UserError, match="cannot be read as one"):
        find_rates([str(tmp_path / "other.json")])


def test_this_machine_has_the_rates_of_devices_with_its_names(monkeypatch):
    monkeypatch.setattr("deploy.plan.rates.own_devices", lambda: {"cpu": "AuthenticAMD family 26", "gpu": "NVIDIA A10"})
    assert own_rates() == {"cpu": ZEN5_CORE}
    monkeypatch.setattr("deploy.plan.rates.own_devices", lambda: {"gpu": "NVIDIA H100 80GB HBM3"})
    assert own_rates() == {"gpu": H100}
    for other in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL"):  # slower cards with less or other memory
        monkeypatch.setattr("deploy.plan.rates.own_devices", lambda other=other: {"gpu": other})
        assert own_rates() == {}


def test_two_rates_of_one_device_are_refused(tmp_path):
    file = tmp_path / "rates.json"
    file.write_bytes(TypeAdapter(Rates).dump_json(made(device="gpu")))
    with pytest.raises(UserError, match="both rates of a gpu"):
        find_rates(["h100", str(file)])


def test_the_rates_of_an_update_are_its_work_over_the_seconds_of_a_clock(tmp_path, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr("tests.bench.rates.clock", lambda busy: lambda: next(ticks))  # a second at each look
    model = save_tiny_model(tmp_path)
    found = learning(str(model), False, 1, 512, True)
    # 24 rollouts with 36 + 36 tokens; two layers with two heads of 32; the output embedding has 64 rows of 64.
    weights = model_size(model).parameters - 64 * 64
    forward = 24 * (2 * weights * 72 + 2 * 64 * 64 * 36 + 2 * 2 * 2 * 32 * 72**2)
    assert found["passes"] == forward / 1  # two looks at the clock
    assert found["training"] == 3 * forward / 4  # what is left of seven seconds after 1 + 2
    assert found["optimizer"] == 2 * 40 * (weights + 64 * 64) / 2  # two steps


def test_rates_of_an_engine_solve_for_the_measured_seconds():
    # Each step reads 269,030,016 bytes of weights, and 23,040 bytes for each of the 72 tokens of a running sequence.
    # A sequence of 64 + 16 tokens takes the operations below; its first token comes with the prompt.
    head = 49152 * 576
    attention = 2 * 30 * 9 * 64
    prefill = 2 * (SMOL.parameters - head) * 64 + 2 * head + attention * 64**2
    decode = 2 * (SMOL.parameters - head) * 16 + 2 * head * 15 + attention * (80**2 - 64**2)

    def step_s(running: int) -> float:
        return (269_030_016 + running * 72 * 23_040) / 20e9 + running * decode / 15 / 150e9

    found = {"running": 64, "prefill_s": 64 * prefill / 200e9, "step_s": step_s(64), "step_of_one_s": step_s(1)}
    rates = decoding(found, SMOL)
    assert (rates.prefill_per_s, rates.decode_per_s) == pytest.approx((200e9, 150e9))
    assert rates.read_bytes_per_s == pytest.approx(20e9)


@pytest.mark.parametrize(("running", "measured_s"), [(1, 0.002545), (256, 0.012389)])
def test_vllms_own_time_gives_back_the_steps_of_an_h200(running, measured_s):
    """It was fitted to these two steps. The model is the Llama of 1.2B weights of tests/gpu_check/models.py:
    2,471,628,800 bytes of weights, and 32,768 bytes for each of the 72 tokens of a running sequence."""
    least_s = (2_471_628_800 + running * 72 * 32_768) / 4.8e12  # bytes of a step, by the data sheet of an H200
    assert least_s + H100.decoding.step_s + running * H100.decoding.rollout_s == pytest.approx(measured_s, rel=0.01)


def test_the_processes_that_measure_a_gpu_see_it(monkeypatch):
    parts = {
        "learning": {"pass_tokens": 8192, "passes": 1.0, "training": 1.0, "optimizer": 1.0, "packing": 1.0},
        "engine": {"running": 256, "prefill_s": 0.079, "step_s": 0.0124, "step_of_one_s": 0.0025},
    }
    workers = []

    def call(function, *args, threads, worker):
        workers.append(worker)
        return parts[function.partition(":")[2]]

    monkeypatch.setattr("tests.bench.rates.call", call)
    measure(MODEL, kind="own", gpu=True, busy=False)
    assert len(workers) == 4  # three sizes of micro-batches, and the engine
    assert all("CUDA_VISIBLE_DEVICES" not in worker_environment(worker) for worker in workers)
