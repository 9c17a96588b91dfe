"""The parts of a process's memory that do not follow from the number of weights alone. Runs in the driver.

Measured on a two-core x86 machine; docs/plan.md compares the estimates with measured peaks.
"""

from __future__ import annotations

from typing import NamedTuple

from common.config.ppo import LoRAConfig
from common.memory import MIB
from common.model.size import ModelSize


class ProcessKind(NamedTuple):
    """Memory of a process of a role without any model, in bytes.

    Gaps are only in bfloat16 on CPUs. oneDNN compiles a kernel for each shape of a matrix product, and keeps the last
    1,024. Passes of different lengths leave gaps in the heap. In 200 passes of different lengths through one layer the
    process grew by 300 MiB, and by 180 with a cache of 16 kernels. In whole runs of 10 to 16 steps learner and engine
    grew by 200 to 610 MiB beyond their other parts, in one run of 30 steps by 800. References grew by 150 to 230 MiB,
    and by 380 where an evaluation followed each step; reward models by 80 to 130.
    """

    libraries: int  # private memory and pages of library files, once it has joined Ray and imported its role
    gaps: int  # kernels that oneDNN compiles, and gaps in the heap


REFERENCE = ProcessKind(515 * MIB, 250 * MIB)
REWARD = ProcessKind(560 * MIB, 150 * MIB)  # it also has the tokenizer of the policy, and computes no logits
TRAINER = ProcessKind(580 * MIB, 370 * MIB)  # learner and the other trainers
ENGINE = ProcessKind(770 * MIB, 370 * MIB)  # generator: vLLM


def libraries(kind: ProcessKind, *, gpus: float, dtype: str) -> dict[str, int]:
    """The parts of every process of a kind that computes in `dtype`."""
    gaps = kind.gaps if gpus == 0 and dtype in ("bfloat16", "bf16") else 0
    return {"libraries": kind.libraries, "kernels and gaps": gaps}


def kept_values(model: ModelSize, *, lora: LoRAConfig | None = None) -> int:
    """Numbers that one layer keeps of one token until the backward pass (common/model/kernels.py).

    The inputs of both norms and their outputs; queries, keys, values and the output of attention; gate, up and their
    product. peft casts the input of each adapter separately. A layer's seven matrices have only four different
    inputs, so three more copies are kept. Each adapter also keeps its product with A."""
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    values = 4 * model.hidden + 2 * queries + 2 * keys + 3 * _width(model)
    return values if lora is None else values + 3 * model.hidden + 7 * lora.rank


def kept_until_backward(
    model: ModelSize, tokens: int, *, value_bytes: int, checkpointing: bool, lora: LoRAConfig | None = None
) -> int:
    """Bytes that a pass keeps until the backward pass. With checkpointing: the input of each layer, and everything of
    the layer that is computed again."""
    of_layer = kept_values(model, lora=lora)
    values = model.layers * model.hidden + of_layer if checkpointing else model.layers * of_layer
    return value_bytes * tokens * values


def gathered(model: ModelSize, activations: int, *, value_bytes: int, networks: int = 1, trains: bool = True) -> int:
    """Bytes that a rank has in addition to its share and to `activations`, while several ranks train (FSDP2, see
    `shard` of learner/ranks/distributed.py). `trains`: all weights train, not only adapters.

    The result is the larger of two moments of a backward pass. At its start, a rank has the embeddings, which stay
    gathered after the forward pass; the last layer and, gathered ahead, the layer before it; the gradients of the
    output embedding and of the last layer. At its end, the activations are gone, and gradients of the embeddings are
    copied into a float32 buffer, to be added up over ranks. A separate critic has one more input embedding.
    """
    embedding = model.vocabulary * model.hidden
    ends = embedding if tied(model) else 2 * embedding
    layer = (model.parameters - ends) // model.layers
    ends += (networks - 1) * embedding
    begins = value_bytes * (ends + 2 * layer)
    if not trains:
        return begins
    begins += value_bytes * (embedding + layer)
    return max(begins, (value_bytes + 4) * ends - activations)


def adapter_weights(model: ModelSize, lora: LoRAConfig) -> int:
    """Weights of adapters on the seven matrices of every layer: rank x (inputs + outputs)."""
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    ends = 2 * (model.hidden + queries) + 2 * (model.hidden + keys) + 3 * (model.hidden + _width(model))
    return lora.rank * model.layers * ends


def tied(model: ModelSize) -> bool:
    """True if input and output embedding are one matrix. Also if the sizes of the weights are not known."""
    return sum(model.body.values()) in (0, model.parameters)


def engine_weights(model: ModelSize) -> int:
    """Weights of a set in an engine on the CPU. The engine packs matrices for products, and the packed form cannot
    serve as an embedding. So a matrix that is also the input embedding is there twice."""
    return model.parameters + (model.vocabulary * model.hidden if tied(model) else 0)


def _width(model: ModelSize) -> int:
    return model.intermediate or 4 * model.hidden
