"""`ratchet replay`: the policy after any step of a run, or the values of its tokens, rebuilt from the journal.

Runs in a process of its own, and in one process for each rank if the run has several. It needs neither Ray nor vLLM.
The run directory may be a copy on another machine. Nothing is written into it, except values of tokens into RUN/credit.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.config.loading import absolute_if_directory
from common.config.ppo import Config
from common.errors import UserError
from common.files import sha256
from common.model.files import resolve_model
from common.model.identity import model_digest
from deploy.run.record import read_record
from deploy.run.resume import resumed_config
from deploy.run.settings import settled
from deploy.screen.console import Output, complain
from deploy.screen.rank_bars import bars_of
from learner.loop.checkpoints import CheckpointError, Checkpoints
from learner.loop.journal import Journal
from learner.loop.notes import identity, learns
from learner.proof.ranks import in_ranks
from learner.proof.replay import Replay


def run_replay(
    run: Path,
    to: Path,
    *,
    to_step: int | None = None,
    from_checkpoint: bool = False,
    model: str | None = None,
    critic: str | None = None,
    settings: Sequence[str] = (),
) -> Path:
    """Writes the policy after `to_step` updates (left out: all that the journal has) into `to`, as a Hugging Face
    directory. With LoRA, its subdirectory `adapter` has the adapters.

    `model`, `critic`: where the run's starting model and its trained critic are now. `settings`: of the device layout,
    such as learner.gpus=0. Raises UserError.
    """
    refuse_other_directories(run)
    if os.path.lexists(to) and not (to.is_dir() and not any(to.iterdir())):
        raise UserError(f"--to ({to}) exists; name a new directory")
    journal = Journal(run / "journal")
    journal.verify()
    refuse_unlearned(journal)
    steps = journal.next_step if to_step is None else to_step
    if not 0 <= steps <= journal.next_step:
        raise UserError(f"--to-step ({steps}) must be between 0 and {journal.next_step}, the steps of the journal")
    cfg = config_for_replay(run, journal, model, critic, settings)
    start = newest_verified(run, journal, steps, until=steps) if from_checkpoint else None
    replay_in_ranks(cfg, run, steps, start=start, to=to)
    skipped = sum(step < steps for step in journal.voided)
    began = f"checkpoint {start.name}" if start is not None else "the initial weights"
    [*weights] = sorted(to.glob("*.safetensors"))
    Output().print(
        f"policy after {steps} of {journal.next_step} steps, rebuilt from {began} and the journal"
        f"{f' ({skipped} void batches skipped)' if skipped else ''}: {to}\n"
        + "\n".join(f"SHA-256 {sha256(path)}  {path.name}" for path in weights),
        markup=False,
        soft_wrap=True,
    )
    return to


def rebuild_credit(
    run: Path,
    steps: str,
    *,
    to: Path | None = None,
    from_checkpoint: bool = False,
    model: str | None = None,
    critic: str | None = None,
    settings: Sequence[str] = (),
) -> None:
    """Writes the values of the tokens of some steps, such as 7 or 7-9, into `to` (left out: RUN/credit). The other
    arguments are those of `run_replay`. Raises UserError."""
    refuse_other_directories(run)
    journal = Journal(run / "journal")
    journal.verify()
    refuse_unlearned(journal)
    chosen, directory = _steps(steps, journal.next_step), run / "credit" if to is None else to
    cfg = config_for_replay(run, journal, model, critic, settings)
    start = newest_verified(run, journal, chosen.start, until=chosen.stop) if from_checkpoint else None
    replay_in_ranks(cfg, run, chosen.stop, start=start, credit=chosen, credit_to=directory)
    written = [step for step in chosen if step not in journal.voided]
    void = ", ".join(str(step) for step in chosen if step in journal.voided)
    Output().print(
        f"values of the tokens of {len(written)} steps: {directory}"
        f"{f'; nothing was learned from the batch of step {void}' if void else ''}",
        markup=False,
        soft_wrap=True,
    )


def _steps(text: str, num_steps: int) -> range:
    """The steps that a text such as 7 or 7-9 names. Raises UserError if the journal does not have them."""
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
    found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    if not found or found.stop > num_steps:
        has = f"steps 0 to {num_steps - 1}" if num_steps else "no step"
        raise UserError(f"--credit ({text}) must be a step such as 7, or steps such as 7-9; the journal has {has}")
    return found


def refuse_other_directories(run: Path) -> None:
    """Raises UserError unless the directory has the journal of `ratchet train`, or of `ratchet train-critic --sample`.
    A directory without a run.json may be a copy of a run's."""
    if not os.path.exists(run / "config.toml"):
        raise UserError(f"{run} is no run directory (no config.toml); name one that ratchet train has made")
    command = read_record(run).get("command", "train")
    sampled = command == "train-critic" and (run / "journal").is_dir()
    if command != "train" and not sampled:
        raise UserError(f"{run} was made by ratchet {command}, which keeps no journal; name a run of ratchet train")


def refuse_unlearned(journal: Journal) -> None:
    """Raises UserError for a journal whose policy never learned."""
    if not learns(journal.notes):
        raise UserError(
            f"{journal.directory} cannot be replayed: it has only responses of the starting policy (ratchet "
            "train-critic --sample), and no policy learned from them; name a run of ratchet train"
        )


def config_for_replay(
    run: Path, journal: Journal, model: str | None, critic: str | None, settings: Sequence[str]
) -> Config:
    """The newest settings of the run, with the present places of the starting model and the trained critic. Raises
    UserError if the run began with another model or critic."""
    cfg, _ = settled(
        resumed_config(Config, run, settings, travels=False), journal.notes, journal.next_step, (), journal.identity
    )
    begun = identity(journal.notes, before_step=0)
    if model is not None:
        cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": absolute_if_directory(model)})})
    setting = "model.path" if model is None else "--model"
    directory = resolve_model(cfg.model.path, setting, trust_remote_code=cfg.model.trust_remote_code)
    _check_same("model", f"{setting} ({cfg.model.path})", model_digest(directory), begun)
    if critic is not None and cfg.critic_path is None:
        raise UserError(f"--critic ({critic}): the run began without a trained critic; leave it out")
    if cfg.critic_path is not None:
        path = absolute_if_directory(critic or cfg.critic_path)
        setting = f"{'learner.critic_path' if critic is None else '--critic'} ({path})"
        if not os.path.isdir(path):
            raise UserError(f"{setting} is no directory; name the directory of the run's trained critic with --critic")
        _check_same("critic", setting, model_digest(Path(path)), begun)
        cfg = cfg.model_copy(update={"learner": cfg.learner.model_copy(update={"critic_path": path})})
    return cfg


def _check_same(name: str, setting: str, found: str, begun: Mapping[str, str]) -> None:
    """Raises UserError if the run began with another digest."""
    if begun.get(name) != found:
        raise UserError(
            f"{setting} is not the {name} that the run began with (SHA-256 {found}, in the journal {begun.get(name)}); "
            f"name that {name}'s directory with --{name}"
        )


def replay_in_ranks(cfg: Config, run: Path, until: int, **what: object) -> None:
    """Replays in as many processes as the run has ranks. `what`: other fields of `Replay`."""
    with tempfile.TemporaryDirectory(prefix="ratchet-replay-") as scratch:
        progress = Path(scratch) / "progress"
        job = Replay(cfg, run, until, Path(scratch), progress=progress, **what)  # type: ignore[arg-type]
        with bars_of(progress, "replay"):
            in_ranks(job, cfg.learner.ranks, gpus=cfg.learner.gpus, scratch=Path(scratch))


def newest_verified(run: Path, journal: Journal, step: int, *, until: int) -> Path | None:
    """The newest checkpoint after at most `step` steps that is undamaged, belongs to this journal, and can continue to
    `until`. None if there is none."""
    checkpoints = Checkpoints(run / "checkpoints", every=1, keep=1, journal=journal)
    for found in reversed(checkpoints.steps()):
        if found > step:
            continue
        try:
            checkpoints.check(found)
            if found == until or checkpoints.can_continue(found):  # otherwise Adam's state would be missing
                return checkpoints.path(found)
        except CheckpointError as error:
            complain(f"{checkpoints.path(found)} is skipped: {error}")
    return None
