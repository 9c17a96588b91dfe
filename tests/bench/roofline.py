"""What a 7B model should do on eight H100s, from peak rates: prints the tables of docs/performance.md.

Arithmetic only, nothing is measured: `python -m tests.bench.roofline`. An estimate is a bound as good as its rates and
the shares of them that `Machine` assumes. Units: FLOP, bytes, seconds, tokens; B, S and R count rollouts, tokens of a
sequence and tokens of its response.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Model:
    """A decoder with gated MLP and output embedding of its own, as Llama 2 and Mistral have."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    @property
    def kv_width(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    @property
    def layer_parameters(self) -> int:
        """Matrices: q and o, k and v, and the MLP's three; two norms."""
        matrices = 2 * self.hidden**2 + 2 * self.hidden * self.kv_width + 3 * self.hidden * self.intermediate
        return matrices + 2 * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + 2 * self.vocabulary * self.hidden + self.hidden

    @property
    def kv_bytes(self) -> int:
        """Of one token, in bf16."""
        return 2 * self.layers * self.kv_width * BF16


LLAMA_2_7B = Model("Llama-2-7B", 32, 4096, 32, 32, 11008, 32000)
MISTRAL_7B = Model("Mistral-7B", 32, 4096, 32, 8, 14336, 32000)


@dataclass(frozen=True)
class Machine:
    """An H100 SXM of eight joined by NVSwitch. Peak rates: NVIDIA H100 Tensor Core GPU datasheet, without sparsity."""

    flops: float = 989.4e12  # bf16 a second
    memory: float = 80e9
    memory_rate: float = 3.35e12
    link_rate: float = 450e9  # NVLink, one direction: half of 900 GB/s
    host_rate: float = 64e9  # PCIe 5.0 x16, one direction: half of 128 GB/s
    # Shares of the peak, assumed. Compute: torchtitan's benchmark of December 2024 has 33 to 39 % for Llama 3.1 8B with
    # FSDP on eight H100 and 16,384 tokens a GPU.
    compute_share: float = 0.38
    memory_share: float = 0.7
    link_share: float = 0.75
    host_share: float = 0.8
    usable_memory: float = 0.9  # of a GPU's, before the allocator runs into trouble


@dataclass(frozen=True)
class Work:
    """A PPO step, and which GPUs do what."""

    rollouts: int = 512
    prompt: int = 512
    response: int = 512
    epochs: int = 2
    minibatches: int = 4
    micro_batch_tokens: int = 8192  # of a rank
    checkpointing: bool = True
    learners: int = 4
    generators: int = 3
    references: int = 1
    shared: bool = False  # the roles take turns on the same GPUs

    @property
    def tokens(self) -> int:
        return self.rollouts * (self.prompt + self.response)


def forward_flops(model: Model, sequence: int, *, head_share: float) -> float:
    """Of one token of a packed causal sequence: 2 a weight, and attention to S/2 tokens on average, 4 a channel (scores
    and their use). The head works on `head_share` of the tokens."""
    matrices = 2 * model.layers * (model.layer_parameters - 2 * model.hidden)
    attention = 4 * model.layers * model.hidden * sequence / 2
    return matrices + attention + head_share * 2 * model.hidden * model.vocabulary


def training_flops(model: Model, sequence: int, *, head_share: float, checkpointing: bool) -> float:
    """Forward, and twice that backward; with checkpointing the forward pass again."""
    return (4 if checkpointing else 3) * forward_flops(model, sequence, head_share=head_share)


def state_bytes(model: Model, ranks: int) -> float:
    """Float32 weights, gradients and Adam's two moments, sharded. The value head is too small to count."""
    return 4 * FP32 * model.parameters / ranks


def gathered_bytes(model: Model) -> float:
    """What FSDP holds whole: weights of two layers (one at work, one on its way) and both embeddings in bf16, gradients
    of one layer likewise."""
    return BF16 * (3 * model.layer_parameters + 2 * model.vocabulary * model.hidden)


def layer_activation_bytes(model: Model) -> float:
    """Of one token in one layer, all that backward needs, bf16: inputs of two norms and their outputs (4 hidden), q and
    the attention's output (2 hidden), k and v, and gate, up, activated gate and product (4 intermediate)."""
    return BF16 * (6 * model.hidden + 2 * model.kv_width + 4 * model.intermediate)


def activation_bytes(model: Model, tokens: int, *, checkpointing: bool) -> float:
    """With checkpointing the input of each layer, and one whole layer at a time."""
    if checkpointing:
        return tokens * (model.layers * BF16 * model.hidden + layer_activation_bytes(model))
    return tokens * model.layers * layer_activation_bytes(model)


def rank_bytes(model: Model, work: Work) -> float:
    """What a learner's rank needs at its peak, but for the logits of a chunk and what its libraries take."""
    kept = activation_bytes(model, work.micro_batch_tokens, checkpointing=work.checkpointing)
    return state_bytes(model, work.learners) + gathered_bytes(model) + kept


def collective_bytes(model: Model, ranks: int) -> tuple[float, float]:
    """That each rank receives for one micro-batch: bf16 weights gathered for forward and again for backward; and the
    gradients it sends off, float32."""
    foreign = (ranks - 1) / ranks
    return 2 * BF16 * model.parameters * foreign, FP32 * model.parameters * foreign


def micro_batch_seconds(model: Model, machine: Machine, work: Work) -> tuple[float, float]:
    """Compute and communication of a micro-batch with gradients; the two overlap."""
    flops = training_flops(model, sequence(work), head_share=head_share(work), checkpointing=work.checkpointing)
    compute = work.micro_batch_tokens * flops / (machine.flops * machine.compute_share)
    return compute, sum(collective_bytes(model, work.learners)) / (machine.link_rate * machine.link_share)


def running(model: Model, machine: Machine, work: Work) -> int:
    """Sequences whose KV cache fits on one GPU beside the weights, and beside what the other roles need there if they
    share it: a learner's rank and the reference."""
    others = rank_bytes(model, work) + BF16 * model.parameters if work.shared else 0
    room = machine.memory * machine.usable_memory - BF16 * model.parameters - others
    return int(room // (sequence(work) * model.kv_bytes))


def decode_seconds(model: Model, machine: Machine, batch: int, context: float) -> float:
    """One token for each of `batch` sequences: HBM must bring every weight once and every sequence's cache, or the
    tensor cores are what takes longer. The input embedding is looked up, not read."""
    weights = BF16 * (model.parameters - model.vocabulary * model.hidden)
    read = (weights + batch * context * model.kv_bytes) / (machine.memory_rate * machine.memory_share)
    # Attention looks back at `context` tokens: what a packed sequence twice as long does on average.
    flops = batch * forward_flops(model, int(2 * context), head_share=1)
    return max(read, flops / (machine.flops * machine.compute_share))


def generation_seconds(model: Model, machine: Machine, work: Work) -> float:
    """Each generator has its share of the rollouts, as many at once as the cache holds; prefill and decode add up."""
    rollouts = work.rollouts / work.generators
    at_once = min(rollouts, running(model, machine, work))
    context = work.prompt + work.response / 2
    decode = rollouts / at_once * work.response * decode_seconds(model, machine, round(at_once), context)
    prefill = rollouts * work.prompt * forward_flops(model, work.prompt, head_share=0)
    return decode + prefill / (machine.flops * machine.compute_share)


def forward_seconds(model: Model, machine: Machine, work: Work, gpus: int) -> float:
    """A pass without gradients over the whole batch."""
    flops = work.tokens * forward_flops(model, sequence(work), head_share=head_share(work))
    return flops / (gpus * machine.flops * machine.compute_share)


def publish_seconds(model: Model, machine: Machine) -> float:
    """bf16 weights off one rank and onto every generator at once, through the host's memory."""
    return 2 * BF16 * model.parameters / (machine.host_rate * machine.host_share)


def step_seconds(model: Model, machine: Machine, work: Work) -> dict[str, float]:
    """Phases of a synchronous step. A reference with GPUs of its own works beside the generators."""
    reference = forward_seconds(model, machine, work, work.references)
    generation = generation_seconds(model, machine, work)
    compute, communication = micro_batch_seconds(model, machine, work)
    micro_batches = work.epochs * work.tokens / (work.learners * work.micro_batch_tokens)
    # AdamW reads four float32 and writes three.
    optimizer = 7 * FP32 * model.parameters / work.learners / (machine.memory_rate * machine.memory_share)
    phases = {
        "generate": generation,
        "reference, beyond generation": reference if work.shared else max(0.0, reference - generation),
        "old log-probabilities": forward_seconds(model, machine, work, work.learners),
        "forward and backward": micro_batches * max(compute, communication),
        "optimizer": work.epochs * work.minibatches * optimizer,
        "publish": publish_seconds(model, machine),
    }
    return phases | {"step": sum(phases.values())}


def sequence(work: Work) -> int:
    return work.prompt + work.response


def head_share(work: Work) -> float:
    """Only response positions reach the head."""
    return work.response / sequence(work)


COLUMNS = [
    (LLAMA_2_7B, Work()),
    (MISTRAL_7B, Work()),
    (LLAMA_2_7B, Work(learners=8, generators=8, references=8, shared=True)),
]


def rows(model: Model, work: Work, machine: Machine) -> dict[str, str]:
    """One column of the table."""
    share, length = head_share(work), sequence(work)
    gathered, scattered = collective_bytes(model, work.learners)
    compute, communication = micro_batch_seconds(model, machine, work)
    phases = step_seconds(model, machine, work)
    at_once = min(work.rollouts // work.generators, running(model, machine, work))
    whole, checkpointed = replace(work, checkpointing=False), replace(work, checkpointing=True)
    return {
        "parameters, 1e9": f"{model.parameters / 1e9:.2f}",
        "GPUs: learner, generators, reference": "all 8 in turn" if work.shared else _split(work),
        "GFLOP a token, forward": f"{forward_flops(model, length, head_share=share) / 1e9:.1f}",
        "- of which attention": f"{4 * model.layers * model.hidden * length / 2 / 1e9:.2f}",
        "- of which head": f"{share * 2 * model.hidden * model.vocabulary / 1e9:.2f}",
        "GFLOP a token, forward and backward": gflop(model, whole),
        "- with checkpointing": gflop(model, checkpointed),
        "learner's rank: state, GB": gb(state_bytes(model, work.learners)),
        "- gathered, GB": gb(gathered_bytes(model)),
        "- activations, GB": gb(activation_bytes(model, work.micro_batch_tokens, checkpointing=False)),
        "- activations with checkpointing, GB": gb(
            activation_bytes(model, work.micro_batch_tokens, checkpointing=True)
        ),
        "- in all, GB": gb(rank_bytes(model, whole)),
        "- in all with checkpointing, GB": gb(rank_bytes(model, checkpointed)),
        "micro-batch: all-gather, GB": gb(gathered),
        "- reduce-scatter, GB": gb(scattered),
        "- communication, s": f"{communication:.2f}",
        "- compute with checkpointing, s": f"{compute:.2f}",
        "- tokens where the two are even": f"{work.micro_batch_tokens * communication / compute:,.0f}",
        "KV cache, KB a token": f"{model.kv_bytes / 1e3:.0f}",
        "sequences at once on a generator": f"{at_once}",
        "weights to publish, GB": gb(BF16 * model.parameters),
        **{f"{name}, s": f"{seconds:.1f}" for name, seconds in phases.items()},
        "tokens/s of the step (prompt and response)": f"{work.tokens / phases['step']:,.0f}",
        "response tokens/s": f"{work.rollouts * work.response / phases['step']:,.0f}",
    }


def decode_rows(machine: Machine, work: Work) -> dict[int, list[str]]:
    """Tokens/s of one generator half-way through its responses, by how many sequences it works on."""
    table, context = {}, work.prompt + work.response / 2
    for batch in (1, 8, 32, 64, 128, 256, 512):
        cells = []
        for model in (LLAMA_2_7B, MISTRAL_7B):
            fits = batch <= running(model, machine, work)
            cells.append(f"{batch / decode_seconds(model, machine, batch, context):,.0f}" if fits else "no room")
        table[batch] = cells
    return table


def _split(work: Work) -> str:
    return f"{work.learners}, {work.generators}, {work.references}"


def gflop(model: Model, work: Work) -> str:
    flops = training_flops(model, sequence(work), head_share=head_share(work), checkpointing=work.checkpointing)
    return f"{flops / 1e9:.1f}"


def gb(count: float) -> str:
    return f"{count / 1e9:.1f}"


def main() -> None:
    machine = Machine()
    columns = [rows(model, work, machine) for model, work in COLUMNS]
    print("| |" + "".join(f" {model.name} |" for model, _ in COLUMNS))
    print("|---|" + "---|" * len(COLUMNS))
    for name in columns[0]:
        print(f"| {name} |" + "".join(f" {column[name]} |" for column in columns))
    print("\nTokens/s of one generator of its own GPU, half-way through its responses:\n")
    print(f"| sequences at once | {LLAMA_2_7B.name} | {MISTRAL_7B.name} |\n|---|---|---|")
    for batch, cells in decode_rows(machine, Work()).items():
        print(f"| {batch} |" + "".join(f" {cell} |" for cell in cells))


if __name__ == "__main__":
    main()
