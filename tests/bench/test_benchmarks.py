"""The benchmarks measure what they say: on a tiny model, and without looking at the clock."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from learner.ppo.advantages import gae as ratchet_gae
from tests.bench import __main__ as bench
from tests.bench import plain_ppo
from tests.bench.bare import ROW, bare_for, count
from tests.bench.batch import LONGEST, ROLLOUTS, SHORTEST, batch
from tests.bench.credit import costs
from tests.bench.fresh import call
from tests.bench.learner import compare
from tests.bench.mask import CRITICS
from tests.bench.mask import compare as compare_losses
from tests.bench.memory import record
from tests.bench.plain_ppo import PlainPPO
from tests.bench.results import Result, table
from tests.bench.step import plain
from tests.bench.task import prompts, variety
from tests.bench.turns import environments
from tests.bench.weights import find_changes, trained
from tests.fakes import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


def test_the_bare_loop_has_the_learners_tokens(tiny):
    made = batch(tiny)
    lengths = [len(row["prompt_ids"]) + len(row["response_ids"]) for row in made.to_pylist()]
    assert (len(lengths), min(lengths), max(lengths)) == (ROLLOUTS, SHORTEST, LONGEST)
    bare = bare_for(tiny, made, 256)
    ids = torch.cat(bare.micro_batches)
    assert ids.numel() == sum(lengths)
    assert len(ids) * bare.chosen == count(made, "response_ids")
    assert [len(rows) for rows in bare.micro_batches[:-1]] == [256 // ROW] * (len(bare.micro_batches) - 1)


def test_the_bare_loop_computes_logprobs_of_the_tokens_that_follow(tiny):
    bare = bare_for(tiny, batch(tiny), 256)
    ids = bare.micro_batches[0]
    with torch.no_grad():
        logprobs = bare.policy(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        values = bare.value_head(bare.policy.base_model(ids).last_hidden_state)[:, -bare.chosen - 1 : -1]
        loss = bare.loss(ids)
    assert loss.item() == pytest.approx((values.sum() - logprobs[:, -bare.chosen :].sum()).item(), rel=1e-2)  # bf16


def test_both_loops_run_and_are_compared(tiny):
    found = compare(tiny, 1, 1, None)
    assert found["ratio"] == pytest.approx(found["bare_s"] / found["optimise_s"])
    assert found["update_ratio"] == pytest.approx(found["bare_s"] / found["update_s"])
    assert found["tokens"] == ROLLOUTS * (SHORTEST + LONGEST) / 2


def test_both_policy_losses_run_on_one_learner_and_are_compared(tiny):
    for critic in CRITICS:
        found = compare_losses(tiny, critic, 1, 1, 1)
        assert found["ratio"] == pytest.approx(found["mask_s"] / found["clip_s"])


def test_credit_is_measured_against_its_own_update_and_journal(tiny):
    found = costs(tiny, 1, 1, 4, 40, 0.25)
    assert found["time_ratio"] == pytest.approx((found["gather_s"] + found["write_s"]) / found["update_s"])
    # A journal without compression has at least its ids, log-probabilities, versions and texts, 4 bytes each.
    assert found["journal_bytes"] > 4 * (30 * 4 * 2 + 10 * 4 * 5)
    assert 10 * 4 < found["credit_bytes"] < found["bytes_ratio"] * found["journal_bytes"] + 1


def test_memory_counts_the_interpreter(tiny):
    parts = record(tiny)
    assert parts["published_peak_mb"] >= parts["second_update_peak_mb"] >= parts["imported_mb"] > 100
    assert parts["state_mb"] == pytest.approx(16 * parts["parameters"] / 1e6)


def test_trained_weights_lie_between_the_bf16_values_around_them():
    weight = torch.tensor([1.0, -1.5, 0.75, 3e-3]).bfloat16().float().repeat(2000, 1)
    moved = trained(weight)
    # bf16 steps by 2^-7 from 1 to 2, by 2^-8 from 1/2 to 1, and by 2^-16 from 2^-9 to 2^-8.
    steps = torch.tensor([2**-7, 2**-7, 2**-8, 2**-16])
    assert ((moved - weight).abs() <= steps / 2).all()
    torch.testing.assert_close((moved - weight).std(0), steps / 12**0.5, atol=0, rtol=0.05)  # uniform


def test_changes_are_counted_in_bytes_of_the_full_set(tiny):
    parts = find_changes(tiny)
    named = LlamaForCausalLM.from_pretrained(tiny).named_parameters()
    weights = torch.cat([weight.detach().double().abs().flatten() for _, weight in named]).numpy()
    spacing = 2.0 ** (np.floor(np.log2(weights)) - 7)  # of bf16 there: seven bits follow the leading one
    for rate in (1e-6, 1e-5):
        crossed = np.minimum(1, rate / spacing).mean()  # share of places from which such a step leads past a boundary
        # A change takes three times the bytes of a value.
        assert parts[f"trained_{rate:.0e}_bytes_ratio".replace("e-0", "e-")] == pytest.approx(3 * crossed, rel=0.05)


def test_plain_padding_changes_no_logprob_and_no_value(tiny):
    torch.manual_seed(0)
    trainer = PlainPPO(tiny, max_new_tokens=5)
    asked = [[4, 5, 6, 7, 8], [9, 10]]
    ids, attended, mask = trainer.generate(asked)
    assert ids[1, :3].tolist() == [0, 0, 0]
    assert not attended[1, :3].any()
    assert ids.shape == (2, 10)
    assert mask.all()  # the end token is forbidden until the last
    alone = ids[1:, 3:]
    everywhere = torch.ones_like(alone, dtype=torch.bool)
    with torch.no_grad():
        together = plain_ppo.logprobs(trainer.policy, ids, attended, 5)[1]
        by_itself = trainer.policy(alone).logits.log_softmax(-1)[0, :-1].gather(-1, alone[0, 1:, None]).squeeze(-1)
        values = trainer.critic(ids, attended, 5)[1]
        torch.testing.assert_close(together, by_itself[-5:], atol=1e-5, rtol=0)
        torch.testing.assert_close(values, trainer.critic(alone, everywhere, 5)[0], atol=1e-5, rtol=0)


def test_plain_gae_is_ratchets():
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    rewards, values = (torch.randn(2, 4, generator=generator) * mask for _ in range(2))
    mine = plain_ppo.gae(rewards, values, mask)
    theirs = ratchet_gae(rewards, values, mask, gamma=plain_ppo.GAMMA, lam=plain_ppo.LAM)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one * mask, other, atol=1e-6, rtol=0)


def test_plain_steps_raise_the_reward(tiny, monkeypatch):
    monkeypatch.setattr(plain_ppo, "LEARNING_RATE", 3e-3)
    torch.manual_seed(0)
    trainer = PlainPPO(tiny, max_new_tokens=6)
    scores = []

    def a_words(text):
        words = text.split()
        scores.append(sum(word.startswith("a") for word in words) / max(1, len(words)))
        return scores[-1]

    for _ in range(20):
        trainer.step([[3, 4 + i] for i in range(32)], a_words)
    assert sum(scores[-64:]) / 64 > sum(scores[:64]) / 64 + 0.2


def test_plain_asks_every_prompt(tiny):
    found = plain(tiny, 4, 1)
    trainer = PlainPPO(tiny, max_new_tokens=4)
    assert found["tokens"] == sum(len(trainer.tokenizer(p["prompt"])["input_ids"]) + 4 for p in prompts(0))
    assert found["step_s"] == pytest.approx(found["generate_s"] + found["score_s"] + found["learn_s"])


def test_prompts_do_not_depend_on_the_seed():
    assert prompts(0) == prompts(1)
    assert variety("a b a b") == 0.5


def test_the_environments_of_the_benchmark_of_turns_can_be_made():
    assert [environments(name).host.role for name in ("AtOnce", "Slow")] == ["EnvironmentsAtOnce", "EnvironmentsSlow"]


def fake_measure():
    return {"fake": Result(0.5, ">= 0.9", {"part_s": 2.0}), "other": Result(1.0)}


def test_a_call_brings_back_what_the_function_returns():
    assert call("tests.bench.results:Result", 0.5, ">= 0.9") == asdict(Result(0.5, ">= 0.9"))


def test_results_go_to_table_and_file_and_a_failure_does_not_stop_the_rest(tmp_path, monkeypatch, capsys):
    def fake_call(function):
        if function == "tests.bench.broken:measure":
            raise bench.subprocess.CalledProcessError(1, function)
        return {name: asdict(result) for name, result in fake_measure().items()}

    monkeypatch.setattr(bench, "MODULES", {"broken": ["never"], "fake": ["fake", "other"]})
    monkeypatch.setattr(bench, "call", fake_call)
    path = tmp_path / "runs/bench.json"
    assert bench.main([], path) == 1
    assert json.loads(path.read_text())["fake"] == {"value": 0.5, "wanted": ">= 0.9", "parts": {"part_s": 2.0}}
    printed = capsys.readouterr().out
    assert "failed: broken" in printed
    assert bench.main(["fake"], path) == 0


def test_the_table_marks_what_is_missed():
    lines = table(fake_measure()).splitlines()
    assert lines[1].split() == ["!!", "fake", "0.500", ">=", "0.9"]
    assert lines[2].split() == ["part_s", "2.000"]
    assert lines[3].split() == ["ok", "other", "1.000"]
    assert Result(1.5, "<= 1.5").met
    assert not Result(1.6, "<= 1.5").met
