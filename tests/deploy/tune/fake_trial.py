"""Stands for `ratchet train` in tests of tuning: writes the files of a run, with values that follow from its settings.

Its last argument but --restarts is the run directory. After each evaluation it waits until the tuning has taken the
value, so that a decision always comes before the next step. Settings with these values misbehave:

    ppo.value_coef = 7      a health rule holds from step 1 on
    ppo.value_coef = 8      the run fails after step 3
    ppo.value_coef >= 9     the run fails before its first step
    ppo.clip_eps = 0.9      ... if there is no file "mended" next to the directory of the tuning

A file "hold" next to the directory of the tuning has "NAME STEP": the run NAME waits after that step until it is told
to stop.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import tomllib
from pathlib import Path

LIMIT_S = 60


def main(arguments: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    assert arguments[-2:] == ["--restarts", "1"]
    command, *rest, option, run = arguments[:-2]
    directory = Path(run)
    assert command == "train"
    if option == "--resume":
        assert rest == []
        settings = json.loads((directory / "settings.json").read_text())
    else:
        assert option == "--run"
        config, *given = rest
        tree = tomllib.loads(Path(config).read_text())
        settings = {"num_steps": tree["num_steps"], "every": tree["evaluation"]["every"]}
        for key, _, text in (setting.partition("=") for setting in given):
            settings[key] = tomllib.loads(f"value = {text}")["value"]
    begin(directory, settings)
    append(directory / "starts.jsonl", {"arguments": arguments, "pid": os.getpid()})
    train(directory, settings)


def begin(directory: Path, settings: dict) -> None:
    broken = settings.get("ppo.clip_eps") == 0.9 and not (directory.parents[2] / "mended").exists()
    if broken or settings.get("ppo.value_coef", 0) >= 9:
        fail("nothing fits", directory)
    directory.mkdir(exist_ok=True)
    (directory / "settings.json").write_text(json.dumps(settings))
    (directory / "config.toml").write_text("")


def train(directory: Path, settings: dict) -> None:
    done = {record["policy_version"] for record in read(directory / "evaluations.jsonl")}
    trained = len(read(directory / "metrics.jsonl"))
    for step in range(settings["num_steps"] + 1):
        if step > trained:
            ill = ["kl_exploding"] if settings.get("ppo.value_coef") == 7 else []
            append(directory / "metrics.jsonl", {"step": step - 1, "health": ill})
        if settings.get("ppo.value_coef") == 8 and step == 3:
            fail("mismatch/kl was above ppo.max_mismatch_kl", directory)
        if (step % settings["every"] == 0 or step == settings["num_steps"]) and step not in done:
            score = value(settings, step)
            append(
                directory / "evaluations.jsonl",
                {"policy_version": step, "score": score, "pass_at_1": score / 2, "components": {"correct": -score}},
            )
            if step < settings["num_steps"]:
                wait_until(lambda step=step: taken(directory, step))
        hold = directory.parents[2] / "hold"
        if hold.exists() and hold.read_text() == f"{name(directory)} {step}":
            (directory / "held").touch()
            wait_until(lambda: False)
    (directory / "summary.json").write_text("{}")


def fail(message: str, directory: Path) -> None:
    """As the driver and its parent process end."""
    parent = f"the run has used up its 1 restarts (--restarts); continue with ratchet train --resume {directory}"
    sys.exit(f"ratchet: {message}\nratchet: {parent}")


def value(settings: dict, step: int) -> float:
    """The best learning rate is 1e-5, the best clip_eps the largest; ppo.entropy_coef changes nothing."""
    rate = settings.get("optimizer.learning_rate", 1e-5)
    height = 1 - 0.2 * abs(math.log10(rate) + 5) + settings.get("ppo.clip_eps", 0.0)
    return round(step / settings["num_steps"] * height + 0.01 * (settings["seed"] % 2), 6)


def name(directory: Path) -> str:
    return directory.name if "repeat" in directory.name else directory.name.partition("-")[0]


def taken(directory: Path, step: int) -> bool:
    events = read(directory.parent.parent / "events.jsonl")
    return any(event.get("run") == name(directory) and event.get("step") == step for event in events)


def wait_until(condition) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def read(path: Path) -> list[dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def append(path: Path, record: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
