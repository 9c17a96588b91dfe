"""The command with fake engines and services: who is asked what, one policy at a time, cut and continued."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

import deploy.evaluation.command as command
import deploy.session
from common.errors import UserError
from common.files import read_records
from common.types import Rollout, RolloutRef, Score, Turn, Void
from deploy.evaluation.command import run_evaluation
from deploy.evaluation.rows import figure_rows
from deploy.plan.placement import Node
from tests.fakes import FakeRoles, make_rollout, save_tiny_model, tiny_config

PROMPTS, SAMPLES = 4, 3


class Everything:
    def __contains__(self, value):
        return True


class Cluster:
    """What all processes of the commands of a test have done."""

    def __init__(self):
        self.running = None  # the policy whose engines run
        self.started = []  # the policies whose engines were started
        self.asked = []  # (policy, sample id)
        self.fails_after = None  # questions
        self.services = 0  # that run
        self.without_score = set()  # sample ids
        self.without_judge = set()  # sample ids
        self.episodes = False  # an environment answers the policies


class Engine(FakeRoles):
    def __init__(self, cluster, policy):
        super().__init__([])
        self.cluster, self.policy = cluster, policy

    async def write(self, prompt) -> Rollout:
        assert self.cluster.running == self.policy
        if len(self.cluster.asked) == self.cluster.fails_after:
            raise RuntimeError("the pool has failed")
        self.cluster.asked.append((self.policy, prompt.sample_id))
        draws = np.random.default_rng([len(self.policy), *map(abs, prompt.sample_id)])
        rollout = make_rollout(prompt, [int(draws.integers(4, 50)) for _ in range(draws.integers(1, 4))])
        logprobs = -draws.exponential(size=len(rollout.response_ids)).astype(np.float32)
        rollout = replace(rollout, rollout_logprobs=logprobs)
        if self.cluster.episodes:  # the environment says 60 61 after the first token
            rollout = replace(
                rollout,
                prompt=replace(prompt, text=f"{prompt.text}, {draws.integers(99)}"),
                response_ids=np.insert(rollout.response_ids, 1, [60, 61]),
                turns=(Turn(1, 3, float(draws.normal())),),
            )
        return rollout


class Services(FakeRoles):
    def __init__(self, cluster):
        super().__init__([])
        self.cluster = cluster

    async def judge(self, ref: RolloutRef) -> Score | Void:
        if ref.sample_id in self.cluster.without_score:
            return Void(ref.sample_id, "no service")
        passed = float(ref.rollout.response_ids[0] % 2)
        if ref.sample_id in self.cluster.without_judge:
            return Score(passed, {"a_words": passed}, judge_voids={"gold": Void(ref.sample_id, "no judge")})
        return Score(passed, {"a_words": passed, "gold": passed - 0.5})

    async def measure(self, rollout: Rollout) -> np.ndarray:
        return rollout.rollout_logprobs - np.float32(0.25)


@pytest.fixture
def roles(monkeypatch):
    """Engines and services in this process."""
    known = Cluster()

    class Starter:
        def __init__(self, cfg, on_event, tell):
            self.policy, self.services = None, 0

        async def writers(self, policy, cfg, *, keep, seed):
            assert known.running is None, "the engines of the policy before must have stopped"
            self.policy = known.running = policy.path
            known.started.append(policy.path)
            return Engine(known, policy.path)

        def service(self):
            self.services += 1
            known.services += 1
            return Services(known)

        async def rewards(self, cfg, *, policy, judges):
            return self.service()

        async def references(self, cfg):
            return self.service()

        def stop(self):
            known.services -= self.services
            if self.policy is not None:
                known.running = None

    @contextmanager
    def cluster(cfg, run):
        yield [Node("n", 8, 0, 1 << 40)]

    monkeypatch.setattr(deploy.session, "cluster", cluster)
    monkeypatch.setattr(deploy.session, "try_sources", lambda *arguments, **options: None)
    monkeypatch.setattr(command, "Starter", Starter)
    monkeypatch.setattr(command, "write_plots", lambda record, directory: [directory / "plot.png"])  # takes a second
    monkeypatch.setattr(command, "RewardPool", lambda pool, keep: pool)
    monkeypatch.setattr(command, "ReferencePool", lambda pool: pool)
    return known


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [str(save_tiny_model(tmp_path_factory.mktemp(name))) for name in ("model", "trained")]


@pytest.fixture
def cfg(models):
    return tiny_config(models[0], evaluation={"prompts": PROMPTS, "text_tokens": 0})


def ids(path):
    return [(answer["prompt"], answer["sample"]) for answer in read_records(path)]


EVERY = [(prompt, sample) for prompt in range(PROMPTS) for sample in range(SAMPLES)]


def test_every_policy_answers_every_question_and_one_runs_at_a_time(roles, cfg, models, tmp_path, capsys):
    record = run_evaluation(cfg, tmp_path / "run", policies={"mine": models[1]}, samples=SAMPLES)
    assert roles.started == models
    assert (roles.running, roles.services) == (None, 0)
    assert json.loads((tmp_path / "run/evaluation.json").read_text()) == record
    for name in ("base", "mine"):
        assert sorted(ids(tmp_path / f"run/answers/{name}.jsonl")) == EVERY
    base, mine = record["policies"].values()
    for name, figures in record["policies"].items():
        answers = read_records(tmp_path / f"run/answers/{name}.jsonl")
        assert figures["score"]["value"] == pytest.approx(np.mean([answer["score"] for answer in answers]))
        assert figures["pass_at_k"][0]["value"] == pytest.approx(figures["score"]["value"])
        tokens = np.mean([len(answer["tokens"]) for answer in answers])
        assert figures["kl_per_response"]["value"] == pytest.approx(0.25 * tokens, abs=1e-6)
    assert "crossover" in mine
    assert "crossover" not in base
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"{tmp_path / 'run'}: evaluation.json, plot.png, answers/"
    assert "4 held-out prompts, 3 answer(s) of each policy to each" in out
    assert "The base, asked k times, beats mine, asked once: " in out


@pytest.mark.parametrize("episodes", [False, True], ids=["responses", "episodes"])
@pytest.mark.parametrize("fails_after", [5, PROMPTS * SAMPLES])
def test_a_cut_evaluation_asks_the_rest_and_ends_the_same(roles, cfg, models, tmp_path, fails_after, episodes):
    roles.episodes = episodes
    policies = {"mine": models[1]}
    whole = run_evaluation(cfg, tmp_path / "whole", policies=policies, samples=SAMPLES)
    everything, roles.asked, roles.started = roles.asked, [], []
    roles.fails_after = fails_after
    with pytest.raises(RuntimeError, match="the pool has failed"):
        run_evaluation(cfg, tmp_path / "cut", policies=policies, samples=SAMPLES)
    assert not (tmp_path / "cut/evaluation.json").exists()
    assert roles.services == 0
    roles.fails_after, before, roles.asked = None, roles.asked, []
    assert run_evaluation(cfg, tmp_path / "cut", resume=True) == whole
    for name in ("base", "mine"):
        assert sorted(ids(tmp_path / f"cut/answers/{name}.jsonl")) == EVERY
    assert sorted({*before, *roles.asked}) == sorted(everything)
    for answer in read_records(tmp_path / "cut/answers/mine.jsonl"):
        assert len(answer["tokens"]) == len(answer["logprobs"]) + 2 * episodes
        assert len(answer.get("turns", [])) == episodes


def test_a_finished_evaluation_starts_nothing(roles, cfg, tmp_path):
    whole = run_evaluation(cfg, tmp_path / "run", samples=2)
    roles.started = []
    assert run_evaluation(cfg, tmp_path / "run", resume=True) == whole
    assert roles.started == []


def test_a_continued_evaluation_asks_only_what_is_new(roles, cfg, models, tmp_path):
    run_evaluation(cfg, tmp_path / "run", samples=1)
    roles.asked = []
    more = {"mine": models[1]}
    record = run_evaluation(cfg, tmp_path / "run", policies=more, samples=SAMPLES, resume=True)
    assert len(roles.asked) == PROMPTS * (SAMPLES - 1) + PROMPTS * SAMPLES
    assert record == run_evaluation(cfg, tmp_path / "new", policies=more, samples=SAMPLES)


def test_answers_without_a_score_are_asked_again(roles, cfg, tmp_path):
    whole = run_evaluation(cfg, tmp_path / "whole", samples=SAMPLES)
    first = roles.asked[0][1]
    roles.without_score = {first}
    record = run_evaluation(cfg, tmp_path / "run", samples=SAMPLES)
    assert (record["policies"]["base"]["voids"], record["policies"]["base"]["void_reason"]) == (1, "no service")
    roles.without_score, roles.asked = set(), []
    assert run_evaluation(cfg, tmp_path / "run", resume=True) == whole
    assert [sample_id for _, sample_id in roles.asked] == [first]


def test_answers_that_a_judge_gave_no_score_count_and_are_asked_again(roles, models, tmp_path, capsys):
    judges = [{"name": "gold", "function": "tests.tasks:a_words"}]
    cfg = tiny_config(models[0], evaluation={"prompts": PROMPTS, "text_tokens": 0, "judges": judges})
    whole = run_evaluation(cfg, tmp_path / "whole", samples=2 * SAMPLES)
    roles.without_judge = Everything()
    record = run_evaluation(cfg, tmp_path / "run", samples=2 * SAMPLES)
    base, asked = record["policies"]["base"], 2 * SAMPLES * PROMPTS
    assert base["pass_at_k"] == whole["policies"]["base"]["pass_at_k"]
    assert base["voids"] == 0
    assert base["judges"]["gold"]["voids"] == asked
    assert ("  of gold alone", [str(asked)]) in figure_rows(record)
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("judge gold gave no score to 16 answers in a row, most recently: no judge;") == 1
    roles.without_judge, roles.asked = set(), []
    assert run_evaluation(cfg, tmp_path / "run", resume=True) == whole
    assert len(roles.asked) == asked


def test_too_many_answers_without_a_score_end_the_evaluation(roles, cfg, models, tmp_path):
    run_evaluation(cfg, tmp_path / "whole", samples=SAMPLES)
    roles.without_score = {sample_id for _, sample_id in roles.asked}
    with pytest.raises(UserError, match=r"12 of 12 held-out answers could not be scored, .*most often: no service"):
        run_evaluation(cfg, tmp_path / "run", policies={"mine": models[1]}, samples=SAMPLES)
    assert roles.started == [models[0], models[0]]


def test_a_service_that_is_down_costs_one_batch(roles, cfg, models, tmp_path):
    roles.without_score = Everything()
    with pytest.raises(UserError, match="none of the first 64 answers of base could be scored; most often: no service"):
        run_evaluation(cfg, tmp_path / "run", policies={"mine": models[1]}, samples=100)
    assert roles.started == models[:1]
    assert roles.services == 0


def test_one_answer_of_one_policy_has_the_record_of_before(roles, cfg, models, tmp_path, capsys):
    record = run_evaluation(cfg, tmp_path / "run", policies={"policy": models[1]})
    assert roles.started == models[1:]
    assert (record["policy"], record["reference"]) == (models[1], models[0])
    passed = [answer["score"] for answer in read_records(tmp_path / "run/answers.jsonl")]
    assert len(passed) == PROMPTS
    assert record["pass_at_1"] == record["score"] == np.mean(passed)
    assert (record["prompts"], record["voids"], record["policy_version"]) == (PROMPTS, 0, 0)
    assert record["policies"]["policy"]["score"]["value"] == record["score"]
    out = capsys.readouterr().out
    assert "held-out prompts, one sampled answer each" in out
    assert out.splitlines()[-1] == f"{tmp_path / 'run'}: evaluation.json, answers.jsonl"


def test_truncated_sampling_is_warned_of(roles, models, tmp_path, capsys):
    settings = {"prompts": PROMPTS, "text_tokens": 0}
    cfg = tiny_config(models[0], evaluation=settings, sampling={"max_new_tokens": 8, "top_k": 1})
    run_evaluation(cfg, tmp_path / "run", samples=2)
    assert "all 2 answers to a prompt are the same" in " ".join(capsys.readouterr().err.split())
