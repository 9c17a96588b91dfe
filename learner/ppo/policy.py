"""The policy and its critic: a value head on the policy's own trunk, or on a network of its own.

Runs in every learner rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.config.ppo import LearnerConfig, OptimizerConfig
from common.model.files import load_policy
from common.model.kernels import install
from common.model.logprobs import Finish, chosen_logprobs
from common.model.packing import Sequences
from common.model.saved_weights import as_saved
from learner.ppo import lora
from learner.ppo.critic_files import load_body, load_head
from learner.ppo.frozen import freeze
from learner.ppo.frozen_states import States
from learner.ppo.preparation import prepare, weights_dtype
from learner.ppo.value_head import critic_tensors, head_values, new_head, values_of_states
from learner.ranks.distributed import whole


class PolicyWithCritic(nn.Module):
    """Policy and critic from one checkpoint. The value head starts at zero, so the first values are zero.

    The policy chooses response token t from a state that knows the prompt and the tokens before t. V_t is computed from
    the same state. Without a critic `value_head` is None, and no values are computed.
    """

    def __init__(
        self, policy: PreTrainedModel, critic_body: PreTrainedModel | None = None, *, has_critic: bool = True
    ) -> None:
        super().__init__()
        self.policy = policy
        self.critic_body = critic_body  # None: the policy's trunk serves both
        self.value_head = new_head(policy) if has_critic else None

    @classmethod
    def load(
        cls,
        directory: Path,
        cfg: LearnerConfig,
        device: torch.device,
        *,
        has_critic: bool,
        seed: int,
        critic: Path | None = None,
    ) -> PolicyWithCritic:
        """`critic`: the directory of a trained critic (learner/ppo/critic_files.py), which replaces the fresh one."""
        dtype = weights_dtype(cfg)
        policy = load_policy(directory, dtype=dtype, device=device, install=install)
        critic_body = None
        if has_critic and cfg.critic == "separate":
            if critic is None:
                critic_body = load_policy(directory, dtype=dtype, device=device, install=install).base_model
            else:
                critic_body = load_body(critic, type(policy.base_model), dtype=dtype, device=device)
                install(critic_body)
            freeze(critic_body, cfg.critic_frozen)
        for model in filter(None, (policy, critic_body)):
            prepare(model, cfg, seed=seed)
        network = cls(policy, critic_body, has_critic=has_critic)
        if network.value_head is not None and critic is not None:
            load_head(critic, network.value_head)
        return network

    def forward(
        self,
        sequences: Sequences | States,
        *,
        temperature: float,
        reference: bool = False,
        only_values: bool = False,
        only_states: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Log-probabilities, entropy and values of every response token, float32 [B, R]. Without a critic, values are
        None.

        With `reference` the log-probabilities are those without LoRA's adapters. With `only_values` the others are
        None: neither the output embedding nor, with a separate critic, the policy computes anything. With `only_states`
        it returns only the policy's states of the response tokens, [n, H]. If `States` are given instead of sequences,
        it returns only the values of the head, [n].
        """
        if isinstance(sequences, States):
            assert self.value_head is not None, "without a critic there is no head"
            return None, None, values_of_states(self.value_head, sequences)
        if only_states:
            return (sequences.response_states(self.policy.base_model)[0],)
        if only_values:  # no method of its own: FSDP gathers weights for `forward` only
            return None, None, self._values(sequences)
        with lora.off(self.policy) if reference else nullcontext():
            states, token_ids = sequences.response_states(self.policy.base_model)
        head, finish = self.policy.get_output_embeddings(), Finish.of(self.policy.config)
        logprobs, entropy = chosen_logprobs(states, token_ids, head, temperature=temperature, finish=finish)
        return sequences.scatter(logprobs), sequences.scatter(entropy), self._values(sequences, states)

    def _values(self, sequences: Sequences, states: Tensor | None = None) -> Tensor | None:
        """Values [B, R] from the policy's states, which may be given, or from those of the critic's own network."""
        if self.value_head is None:
            return None
        if self.critic_body is not None:
            states, _ = sequences.response_states(self.critic_body)
        elif states is None:
            states, _ = sequences.response_states(self.policy.base_model)
        return sequences.scatter(head_values(self.value_head, states))

    def parts(self, cfg: OptimizerConfig) -> list[tuple[nn.Module, float]]:
        """The policy, and the parts of the critic, each with its peak learning rate."""
        parts: list[tuple[nn.Module | None, float]] = [
            (self.policy, cfg.learning_rate),
            (self.value_head, cfg.value_head_learning_rate),
            (self.critic_body, cfg.critic_learning_rate),
        ]
        return [(part, rate) for part, rate in parts if part is not None]

    def policy_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights under the names of `save_pretrained`, tied ones once, LoRA's adapters merged.

        Each is gathered from all ranks when the iterator reaches it, at most one layer at once. So every rank must run
        through them together.
        """
        return as_saved(self.policy, lora.merged(self.policy))

    def critic_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `learner.ppo.value_head.critic_tensors`; none without a critic."""
        return iter(()) if self.value_head is None else critic_tensors(self.value_head, self.critic_body)

    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's LoRA adapters, gathered as above; none without LoRA."""
        for name, parameter in self.policy.named_parameters():
            if lora.is_adapter(name):
                yield name, whole(parameter)
