"""Settings that PPO and reward training share: ranks, optimizer, checkpoints. Runs anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from common.config.base import MayChange, NonNegative, Placed, Positive, Processes, Rate, Seconds, Section

# Default size of a micro-batch, in tokens. A micro-batch of 512 keeps two CPU cores busy.
CPU_TOKENS = 512
GPU_TOKENS = 8192  # where the memory of the GPU is not known


class TrainerConfig(Placed):
    """The processes (ranks) that train together, each on its own device."""

    cpus: MayChange[Annotated[float, Field(ge=0)]] = 1
    """CPU cores each rank reserves in Ray's bookkeeping."""
    gpus: MayChange[Annotated[float, Field(ge=0)]] = 0
    """GPUs each rank reserves; 0 runs it on the CPU. With several ranks it must be 0 or 1."""
    threads: MayChange[Positive] = 1
    """Compute threads of each rank. Two busy processes that both use every core slow each other threefold."""
    ranks: MayChange[Processes] = 1
    """Processes that train together, each on its share of every batch."""
    min_ranks: MayChange[Processes | None] = None
    """Fewest processes to train with. If the cluster has no room for all `ranks`, such as after the loss of a node, the
    group starts with as many as there is room for. Weights then agree up to rounding, and each process needs more
    memory. Left out: ranks."""
    room_wait_s: MayChange[Seconds] = 60
    """Longest wait for room for all `ranks` once min_ranks have started, seconds."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of matrix products in forward and backward. Trained weights, losses and optimizer state are always
    float32."""
    micro_batch_tokens: MayChange[Positive | None] = None
    """Tokens of one forward and backward pass; bounds activation memory and cannot change the gradient. A longer
    sequence is a micro-batch of its own. Left out: 512 on the CPU; on a GPU 32768, or 16384 for models from 1e9
    weights on, halved until a pass fits the share of the GPU, or 8192 if the GPU's memory is not known. RUN/config.toml
    records the number for a GPU, and a resumed run or a replay keeps it. If the device changes, set it too."""
    gradient_checkpointing: MayChange[bool] = False
    """Recompute activations in the backward pass: about a quarter slower, and far less memory."""
    compile: MayChange[bool | None] = None
    """Compile the model's layers (torch.compile) at the first update, which then takes about 20 seconds longer. Later
    updates are faster on a GPU, those of small models most. Layers that cannot be compiled, or whose compiled results
    differ, stay uncompiled, and RUN/log.txt says why. If compiling fails in the middle of a run, set this to false and
    continue. The services for reference and reward never compile: each of their processes would wait for it, and their
    passes have no backward pass. Left out: true on a GPU, false on the CPU, where it gains nothing."""
    deterministic: MayChange[bool] = False
    """Use only kernels that add in a fixed order (torch's deterministic mode). On one layout of GPUs a step that is
    repeated then has the same bits. 10 % slower for 1.2B weights on an H100. An operation that has no such kernel ends
    the run with torch's message. CPUs compute the same bits without it."""
    timeout_s: MayChange[Seconds] = 1800
    """Longest update, and longest wait of one rank for another, seconds. A rank that takes longer counts as lost."""
    probe_timeout_s: MayChange[Seconds] = 30
    """A rank that answers no health probe for this many seconds counts as lost, even in the middle of an update."""

    @property
    def fewest_ranks(self) -> int:
        """Fewest processes to train with."""
        return self.min_ranks or self.ranks

    @property
    def compiles(self) -> bool:
        """True if the model's layers are compiled."""
        return self.gpus > 0 if self.compile is None else self.compile

    @property
    def token_budget(self) -> int:
        """Tokens of a micro-batch. deploy/plan/micro_batches.py fills in the setting where a run trains on GPUs."""
        return self.micro_batch_tokens or (GPU_TOKENS if self.gpus else CPU_TOKENS)


def broken_trainer_rules(cfg: TrainerConfig, rows: int, where: str) -> Iterator[str]:
    """One message for each broken rule across the fields of a [learner] section. `rows`: rows of each optimizer step.
    `where`: the setting that decides their number."""
    if cfg.fewest_ranks > cfg.ranks:
        yield (
            f"learner.min_ranks ({cfg.min_ranks}) must be at most learner.ranks ({cfg.ranks}); lower the first or "
            "raise the second"
        )
    if cfg.ranks > 1 and cfg.gpus not in (0, 1):
        yield (
            f"learner.gpus ({cfg.gpus:g}) must be 1 for each of {cfg.ranks} learner.ranks, or 0 for the CPU: ranks "
            "cannot share a GPU"
        )
    if cfg.ranks > rows >= 1:
        yield (
            f"learner.ranks ({cfg.ranks}) must be at most {where} ({rows}), the rows of an optimizer step, or "
            "some ranks have none; lower the first or raise the second"
        )


class AdamWConfig(Section):
    """AdamW and the schedule of its learning rate."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate of the language model's weights."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up. constant stays at the peak; linear and cosine fall to zero, and reach it one step
    after the last one: with linear, the last of n steps still runs at 1 / n of the peak."""
    warmup_steps: NonNegative = 0
    """Steps in which the rate rises linearly to the peak: the first one runs at 1 / (warmup_steps + 1) of the peak."""
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """Decay of Adam's running mean and variance of the gradient."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to Adam's denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, per unit of learning rate; applies to matrices only."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Bound of the joint norm of all gradients, in PPO those of policy and critic together. A larger one is scaled down
    to it."""


class CheckpointConfig(Section):
    """Learner state on disk."""

    every: Positive = 20
    """Steps between checkpoints. A resumed run repeats the steps after its newest checkpoint (PPO: from the journal,
    without generating anything), so a smaller number trades disk for time."""
    keep: Positive = 2
    """Checkpoints kept; older ones are removed."""
    keep_optimizer_at_end: bool = True
    """Keep the optimizer's state in the checkpoints of a finished run: two thirds of their size. If false, they can
    still be exported, but a run that is continued with more steps repeats all earlier ones (PPO: from the journal)."""
    on_signal: bool = False
    """When a signal stops the run (Ctrl-C, SIGTERM, SIGHUP), finish the current step and write a checkpoint first. The
    resumed run then repeats no step, but stopping takes as long as a step. If false, stopping takes seconds."""
