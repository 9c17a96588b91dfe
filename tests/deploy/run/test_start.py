"""A start compared with the run's journal: edits by hand, recorded changes, accepted differences, lost storage."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from common.config.loading import load_config
from common.config.ppo import Config
from common.errors import UserError
from common.experience_table import experience_table
from common.types import PromptRecord
from deploy.run import directory
from deploy.run.directory import sole_owner
from deploy.run.finished import finished_training
from deploy.run.identity import accepted_differences, kept_names
from deploy.run.provenance import versions
from deploy.run.record import read_record
from deploy.run.settings import leaves
from deploy.run.start import new_start, resumed_start
from learner.loop.journal import Journal
from learner.loop.prompts import PromptStream
from tests.fakes import make_experience, save_tiny_model, tiny_config

IDENTITY = {"model": "1" * 64, "prompts.train": "2" * 64, "reward.sources.0": "3" * 64}
RECORDS = [PromptRecord(f"ask a{i}", np.array([3, 4 + i], dtype=np.int32), {}) for i in range(3)]


@pytest.fixture
def cfg(tmp_path):
    return tiny_config(save_tiny_model(tmp_path / "model"), num_steps=4)


@pytest.fixture
def run(tmp_path, cfg):
    """A run that has begun."""
    directory = tmp_path / "run"
    with sole_owner(directory) as owned:
        owned.begin(cfg, "train", force=False)
        new_start(directory, cfg, IDENTITY, stream()).record()
    return directory


def stream():
    return PromptStream(RECORDS, seed=0, rollouts_per_prompt=1)


def learn_a_step(run):
    journal, prompts = Journal(run / "journal"), stream()
    journal.open_for_writing()
    prompts.settle([prompts.next().sample_id])
    table = experience_table([make_experience(0, [4, 1])])
    journal.append(table, policy_version=journal.next_step, prompts=prompts.state())


def resumed(run, *changes, identity=IDENTITY, accepted=(), prompts=None):
    """A start with --resume, and --change for each of `changes`; not recorded yet."""
    cfg = load_config(run / "config.toml", changes, Config)
    keys = [change.partition("=")[0] for change in changes]
    return resumed_start(run, cfg, identity, prompts or stream(), changed=keys, accepted=accepted)


def edit(run, cfg, **sections):
    """Writes config.toml as an editor would, with other values in some sections."""
    tree = cfg.model_dump(mode="json", exclude_none=True)
    for section, values in sections.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    (run / "config.toml").write_text(Config.model_validate(tree).to_toml())


def kinds(run):
    return [note.kind for note in Journal(run / "journal").notes]


def test_a_run_begins_with_its_identity_settings_and_versions(run, cfg):
    [note] = Journal(run / "journal").notes
    assert (note.kind, note.before_step, note.number) == ("begin", 0, 0)
    assert note.fields["identity"] == IDENTITY
    assert Config.model_validate(note.fields["config"]) == cfg
    assert note.fields["num_prompts"] == len(RECORDS)
    assert note.fields["versions"] == versions()
    assert read_record(run)["journal"] == Journal(run / "journal").digest(0)


def test_an_unchanged_run_continues_and_records_nothing(run, cfg):
    learn_a_step(run)
    prompts = stream()
    start = resumed(run, prompts=prompts)
    assert (start.cfg, start.notes) == (cfg, [])
    assert len(prompts.outstanding) == 0
    assert prompts.next().sample_id != stream().next().sample_id  # the first one is in the journal


def test_an_edit_by_hand_is_refused_setting_by_setting(run, cfg):
    edit(run, cfg, optimizer={"learning_rate": 0.5}, ppo={"lam": 0.5}, seed=3)
    with pytest.raises(UserError) as refused:
        resumed(run)
    message = str(refused.value)
    assert f"optimizer.learning_rate is 0.5, but {cfg.optimizer.learning_rate} in the journal, or give it with" in (
        message
    )
    assert "--change optimizer.learning_rate=0.5; ppo.lam is 0.5, but 0.95 in the journal; seed is 3, but 0" in message
    assert message.endswith("Undo the edit, or start a new run")
    assert kinds(run) == ["begin"]


def test_settings_that_may_change_and_moved_files_are_no_edit(run, cfg):
    edit(run, cfg, num_steps=9, generators={"min": 2}, model={"path": "/moved/elsewhere"})
    assert resumed(run).cfg.num_steps == 9
    with pytest.raises(UserError, match=r"model.path is /moved/elsewhere"):  # contents that nobody knows
        resumed(run, identity={"prompts.train": "2" * 64})


def test_a_change_is_recorded_once_and_then_is_the_runs_setting(run):
    learn_a_step(run)
    start = resumed(run, "optimizer.learning_rate=0.25", "kl.coef=0.5")
    start.record()
    with sole_owner(run) as owned:
        owned.resume(start.cfg)
    note = Journal(run / "journal").notes[-1]
    assert (note.kind, note.before_step) == ("change", 1)
    assert note.fields["settings"] == {"optimizer.learning_rate": 0.25, "kl.coef": 0.5}
    assert resumed(run).notes == []
    assert resumed(run, "kl.coef=0.5").notes == []  # as a restart repeats the option
    assert resumed(run, "kl.coef=0.75").notes == [("change", {"settings": {"kl.coef": 0.75}})]


def test_a_crash_between_journal_and_config_is_no_edit(run, cfg):
    """The new value is in the journal, but not in config.toml."""
    resumed(run, "kl.coef=0.5").record()
    assert load_config(run / "config.toml", [], Config).kl.coef == cfg.kl.coef
    start = resumed(run)
    assert (start.cfg.kl.coef, start.notes) == (0.5, [])
    resumed(run, "kl.coef=0.75").record()  # and config.toml still has the first value
    assert resumed(run).cfg.kl.coef == 0.75
    with sole_owner(run) as owned:
        owned.resume(resumed(run).cfg)
    resumed(run, "kl.coef=0.25").record()  # config.toml has a value between the first and the last
    assert resumed(run).cfg.kl.coef == 0.25
    learn_a_step(run)  # from here on, an old value is an edit
    with pytest.raises(UserError, match=r"kl.coef is .* but 0.25 in the journal"):
        resumed(run)


def test_the_summary_of_an_earlier_end_is_gone_before_the_new_settings_are_written(run, cfg, monkeypatch):
    """A run that was extended and killed must not be taken for finished."""

    def killed(path, text):
        assert not (run / "summary.json").exists()
        raise KeyboardInterrupt

    (run / "summary.json").write_text("{}")
    monkeypatch.setattr(directory, "write_durably", killed)
    with sole_owner(run) as owned, pytest.raises(KeyboardInterrupt):
        owned.resume(cfg)


def test_a_difference_is_refused_until_it_is_accepted(run):
    other = {**IDENTITY, "model": "f" * 64}
    with pytest.raises(UserError, match=r"model \(.*\) has SHA-256 ffffffffffff, in the journal 111111111111"):
        resumed(run, identity=other)
    resumed(run, identity=other, accepted=["model"]).record()
    assert Journal(run / "journal").identity == other
    assert resumed(run, identity=other).notes == []
    with pytest.raises(UserError, match="in the journal ffffffffffff"):
        resumed(run)


@pytest.mark.parametrize("frozen", [{"lora": {}}, {"critic": "separate", "critic_frozen": "attention"}])
def test_another_model_cannot_be_accepted_where_weights_are_frozen(cfg, frozen):
    shown = {"model": "models/a", "critic": "None"}
    tree = {**cfg.model_dump(mode="json", exclude_none=True)}
    kept = kept_names(Config.model_validate({**tree, "learner": {**tree["learner"], **frozen}}))
    with pytest.raises(
        UserError, match=r"--accept model is refused: the .* in no checkpoint, .* Restore models/a as it was"
    ):
        accepted_differences({"model": "f"}, {"model": "1"}, ["model"], shown, kept)
    assert accepted_differences({"model": "f"}, {"model": "1"}, ["model"], shown, kept_names(cfg)) == {"model": "f"}


def test_other_prompt_texts_cannot_be_accepted(run):
    """The journal's sample ids would name other prompts."""
    learn_a_step(run)
    other = PromptStream(
        [*RECORDS[:2], PromptRecord("ask b1", RECORDS[2].token_ids, {})], seed=0, rollouts_per_prompt=1
    )
    identity = {**IDENTITY, "prompts.train": "f" * 64}
    with pytest.raises(UserError, match="are not those the run began with"):
        resumed(run, identity=identity, accepted=["prompts.train"], prompts=other)
    assert resumed(run, identity=identity, accepted=["prompts.train"]).notes  # the same texts with other fields


def test_a_run_killed_before_its_journal_began_begins(run, cfg):
    with sole_owner(run) as owned:
        owned.begin(cfg, "train", force=True)
    assert finished_training(cfg, run) is None
    resumed(run).record()
    assert kinds(run) == ["begin"]


@pytest.mark.parametrize("sign", ["metrics.jsonl", "evaluations.jsonl", "run.json"])
def test_a_journal_that_is_missing_is_asked_for(run, cfg, sign):
    shutil.rmtree(run / "journal")
    if sign != "run.json":
        (run / "run.json").unlink()
        (run / sign).touch()
    with pytest.raises(UserError, match=rf"\({sign}\).*is their storage mounted\?"):
        finished_training(cfg, run)


def test_the_first_evaluation_precedes_the_first_step(run, cfg):
    (run / "evaluations.jsonl").touch()
    assert finished_training(cfg, run) is None


def test_the_journal_of_another_run_is_refused(run, cfg, tmp_path):
    with sole_owner(tmp_path / "other") as owned:
        owned.begin(cfg, "train", force=False)
        new_start(tmp_path / "other", cfg, {"model": "0" * 64}, stream()).record()
    shutil.rmtree(run / "journal")
    shutil.copytree(tmp_path / "other/journal", run / "journal")
    with pytest.raises(UserError, match="is the journal of another run"):
        resumed(run)


def test_a_config_of_another_version_is_refused_with_its_first_fault(run, cfg):
    run = run.with_name("newer")
    with sole_owner(run) as owned:
        owned.begin(cfg, "train", force=False)
        start = new_start(run, cfg, IDENTITY, stream())
        start.notes[0][1]["config"]["ppo"]["clip_higher"] = 0.3
        start.record()
    with pytest.raises(UserError, match=r"do not fit this version of Ratchet \(ppo.clip_higher: Extra inputs"):
        resumed(run)


def test_leaves_have_the_keys_of_the_command_line(cfg):
    found = leaves(cfg)
    assert found["reward.sources.0.weight"] == 1
    assert found["optimizer.betas"] == [0.9, 0.95]
    assert found["num_steps"] == 4
    assert not any(isinstance(value, dict) for value in found.values())
