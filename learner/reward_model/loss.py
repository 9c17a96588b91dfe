"""The loss of a reward model on preference pairs. Runs in each trainer rank."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def preference_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor, *, centre_coef: float, num_pairs: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """-log sigmoid(chosen - rejected - margin) + centre_coef (chosen + rejected)^2, summed over pairs / `num_pairs`.

    All float32 [B]; `num_pairs` counts the whole step over all ranks. The first term is the negative log-likelihood of
    Bradley and Terry (1952), with margins as in Llama 2 (arXiv:2307.09288, eq. 2). The second (Eisenstein et al. 2023,
    arXiv:2312.09244, section 2) fixes the origin of the scores, which differences leave open. Statistics, sums over
    pairs: `correct`, chosen above rejected; `margin`, chosen - rejected.
    """
    difference = chosen - rejected
    per_pair = -logsigmoid(difference - margins) + centre_coef * (chosen + rejected) ** 2
    stats = {"correct": (difference > 0).sum(), "margin": difference.detach().sum()}
    return per_pair.sum() / num_pairs, stats
