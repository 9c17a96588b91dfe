"""Tests a loaded model: packed sequences must give the results of eager attention on each sequence alone.

Runs anywhere. Every process that loads a policy with transformers calls it before using the model. Nothing here depends
on the type of the model. The packed results come from the functions that the learner and the reference use.
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

# Different lengths. A leak from one sequence into the next shows most in the sequence of a single token.
LENGTHS = (5, 23, 1, 9)

# Largest accepted errors: of states, relative to their size; of log-probabilities, in nats. Measured over 75 types: in
# float32 correct models are off by at most 5e-6 and wrong ones by at least 0.03; in bfloat16 correct ones by 0.015.
_EXACT, _COARSE = (1e-4, 2e-3), (0.1, 0.5)


class UnsuitedModelError(ValueError):
    """A model does not compute what it should. The message continues a sentence about the model."""


@dataclass(frozen=True)
class EagerResults:
    """The results of eager attention on each sequence alone."""

    sequences: Sequences
    states: list[Tensor]  # of each sequence [length - 1, H]
    logprobs: list[Tensor]  # float32 [length - 1]


@torch.no_grad()
def eager_results(model: PreTrainedModel) -> EagerResults:
    """The expected results. Call it before any module of the model is replaced."""
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
    return EagerResults(sequences, states, logprobs)


@torch.no_grad()
def check_packed(model: PreTrainedModel, expected: EagerResults) -> None:
    """Raises UnsuitedModelError if the results of a packed row differ from the expected ones."""
    exact = model.dtype == torch.float32
    near, near_logprobs = _EXACT if exact else _COARSE
    try:
        states, token_ids = expected.sequences.response_states(model.base_model)
        head, finish = model.get_output_embeddings(), Finish.of(model.config)
        logprobs, entropy = chosen_logprobs(states, token_ids, head, temperature=1.0, finish=finish)
    except AttentionError as error:
        raise UnsuitedModelError(str(error)) from error
    except Exception as error:  # a model that cannot handle packed rows may raise any error
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
    """The largest relative error over all sequences."""
    errors = [(a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1).clamp_min(1e-9) for a, b in pairs if len(a)]
    return max(_typical(error, exact=exact) for error in errors)


def _typical(errors: Tensor, *, exact: bool) -> float:
    """The largest error. In bfloat16, the median over tokens, because rounding can send a token to another expert."""
    return float(errors.max() if exact else errors.median())


def _sequences(model: PreTrainedModel) -> Sequences:
    rng = np.random.default_rng(0)
    rows = len(model.get_input_embeddings().weight)
    ids = [rng.integers(min(3, rows - 1), rows, size=length) for length in LENGTHS]  # ids 0 to 2 are often padding
    return Sequences.pack([x[:1] for x in ids], [x[1:] for x in ids]).to(model.device)
