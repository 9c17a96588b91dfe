"""`--preset`: where its settings come in, what is refused, and the shipped presets."""

from __future__ import annotations

import re
import tomllib

import pytest

from common.config.loading import load_config
from common.config.ppo import Config
from common.errors import UserError
from deploy.presets import DIRECTORY, preset_settings, with_preset
from tests.deploy.test_configs import CONFIGS, ROOTS

SHIPPED = ["balanced", "careful", "fast"]
LARGER = CONFIGS / "larger.toml"


def load(preset, *settings, config=LARGER):
    return with_preset(preset, settings, lambda given: load_config(config, given, Config))


def test_the_shipped_presets_are_these():
    assert sorted(path.stem for path in DIRECTORY.iterdir()) == SHIPPED


@pytest.mark.parametrize("name", [name for name, root in ROOTS.items() if root is Config])
@pytest.mark.parametrize("preset", SHIPPED)
def test_a_shipped_preset_fits_every_shipped_config(preset, name):
    cfg, tree = load(preset, config=CONFIGS / name), tomllib.loads((DIRECTORY / f"{preset}.toml").read_text())
    for section, settings in tree.items():
        for key, value in settings.items():
            assert getattr(getattr(cfg, section), key) == value
    assert cfg.optimizer.learning_rate == load(None, config=CONFIGS / name).optimizer.learning_rate


@pytest.mark.parametrize("preset", SHIPPED)
def test_every_setting_of_a_preset_has_its_reason(preset):
    text = (DIRECTORY / f"{preset}.toml").read_text()
    settings = [line for line in text.splitlines() if re.match(r"\w+ = ", line)]
    assert len(settings) == len(preset_settings(preset)) > 5
    assert all(re.search(r" # \S+ \S+", line) for line in settings)
    assert "MEASURED (docs/results.md" in text


def test_the_file_gives_way_to_the_preset_and_the_preset_to_settings():
    assert load(None).ppo.clip_eps == 0.2
    assert load("careful").ppo.clip_eps == 0.05
    assert load("careful", "ppo.clip_eps=0.3").ppo.clip_eps == 0.3
    assert load("careful", "ppo.clip_eps=0.3").kl.coef == load("careful").kl.coef != load(None).kl.coef


def test_a_file_of_settings_is_a_preset_too(tmp_path):
    (tmp_path / "mine.toml").write_text('num_steps = 3\n[optimizer]\nbetas = [0.9, 0.99]\nschedule = "cosine"\n')
    cfg = load(str(tmp_path / "mine.toml"))
    assert (cfg.num_steps, cfg.optimizer.betas, cfg.optimizer.schedule) == (3, (0.9, 0.99), "cosine")


def test_a_preset_of_an_editor_on_windows_is_read(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbfnum_steps = 3\r\n")
    assert load(str(tmp_path / "mine.toml")).num_steps == 3


def test_a_preset_that_breaks_a_rule_is_named():
    with pytest.raises(UserError, match=r"multiple of ppo.minibatches \(4\)(.|\n)*--preset fast gives .*minibatches=4"):
        load("fast", "rollouts_per_step=6")


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("fats", r"--preset \(fats\) must be one of balanced, careful, fast, or a \.toml file"),
        ("missing.toml", r"preset missing\.toml cannot be read"),
        ("broken.toml", r"preset broken\.toml is not valid TOML"),
    ],
)
def test_a_preset_that_cannot_be_read_is_refused(preset, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.toml").write_text("a = \n")
    with pytest.raises(UserError, match=message):
        load(preset)
