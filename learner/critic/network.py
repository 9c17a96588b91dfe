"""The network of a critic: a value head on states of a transformer body. Runs in every trainer rank.

`PolicyWithCritic` (learner/ppo/policy.py) puts the head next to a policy. `Critic` has no policy: `ratchet
train-critic` trains it on responses that are written already.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.config.ppo import LearnerConfig, OptimizerConfig
from common.model.compiled_layers import compile_layers
from common.model.files import load_policy
from common.model.kernels import install
from common.model.packing import Sequences
from common.model.recomputed_layers import checkpoint_activations
from common.model.saved_weights import as_saved
from learner.critic.files import HEAD
from learner.critic.frozen import freeze
from learner.critic.frozen_states import States
from learner.ppo import lora
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
    """Values [n] of kept states. A network returns them from its `forward`, and FSDP takes no view of another tensor
    there."""
    return head_values(head, states.values).clone()


def weights_dtype(cfg: LearnerConfig) -> torch.dtype:
    """float32; with LoRA the frozen weights are in the precision of the forward pass."""
    return torch.bfloat16 if cfg.lora is not None and cfg.precision == "bf16" else torch.float32


def prepare(model: PreTrainedModel, cfg: LearnerConfig, *, seed: int) -> None:
    """Adds what the settings ask for to a model that trains: adapters, recomputed activations, compiled layers."""
    if cfg.lora is not None:
        lora.add(model, cfg.lora, seed=seed)
    if cfg.gradient_checkpointing:
        checkpoint_activations(model)
    if cfg.compiles:
        compile_layers(model)


def critic_tensors(head: nn.Linear, body: PreTrainedModel | None) -> Iterator[tuple[str, Tensor]]:
    """The value head and, of a separate critic, its network, in float32 with LoRA's adapters merged: the tensors of
    `learner.critic.files.save_critic`. Each is gathered from all ranks when the iterator reaches it, so every rank must
    run through them together."""
    for name, parameter in head.named_parameters():
        yield f"{HEAD}{name}", whole(parameter)
    if body is not None:
        persistent = body.state_dict().keys()
        buffers = ((name, buffer.detach) for name, buffer in body.named_buffers() if name in persistent)
        yield from as_saved(body, chain(lora.merged(body, torch.float32), buffers))


class Critic(nn.Module):
    """A critic without a policy. With learner.critic = "shared" the body is the policy's trunk as training starts, and
    stays frozen: only the head trains."""

    def __init__(self, body: PreTrainedModel, value_head: nn.Linear, *, is_shared: bool) -> None:
        super().__init__()
        self.body, self.value_head, self.is_shared = body, value_head, is_shared
        if is_shared:
            body.requires_grad_(False)

    @classmethod
    def load(cls, directory: Path, cfg: LearnerConfig, device: torch.device, *, seed: int) -> Critic:
        """A fresh critic, from the model that training starts from."""
        policy = load_policy(directory, dtype=weights_dtype(cfg), device=device, install=install)
        head, body, is_shared = new_head(policy), policy.base_model, cfg.critic == "shared"
        if is_shared:
            if cfg.compiles:
                compile_layers(body)
        else:
            freeze(body, cfg.critic_frozen)
            prepare(body, cfg, seed=seed)
        return cls(body, head, is_shared=is_shared)

    def forward(self, batch: Sequences | States, *, only_states: bool = False) -> tuple[Tensor]:
        """Values of every response token, float32: [B, R] of sequences, [n] of states. With `only_states` instead the
        states of the sequences, [n, H]."""
        if isinstance(batch, States):
            return (values_of_states(self.value_head, batch),)
        states, _ = batch.response_states(self.body)
        return (states if only_states else batch.scatter(head_values(self.value_head, states)),)

    def parts(self, cfg: OptimizerConfig) -> list[tuple[nn.Module, float]]:
        """The parts that train, each with its peak learning rate."""
        head = (self.value_head, cfg.value_head_learning_rate)
        return [head] if self.is_shared else [head, (self.body, cfg.critic_learning_rate)]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `critic_tensors`."""
        return critic_tensors(self.value_head, None if self.is_shared else self.body)
