"""Whether a model gives packed sequences what transformers' own eager attention gives each of them alone.

Runs wherever a model is loaded, before it is used. Nothing here knows a type of model: what is right is decided by
computing it both ways, through the functions that the learner and the reference use.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.model.attention import AttentionError
from common.model.logprobs import Finish, chosen_logprobs
from common.model.packing import Sequences

# Different lengths, one of a single token: whatever runs over from one sequence to the next shows in it most.
LENGTHS = (5, 23, 1, 9)

# How far states may be off, relative to their size, and log-probabilities, nats. Measured over 75 types of models: in
# float32 right ones are off by at most 5e-6 and wrong ones by at least 0.03; in bfloat16 right ones by 0.015.
_EXACT, _COARSE = (1e-4, 2e-3), (0.1, 0.5)


class UnsuitedModelError(ValueError):
    """What a model computes otherwise; the message begins in the middle of a sentence about the model."""


@dataclass(frozen=True)
class Alone:
    """What eager attention gives each sequence by itself."""

    sequences: Sequences
    states: list[Tensor]  # of each sequence [length - 1, H]
    logprobs: list[Tensor]  # float32 [length - 1]


@torch.no_grad()
def alone(model: PreTrainedModel) -> Alone:
    """Call it before anything in the model is replaced: this is what replacements are compared with."""
    if model.base_model is model:
        raise UnsuitedModelError("its layers cannot be called without its output embedding")
    sequences = _sequences(model)
    states, logprobs = [], []
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        for ids in sequences.input_ids.split(sequences.lengths.tolist()):
            states.append(model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1])
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            logprobs.append(logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1))
    finally:
        model.set_attn_implementation(usual)
    return Alone(sequences, states, logprobs)


@torch.no_grad()
def compare(model: PreTrainedModel, expected: Alone) -> None:
    """Raises UnsuitedModelError if a packed row is computed otherwise."""
    exact = model.dtype == torch.float32
    near, near_logprobs = _EXACT if exact else _COARSE
    try:
        states, token_ids = expected.sequences.response_states(model.base_model)
        head, finish = model.get_output_embeddings(), Finish.of(model.config)
        logprobs, entropy = chosen_logprobs(states, token_ids, head, temperature=1.0, finish=finish)
    except AttentionError as error:
        raise UnsuitedModelError(str(error)) from error
    except Exception as error:  # what a model raises that takes no packed row is its own choice
        raise UnsuitedModelError(
            f"it cannot read several sequences in one row ({type(error).__name__}: {error})"
        ) from error
    counts = [len(part) for part in expected.states]
    if not all(bool(x.isfinite().all()) for x in (*expected.states, *expected.logprobs, states, logprobs, entropy)):
        raise UnsuitedModelError("it computes numbers that are not finite")
    pairs = list(zip(states.split(counts), expected.states, strict=True))
    if _error(pairs, exact=exact) > near:
        first = _error(pairs[:1], exact=exact)
        where = (
            "its attention is not the packed one" if first > near else "its layers mix the sequences of a packed row"
        )
        raise UnsuitedModelError(
            f"{where}: its states differ from its own eager attention's by {_error(pairs, exact=exact):.2g} of their "
            "size"
        )
    off = max(
        _typical((one - other).abs(), exact=exact)
        for one, other in zip(logprobs.split(counts), expected.logprobs, strict=True)
        if len(one)
    )
    if off > near_logprobs:
        raise UnsuitedModelError(
            f"it changes its logits after the output embedding in an unknown way: log-probabilities differ by {off:.2g}"
        )


def _error(pairs: list[tuple[Tensor, Tensor]], *, exact: bool) -> float:
    """The largest relative error of any sequence."""
    errors = [(a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1).clamp_min(1e-9) for a, b in pairs if len(a)]
    return max(_typical(error, exact=exact) for error in errors)


def _typical(errors: Tensor, *, exact: bool) -> float:
    """In bfloat16 the median over tokens: rounding sends a token to another expert now and then."""
    return float(errors.max() if exact else errors.median())


def _sequences(model: PreTrainedModel) -> Sequences:
    rng = np.random.default_rng(0)
    rows = len(model.get_input_embeddings().weight)
    ids = [rng.integers(min(3, rows - 1), rows, size=length) for length in LENGTHS]  # 0 to 2 are often padding
    return Sequences.pack([x[:1] for x in ids], [x[1:] for x in ids]).to(model.device)
