"""A trained critic compared with the run that would start from it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.config.sources import FunctionSourceConfig, HttpSourceConfig, JudgeSourceConfig, ModelSourceConfig
from common.errors import UserError
from common.model.identity import file_digest, model_digest
from common.user_code.import_path import module_file
from deploy.policy_files import PolicyFiles
from deploy.run.critic import check_critic, critic_basis
from deploy.run.identity import identity_of
from deploy.run.start import planned_start
from learner.loop.prompts import PromptStream
from learner.ppo.critic_files import CriticBasis, CriticSource, TrainedCritic, save_critic
from learner.ppo.scores import RunningMoments
from tests.deploy.run.test_start import RECORDS
from tests.fakes import save_tiny_model, tiny_config

SOURCES = (
    FunctionSourceConfig(name="words", function="tests.tasks:a_words"),
    HttpSourceConfig(name="service", urls=["http://h"], weight=0.5),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def policy(model):
    return PolicyFiles.load(str(model))


@pytest.fixture
def cfg(model, tmp_path):
    learner = {"precision": "fp32", "critic_path": str(tmp_path / "critic")}
    cfg = tiny_config(model, learner=learner)
    return cfg.model_copy(update={"reward": cfg.reward.model_copy(update={"sources": SOURCES})})


def save(cfg, basis: CriticBasis, *trained_on) -> None:
    head = {"value_head.weight": torch.zeros(1, 64), "value_head.bias": torch.zeros(1)}
    record = TrainedCritic(basis, RunningMoments(8, 0.5, 2.0), list(trained_on), [])
    save_critic(Path(cfg.learner.critic_path), head, record, base=Path(cfg.model.path))


def test_the_basis_of_a_critic_is_what_its_returns_come_from(cfg, policy, model):
    found = critic_basis(cfg, policy)
    assert (found.kind, found.model, found.gamma) == ("shared", model_digest(model), 1.0)
    assert (found.normalise, found.clip, found.kl_coef, found.kl_estimator) == ("mean_std", 5.0, 0.05, "k1")
    words, service = found.sources
    scoring = {"kind": "function", "function": "tests.tasks:a_words"}
    assert words == CriticSource("words", 1.0, file_digest(module_file("tests.tasks")), scoring)
    assert service == CriticSource("service", 0.5, None, {"kind": "urls"})
    assert found.responses["sampling.max_new_tokens"] == 8
    assert found.responses["prompts.format"] == "plain"


def test_a_critic_of_this_run_is_accepted(cfg, policy, capsys):
    save(cfg, critic_basis(cfg, policy))
    check_critic(cfg, policy)
    assert capsys.readouterr().err == ""


def test_a_pattern_that_freezes_nothing_is_refused_before_anything_starts(model, policy):
    def cfg(pattern):
        return tiny_config(model, learner={"critic": "separate", "critic_frozen": [pattern]})

    check_critic(cfg("*.mlp.*"), policy)
    with pytest.raises(
        UserError, match=r"critic_frozen \(\*\.mpl\.\*\) matches no parameter .*similar names: layers\.0\.mlp"
    ):
        check_critic(cfg("*.mpl.*"), policy)


def test_a_run_without_a_trained_critic_has_nothing_to_check(model, policy):
    check_critic(tiny_config(model), policy)


DIFFERENT = {
    "kind": ({"kind": "separate"}, "it is a separate critic, and learner.critic is shared"),
    "tokenizer": ({"tokenizer": "0" * 64, "model": "0" * 64}, "with another tokenizer than that of model.path"),
    "model": ({"model": "0" * 64}, "it was trained from another model than model.path"),
    "normalise": ({"normalise": "std"}, "it was trained with reward.normalise std, and the run has mean_std"),
    "clip": ({"clip": 4.0}, "it was trained with reward.clip 4.0, and the run has 5.0"),
    "gamma": ({"gamma": 0.9}, "it was trained with ppo.gamma 0.9, and the run has 1.0"),
}


@pytest.mark.parametrize(("changes", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_a_critic_for_another_run_is_refused_by_name(cfg, policy, changes, message):
    save(cfg, replace(critic_basis(cfg, policy), **changes))
    with pytest.raises(UserError, match=r"learner\.critic_path \(.*\) does not fit this run: ") as error:
        check_critic(cfg, policy)
    assert message in str(error.value)
    assert str(error.value).count("trained with") + str(error.value).count("it is a") <= 1


def test_other_reward_sources_are_refused_by_name(cfg, policy):
    basis = critic_basis(cfg, policy)
    words, service = basis.sources
    for sources, message in (
        ((words,), "with the reward sources words, and the run has words, service"),
        ((words, replace(service, weight=2.0)), "with the reward source service at weight 2, and the run has 0.5"),
        ((replace(words, digest="0" * 64), service), "it was trained with other files behind the reward source words"),
        (
            (replace(words, settings={**words.settings, "function": "tests.tasks:b"}), service),
            'with function "tests.tasks:b" in the reward source words, and the run has "tests.tasks:a_words"',
        ),
    ):
        save(cfg, replace(basis, sources=sources))
        with pytest.raises(UserError) as error:
            check_critic(cfg, policy)
        assert message in str(error.value)
    save(cfg, replace(basis, sources=(service, words)))  # in another order
    check_critic(cfg, policy)


def playing(cfg, function: str, **environment):
    """The config with an environment that scores its episodes."""
    tree = cfg.model_dump(mode="json", exclude_none=True)
    tree["environment"] = {"function": f"tests.environments:{function}", "max_tokens": 40, **environment}
    tree["reward"]["sources"] = [{"name": "game", "environment": True}]
    return type(cfg).model_validate(tree)


def test_a_critic_of_another_environments_rewards_is_refused(cfg, policy, capsys):
    ours = playing(cfg, "AWords")
    basis = critic_basis(ours, policy)
    [game] = basis.sources
    assert game.digest == identity_of(ours, policy, RECORDS, [])["environment"]
    save(cfg, critic_basis(playing(cfg, "Restarting"), policy))
    message = r'with function "tests.environments:Restarting" in the reward source game, .*"tests.environments:AWords"'
    with pytest.raises(UserError, match=message):
        check_critic(ours, policy)
    save(cfg, replace(basis, sources=(replace(game, digest="0" * 64),)))
    with pytest.raises(UserError, match="with other files behind the reward source game"):
        check_critic(ours, policy)
    save(cfg, basis)
    check_critic(ours, policy)
    assert capsys.readouterr().err == ""


def test_episodes_of_another_form_are_only_a_warning(cfg, policy, capsys):
    save(cfg, critic_basis(playing(cfg, "AWords", max_turns=2), policy))
    check_critic(playing(cfg, "AWords"), policy)
    assert "other responses than the run's: environment.max_turns was 2 and is 8 now" in capsys.readouterr().err
    plain, episodes = critic_basis(cfg, policy), critic_basis(playing(cfg, "AWords"), policy)
    save(cfg, replace(plain, responses=episodes.responses))
    check_critic(cfg, policy)
    assert "environment was tests.environments:AWords and is None now" in capsys.readouterr().err


def test_another_kl_penalty_is_only_a_warning(cfg, policy, capsys):
    save(cfg, replace(critic_basis(cfg, policy), kl_coef=0.2))
    check_critic(cfg, policy)
    assert "was trained with kl.coef 0.2 and kl.estimator k1, and the run has 0.05 and k1" in capsys.readouterr().err


def test_what_a_judge_is_told_decides_its_scores_and_its_address_does_not():
    about = {"name": "judge", "judge_model": "m", "template": "{response}", "score_range": (0, 10)}
    judge = JudgeSourceConfig(judge_urls=["http://h/v1"], **about)
    elsewhere = judge.model_copy(update={"judge_urls": ("http://i/v1",), "retries": 9, "weight": 2.0})
    assert elsewhere.scoring == judge.scoring
    for changed in ({"judge_model": "n"}, {"template": "{response}!"}, {"score_range": (0, 5)}, {"request": {}}):
        assert judge.model_copy(update=changed).scoring != judge.scoring
    model = ModelSourceConfig(name="model", model="here")
    assert model.scoring == {"kind": "model", "dtype": "bfloat16", "max_tokens": 2048}


def test_other_responses_are_only_a_warning(cfg, policy, capsys):
    basis = critic_basis(cfg, policy)
    save(cfg, replace(basis, responses={**basis.responses, "sampling.temperature": 0.5}))
    check_critic(cfg, policy)
    assert "other responses than the run's: sampling.temperature was 0.5 and is 1.0 now" in capsys.readouterr().err


def test_a_run_that_has_begun_may_have_another_reward_by_now(cfg, policy, capsys):
    save(cfg, replace(critic_basis(cfg, policy), clip=4.0, kl_coef=0.2))
    check_critic(cfg, policy, begun=True)
    assert capsys.readouterr().err == ""
    save(cfg, replace(critic_basis(cfg, policy), kind="separate"))
    with pytest.raises(UserError, match="it is a separate critic"):
        check_critic(cfg, policy, begun=True)


def planned(directory, cfg, policy, **fields):
    prompts = PromptStream(RECORDS, seed=0, rollouts_per_prompt=1)
    return planned_start(directory, cfg, policy, [RECORDS, []], prompts, **fields)


def test_a_run_without_a_critic_ignores_the_path_of_one(cfg, policy, tmp_path):
    assert not Path(cfg.learner.critic_path).exists()
    without = cfg.model_copy(update={"ppo": cfg.ppo.model_copy(update={"advantages": "returns"})})
    [(_, begin)] = planned(tmp_path / "run", without, policy, resume=False).notes
    assert "critic" not in begin["identity"]


def test_the_journal_records_the_critic_and_a_moved_one_is_no_change(cfg, policy, tmp_path):
    save(cfg, critic_basis(cfg, policy))
    run, critic = tmp_path / "run", Path(cfg.learner.critic_path)
    start = planned(run, cfg, policy, resume=False)
    [(kind, begin)] = start.notes
    assert (kind, begin["identity"]["critic"]) == ("begin", model_digest(critic))
    start.record()
    moved = shutil.move(critic, tmp_path / "moved")
    with pytest.raises(UserError, match=r"critic\) has no critic.json"):
        planned(run, cfg, policy, resume=True)
    at_its_place = cfg.model_copy(update={"learner": cfg.learner.model_copy(update={"critic_path": str(moved)})})
    assert planned(run, at_its_place, policy, resume=True).notes == []


def test_another_critic_is_refused_on_resume_and_cannot_be_accepted(cfg, policy, tmp_path):
    save(cfg, critic_basis(cfg, policy))
    run, record = tmp_path / "run", Path(cfg.learner.critic_path) / "critic.json"
    planned(run, cfg, policy, resume=False).record()
    record.write_text(json.dumps({**json.loads(record.read_text()), "passes": [{"loss": 1.0}]}))
    with pytest.raises(UserError, match=r"critic \(.*\) has SHA-256 .* Restore them, or start a new run$"):
        planned(run, cfg, policy, resume=True)
    with pytest.raises(UserError, match=r"--accept critic is refused: the run begins .* Restore .*/critic as it"):
        planned(run, cfg, policy, resume=True, accepted=["critic"])


def test_a_critic_that_has_seen_the_first_responses_is_a_warning(cfg, policy, tmp_path, capsys):
    prompts = identity_of(cfg, policy, RECORDS, [])["prompts.train"]
    part = {"run": "runs/mine", "first": 0, "seed": cfg.seed, "prompts": prompts, "learns": True}
    others = ({"seed": 9}, {"prompts": "0" * 64}, {"learns": False}, {"first": 1})
    save(cfg, critic_basis(cfg, policy), *({**part, **other} for other in others))
    planned(tmp_path / "run", cfg, policy, resume=False)
    assert capsys.readouterr().err == ""
    save(cfg, critic_basis(cfg, policy), part)
    planned(tmp_path / "run", cfg, policy, resume=False)
    message = "learned from runs/mine, with this run's seed (0) and prompts"
    assert capsys.readouterr().err.count(message) == 1


def test_only_the_same_critic_may_have_another_path_on_resume(cfg, policy, tmp_path):
    save(cfg, critic_basis(cfg, policy))
    without = cfg.model_copy(update={"learner": cfg.learner.model_copy(update={"critic_path": None})})
    for name, before, after in (("removed", cfg, without), ("added", without, cfg)):
        planned(tmp_path / name, before, policy, resume=False).record()
        with pytest.raises(UserError, match=r"learner\.critic_path is .*in the journal"):
            planned(tmp_path / name, after, policy, resume=True)
