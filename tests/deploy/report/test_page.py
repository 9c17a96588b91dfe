"""The page as a file: one piece, no network, and nothing in it that a model wrote can act."""

import base64
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from deploy import cli
from deploy.report.page import SCRIPTS, json_text
from deploy.report.report import page_blocks
from deploy.report.run_files import RunFiles
from tests.deploy.report.conftest import HOSTILE, data_of
from tests.deploy.report.made_run import write_run
from tests.test_layers import BLOCKED

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "deploy/report/page"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\u2066-\u2069\u200e\u200f\u061c]")


def outside_data_and_scripts(page):
    return re.sub(r"<script.*?</script>", "", page, flags=re.S)


def test_hostile_texts_are_data_and_never_markup(page):
    values = data_of(page)
    prompt = values["details"]["prompts"]["3"]
    assert "<img src=x onerror=" in prompt  # shown in full ...
    assert "<b>bold</b> &lt;i&gt;" in prompt
    assert "onerror" not in outside_data_and_scripts(page)  # ... but only as data
    assert re.findall(r"<script[^>]*>window", page) == []
    for text in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, flags=re.S):
        assert not set("<>&") & set(text)


def texts_of(value):
    """Every text in a JSON value, keys included."""
    if isinstance(value, dict):
        return [text for item in (*value, *value.values()) for text in texts_of(item)]
    if isinstance(value, list):
        return [text for item in value for text in texts_of(item)]
    return [value] if isinstance(value, str) else []


def test_control_characters_are_written_out(page):
    assert CONTROL.search(page) is None
    values = data_of(page)
    assert [text for text in texts_of(values) if CONTROL.search(text)] == []  # nor as JSON escapes
    prompt = values["details"]["prompts"]["3"]
    assert "\\x1b[31mred" in prompt
    assert "\\u202egnp" in prompt
    assert "before\\u2028after" in prompt


def test_text_in_json_is_kept_exactly():
    for text in (*HOSTILE[:2], "日本語 ü 😀", 'quote " and \\ backslash', "line\nline\ttab"):
        assert data_of(f'<script type="application/json" id="x-data">{json_text(text)}</script>') == {"x": text}
    assert json_text([float("nan"), float("inf"), 1.5]) == "[null,null,1.5]"


def test_the_browser_may_run_only_the_scripts_of_the_page(page):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none';")
    allowed = re.findall(r"'sha256-([^']*)'", policy)
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert hashes == allowed
    assert len(hashes) == 2
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_the_page_loads_nothing(page):
    own = outside_data_and_scripts(page)
    assert re.findall(r"""(?:src|href)\s*=|@import|url\(""", own) == []


def test_no_script_of_the_page_parses_text_as_html():
    parsing = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function"
    assert [name for name in SCRIPTS if re.search(parsing, (PAGE / name).read_text())] == []


def test_every_file_of_the_page_is_used():
    assert {path.name for path in PAGE.iterdir()} == {*SCRIPTS, "page.html", "page.css"}


def test_the_command_prints_the_path_on_its_last_line(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run", steps=2)
    monkeypatch.setattr(sys, "argv", ["ratchet", "report", str(run)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(run / "report.html")
    assert lines[-2].startswith("2 steps, 16 rollouts, all with text and token numbers; ")
    assert data_of((run / "report.html").read_text())["run"]["state"] == "finished"


def test_the_report_replaces_only_reports(tmp_path):
    from deploy.report.report import run_report

    run, page = write_run(tmp_path / "run", steps=1), tmp_path / "page.html"
    for text in ("notes", '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'):
        page.write_text(text)
        with pytest.raises(
            UserError, match=r"page\.html does not begin like the files .*; delete it or name another file with"
        ):
            run_report(run, page)
        assert page.read_text() == text
    os.mkfifo(tmp_path / "pipe")  # a device, such as /dev/null, is refused in the same way
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="is not a regular file; name another file with --to"):
            run_report(run, place)
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(
        UserError, match=r"page\.html cannot be written: no file can be made in .*missing; name another"
    ):
        run_report(run, tmp_path / "missing/page.html")


def test_the_report_replaces_an_empty_file_and_an_old_report_behind_a_link(tmp_path):
    from deploy.report.report import run_report

    run, page, link = write_run(tmp_path / "run", steps=1), tmp_path / "page.html", tmp_path / "link.html"
    page.touch()
    link.symlink_to(page)
    for _ in range(2):
        run_report(run, link)
        assert link.is_symlink()
        assert data_of(page.read_text())["run"]["steps"] == 1


def test_a_config_with_settings_of_another_type_still_has_a_page(tmp_path):
    run = write_run(tmp_path / "run", steps=2)
    (run / "config.toml").write_text('num_steps = "two"\nmodel.path = 3\nppo.gamma = "high"\nreward.sources = [1]\n')
    blocks = page_blocks(RunFiles.read(run))
    assert (blocks["run"]["steps"], blocks["run"]["state"], blocks["scores"]["sources"]) == (2, "finished", [])


def test_escapes_in_names_do_not_reach_the_terminal(tmp_path, capsys):
    from deploy.report.report import run_report

    run = write_run(tmp_path / "run \x1b[31m", steps=2)
    (run / "credit/step-000001.parquet").write_bytes(b"cut")
    run_report(run)
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert "step-000001.parquet cannot be read" in printed.err
    assert printed.out.endswith("run \\x1b[31m/report.html\n")


def test_the_report_needs_no_ray_torch_or_vllm():
    modules = [f"deploy.report.{path.stem}" for path in sorted((ROOT / "deploy/report").glob("*.py"))]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, "ray,torch,vllm,transformers", *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
