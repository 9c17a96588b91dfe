"""Reward training: packed pairs against ordinary rows, one step against its definition, and the loop over the pairs."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, MistralConfig, MistralForSequenceClassification

from common.config.reward_model import RewardTrainingConfig
from common.errors import BatchError, UserError
from common.files import read_records
from common.model.files import load_tokenizer
from learner.reward_model.pair_batch import PairBatch
from learner.reward_model.pair_records import tokenise_pairs
from learner.reward_model.pairs import Pair, Pairs
from learner.reward_model.trainer import RewardTrainer
from learner.reward_model.training import RewardRun, train_reward_model
from tests.fakes import WORDS, save_tiny_model
from tests.tracing import graphs, trace_only


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("language_model"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A reward model whose head is not zero, so that a first step moves all its weights."""
    directory = save_tiny_model(tmp_path_factory.mktemp("model"))
    reward_model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, pad_token_id=0)
    nn.init.normal_(reward_model.score.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    reward_model.save_pretrained(directory)
    return directory


def reward_config(model: Path, **overrides: Any) -> RewardTrainingConfig:
    """A small valid config; sections given as dicts replace fields of the defaults below."""
    tree: dict[str, Any] = {
        "pairs_per_step": 4,
        "model": {"path": str(model)},
        "data": {"train": "pairs.jsonl", "max_tokens": 12},
        # Such an eps keeps the size of the gradient in Adam's step, which otherwise almost cancels.
        "optimizer": {"learning_rate": 4e-3, "head_learning_rate": 2e-2, "eps": 1e-3},
        "learner": {"precision": "fp32"},
        "checkpoint": {"every": 2},
    }
    for key, value in overrides.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return RewardTrainingConfig.model_validate(tree)


def make_pair(shared: list[int], chosen: list[int], rejected: list[int], margin: float = 0.0) -> Pair:
    return Pair(*(np.array(ids, dtype=np.int32) for ids in (shared, chosen, rejected)), margin)


def ragged_pairs(count: int = 7, seed: int = 0) -> list[Pair]:
    """Pairs of 2 to 17 tokens; the first shares no token, the second all but the last."""
    rng = np.random.default_rng(seed)
    lengths = [(0, 2, 5), (5, 1, 1), *rng.integers((0, 1, 1), (6, 7, 7), (count - 2, 3))]
    return [
        make_pair(*(rng.integers(2, 64, length).tolist() for length in three), margin=rng.uniform(0, 2))
        for three in lengths
    ]


def sequences(pair: Pair) -> list[torch.Tensor]:
    ends = pair.chosen_ids, pair.rejected_ids
    return [torch.from_numpy(np.concatenate([pair.shared_ids, end])).long()[None] for end in ends]


def packed(pair: Pair) -> tuple[int, ...]:
    return tuple(np.concatenate([pair.shared_ids, pair.chosen_ids, pair.rejected_ids]).tolist())


def slow_scores(network: nn.Module, pairs: list[Pair]) -> torch.Tensor:
    """As transformers scores a row, every sequence by itself: [N, 2]."""
    return torch.stack([torch.cat([network(row).logits[:, 0] for row in sequences(pair)]) for pair in pairs])


def parameters(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def write_pairs(directory: Path, model: Path, records: list[dict[str, Any]]) -> Pairs:
    source, target = directory / "pairs.jsonl", directory / "pairs.arrow"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert tokenise_pairs(str(source), reward_config(model).data, load_tokenizer(model), target).pairs == len(records)
    return Pairs(target)


def test_a_packed_row_worked_by_hand():
    batch = PairBatch.pad([make_pair([3, 4], [5, 6, 7], [8, 9]), make_pair([2], [10], [11, 12])])
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 7, 8, 9], [2, 10, 11, 12, 0, 0, 0]]
    # Positions of the second ending continue after the shared tokens.
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 2, 3]
    assert batch.positions[1, :4].tolist() == [0, 1, 1, 2]
    assert (batch.chosen_last.tolist(), batch.rejected_last.tolist()) == ([4, 1], [6, 3])
    rows = [["".join(".x"[seen] for seen in row) for row in square] for square in batch.visible[:, 0].int().tolist()]
    assert rows[0] == ["x......", "xx.....", "xxx....", "xxxx...", "xxxxx..", "xx...x.", "xx...xx"]
    assert rows[1][:4] == ["x......", "xx.....", "x.x....", "x.xx..."]
    assert all("x" in row for row in rows[1][4:])  # padding looks at something: a softmax over nothing is NaN


def test_two_endings_in_one_row_score_as_two_rows_of_transformers_do(model):
    """With garbage in our padding; transformers pads as it likes and finds the last tokens by itself."""
    pairs = ragged_pairs()
    batch = PairBatch.pad(pairs)
    padding = torch.arange(batch.input_ids.shape[1]) >= torch.tensor([[pair.num_tokens] for pair in pairs])
    assert padding.any()
    garbage = torch.randint(2, 64, padding.shape, generator=torch.Generator().manual_seed(0))
    batch = replace(batch, input_ids=torch.where(padding, garbage, batch.input_ids))
    trainer = RewardTrainer(reward_config(model), 1)
    states = batch.last_states(trainer.model)
    scores = states @ trainer.model.score.weight[0]

    theirs = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    rows = [row[0] for pair in pairs for row in sequences(pair)]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    mask = torch.arange(input_ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
    outputs = theirs(input_ids=input_ids, attention_mask=mask.long(), output_hidden_states=True)
    expected_states = torch.stack([states[len(row) - 1] for row, states in zip(rows, outputs.hidden_states[-1])])
    torch.testing.assert_close(states.transpose(0, 1).flatten(0, 1), expected_states, atol=1e-5, rtol=0)
    expected = outputs.logits.view(len(pairs), 2)
    torch.testing.assert_close(scores.T, expected, atol=1e-5, rtol=0)
    assert (expected[:, 0] - expected[:, 1]).abs().min() > 1e-3

    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    (scores.T.sin() * weights).sum().backward()
    (expected.sin() * weights).sum().backward()
    for (name, found), other in zip(trainer.model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found.grad, other.grad, atol=1e-5, rtol=0, msg=name)
        assert other.grad.abs().max() > 1e-2, name


@pytest.mark.parametrize("micro_batch_tokens", [24, 48, 2048])
def test_scores_come_back_in_the_order_of_the_pairs(model, micro_batch_tokens):
    trainer = RewardTrainer(reward_config(model, learner={"micro_batch_tokens": micro_batch_tokens}), 1)
    pairs = ragged_pairs()
    found = trainer.scores(pairs)
    assert (found.dtype, found.shape) == (np.float32, (7, 2))
    with torch.no_grad():
        assert found == pytest.approx(slow_scores(trainer.model, pairs).numpy(), abs=1e-5)


UNUSUAL = {
    "optimizer": {"betas": (0.8, 0.9), "weight_decay": 0.1, "max_grad_norm": 0.3, "schedule": "linear",
                  "warmup_steps": 1},
    "loss": {"margin_coef": 0.7, "centre_coef": 0.05},
}  # fmt: skip


class SlowTrainer:
    """The mean loss, sequence by sequence, and AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2)."""

    def __init__(self, cfg: RewardTrainingConfig) -> None:
        self.cfg, self.step = cfg, 0
        self.network = AutoModelForSequenceClassification.from_pretrained(cfg.model.path, dtype=torch.float32)
        self.moments = {name: (0.0, 0.0) for name, _ in self.network.named_parameters()}

    def update(self, pairs: list[Pair], scale: float) -> dict[str, float]:
        opt, how, losses = self.cfg.optimizer, self.cfg.loss, []
        scores = slow_scores(self.network, pairs)
        for (chosen, rejected), pair in zip(scores, pairs):
            lead = chosen - rejected - how.margin_coef * pair.margin
            losses.append(torch.log(1 + torch.exp(-lead)) + how.centre_coef * (chosen + rejected) ** 2)
        loss = torch.stack(losses).mean()
        gradients = dict(zip(self.moments, torch.autograd.grad(loss, list(self.network.parameters()))))
        norm = math.sqrt(sum((g.double() ** 2).sum().item() for g in gradients.values()))
        self.step += 1
        with torch.no_grad():
            for name, p in self.network.named_parameters():
                g = gradients[name] * min(1.0, opt.max_grad_norm / norm)
                rate = scale * (opt.head_learning_rate if name == "score.weight" else opt.learning_rate)
                m, v = self.moments[name]
                m, v = opt.betas[0] * m + (1 - opt.betas[0]) * g, opt.betas[1] * v + (1 - opt.betas[1]) * g**2
                self.moments[name] = m, v
                decay = opt.weight_decay * p if p.ndim == 2 else 0
                corrected = m / (1 - opt.betas[0] ** self.step), v / (1 - opt.betas[1] ** self.step)
                p -= rate * (corrected[0] / (corrected[1].sqrt() + opt.eps) + decay)
        return {
            "preference/loss": loss.item(),
            "preference/accuracy": np.mean([c > r for c, r in scores.tolist()]),
            "preference/margin": (scores[:, 0] - scores[:, 1]).mean().item(),
            "preference/score": scores.mean().item(),
            "preference/grad_norm": norm,
            "preference/learning_rate": opt.learning_rate * scale,
            "learner/tokens": sum(pair.num_tokens for pair in pairs),
        }


def test_three_updates_agree_with_a_slow_derivation(model):
    cfg = reward_config(model, learner={"micro_batch_tokens": 40}, **UNUSUAL)
    trainer, slow = RewardTrainer(cfg, 5), SlowTrainer(cfg)
    for seed, scale in enumerate([1 / 2, 1, 3 / 4]):  # one step of warm-up, then four down to zero
        before = parameters(slow.network)
        expected = slow.update(ragged_pairs(7 - seed, seed), scale)
        found = trainer.update(ragged_pairs(7 - seed, seed))
        assert found.pop("time/learn_s") > 0
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
        torch.testing.assert_close(parameters(trainer.model), parameters(slow.network), atol=1e-6, rtol=0)
        assert (parameters(slow.network) - before).abs().max() > 1e-3
        assert expected["preference/grad_norm"] > 2 * cfg.optimizer.max_grad_norm
    assert trainer.step == 3


def test_every_weight_learns_once_and_the_head_at_its_own_rate(model):
    trainer = RewardTrainer(reward_config(model), 1)
    groups = trainer.optimizer.param_groups
    rates = {id(p): group["peak_lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates)
    for name, p in trainer.model.named_parameters():
        assert rates.pop(id(p)) == (2e-2 if name == "score.weight" else 4e-3), name
    assert not rates


def updated(model: Path, pairs: list[Pair], **overrides: Any) -> torch.Tensor:
    """The weights after a step on `pairs` and one on the first three of them."""
    trainer = RewardTrainer(reward_config(model, **{**UNUSUAL, **overrides}), 5)
    trainer.update(pairs)
    trainer.update(pairs[:3])
    return parameters(trainer.model)


@pytest.mark.parametrize("micro_batch_tokens", [24, 40, 64])
def test_micro_batches_do_not_change_the_update(model, micro_batch_tokens):
    pairs = ragged_pairs()
    whole = updated(model, pairs)
    found = updated(model, pairs, learner={"micro_batch_tokens": micro_batch_tokens})
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("micro_batch_tokens", [40, 2048])
def test_the_order_of_pairs_within_a_step_does_not_change_the_update(model, seed, micro_batch_tokens):
    pairs = ragged_pairs()
    order = [*np.random.default_rng(seed).permutation(3), *(3 + np.random.default_rng(seed).permutation(4))]
    learner = {"micro_batch_tokens": micro_batch_tokens}
    found = updated(model, [pairs[i] for i in order], learner=learner)
    torch.testing.assert_close(found, updated(model, pairs, learner=learner), rtol=1e-5, atol=1e-7)


def test_margins_of_the_records_count_as_the_config_says(language_model):
    # A head of zeros scores 0. Margins 0 and 2 ln 3, halved: -log sigmoid(0) = ln 2, -log sigmoid(-ln 3) = ln 4.
    pairs = [make_pair([3], [4, 1], [40, 1]), make_pair([3], [5, 1], [41, 1], margin=2 * math.log(3))]
    for coef, loss in {0.5: 1.5 * math.log(2), 0.0: math.log(2)}.items():
        found = RewardTrainer(reward_config(language_model, loss={"margin_coef": coef}), 1).update(pairs)
        assert found["preference/loss"] == pytest.approx(loss, abs=1e-6)
        assert (found["preference/margin"], found["preference/accuracy"]) == (0.0, 0.0)


def test_gradient_checkpointing_recomputes_and_gives_the_same_update(model):
    found, passes = [], []
    for on in (False, True):
        trainer = RewardTrainer(reward_config(model, learner={"gradient_checkpointing": on}), 1)
        calls: list[None] = []
        trainer.model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        trainer.update(ragged_pairs())
        found.append(parameters(trainer.model))
        passes.append(len(calls))
    assert passes == [1, 2]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_compiled_layers_give_the_same_bits(model, monkeypatch):
    trace_only(monkeypatch)
    section = {"precision": "fp32", "micro_batch_tokens": 40}
    plain, other = (RewardTrainer(reward_config(model, learner={**section, "compile": on}), 3) for on in (False, True))
    for seed in range(3):
        expected, found = (trainer.update(ragged_pairs(9, seed)) for trainer in (plain, other))
        assert {**found, "time/learn_s": 0} == {**expected, "time/learn_s": 0}
    assert torch.equal(parameters(other.network), parameters(plain.network))
    assert np.array_equal(other.scores(ragged_pairs(5)), plain.scores(ragged_pairs(5)))
    assert 1 <= graphs() <= 2  # a single row may get a graph of its own


def test_bf16_stays_near_float32(model):
    exact, rounded = (RewardTrainer(reward_config(model, learner={"precision": p}), 1) for p in ("fp32", "bf16"))
    pairs = ragged_pairs()
    scores, rounded_scores = exact.scores(pairs), rounded.scores(pairs)
    assert (scores != rounded_scores).any()
    assert rounded_scores == pytest.approx(scores, abs=0.02)
    assert np.abs(scores).max() > 0.5
    expected, found = exact.update(pairs), rounded.update(pairs)
    for key in ("preference/loss", "preference/grad_norm"):
        assert found[key] == pytest.approx(expected[key], rel=0.02)
    assert all(p.dtype == torch.float32 for p in rounded.model.parameters())


def test_a_loss_that_is_nan_stops_the_step_before_the_weights_change(model):
    trainer = RewardTrainer(reward_config(model), 1)
    before = parameters(trainer.model)
    with pytest.raises(BatchError, match="not finite"):
        trainer.update([*ragged_pairs(), make_pair([3], [4], [5], margin=math.nan)])
    assert torch.equal(parameters(trainer.model), before)
    assert trainer.step == 0


def windowed(window: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=64, num_key_value_heads=1, num_labels=1, sliding_window=window, **sizes)
    return MistralForSequenceClassification(config).eval()


def test_a_sliding_window_shorter_than_a_sequence_is_refused(model):
    cfg = reward_config(model, data={"max_tokens": 12})
    with pytest.raises(UserError, match="sliding window"):
        RewardTrainer(cfg, 1, model=windowed(11)).join(0, 1, "")
    RewardTrainer(cfg, 1, model=windowed(12)).join(0, 1, "")


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_model_that_ignores_mask_or_positions_is_refused(model, ignored):
    reward_model = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    reward_model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {key: x for key, x in kwargs.items() if key != ignored}), with_kwargs=True
    )
    with pytest.raises(UserError, match="plain attention"):
        RewardTrainer(reward_config(model), 1, model=reward_model).join(0, 1, "")


class Killed(Exception):
    """The process is gone."""


class OneProcess:
    """The group of ranks, around one trainer that lives here. Dies at the call it is told, before or after its work."""

    def __init__(self, trainer: RewardTrainer, *, dies: tuple[int, str] | None = None) -> None:
        self.trainer, self.calls, self.batches, self._dies = trainer, [], [], dies

    @property
    def step(self) -> int:
        return self.trainer.step

    async def _do(self, method, argument):
        number = len(self.calls)
        self.calls.append(method.__name__)
        if self._dies == (number, "before"):
            raise Killed
        result = method(argument)
        if self._dies == (number, "after"):
            raise Killed
        return result

    async def update(self, pairs):
        self.batches.append([packed(pair) for pair in pairs])
        return await self._do(self.trainer.update, pairs)

    async def scores(self, pairs):
        assert len(pairs) <= 64
        return await self._do(self.trainer.scores, pairs)

    async def save(self, directory):
        return await self._do(self.trainer.save, directory)

    async def restore(self, directory):
        await self._do(self.trainer.restore, directory)

    async def save_model(self, directory):
        await self._do(self.trainer.save_model, directory)


@pytest.fixture(scope="module")
def ten_pairs(model, tmp_path_factory) -> Pairs:
    rng = np.random.default_rng(0)
    some = [" ".join(rng.choice(WORDS[4:], 1 + i % 4, replace=False)) for i in range(30)]
    records = [
        {"prompt": f"ask {some[i]}", "chosen": some[i + 10], "rejected": some[i + 20], "margin": i / 10}
        for i in range(10)
    ]
    return write_pairs(tmp_path_factory.mktemp("pairs"), model, records)


LOOP = {"epochs": 2, "optimizer": {"schedule": "linear", "warmup_steps": 2}}  # three steps an epoch: 4, 4 and 2 pairs
CALLS = ["update", "update", "save", "update", "scores", "update", "save", "update", "update", "save", "scores"]


def run_once(directory: Path, model: Path, pairs: Pairs, *, dies: tuple[int, str] | None = None, **overrides: Any):
    """Trains in `directory` from its newest checkpoint. Returns the group, dead or not, and the evaluations."""
    directory.mkdir(exist_ok=True)
    cfg = reward_config(model, **{**LOOP, **overrides})
    group = OneProcess(RewardTrainer(cfg, 3 * cfg.epochs), dies=dies)
    try:
        evaluations = asyncio.run(train_reward_model(RewardRun(cfg, directory, pairs, pairs[np.arange(5)], group)))
    except Killed:
        return group, None
    return group, evaluations


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k.split("/")[0] != "time"} for record in read_records(path)]


@pytest.fixture(scope="module")
def uninterrupted(model, ten_pairs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    group, evaluations = run_once(directory, model, ten_pairs)
    return group, evaluations, directory


def test_the_loop_updates_saves_evaluates_every_epoch_and_leaves_the_model(uninterrupted):
    group, evaluations, directory = uninterrupted
    assert group.calls == [*CALLS, "save_model"]
    assert [(e.step, e.epoch, e.pairs) for e in evaluations] == [(3, 1.0, 5), (6, 2.0, 5)]
    assert [record["step"] for record in read_records(directory / "evaluations.jsonl")] == [3, 6]
    records = read_records(directory / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(6))
    assert [record["epoch"] for record in records] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2], abs=1e-12)
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {"step-000004", "step-000006"}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", range(len(CALLS) + 1), ids=[*map("{0[1]}-{0[0]}".format, enumerate(CALLS)), "model"])
def test_training_killed_anywhere_resumes_to_the_same_bits(model, ten_pairs, uninterrupted, tmp_path, number, when):
    whole, evaluations, directory = uninterrupted
    cut, nothing = run_once(tmp_path, model, ten_pairs, dies=(number, when))
    assert (nothing, len(cut.calls)) == (None, number + 1)
    saves = cut.calls[:number].count("save")  # a checkpoint counts once the driver has written its marker
    resumed, found = run_once(tmp_path, model, ten_pairs)
    assert resumed.calls.count("restore") == min(1, saves)
    assert resumed.calls.count("update") == 6 - 2 * saves  # every step after the newest checkpoint, again
    one, other = (group.trainer.model.state_dict() for group in (resumed, whole))
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert timeless(tmp_path / "metrics.jsonl") == timeless(directory / "metrics.jsonl")
    assert found == evaluations
    assert timeless(tmp_path / "evaluations.jsonl") == timeless(directory / "evaluations.jsonl")
    assert (tmp_path / "model" / "config.json").exists()


def test_a_checkpoint_without_its_marker_is_ignored(model, ten_pairs, uninterrupted, tmp_path):
    run_once(tmp_path, model, ten_pairs, dies=(7, "before"))  # after the checkpoints of steps 2 and 4
    newest = tmp_path / "checkpoints/step-000004"
    (newest / "COMPLETE").unlink()
    (newest / "learner.pt").write_bytes(b"cut short")
    resumed, _ = run_once(tmp_path, model, ten_pairs)
    assert resumed.calls.count("update") == 4
    assert torch.equal(parameters(resumed.trainer.model), parameters(uninterrupted[0].trainer.model))
    assert timeless(tmp_path / "metrics.jsonl") == timeless(uninterrupted[2] / "metrics.jsonl")


def test_pairs_that_cannot_be_learned_from_end_the_run_with_a_remedy(model, ten_pairs, tmp_path, monkeypatch):
    def update(self: RewardTrainer, pairs: Any) -> None:
        raise BatchError("the gradient's norm is not finite (nan)")

    monkeypatch.setattr(RewardTrainer, "update", update)
    with pytest.raises(UserError, match=r"pairs of step 1: the gradient.*\(nan\)\. .*lower optimizer.learning_rate"):
        run_once(tmp_path, model, ten_pairs)


@pytest.mark.parametrize("damage", ["newest", "all"])
def test_a_damaged_checkpoint_is_set_aside_and_training_continues(model, ten_pairs, uninterrupted, tmp_path, damage):
    run_once(tmp_path, model, ten_pairs, dies=(8, "before"))  # after the checkpoints of steps 2 and 4
    for step in (4, 2) if damage == "all" else (4,):
        weights = tmp_path / f"checkpoints/step-{step:06d}/weights-00000.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    resumed, _ = run_once(tmp_path, model, ten_pairs)
    assert resumed.calls.count("update") == (6 if damage == "all" else 4)
    assert torch.equal(parameters(resumed.trainer.model), parameters(uninterrupted[0].trainer.model))
    assert (tmp_path / "set-aside/step-000004/weights-00000.safetensors").exists()
    assert timeless(tmp_path / "metrics.jsonl") == timeless(uninterrupted[2] / "metrics.jsonl")


def test_the_optimizer_of_a_finished_run_is_dropped_if_asked(model, ten_pairs, tmp_path):
    run_once(tmp_path, model, ten_pairs, checkpoint={"every": 2, "keep": 2, "keep_optimizer_at_end": False})
    assert not list(tmp_path.glob("checkpoints/*/optimizer-*"))
    assert len(list(tmp_path.glob("checkpoints/*/weights-*"))) == 2


def test_a_run_that_is_done_trains_no_more(model, ten_pairs, uninterrupted, tmp_path):
    _, evaluations, directory = uninterrupted
    shutil.copytree(directory, tmp_path / "run")
    resumed, found = run_once(tmp_path / "run", model, ten_pairs)
    assert resumed.calls == ["restore", "save_model"]
    assert found == evaluations


def test_every_epoch_sees_every_pair_once_in_an_order_of_its_own(model, ten_pairs, tmp_path):
    group, _ = run_once(tmp_path, model, ten_pairs, epochs=3)
    assert [len(batch) for batch in group.batches] == [4, 4, 2] * 3
    epochs = [[pair for batch in group.batches[start : start + 3] for pair in batch] for start in (0, 3, 6)]
    pairs = [packed(pair) for pair in ten_pairs]
    assert len(set(pairs)) == 10
    for epoch in epochs:
        assert sorted(epoch) == sorted(pairs)
    orders = {tuple(epoch) for epoch in (*epochs, pairs)}
    assert len(orders) == 4
    other = RewardRun(reward_config(model, seed=1), tmp_path, ten_pairs, ten_pairs, group)
    assert [packed(pair) for pair in other.batch(0)] != group.batches[0]


def counted_pairs(count: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """Responses of 3 to 6 words, none written twice; the preferred one has more a-words than b-words."""
    kinds: dict[bool, list[str]] = {True: [], False: []}
    seen = set()
    while min(map(len, kinds.values())) < count:
        words = rng.choice(WORDS[4:], rng.integers(3, 7)).tolist()
        lead = sum(word[0] == "a" for word in words) - sum(word[0] == "b" for word in words)
        if lead and " ".join(words) not in seen:
            seen.add(" ".join(words))
            kinds[lead > 0].append(" ".join(words))
    return [{"prompt": "ask", "chosen": c, "rejected": r} for c, r in zip(kinds[True][:count], kinds[False])]


def test_a_tiny_model_learns_to_judge_unseen_responses(language_model, tmp_path):
    pairs = write_pairs(tmp_path, language_model, counted_pairs(500, np.random.default_rng(0)))
    train, heldout = pairs[np.arange(350)], pairs[np.arange(350, 500)]  # more than one call's worth are held out
    texts = [{tuple(row[0].tolist()) for pair in part for row in sequences(pair)} for part in (train, heldout)]
    assert not texts[0] & texts[1]
    optimizer = {"learning_rate": 2e-3, "head_learning_rate": 1e-2, "eps": 1e-8, "schedule": "linear"}
    cfg = reward_config(language_model, epochs=2, pairs_per_step=16, optimizer=optimizer, checkpoint={"every": 100})
    group = OneProcess(RewardTrainer(cfg, 44))
    seen: list[Any] = []
    run = RewardRun(cfg, tmp_path / "run", train, heldout, group, on_evaluation=seen.append)
    run.directory.mkdir()
    evaluations = asyncio.run(train_reward_model(run))
    assert evaluations == seen
    assert evaluations[-1].pairs == 150
    assert evaluations[-1].accuracy > 0.95
    assert evaluations[-1].loss < 0.2  # ln 2 = 0.69 at first
    with torch.no_grad():  # the saved model, read by transformers alone
        left = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model", dtype=torch.float32).eval()
        chosen, rejected = slow_scores(left, list(heldout)).T
    assert (chosen > rejected).double().mean().item() == pytest.approx(evaluations[-1].accuracy, abs=0.02)
