"""Stand-ins for tests: a tiny real model on disk, hand-made rollouts, and roles that record what happens to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.config.ppo import Config
from common.credit_table import DERIVED_SCHEMA
from common.errors import EngineDeadError
from common.files import sha256
from common.metrics import meters
from common.model.size import ModelSize
from common.types import Experience, ExperienceRef, Prompt, Rollout, RolloutRef, SampleId, Score, Turn, Void
from deploy.plan.capacity import engine_needs_gpu

END = 1
WORDS = ["<pad>", "<end>", "<unk>", "ask", *(f"a{i}" for i in range(30)), *(f"b{i}" for i in range(30))]


def save_tiny_model(directory: Path, *, tied: bool = True, seed: int = 0, context: int = 128) -> Path:
    """A random two-layer Llama with a head size vLLM accepts, and a tokenizer of 64 words, half of them a-words."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=END,
        initializer_range=0.05,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    save_tiny_tokenizer(directory)
    return directory


def save_tiny_tokenizer(directory: Path) -> None:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(directory)


_TINY_DECODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
_TINY_KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "mixtral": {**_TINY_DECODER, "num_local_experts": 4, "tie_word_embeddings": True},
    "olmoe": {**_TINY_DECODER, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_TINY_DECODER,
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
    },
    "glm4_moe": {
        **_TINY_DECODER,
        "head_dim": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
    },
}


def save_tiny_kind(directory: Path, kind: str, *, seed: int = 0) -> Path:
    """A random model of another kind (GPT-2, mixtures of experts) with the same tokenizer."""
    torch.manual_seed(seed)
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": END}
    config = AutoConfig.for_model(kind, **_TINY_KINDS[kind], **tokens, initializer_range=0.1)
    model = AutoModelForCausalLM.from_config(config)
    for buffer in model.buffers():
        if buffer.dtype == torch.float32 and buffer.ndim == 1 and len(buffer) == 4:
            buffer.copy_(torch.randn(4))  # of experts: all zeros as they are made
    model.save_pretrained(directory)
    save_tiny_tokenizer(directory)
    return directory


QWEN_1_5B = ModelSize(
    parameters=1_543_714_304,
    layers=28,
    hidden=1536,
    heads=12,
    kv_heads=2,
    head_dim=128,
    vocabulary=151_936,
    context=32_768,
    intermediate=8960,
)

# GPUs of each engine in a test: vLLM's GPU build cannot run on the CPU.
ENGINE_GPUS = 0.2 if engine_needs_gpu() else 0


def tiny_config(model: Path | str, **overrides: Any) -> Config:
    """A small valid config; sections given as dicts replace fields of the defaults below."""
    tree: dict[str, Any] = {
        "num_steps": 3,
        "rollouts_per_step": 4,
        "max_staleness": 0,
        "model": {"path": str(model)},
        "prompts": {"train": "tests.tasks:train_prompts", "heldout": "tests.tasks:heldout_prompts", "max_tokens": 8},
        "sampling": {"max_new_tokens": 8},
        "generators": {"dtype": "float32", "kv_cache_mib": 16, "gpus": ENGINE_GPUS},
        "reference": {"dtype": "float32"},
        "reward": {"sources": [{"name": "a_words", "function": "tests.tasks:a_words"}]},
        "ppo": {"clip_eps": 0.2, "ppo_epochs": 2, "minibatches": 2},
        "optimizer": {"learning_rate": 1e-3, "value_head_learning_rate": 1e-2},
        "learner": {"precision": "fp32"},
        "evaluation": {"prompts": 8},
        "ray": {"dashboard": False, "object_store_mib": 256},
    }
    for key, value in overrides.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return Config.model_validate(tree)


def metered() -> meters.InMemory:
    """What is recorded from here on, as by Role(0)."""
    memory = meters.InMemory()
    meters.install(memory, role="Role", replica="Role(0)")
    return memory


OWN_TAGS = {"role": "Role", "replica": "Role(0)"}


def make_prompt(index: int = 0, token_ids: tuple[int, ...] = (3, 4, 5), **fields: Any) -> Prompt:
    return Prompt(SampleId(0, index, 0), f"prompt {index}", np.array(token_ids, dtype=np.int32), fields)


def make_rollout(prompt: Prompt, response: list[int], *, version: int = 0, logprob: float = -4.0) -> Rollout:
    length = len(response)
    return Rollout(
        prompt,
        np.array(response, dtype=np.int32),
        np.full(length, logprob, dtype=np.float32),
        np.full(length, version, dtype=np.int32),
        "stop" if response and response[-1] == END else "length",
        "Generator(0)",
    )


def make_experience(index: int, response: list[int], *, score: float = 0.0, version: int = 0) -> Experience:
    rollout = make_rollout(make_prompt(index, tuple(range(3, 5 + index % 3))), response, version=version)
    return Experience(rollout, Score(score, {"made_up": score}), np.full(len(response), -4.0, dtype=np.float32))


def as_episode(row: Experience, *turns: Turn) -> Experience:
    """The same response, in which an environment wrote the tokens between the turns: their log-probabilities and
    versions are gone."""
    rollout = replace(row.rollout, turns=turns)
    sampled = rollout.response_mask
    arrays = {name: getattr(rollout, name)[sampled] for name in ("rollout_logprobs", "policy_versions")}
    ref_logprobs = None if row.ref_logprobs is None else row.ref_logprobs[sampled]
    return replace(row, rollout=replace(rollout, **arrays), ref_logprobs=ref_logprobs)


def random_turns(rng: np.random.Generator, count: int, *, contexts: bool = False) -> list[Turn]:
    """Turns that follow one another from the start of a response. Some have no token of the policy, or none of the
    environment. With `contexts`, new contexts begin after some, and half of these end a sequence."""
    turns, place = [], 0
    for _ in range(count):
        end = place + int(rng.integers(4))
        place = end + int(rng.integers(4))
        turn = Turn(end, place, float(rng.normal(0, 2)))
        if contexts and place > end and rng.random() < 0.7:
            turn = replace(turn, new_context=True, ends=bool(rng.random() < 0.5))
        turns.append(turn)
    return turns


async def pending(coroutine: Any) -> asyncio.Task:
    """The coroutine as a task that had every chance to run and is still waiting."""
    task = asyncio.create_task(coroutine)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()
    return task


def make_scored(index: int, response: list[int], **about: Any) -> ExperienceRef:
    """The same before it is fetched."""
    row = make_experience(index, response, **about)
    return ExperienceRef(replace(RolloutRef.of(row.rollout), rollout=row.rollout), row.score, row.ref_logprobs)


async def fetch_scored(rows: Sequence[ExperienceRef]) -> list[Experience]:
    return [Experience(row.ref.rollout, row.score, row.ref_logprobs) for row in rows]


class LocalHost:
    """`actors.pool.host.Host` in this process: at most `room` replicas of a role, which live until they are killed."""

    losses = (ConnectionError, EngineDeadError)
    lost_values = (LookupError,)
    outages = (OSError,)
    close_s = 0.0

    def __init__(
        self,
        role: Any,
        *args: Any,
        room: int = 1 << 30,
        node_of: Callable[[int], str] | None = None,
        **kwargs: Any,
    ) -> None:
        """`node_of`: the node of the handle with this index; by default each replica has its own."""
        self.role = role.__name__
        self._node_of = node_of
        self._make, self._args = partial(role, **kwargs), args
        self.room = room
        self.handles: list[LocalHandle] = []
        self.leaving: dict[str, float] = {}
        self.closed: list[str] = []  # names of the replicas that may close what they have open before they end

    async def create(self, name: str) -> LocalHandle:
        handle = LocalHandle(name)
        self.handles.append(handle)
        self._place()
        return handle

    def _place(self) -> None:
        alive = [handle for handle in self.handles if not handle.dead]
        for handle in alive[: self.room]:
            if not handle.placed.done():
                handle.role = self._make(handle.name, *self._args)
                handle.placed.set_result(None)

    def kill(self, handle: LocalHandle, *, close: bool) -> Future[None]:
        if close:
            self.closed.append(handle.name)
        handle.die()
        self._place()
        killed: Future[None] = Future()
        killed.set_result(None)
        return killed

    async def node(self, handle: LocalHandle) -> str | None:
        if not handle.placed.done():
            return None
        return self._node_of(self.handles.index(handle)) if self._node_of else f"node of {handle.name}"

    async def leaving_nodes(self) -> dict[str, float]:
        return self.leaving

    def make_room(self, room: int) -> None:
        self.room = room
        self._place()

    async def probe(self, handle: LocalHandle) -> None:
        if handle.silent:
            await asyncio.sleep(3600)

    async def fetch(self, references: Sequence[Any]) -> list[Any]:
        return [await ref if isinstance(ref, asyncio.Future) else ref for ref in references]

    def alive(self, name: str) -> LocalHandle:
        [handle] = [handle for handle in self.handles if handle.name == name and not handle.dead]
        return handle


class LocalHandle:
    """Calls a role's methods as a Ray handle would: by `method.remote`, answered unless the replica dies."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.role: Any = None
        self.placed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.dead = self.silent = False
        self._calls: set[asyncio.Task] = set()

    def die(self) -> None:
        self.dead = True
        for call in self._calls:
            call.cancel()

    def __getattr__(self, method: str) -> LocalMethod:
        return LocalMethod(self, method)

    async def run(self, method: str, args: tuple[Any, ...]) -> Any:
        await self.placed
        if self.dead:
            raise ConnectionError(f"{self.name} is gone")
        values = [await arg if isinstance(arg, asyncio.Future) else arg for arg in args]
        call = asyncio.create_task(getattr(self.role, method)(*values))
        self._calls.add(call)
        try:
            return await call
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and caller.cancelling():
                call.cancel()
                raise
            raise ConnectionError(f"{self.name} died") from None
        finally:
            self._calls.discard(call)


class LocalMethod:
    def __init__(self, handle: LocalHandle, method: str, num_returns: int = 1) -> None:
        self._handle, self._method, self._num_returns = handle, method, num_returns

    def options(self, *, num_returns: int) -> LocalMethod:
        return LocalMethod(self._handle, self._method, num_returns)

    def remote(self, *args: Any) -> Any:
        answer = asyncio.ensure_future(self._handle.run(self._method, args))
        if self._num_returns == 1:
            return answer
        parts = [asyncio.get_running_loop().create_future() for _ in range(self._num_returns)]

        def deliver(done: asyncio.Future) -> None:
            error = None if done.cancelled() else done.exception()
            for index, part in enumerate(parts):
                if part.done():
                    continue
                if done.cancelled():
                    part.cancel()
                elif error is not None:
                    part.set_exception(error)
                    part.exception()
                else:
                    part.set_result(done.result()[index])

        answer.add_done_callback(deliver)
        return parts


def made_up_credit(table: Any) -> pa.Table:
    """What a learner without a critic might derive from this batch: every value is 0.5, and no token is clipped."""
    lengths = [len(row) for row in table["policy_versions"]]
    columns = {name: [[0.5] * n for n in lengths] for name in DERIVED_SCHEMA.names}
    columns |= {name: [None] * len(lengths) for name in ("values", "td_errors")}
    columns["clipped"] = [[False] * n for n in lengths]
    columns["ends"] = [[t == n - 1 for t in range(n)] for n in lengths]
    return pa.table(columns, schema=DERIVED_SCHEMA)


class FakeRoles:
    """All roles in one process. Records events in order, and refuses what no real role would be asked."""

    def __init__(
        self, events: list[str], *, fail_prompts: frozenset[int] = frozenset(), synchronous: bool = True
    ) -> None:
        self.events = events
        self._synchronous = synchronous
        self.version = 0
        self.step = 0
        self.tables: list[Any] = []
        self.updating = False
        self.asleep = False
        self._fail_prompts = fail_prompts

    async def generate(self, prompt: Prompt, *, plain_tokens: int = 0) -> RolloutRef:
        rollout = make_rollout(prompt, [4, END]) if plain_tokens else await self.write(prompt)
        return replace(RolloutRef.of(rollout), rollout=rollout)

    async def fetch(self, references: Sequence[Any]) -> list[Any]:
        return list(references)

    async def write(self, prompt: Prompt) -> Rollout:
        assert not (self._synchronous and self.updating), "a synchronous step must not generate while it learns"
        while self.asleep:
            await asyncio.sleep(0.001)
        version = self.version
        await asyncio.sleep(0.001 * (prompt.sample_id.prompt % 3))  # finish out of order
        if prompt.sample_id.epoch >= 0:
            self.events.append(f"generate v{version}")
        return make_rollout(prompt, [4 + prompt.sample_id.prompt % 20, END], version=version)

    async def score(self, ref: RolloutRef) -> Score | Void:
        if ref.sample_id.prompt in self._fail_prompts:
            return Void(ref.sample_id, "told to fail")
        return Score(1.0, {"a_words": 1.0})

    async def judge(self, ref: RolloutRef) -> Score | Void:
        score = await self.score(ref)
        return score if isinstance(score, Void) else Score(score.total, {**score.components, "gold": 0.5})

    async def logprobs(self, ref: RolloutRef) -> tuple[np.ndarray, bool]:
        logprobs = await self.measure(ref.rollout)
        return logprobs, bool(np.isfinite(logprobs).all())

    async def measure(self, rollout: Rollout) -> np.ndarray:
        return rollout.rollout_logprobs

    async def sleep(self) -> None:
        self.asleep = True
        self.events.append("sleep")

    async def wake(self) -> None:
        self.asleep = False
        self.events.append("wake")

    async def update(self, table: Any) -> dict[str, float]:
        self.updating = True
        await asyncio.sleep(0.005)
        self.events.append(f"update {self.step}")
        self.tables.append(table)
        self.step += 1
        self.updating = False
        return {"ppo/entropy": 1.0, "mismatch/kl": 0.0}

    async def credit(self) -> Any:
        return made_up_credit(self.tables[-1])

    async def policy_logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        return [rollout.rollout_logprobs for rollout in rollouts]

    async def publish(self) -> AsyncGenerator[str, None]:
        self.events.append(f"publish v{self.step}")
        for index in range(2):
            await asyncio.sleep(0.002)
            yield f"bucket {index} of {self.step}"

    async def load(self, weights: AsyncGenerator[str, None], version: int) -> dict[str, float]:
        assert not self.asleep, "an engine that sleeps has no memory for new weights"
        assert [bucket async for bucket in weights] == [f"bucket {index} of {version}" for index in range(2)]
        await asyncio.sleep(0.003)  # long enough for a rollout that was let in too early to be written
        self.events.append(f"load v{version}")
        self.version = version
        return {}

    async def restore(self, directory: Path) -> None:
        self.step = int((directory / "optimizer-step").read_text())
        self.events.append(f"restore {self.step}")

    async def save(self, directory: Path) -> dict[str, str]:
        directory.mkdir(parents=True)
        (directory / "optimizer-step").write_text(str(self.step))
        self.events.append(f"save {self.step}")
        return {"optimizer-step": sha256(directory / "optimizer-step")}

    async def skip(self) -> None:
        self.events.append(f"skip {self.step}")
        self.step += 1

    async def reconfigure(self, cfg: Config) -> None:
        self.events.append(f"reconfigure at {self.step}")

    async def rebuild(self) -> None:
        self.events.append("rebuild")
        self.step = 0

    async def unless_lost(self, work: Awaitable[Any]) -> Any:
        return await work

    async def save_policy(self, directory: Path) -> None:
        self.events.append("save policy")
