"""What a killed process was writing is removed by the next owner of the directory, and nothing else is."""

from __future__ import annotations

from pathlib import Path

from deploy.run.leftovers import clear_leftovers

LEFT = [
    ".policy-abcd1234/model.safetensors",
    ".policy-abcd1234-old/model.safetensors",  # the directory that replaced it is there
    "config.toml.123.tmp",
    "summary.json.99999.tmp",
    "errors/01.txt.7.tmp",
    "checkpoints/step-000006/part",
]
KEPT = [
    ".policy-mine/model.safetensors",
    ".git/config",
    "policy/model.safetensors",
    "notes.tmp",
    "scale.json.5.tmp",  # `ratchet scale` may be writing it
    "checkpoints/step-000003/COMPLETE",
    "checkpoints/step-000006-backup/part",
    "checkpoints/mine/part",
    "journal/step-000003.tmp",  # Journal.open_for_writing removes it
]


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_unfinished_files_are_removed_and_all_others_stay(tmp_path):
    run = tmp_path / "run"
    for name in (*LEFT, *KEPT):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    clear_leftovers(run)
    assert files(run) == sorted(KEPT)
    clear_leftovers(run)
    assert files(run) == sorted(KEPT)


def test_links_are_neither_followed_nor_removed(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (elsewhere / "step-000009").mkdir(parents=True)
    (elsewhere / "step-000009/part").touch()
    (elsewhere / "x.json.3.tmp").touch()
    run.mkdir()
    (run / "checkpoints").symlink_to(elsewhere)
    (run / ".policy-abcd1234").symlink_to(elsewhere)
    (run / "errors").symlink_to(elsewhere)
    clear_leftovers(run)
    assert files(elsewhere) == ["step-000009/part", "x.json.3.tmp"]
    assert (run / ".policy-abcd1234").is_symlink()


def test_a_directory_that_was_about_to_be_replaced_gets_its_name_back(tmp_path):
    for name in (".policy-abcd1234/new", ".policy-abcd1234-old/old"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    clear_leftovers(tmp_path)
    assert files(tmp_path) == ["policy/old"]
