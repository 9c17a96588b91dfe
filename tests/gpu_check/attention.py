"""Packed attention against its definition in float64, forward and backward; and the time of its kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from common.model import attention
from common.model.attention import packed_attention
from common.model.lengths import Lengths
from tests.gpu_check.run import Run, error

LENGTHS = [1, 7, 64, 200, 33, 129]
NEAR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """A kind of attention that some model has."""

    model: str
    heads: int
    kv_heads: int
    width: int  # of queries and keys
    value_width: int | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.bfloat16


CASES = [
    Case("SmolLM2", 9, 3, 64),
    Case("Qwen2.5-7B", 28, 4, 128),
    Case("Phi-2", 8, 8, 80),
    Case("Gemma's width", 4, 2, 256),
    Case("Mistral's window", 8, 2, 128, window=48),
    Case("a window of the longest sequence", 8, 2, 128, window=200),
    Case("a window one shorter", 8, 2, 128, window=199),
    Case("DeepSeek's narrow values", 4, 4, 192, value_width=128),
    Case("Gemma 2's capped scores", 8, 4, 128, softcap=50.0),
    Case("gpt-oss's sinks", 8, 2, 64, window=48, sinks=True),
    Case("float32", 9, 3, 64, dtype=torch.float32),
    Case("float32 with a window", 8, 2, 128, window=48, dtype=torch.float32),
]


def check(run: Run) -> None:
    for case in CASES:
        run.part(f"attention, {case.model}", check_case, case)
    if run.on_gpu:
        run.part("attention, time", measure)
    else:
        run.skip("attention, time", "needs a GPU")


def check_case(run: Run, case: Case) -> None:
    q, k, v, sinks = inputs(case, run.device)
    arguments = [q, k, v, *([] if sinks is None else [sinks])]
    found, _ = packed_attention(
        torch.nn.Module(),
        q,
        k,
        v,
        None,
        scaling=case.width**-0.5,
        lengths=Lengths(LENGTHS, run.device),
        sliding_window=case.window,
        softcap=case.softcap,
        s_aux=sinks,
    )
    weight = torch.randn_like(found)
    gradients = torch.autograd.grad((found * weight).float().sum(), arguments)
    exact_arguments = [x.detach().double().requires_grad_() for x in arguments]
    exact = defined(case, *exact_arguments)
    exact_gradients = torch.autograd.grad((exact * weight.double()).sum(), exact_arguments)
    errors = [error(a, b) for a, b in zip((found, *gradients), (exact, *exact_gradients))]
    what = f"attention, {case.model}: values and gradients are off by {', '.join(f'{e:.1e}' for e in errors)}"
    run.expect(max(errors) < NEAR[case.dtype], what)


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch.manual_seed(1)
    total = sum(LENGTHS)
    shapes = (case.heads, case.width), (case.kv_heads, case.width), (case.kv_heads, case.value_width or case.width)
    q, k, v = (
        torch.randn(1, heads, total, width, device=device, dtype=case.dtype, requires_grad=True)
        for heads, width in shapes
    )
    sinks = torch.randn(case.heads, device=device, dtype=case.dtype, requires_grad=True) if case.sinks else None
    return q, k, v, sinks


def defined(case: Case, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Each sequence alone, from the definition. Returns [1, N, heads, E]."""
    parts = []
    for one_q, one_k, one_v in zip(*(x.split(LENGTHS, dim=2) for x in (q, k, v))):
        one_k, one_v = (x.repeat_interleave(case.heads // case.kv_heads, dim=1) for x in (one_k, one_v))
        visible = torch.ones(one_q.shape[2], one_q.shape[2], dtype=torch.bool, device=q.device).tril()
        if case.window:
            visible = visible.triu(1 - case.window)
        scores = one_q @ one_k.transpose(-1, -2) * case.width**-0.5
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            own = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, own], dim=-1)
        parts.append(scores.softmax(-1)[..., : one_k.shape[2]] @ one_v)
    return torch.cat(parts, dim=2).transpose(1, 2)


def measure(run: Run) -> None:
    """Forward and backward, 8 sequences of 1,024 tokens and 2 of 4,096: flash attention over packed sequences as a
    window and as causal, and torch's kernels for equal rows."""
    for rows, length in ((8, 1024), (2, 4096)):
        for heads, kv_heads, width in ((32, 8, 128), (32, 8, 64)):
            times = {
                "packed, window": packed_ms(run, rows, length, heads, kv_heads, width, (length - 1, 0)),
                "packed, causal": packed_ms(run, rows, length, heads, kv_heads, width, (-1, 0)),
                "rows, flash": rows_ms(run, rows, length, heads, kv_heads, width, SDPBackend.FLASH_ATTENTION),
                "rows, cuDNN": rows_ms(run, rows, length, heads, kv_heads, width, SDPBackend.CUDNN_ATTENTION),
            }
            listed = ", ".join(f"{name} {took:.2f}" for name, took in times.items())
            run.figure(f"attention, {rows} x {length} tokens, {heads}/{kv_heads} heads of {width}, ms: {listed}")


def packed_ms(
    run: Run, rows: int, length: int, heads: int, kv_heads: int, width: int, window: tuple[int, int]
) -> float:
    q, k, v = (
        torch.randn(rows * length, n, width, device=run.device, dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    ends = torch.arange(0, rows * length + 1, length, device=run.device, dtype=torch.int32)
    upstream = torch.randn_like(q)

    def work() -> None:
        out = attention.varlen_attn(q, k, v, ends, ends, length, length, window_size=window, enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), upstream)

    return run.milliseconds(work)


def rows_ms(run: Run, rows: int, length: int, heads: int, kv_heads: int, width: int, backend: SDPBackend) -> float:
    """Not a number if torch has no such kernel."""
    q, k, v = (
        torch.randn(rows, n, length, width, device=run.device, dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    upstream = torch.randn_like(q)

    def work() -> None:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), upstream)

    try:
        return run.milliseconds(work)
    except RuntimeError:
        return float("nan")
