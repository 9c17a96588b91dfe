"""`chosen_logprobs` against float64; time and memory of its tiles at large vocabularies."""

from __future__ import annotations

import torch
from torch import nn

from common.model.logprobs import GPU_TILE, Finish, chosen_logprobs
from tests.gpu_check.run import Run, error

TILES = ((1024, 8192), GPU_TILE, (4096, 16384), (4096, 65536), (8192, 32768))


def check(run: Run) -> None:
    for finish in (Finish(), Finish(scale=0.5, cap=30.0)):
        run.part(f"head, {finish}", check_values, finish)
    if not run.on_gpu:
        run.skip("head, time", "needs a GPU")
        return
    for hidden, vocabulary in ((576, 49152), (2048, 128256), (3584, 152064)):
        run.part(f"head, time of {hidden} x {vocabulary}", measure, hidden, vocabulary)


def check_values(run: Run, finish: Finish) -> None:
    torch.manual_seed(0)
    head = nn.Linear(64, 3000, bias=False, device=run.device)
    states = torch.randn(300, 64, device=run.device, requires_grad=True)
    ids, temperature = torch.randint(3000, (300,), device=run.device), 0.7
    found = torch.stack(chosen_logprobs(states, ids, head, temperature=temperature, finish=finish, tile=(128, 1024)))
    exact_states, exact_weight = (x.detach().double().requires_grad_() for x in (states, head.weight))
    logits = exact_states @ exact_weight.t() * finish.scale
    logits = logits if finish.cap is None else finish.cap * torch.tanh(logits / finish.cap)
    every = (logits / temperature).log_softmax(-1)
    exact = torch.stack([every.gather(-1, ids[:, None])[:, 0], -(every.exp() * every).sum(-1)])
    gradients = torch.autograd.grad((found[0] + 0.3 * found[1]).sum(), (states, head.weight))
    exact_gradients = torch.autograd.grad((exact[0] + 0.3 * exact[1]).sum(), (exact_states, exact_weight))
    errors = [error(a, b) for a, b in zip((*found, *gradients), (*exact, *exact_gradients))]
    listed = ", ".join(f"{e:.1e}" for e in errors)
    run.expect(max(errors) < 1e-5, f"head, {finish}: log-probabilities, entropy and gradients are off by {listed}")


def measure(run: Run, hidden: int, vocabulary: int, tokens: int = 4096) -> None:
    """Forward and backward under autocast, as in an update. The backward pass makes the logits again, so there are four
    matrix products."""
    head = nn.Linear(hidden, vocabulary, bias=False, device=run.device)
    states = torch.randn(tokens, hidden, device=run.device, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(vocabulary, (tokens,), device=run.device)
    operations = 4 * 2 * tokens * hidden * vocabulary
    for tile in TILES:

        def work(tile: tuple[int, int] = tile) -> None:
            with torch.autocast("cuda", torch.bfloat16):
                logprobs, _ = chosen_logprobs(states, ids, head, temperature=1.0, tile=tile)
            logprobs.sum().backward()

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        took = run.milliseconds(work, rounds=5)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        run.figure(
            f"head, {hidden} x {vocabulary}, {tokens} tokens, tile {tile}: {took:.1f} ms, "
            f"{operations / took / 1e9:.0f} TFLOP/s, {peak:.2f} GiB more"
        )
