"""LoRA: training, publishing and saving of adapters. For two ranks see test_ranks.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from common.errors import UserError
from common.model.packing import Sequences
from common.model.size import parameter_shapes
from learner.ppo import lora
from learner.ppo.learner import Learner
from tests.fakes import make_prompt, make_rollout, save_tiny_kind, save_tiny_model, tiny_config
from tests.learner.ppo.test_learner import varied_batch

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RATES = {"learning_rate": 1e-2, "value_head_learning_rate": 2e-2, "critic_learning_rate": 1e-2, "eps": 1e-3}
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def new_learner(model: Path, *, seed: int = 0, targets: str | tuple[str, ...] = "all-linear", **fields) -> Learner:
    settings = {"precision": "fp32", "lora": {"rank": 4, "alpha": 8, "targets": targets}, **fields}
    return Learner(
        tiny_config(
            model,
            seed=seed,
            rollouts_per_step=8,
            num_steps=10,
            optimizer=RATES,
            learner=settings,
            sampling={"temperature": TEMPERATURE},
        )
    )


@pytest.fixture(scope="module")
def trained(model):
    """After three updates."""
    learner = new_learner(model)
    for seed in range(3):
        learner.update(varied_batch(seed))
    return learner


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_published_has_the_names_and_shapes_that_engines_expect(tmp_path, tied, adapted):
    directory = save_tiny_model(tmp_path / "model", tied=tied)
    learner = new_learner(directory) if adapted else new_learner(directory, lora=None)
    published = {name: tuple(tensor.shape) for name, tensor in learner.network.policy_tensors()}
    assert published == parameter_shapes(directory)


def sequences(seed: int = 0) -> Sequences:
    rng = np.random.default_rng(seed)
    lengths = [(3, 7), (5, 1), (4, 0), (6, 8)]
    return Sequences.pack(*([rng.integers(2, 60, pair[i]) for pair in lengths] for i in range(2)))


def logprobs(learner: Learner, **options) -> torch.Tensor:
    with torch.no_grad():
        return learner.network(sequences(), temperature=TEMPERATURE, **options)[0]


def slow_logprobs(network: LlamaForCausalLM, prompt: list[int], response: list[int]) -> list[float]:
    """From the definition, token by token."""
    found = []
    for t, token in enumerate(response):
        with torch.no_grad():
            logits = network(torch.tensor([prompt + response[:t]])).logits[0, -1].float()
        found.append(torch.log(torch.softmax(logits / TEMPERATURE, dim=0))[token].item())
    return found


def rows_of(packed: Sequences) -> list[tuple[list[int], list[int]]]:
    parts = packed.input_ids.split(packed.lengths.tolist())
    return [(ids[:p].tolist(), ids[p:].tolist()) for ids, p in zip(parts, packed.prompt_lengths.tolist(), strict=True)]


def assert_logprobs_of(network: LlamaForCausalLM, found: torch.Tensor) -> None:
    """`found`, [B, R], are those that `network` gives, to 1e-5."""
    for row, (prompt, response) in zip(found, rows_of(sequences()), strict=True):
        assert row[: len(response)].tolist() == pytest.approx(slow_logprobs(network, prompt, response), abs=1e-5)


def base(model: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)


def test_at_first_the_policy_is_what_it_was_loaded_from(model):
    learner = new_learner(model)
    assert_logprobs_of(base(model), logprobs(learner))
    assert torch.equal(logprobs(learner), logprobs(learner, reference=True))
    ups = [p for name, p in learner.network.policy.named_parameters() if "lora_B" in name]
    downs = [p for name, p in learner.network.policy.named_parameters() if "lora_A" in name]
    assert len(ups) == len(downs) == 2 * len(TARGETS)
    assert all(not p.any() for p in ups)
    assert all(p.any() for p in downs)


def test_after_training_the_reference_still_is_what_it_was_loaded_from(model, trained):
    assert (logprobs(trained) - logprobs(trained, reference=True)).abs().max() > 0.1
    assert_logprobs_of(base(model), logprobs(trained, reference=True))
    again = logprobs(trained)
    assert (again - logprobs(trained, reference=True)).abs().max() > 0.1  # the adapters are on again


def test_adapters_are_on_again_after_an_error(trained):
    before = logprobs(trained)
    with pytest.raises(KeyError), lora.off(trained.network.policy):
        raise KeyError
    assert torch.equal(logprobs(trained), before)


def test_published_weights_give_the_logprobs_of_the_adapted_policy(model, trained):
    network = base(model)
    names = dict(network.named_parameters())
    tensors = dict(trained.network.policy_tensors())
    assert tensors.keys() == names.keys()
    unchanged = {name for name, tensor in tensors.items() if torch.equal(tensor, names[name])}
    assert unchanged == {name for name in names if not any(target in name for target in TARGETS)}
    network.load_state_dict(tensors, strict=False)  # lm_head is the embedding
    assert_logprobs_of(network, logprobs(trained))


def test_a_merged_weight_is_the_sum_from_the_paper(model, trained):
    """W + alpha / rank B A, in float64 by hand, of one layer."""
    layer = trained.network.policy.model.layers[1].mlp.down_proj
    down, up = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    expected = base(model).model.layers[1].mlp.down_proj.weight.detach().double()
    for r in range(4):
        expected = expected + 8 / 4 * torch.outer(up[:, r], down[r])
    found = dict(trained.network.policy_tensors())["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_the_saved_adapter_is_one_that_peft_loads(model, trained, tmp_path):
    """Its logits are those of the learner; the merged directory is rounded to bf16, about three digits: within 5 % of
    what training has moved."""
    trained.save_policy(tmp_path / "policy")
    adapted = PeftModel.from_pretrained(base(model), tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    assert_logprobs_of(adapted, logprobs(trained))
    ids = sequences().input_ids[None, :10]
    with torch.no_grad():
        whole, rounded, before = (network(ids).logits for network in (adapted, merged, base(model)))
    assert (whole - before).abs().max() > 0.2
    assert (whole - rounded).abs().max() < 0.05 * (whole - before).abs().max()
    adapted.save_pretrained(tmp_path / "as peft writes it")
    names = [set(load_file(tmp_path / d / "adapter_model.safetensors")) for d in ("adapter", "as peft writes it")]
    assert names[0] == names[1]  # other readers, such as vLLM, are less forgiving than peft
    assert adapted.peft_config["default"].base_model_name_or_path == str(model)
    assert adapted.peft_config["default"].task_type == "CAUSAL_LM"


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_only_adapters_and_the_value_head_are_trained(model, critic):
    learner = new_learner(model, critic=critic)
    before = {name: p.detach().clone() for name, p in learner.network.named_parameters()}
    for seed in range(2):
        learner.update(varied_batch(seed))
    changed = {name for name, p in learner.network.named_parameters() if not torch.equal(p, before[name])}
    adapters = {name for name in before if ".lora_" in name}
    assert changed == adapters | {"value_head.weight", "value_head.bias"}
    assert {name.partition(".")[0] for name in adapters} == {"policy", *(["critic_body"] * (critic == "separate"))}
    held = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in learner.network.named_parameters() if name in changed}
    assert all(not p.requires_grad for name, p in learner.network.named_parameters() if name not in changed)


def test_a_gradient_reaches_every_adapter(model):
    learner = new_learner(model)
    learner.update(varied_batch(0))  # before it B is zero, and A has no gradient
    seen: list[bool] = []
    learner.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(bool(p.grad.any()) for p in learner.network.parameters() if p.requires_grad)
    )
    learner.update(varied_batch(1))
    assert len(seen) == 4 * (2 * 2 * len(TARGETS) + 2)
    assert all(seen)


def test_the_seed_decides_the_adapters_and_nothing_else_does(model):
    def adapters(seed: int) -> dict[str, torch.Tensor]:
        return dict(new_learner(model, seed=seed).network.adapter_tensors())

    torch.manual_seed(1)
    first = adapters(0)
    torch.manual_seed(2)
    second, other = adapters(0), adapters(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == ("lora_B" in name) for name in first)


@pytest.mark.parametrize("targets", ["q_proj", ("q_proj", "down_proj")])
def test_targets_decide_which_layers_get_adapters(model, targets, tmp_path):
    learner = new_learner(model, targets=targets)
    learner.update(varied_batch(0))
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in learner.network.adapter_tensors()}
    assert layers == ({targets} if isinstance(targets, str) else set(targets))
    learner.save_policy(tmp_path / "policy")
    assert_logprobs_of(PeftModel.from_pretrained(base(model), tmp_path / "adapter").eval(), logprobs(learner))


KINDS = {
    "Conv1D": ("gpt2", "all-linear"),  # keeps its weight transposed
    "Conv1D, square": ("gpt2", ("attn.c_proj",)),
    "experts": ("mixtral", "all-linear"),  # peft adapts the fused weights of all experts, and the router's
    "one weight of the experts": ("qwen3_moe", ("q_proj", "down_proj")),
}


@pytest.mark.parametrize(("kind", "targets"), KINDS.values(), ids=KINDS)
def test_every_kind_of_adapted_layer_publishes_what_it_trains(tmp_path, kind, targets):
    directory = save_tiny_kind(tmp_path / "model", kind)
    start = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    learner = new_learner(directory, targets=targets)
    for seed in range(2):
        learner.update(varied_batch(seed))
    moved = [not torch.equal(p, torch.zeros_like(p)) for n, p in learner.network.adapter_tensors() if "lora_B" in n]
    assert moved
    assert all(moved)
    assert (logprobs(learner) - logprobs(learner, reference=True)).abs().max() > 0.05
    assert_logprobs_of(start, logprobs(learner, reference=True))

    tensors = dict(learner.network.policy_tensors())
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == parameter_shapes(directory)
    start.save_pretrained(tmp_path / "merged", state_dict=tensors, save_original_format=False)
    assert_logprobs_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), logprobs(learner))

    learner.save_policy(tmp_path / "policy")
    assert_logprobs_of(PeftModel.from_pretrained(start, tmp_path / "adapter").eval(), logprobs(learner))


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (("q_proj", "lm_head"), "lm_head is the output embedding"),
        ("embed_tokens", "model.embed_tokens is the input embedding"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_adapters_of_an_embedding_are_refused(tmp_path, targets, reason, tied):
    with pytest.raises(UserError, match=rf"learner\.lora\.targets .*{reason}.* name linear layers, or use"):
        new_learner(save_tiny_model(tmp_path, tied=tied), targets=targets)


def test_part_of_a_fused_weight_is_no_target(tmp_path):
    with pytest.raises(UserError, match=r"gate_proj without also targeting up_proj .* name linear layers"):
        new_learner(save_tiny_kind(tmp_path, "qwen3_moe"), targets="gate_proj")


@pytest.mark.parametrize("targets", ["no_such_layer", ("no_such_layer",)])
def test_targets_that_fit_nothing_are_the_users_error(model, targets):
    with pytest.raises(UserError, match=r"learner\.lora\.targets .*no_such_layer.* does not fit the model"):
        new_learner(model, targets=targets)


def test_the_learner_measures_the_reference_from_the_definition(model, trained):
    rollouts = [
        make_rollout(make_prompt(index, tuple(prompt)), response)
        for index, (prompt, response) in enumerate(rows_of(sequences()))
    ]
    found = trained.ref_logprobs(*rollouts)
    policy = logprobs(trained)
    for index, row in enumerate(trained.policy_logprobs(*rollouts)):
        assert row.tolist() == pytest.approx(policy[index, : len(row)].tolist(), abs=1e-6)
    network = base(model)
    for row, rollout in zip(found, rollouts, strict=True):
        assert row.dtype == np.float32
        expected = slow_logprobs(network, rollout.prompt.token_ids.tolist(), rollout.response_ids.tolist())
        assert row.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_gradient_checkpointing_does_not_change_the_gradient_of_an_adapter(model, critic):
    found = []
    for on in (False, True):
        learner = new_learner(model, critic=critic, gradient_checkpointing=on)
        taken: list[torch.Tensor] = []
        learner.optimizer.register_step_pre_hook(
            lambda *_, learner=learner, taken=taken: taken.extend(
                p.grad.flatten().clone() for p in learner.network.parameters() if p.requires_grad
            )
        )
        learner.update(varied_batch(0))
        found.append(torch.cat(taken))
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


def test_frozen_weights_are_bf16_where_the_passes_are_and_adapters_float32(model):
    learner = new_learner(model, precision="bf16")
    exact = new_learner(model)
    for seed in range(2):
        stats, exact_stats = learner.update(varied_batch(seed)), exact.update(varied_batch(seed))
    for name, parameter in learner.network.named_parameters():
        trained = ".lora_" in name or "value_head" in name
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name
    for key in ("value/loss", "ppo/entropy", "kl/per_token"):
        assert stats[key] == pytest.approx(exact_stats[key], rel=0.02, abs=0.01), key
