"""How fast a kind of device computes: measured rates, and where each comes from. Runs in the driver.

A rate is the work of deploy/plan/work.py divided by measured seconds, so it contains everything that a pass does
besides its matrix products. `python -m tests.bench.rates` measures the rates of a machine and writes them to a file
that `ratchet plan --rate FILE` takes.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from common.errors import UserError


@dataclass(frozen=True)
class Speed:
    """Operations per second of passes with a model of this size, and this many tokens in each pass."""

    parameters: int
    tokens: int
    per_s: float


@dataclass(frozen=True)
class Decoding:
    """The rates of an engine. The bytes that a step reads and its operations are each divided by a rate. With measured
    rates, a step takes the sum of the two times. With the rates of a data sheet, the larger one is the least time that
    a step can take. `step_s` and `rollout_s` are added in both cases. They were measured on one machine; another may
    need less."""

    prefill_per_s: float  # operations
    decode_per_s: float  # operations
    read_bytes_per_s: float  # weights, keys and values
    data_sheet: bool = False
    step_s: float = 0.0  # seconds of each step beyond these rates: mostly Python, and starting kernels
    rollout_s: float = 0.0  # the same, for each rollout that a step continues


@dataclass(frozen=True)
class Rates:
    """The rates of one device: a GPU, or a CPU core with one thread. In bfloat16."""

    kind: str
    device: Literal["gpu", "cpu"]
    origin: str
    passes: tuple[Speed, ...]  # without gradients
    training: tuple[Speed, ...]  # forward and backward
    decoding: Decoding
    publish_bytes_per_s: float
    publish_whole: bool = True  # False: the rate is of packing alone, so a publication takes longer
    optimizer_bytes_per_s: float | None = None  # None: the optimizer's time is in the rate of training
    gain: float = 1.0  # of each further thread, as a share of the first one's rate
    device_name: str = ""  # a part of the name that such a device has, see `own_devices`

    def threads(self, count: int) -> float:
        """How many times as fast this many threads are."""
        return 1 + self.gain * (count - 1)


def speed(measured: Sequence[Speed], *, parameters: int, tokens: float) -> Speed:
    """The measurement to use for a model and passes of this size: the largest one that is not above this size. First
    the model's size decides, then the number of tokens. If all are above, the smallest one. Rates rise with both sizes.
    So the estimate is too slow rather than too fast, except below the smallest measurement."""
    sizes = {one.parameters for one in measured}
    size = max((size for size in sizes if size <= parameters), default=min(sizes))
    rows = sorted((one for one in measured if one.parameters == size), key=lambda one: one.tokens)
    return max((one for one in rows if one.tokens <= tokens), key=lambda one: one.tokens, default=rows[0])


H100_SPEEDS = (  # operations of an update, divided by its seconds; docs/performance.md has the seconds
    Speed(134_515_008, 8_192, 30.4e12),
    Speed(134_515_008, 16_384, 64.0e12),
    Speed(134_515_008, 32_768, 70.2e12),
    Speed(1_235_814_400, 8_192, 321e12),
    Speed(1_235_814_400, 16_384, 355e12),
    Speed(1_235_814_400, 32_768, 362e12),
)
H100 = Rates(
    kind="h100",
    device="gpu",
    origin=(
        "passes, updates and packing measured on one NVIDIA H100 80GB HBM3, 2026-11-26, without compiled layers "
        "(docs/performance.md). vLLM was not measured on it. Generation is the least time by the data sheet, 989 "
        "TFLOP/s in bfloat16 and 3.35 TB/s, plus vLLM's own time, measured on the machine of an H200: 2.0 ms for each "
        "step and 0.038 ms for each rollout in it"
    ),
    passes=H100_SPEEDS,
    training=H100_SPEEDS,
    # With 1.2B weights and rollouts of 72 tokens an H200 took 2.55 ms for a step of one rollout and 12.4 ms for one of
    # 256. By its data sheet (4.8 TB/s) it would take 0.52 and 0.64 ms. The rest counts as vLLM's own time.
    decoding=Decoding(989e12, 989e12, 3.35e12, data_sheet=True, step_s=1.99e-3, rollout_s=38e-6),
    publish_bytes_per_s=13.5e9 / 1.95,
    publish_whole=False,
    device_name="H100 80GB HBM3",
)
ZEN5_CORE = Rates(
    kind="zen5-core",
    device="cpu",
    origin=(
        "measured with SmolLM2-135M on a virtual machine with two cores of an AMD EPYC (family 26), 2026-11-27, next "
        "to other programs: CPU seconds of one thread, and the shortest of six publications; the gain of a second "
        "thread is from docs/performance.md"
    ),
    passes=(Speed(134_515_008, 128, 174e9), Speed(134_515_008, 256, 231e9), Speed(134_515_008, 512, 269e9)),
    training=(Speed(134_515_008, 128, 159e9), Speed(134_515_008, 256, 218e9), Speed(134_515_008, 512, 259e9)),
    decoding=Decoding(prefill_per_s=316e9, decode_per_s=198e9, read_bytes_per_s=15.1e9),
    publish_bytes_per_s=269e6 / 0.198,
    optimizer_bytes_per_s=47.6e9,
    gain=0.8,
    device_name="AuthenticAMD family 26",
)
KINDS = {rates.kind: rates for rates in (H100, ZEN5_CORE)}


def find_rates(names: Sequence[str]) -> dict[str, Rates]:
    """The rates that `--rate` names, by device ("gpu" or "cpu"). A name is one of KINDS, or a file of measured rates.
    Raises UserError for another name, and for two rates of one device."""
    found: dict[str, Rates] = {}
    for name in names:
        rates = KINDS.get(name) or _read(name)
        if rates.device in found:
            raise UserError(
                f"--rate {name} and --rate {found[rates.device].kind} are both rates of a {rates.device}; give one for "
                "GPUs and one for CPUs at most"
            )
        found[rates.device] = rates
    return found


def own_rates() -> dict[str, Rates]:
    """The rates of this machine's devices, by device, where a kind with that name was measured."""
    names = own_devices()
    return {
        rates.device: rates
        for rates in KINDS.values()
        if rates.device_name and rates.device_name in names.get(rates.device, "")
    }


def own_devices() -> dict[str, str]:
    """The names of this machine's CPU (vendor and family: many kinds have one model name) and of its first GPU."""
    found = {}
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        values = [next(line for line in lines if line.startswith(key)) for key in ("vendor_id", "cpu family")]
        found["cpu"] = " family ".join(value.partition(":")[2].strip() for value in values)
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        found["gpu"] = answer.partition("\n")[0]
    return found


def _read(name: str) -> Rates:
    """The rates in a file that tests/bench/rates.py has written."""
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"--rate {name} must be one of {', '.join(KINDS)}, or a file that `python -m tests.bench.rates --out FILE` "
            "has written; there is no such kind or file"
        )
    try:
        return TypeAdapter(Rates).validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise UserError(
            f"--rate {name} must be a file that `python -m tests.bench.rates --out FILE` has written, but it cannot be "
            f"read as one ({str(error).splitlines()[0]}); write it again"
        ) from None
