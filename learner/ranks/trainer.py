"""The base of all trainers: `Learner` for PPO, `RewardTrainer` for reward models, `CriticTrainer` for critics.

Runs in every trainer rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from common.config.ppo import Config
from common.config.reward_model import RewardTrainingConfig
from learner.ranks.checkpoint import load_checkpoint, load_network, save_checkpoint
from learner.ranks.distributed import Ranks, clip_gradients, shard
from learner.ranks.optimizer import learning_rate_scale, make_optimizer, reconfigure, set_learning_rate
from learner.ranks.rendezvous import open_rendezvous
from learner.ranks.rows import micro_batches


class Trainer(ABC):
    """One rank that trains a network. It takes its share of every batch and, among several ranks, holds its share of
    every weight.

    Its state after step s is a function of config, initial weights and the batches 0..s: nothing else is random here.
    On a GPU, where some kernels add in any order, this holds up to rounding without `learner.deterministic`.
    """

    cfg: Config | RewardTrainingConfig

    def __init__(
        self,
        network: nn.Module,
        cfg: Config | RewardTrainingConfig,
        *,
        num_steps: int,
        device: torch.device,
        borrows: bool = False,
    ) -> None:
        """`borrows`: an engine lends its GPU memory to this rank during each update."""
        self._borrows = borrows
        self.network, self.cfg, self.num_steps, self.device = network, cfg, num_steps, device
        self.step = 0  # updates done
        self.ranks = Ranks()
        self._served: dist.Store | None = None  # the store where the ranks met, if this process serves it
        self.optimizer = make_optimizer(self.parts(), cfg.optimizer)

    # Each trainer defines these.

    @abstractmethod
    def parts(self) -> list[tuple[nn.Module, float]]:
        """The parts of the network, each with its peak learning rate."""

    @abstractmethod
    def exact_modules(self) -> list[nn.Module]:
        """Modules that compute in float32 under any `learner.precision`."""

    @abstractmethod
    def dummy_batch(self) -> Any:
        """The smallest batch that the network takes."""

    def numbers(self) -> dict[str, Any]:
        """State other than `step`, network and optimizer, as JSON values."""
        return {}

    def restore_numbers(self, numbers: dict[str, Any]) -> None:  # noqa: B027 - a trainer may have no other state
        """Restores the state that `numbers` returned."""

    # The state

    def open_rendezvous(self, host: str) -> str:
        """The address where the ranks meet. Called on rank 0 before `join`. `host` is the address of this node."""
        address, self._served = open_rendezvous(host)
        return address

    def join(self, rank: int, world: int, rendezvous: str) -> int:
        """Makes this process one of the ranks of a group. Called once, before training. Returns the updates done."""
        cfg = self.cfg.learner
        self.ranks = Ranks.join(
            rank, world, rendezvous, served=self._served, device=self.device, timeout_s=cfg.timeout_s
        )
        if world > 1:
            shard(self.network, self.exact_modules(), precision=cfg.precision, device=self.device)
            self.optimizer = make_optimizer(self.parts(), self.cfg.optimizer)
        else:
            self.network.to(self.device)  # it is on the CPU if there were to be several ranks, and only one had room
        return self.step

    def save(self, directory: Path) -> dict[str, str]:
        """Writes a checkpoint, to which every rank adds its share. Returns the SHA-256 of this rank's files, by name.
        The checkpoint counts once the driver has written its marker."""
        return save_checkpoint(directory, self.network, self.optimizer, {"step": self.step, **self.numbers()})

    def restore(self, directory: Path) -> int:
        """Restores a checkpoint that any number of ranks wrote. Returns the updates it has done."""
        self.return_memory()  # of an update that failed
        numbers = load_checkpoint(directory, self.network, self.optimizer)
        self.return_memory()
        self.step = numbers["step"]
        self.restore_numbers(numbers)
        return self.step

    def restore_network(self, directory: Path) -> int:
        """Restores only the network of a checkpoint, without the optimizer, for a single rank that will not train.
        Returns the updates it has done."""
        self.step = load_network(directory, self.network)["step"]
        return self.step

    def reconfigure(self, cfg: Any) -> None:
        """Uses these settings from the next step on. The state stays."""
        self.cfg = cfg
        reconfigure(self.optimizer, self.parts(), cfg.optimizer)

    def skip(self) -> int:
        """Counts a step in which nothing is learned. Returns the updates done, such steps included."""
        self.return_memory()
        self.step += 1
        return self.step

    def return_memory(self) -> None:
        """Returns free borrowed memory to the GPU. Otherwise torch would keep it, and the engine that lent it could not
        wake."""
        if self._borrows:
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()

    # One update: set the rate, then for each minibatch forward and backward, then step.

    def set_learning_rate(self) -> float:
        """Sets the rates of this step. Returns them as a share of their peaks."""
        scale = learning_rate_scale(self.step, self.num_steps, self.cfg.optimizer)
        set_learning_rate(self.optimizer, scale)
        return scale

    def micro_batches(
        self, costs: Sequence[int], lengths: Sequence[int], pack: Callable[[list[int], int], list[list[int]]]
    ) -> list[list[int]]:
        """The micro-batches of this rank's share of some rows: see `learner.ranks.rows`."""
        max_tokens, ranks = self.cfg.learner.token_budget, self.ranks
        return micro_batches(costs, lengths, pack, max_tokens=max_tokens, rank=ranks.rank, world=ranks.world)

    def forward(self, batch: Any, num_rows: int, **options: Any) -> tuple[Any, ...]:
        """The network's outputs [num_rows, ...] in the configured precision.

        With no rows: run a dummy pass, so that this rank joins the collective operations of the others, and return
        empty tensors.
        """
        bf16 = self.cfg.learner.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            outputs = self.network(batch if num_rows else self.dummy_batch(), **options)
        return tuple(None if output is None else output[:num_rows] for output in outputs)

    def backward(self, loss: Tensor, *, again: bool = False) -> None:
        """Adds the gradient of this rank's part of the loss. FSDP averages over ranks; the factor makes it a sum.
        `again`: another loss of the same forward pass follows."""
        (loss * self.ranks.world).backward(retain_graph=again)

    def optimizer_step(self) -> float:
        """Clips the gradients, updates the weights and drops the gradients. Returns the norm before clipping."""
        norm = clip_gradients(self.network.parameters(), self.cfg.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def read_together(parts: Sequence[tuple[int, dict[str, Tensor]]]) -> list[tuple[int, dict[str, float]]]:
    """The sums of all micro-batches as numbers, each with its count. Reads all at once, because each read waits for the
    device."""
    rows = torch.stack([torch.stack(list(sums.values())) for _, sums in parts]).tolist()
    return [(count, dict(zip(sums, row, strict=True))) for (count, sums), row in zip(parts, rows, strict=True)]
