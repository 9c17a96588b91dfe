"""One PPO step in the way of classic single-process trainers: `step_vs_plain` compares with it.

It follows `new/ppo_left_padding.py` of vwxyzjn/summarize_from_feedback_details (Huang et al. 2024, arXiv:2403.17031).
trl's PPOTrainer took over its order of work; lm-human-preferences before them is similar. Common to them:

- prompts padded on the left to the longest, responses of a fixed length, written by Hugging Face `generate`;
- everything in float32 with the library's default attention (sdpa);
- policy, critic (with its own trunk and scalar head) and frozen reference in one process, which does one thing after
  another;
- separate passes over the finished rollouts for old log-probabilities, reference and old values, in micro-batches;
- logits on all positions including the prompt, of which the response's are kept;
- epochs over the batch in micro-batches with accumulated gradients, clipped policy and value losses, one AdamW over
  policy and critic.

Nothing here is slower than that way implies. Some parts are faster: all prompts generate as one batch, AdamW is fused,
and no statistics (entropy, clipped shares) are computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.model.files import load_tokenizer, resolve_model

MICRO_BATCH, EPOCHS = 8, 4
GAMMA, LAM, KL_COEF, CLIP, VALUE_CLIP, VALUE_COEF = 1.0, 0.95, 0.05, 0.2, 0.2, 0.1
LEARNING_RATE, MAX_GRAD_NORM = 1e-6, 1.0


@dataclass(frozen=True)
class Rollouts:
    """Left-padded prompts and their responses, with what an update holds fixed. P longest prompt, R response length."""

    ids: Tensor  # [B, P + R]
    attended: Tensor  # bool [B, P + R], False on padding
    mask: Tensor  # bool [B, R], response tokens up to the end token
    old_logprobs: Tensor  # [B, R], as all below
    old_values: Tensor
    advantages: Tensor
    returns: Tensor

    def rows(self, index: Tensor) -> Rollouts:
        return Rollouts(*(getattr(self, field.name)[index] for field in fields(self)))


class Critic(nn.Module):
    """A trunk of its own with a scalar head on every position."""

    def __init__(self, trunk: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.config.hidden_size, 1)

    def forward(self, ids: Tensor, attended: Tensor, num_response: int) -> Tensor:
        """Values [B, R]: of the positions that the response tokens are chosen at."""
        states = self.trunk(**inputs(ids, attended)).last_hidden_state
        return self.head(states).squeeze(-1)[:, -num_response - 1 : -1]


class PlainPPO:
    def __init__(self, model: str, *, max_new_tokens: int) -> None:
        directory = resolve_model(model)
        self.tokenizer = load_tokenizer(directory)
        self.max_new_tokens = max_new_tokens
        self.policy, self.reference, trunk = (
            AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval() for _ in range(3)
        )
        self.reference.requires_grad_(False)
        self.critic = Critic(trunk.base_model)
        parameters = [*self.policy.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)

    def step(self, prompts: Sequence[Sequence[int]], score: Callable[[str], float]) -> dict[str, float]:
        """One whole step on these prompts; returns seconds per phase."""
        started = time.perf_counter()
        ids, attended, mask = self.generate(prompts)
        generated = time.perf_counter()
        rollouts = self.measure(ids, attended, mask, score)
        measured = time.perf_counter()
        self.optimise(rollouts)
        ended = time.perf_counter()
        return {
            "generate_s": generated - started,
            "score_s": measured - generated,
            "learn_s": ended - measured,
            "step_s": ended - started,
        }

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """ids and attended [B, P + R], response mask [B, R]."""
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        attended = torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attended[row, width - len(prompt) :] = True
        end = self.tokenizer.eos_token_id
        ids = self.policy.generate(
            input_ids=ids,
            attention_mask=attended.long(),
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=end,
            pad_token_id=end,
        )
        ended = (ids[:, width:] == end).long().cumsum(1)
        mask = (ended == 0) | ((ended == 1) & (ids[:, width:] == end))
        return ids, torch.cat([attended, mask], dim=1), mask

    @torch.no_grad()
    def measure(self, ids: Tensor, attended: Tensor, mask: Tensor, score: Callable[[str], float]) -> Rollouts:
        """Old and reference log-probabilities, old values, rewards per token, advantages."""
        num_response = mask.shape[1]
        chunks = list(zip(ids.split(MICRO_BATCH), attended.split(MICRO_BATCH), strict=True))
        old_logprobs = torch.cat([logprobs(self.policy, *chunk, num_response) for chunk in chunks])
        ref_logprobs = torch.cat([logprobs(self.reference, *chunk, num_response) for chunk in chunks])
        old_values = torch.cat([self.critic(*chunk, num_response) for chunk in chunks])
        texts = self.tokenizer.batch_decode(ids[:, -num_response:], skip_special_tokens=True)

        rewards = -KL_COEF * (old_logprobs - ref_logprobs)
        last = mask.sum(1) - 1
        rewards[torch.arange(len(ids)), last] += torch.tensor([score(text) for text in texts])
        advantages, returns = gae(rewards * mask, old_values * mask, mask)
        kept = advantages[mask]
        advantages = (advantages - kept.mean()) / (kept.std() + 1e-8) * mask
        return Rollouts(ids, attended, mask, old_logprobs, old_values, advantages, returns)

    def optimise(self, rollouts: Rollouts) -> None:
        for _ in range(EPOCHS):
            micro_batches = torch.randperm(len(rollouts.ids)).split(MICRO_BATCH)
            for index in micro_batches:
                loss = self.loss(rollouts.rows(index)) / len(micro_batches)
                loss.backward()
            nn.utils.clip_grad_norm_([*self.policy.parameters(), *self.critic.parameters()], MAX_GRAD_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def loss(self, batch: Rollouts) -> Tensor:
        num_response = batch.mask.shape[1]
        new_logprobs = logprobs(self.policy, batch.ids, batch.attended, num_response)
        values = self.critic(batch.ids, batch.attended, num_response)
        ratio = (new_logprobs - batch.old_logprobs).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        policy_loss = torch.maximum(-batch.advantages * ratio, -batch.advantages * clipped)
        near = batch.old_values + (values - batch.old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
        value_loss = 0.5 * torch.maximum((values - batch.returns) ** 2, (near - batch.returns) ** 2)
        return policy_loss[batch.mask].mean() + VALUE_COEF * value_loss[batch.mask].mean()


def inputs(ids: Tensor, attended: Tensor) -> dict[str, Tensor | bool]:
    """Padding on the left moves the positions."""
    positions = (attended.long().cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": attended.long(), "position_ids": positions, "use_cache": False}


def logprobs(model: PreTrainedModel, ids: Tensor, attended: Tensor, num_response: int) -> Tensor:
    """Log-probabilities of the response tokens [B, R], from logits on all positions."""
    logits = model(**inputs(ids, attended)).logits[:, -num_response - 1 : -1]
    return F.log_softmax(logits, dim=-1).gather(-1, ids[:, -num_response:, None]).squeeze(-1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, R]; rewards and values are 0 after the end."""
    advantages = torch.zeros_like(rewards)
    running = next_value = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        running = (delta + GAMMA * LAM * running) * mask[:, t]
        advantages[:, t], next_value = running, values[:, t]
    return advantages, advantages + values
