"""The value head on states of a transformer body: its values, and its tensors for a file. Runs in every trainer rank.

`PolicyWithCritic` (learner/ppo/policy.py) and `Critic` (learner/critic/network.py) have one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.model.saved_weights import as_saved
from learner.ppo import lora
from learner.ppo.critic_files import HEAD
from learner.ppo.frozen_states import States
from learner.ranks.distributed import whole


def new_head(policy: PreTrainedModel) -> nn.Linear:
    """A value head for the states of this language model. It starts at zero, so the first values are zero."""
    width = policy.get_output_embeddings().weight.shape[1]  # the layers of OPT-350m have another width
    head = nn.Linear(width, 1, device=policy.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def head_values(head: nn.Linear, states: Tensor) -> Tensor:
    """Values [n] of states [n, H], float32."""
    with torch.autocast(states.device.type, enabled=False):  # bfloat16 has 8 bits: too coarse for a value
        return head(states.float()).squeeze(-1)


def values_of_states(head: nn.Linear, states: States) -> Tensor:
    """Values [n] of kept states. They are cloned, because FSDP does not accept a view as an output of `forward`."""
    return head_values(head, states.values).clone()


def critic_tensors(head: nn.Linear, body: PreTrainedModel | None) -> Iterator[tuple[str, Tensor]]:
    """The value head and, of a separate critic, its network, in float32 with LoRA's adapters merged: the tensors of
    `learner.ppo.critic_files.save_critic`. Each is gathered from all ranks when the iterator reaches it, so every rank
    must run through them together."""
    for name, parameter in head.named_parameters():
        yield f"{HEAD}{name}", whole(parameter)
    if body is not None:
        persistent = body.state_dict().keys()
        buffers = ((name, buffer.detach) for name, buffer in body.named_buffers() if name in persistent)
        yield from as_saved(body, chain(lora.merged(body, torch.float32), buffers))
