"""Ratchet's forward passes of a layer (common/model/kernels.py) against transformers' own: values, time and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from common.model.attention import PACKED
from common.model.compiled_layers import compile_layers
from common.model.kernels import install
from common.model.lengths import Lengths
from common.model.packing import embed
from tests.gpu_check.models import SHAPES
from tests.gpu_check.profile import kernel_times
from tests.gpu_check.run import Run, error

LAYERS = 2
WAYS = {
    "transformers' own": {"replaced": False},
    "Ratchet's": {"replaced": True},
    "Ratchet's, compiled": {"replaced": True, "compiled": True},
}


@dataclass(frozen=True)
class Pass:
    """Some layers on packed sequences of equal length."""

    model: PreTrainedModel
    ids: Tensor  # [1, N]
    positions: Tensor  # [1, N]
    lengths: Lengths
    upstream: Tensor  # [1, N, H], the gradient of the states

    def __call__(self) -> Tensor:
        """The states, after a backward pass."""
        self.model.zero_grad(set_to_none=True)
        body: Any = self.model.base_model
        with torch.autocast(self.ids.device.type, torch.bfloat16):
            states = body(
                inputs_embeds=embed(body, self.ids), position_ids=self.positions, use_cache=False, lengths=self.lengths
            ).last_hidden_state
        states.backward(self.upstream.to(states.dtype))
        return states.detach()


def make_pass(run: Run, shape: dict[str, Any], lengths: list[int], *, replaced: bool, compiled: bool = False) -> Pass:
    torch.manual_seed(0)
    settings = LlamaConfig(**{**shape, "num_hidden_layers": LAYERS, "vocab_size": 1024})
    with run.device:
        model = AutoModelForCausalLM.from_config(settings, attn_implementation=PACKED, dtype=torch.float32).eval()
    if replaced:
        count = install(model)
        run.expect(count >= 7 * LAYERS, f"kernels: {count} modules replaced")
    if compiled:
        compile_layers(model)
    ids = torch.randint(1024, (1, sum(lengths)), device=run.device)
    positions = torch.cat([torch.arange(n, device=run.device) for n in lengths])[None]
    upstream = torch.randn(1, sum(lengths), settings.hidden_size, device=run.device)
    return Pass(model, ids, positions, Lengths(lengths, run.device), upstream)


def check(run: Run) -> None:
    run.part("kernels, values", check_values)
    if not run.on_gpu:
        run.skip("kernels, time", "needs a GPU")
        return
    for name in ("1.2B", "7B"):
        for whose, how in WAYS.items():
            run.part(f"kernels, time of {name}", measure, name, whose, how)


def check_values(run: Run) -> None:
    """Ratchet's passes, compiled too, must be as close to float32 as transformers' own are."""
    shape, lengths = SHAPES["135M"], [100, 3, 57]
    exact = make_pass(run, shape, lengths, replaced=False)
    off = {}
    for name, how in WAYS.items():
        mine = make_pass(run, shape, lengths, **how)
        states, gradients = mine(), [p.grad for p in mine.model.base_model.parameters()]
        with torch.autocast(run.device.type, enabled=False):
            wanted, exact_gradients = float32_results(exact)
        off[name] = [error(states, wanted), max(error(a, b) for a, b in zip(gradients, exact_gradients))]
    listed = "; ".join(f"{name} {values:.1e}, {gradients:.1e}" for name, (values, gradients) in off.items())
    own, *others = off.values()
    ok = all(mine < 1.5 * theirs + 1e-6 for other in others for mine, theirs in zip(other, own))
    run.expect(ok, f"kernels: values and gradients in bf16 are off from float32 by: {listed}")


def float32_results(exact: Pass) -> tuple[Tensor, list[Tensor]]:
    exact.model.zero_grad(set_to_none=True)
    body: Any = exact.model.base_model
    states = body(
        inputs_embeds=body.get_input_embeddings()(exact.ids),
        position_ids=exact.positions,
        use_cache=False,
        lengths=exact.lengths,
    ).last_hidden_state
    states.backward(exact.upstream)
    return states.detach(), [p.grad.clone() for p in body.parameters()]


def measure(run: Run, name: str, whose: str, how: dict[str, bool]) -> None:
    lengths = [1024] * 8
    work = make_pass(run, SHAPES[name], lengths, **how)
    first_s, _ = run.seconds(work)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    took = run.milliseconds(work, rounds=5)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    weights = sum(p.numel() for p in work.model.base_model.layers.parameters())
    rate = 6 * weights * sum(lengths) / took / 1e9
    run.figure(
        f"kernels, {LAYERS} layers of {name}, {sum(lengths)} tokens, {whose}: {took:.1f} ms, {rate:.0f} TFLOP/s, "
        f"{peak:.2f} GiB more; the first pass took {first_s:.1f} s"
    )
    run.figure(f"kernels, {name}, {whose}, ms on the GPU: {kernel_times(work)}")
