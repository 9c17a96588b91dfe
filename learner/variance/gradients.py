"""The policy gradients of equal parts of a batch, for several estimators of the advantages. Runs in every rank.

It is the gradient of the policy's loss in the first minibatch of an update, before any weight has moved: the ratio is 1
there, and nothing is clipped. (With ppo.policy_loss = "mask" the ratio divides by the sampler's probability, and tokens
outside the bounds are left out.) The gradient is linear in the advantages. So the gradient of unwhitened advantages
follows from that of the whitened ones, and from the gradient of an advantage of 1 at every token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from common.model.masking import masked_mean, masked_var, whiten
from learner.ppo.experience import ExperienceBatch
from learner.ppo.learner import Learner
from learner.ppo.objective import policy_term
from learner.ppo.targets import Targets
from learner.variance.sketch import ROOM, GradientSketches

WHITENED_EPS = 1e-8  # that of `whiten`


def equal_parts(groups: np.ndarray, count: int, *, seed: int) -> list[np.ndarray]:
    """The rows of each part. All responses to a prompt are in one part, because they are not independent of each other.
    The prompts are divided at random; if `count` does not divide them, some parts have one prompt more."""
    prompts = np.random.default_rng(seed).permutation(np.unique(groups))
    return [np.flatnonzero(np.isin(groups, part)) for part in np.array_split(prompts, count)]


@dataclass(frozen=True)
class Products:
    """Inner products of the gradients of M parts for E estimators, float64 [E + 1, M, E + 1, M]. The gradients are
    scaled so that their mean over the parts is the gradient of the batch. The last of the E + 1 is an advantage of 1 at
    every token."""

    table: np.ndarray
    names: tuple[str, ...]
    shift: Mapping[str, float]  # mean of the advantages before whitening
    scale: Mapping[str, float]  # what whitening divided them by
    weights: int  # trained weights of the policy
    kept: int  # numbers that each gradient was kept as; `weights`: the products are exact

    def whitened(self, name: str, other: str | None = None) -> np.ndarray:
        """[M, M], between the parts of two estimators; left out: of one."""
        return self.table[self._at(name), :, self._at(other or name), :]

    def unwhitened(self, name: str, other: str | None = None) -> np.ndarray:
        """The same for advantages before whitening. These are scale * whitened + shift, and so are their gradients."""
        other = other or name
        one = len(self.names)
        first = self.scale[name] * self.table[self._at(name)] + self.shift[name] * self.table[one]  # [M, E + 1, M]
        return self.scale[other] * first[:, self._at(other), :] + self.shift[other] * first[:, one, :]

    def _at(self, name: str) -> int:
        return self.names.index(name)


def gradient_products(
    learner: Learner,
    batch: ExperienceBatch,
    fixed: Targets,
    advantages: Mapping[str, Tensor],
    parts: Sequence[np.ndarray],
    *,
    done: Callable[[int], None] = lambda parts: None,
    room: int = ROOM,
) -> Products:
    """advantages: by estimator, [B, R], before whitening. `fixed`: the other targets of the batch. Every rank must call
    it. `done` gets the number of parts done so far."""
    mask = batch.mask
    advantages_and_one = [*(whiten(x, mask) for x in advantages.values()), mask.float()]
    if isinstance(learner.network, FSDPModule):
        # A pass without gradients leaves the root's weights gathered. Without this call, the parameters below would be
        # other tensors than those that get the gradients.
        learner.network.reshard()
    policy = [p for p in learner.network.policy.parameters() if p.requires_grad]
    sketches = GradientSketches(policy, len(advantages_and_one) * len(parts), seed=learner.cfg.seed, room=room)
    for number, rows in enumerate(parts):
        for chosen in learner.share_of(batch.sequences, rows):
            numbers = [number + len(parts) * estimator for estimator in range(len(advantages_and_one))]
            _add_gradients(learner, batch, fixed, advantages_and_one, chosen, sketches, numbers)
        done(number + 1)
    ranks = learner.ranks
    sizes = ranks.sum(torch.tensor([sketches.weights, sketches.width]))
    table = ranks.sum(sketches.products()) * len(parts) ** 2
    shape = (len(advantages_and_one), len(parts)) * 2
    return Products(
        table.reshape(shape).numpy(),
        tuple(advantages),
        {name: float(masked_mean(x.double(), mask)) for name, x in advantages.items()},
        {name: float((masked_var(x.double(), mask) + WHITENED_EPS).sqrt()) for name, x in advantages.items()},
        *map(int, sizes),
    )


def _add_gradients(
    learner: Learner,
    batch: ExperienceBatch,
    fixed: Targets,
    advantages_and_one: Sequence[Tensor],
    chosen: Tensor,
    sketches: GradientSketches,
    numbers: Sequence[int],
) -> None:
    """Adds the gradients of one micro-batch to the sketches of its part; `numbers`: that of each estimator's. One
    forward pass serves all estimators, and each has a backward pass of its own."""
    ppo, num_tokens = learner.cfg.ppo, max(1, int(batch.mask.sum()))
    logprobs, _, _ = learner.outputs(batch.sequences, chosen)
    for number, values in zip(numbers, advantages_and_one, strict=True):
        part = replace(fixed, advantages=values).rows(chosen, logprobs.shape[1], learner.device)
        loss, _ = policy_term(logprobs, part, ppo=ppo, num_tokens=num_tokens)
        learner.backward(loss, again=number != numbers[-1])
        sketches.add(number)
        learner.optimizer.zero_grad(set_to_none=True)
