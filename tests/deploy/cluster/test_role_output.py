"""Lines that Ray publishes reach the log with the name of their process; a real role: tests/end_to_end."""

from __future__ import annotations

import pytest

from deploy.cluster import role_output
from deploy.cluster.role_output import dispatcher, role_output_to


def printed(*lines: str, **about: object) -> dict[str, object]:
    return {"pid": 7, "ip": "10.0.0.1", "localhost": "10.0.0.1", "lines": list(lines), **about}


def test_a_line_has_the_name_and_the_place_of_its_process():
    found: list[tuple[str, str]] = []
    with role_output_to(lambda *line: found.append(line)):
        dispatcher.emit(printed("one", "two", actor_name="Generator(0)"))
        dispatcher.emit(printed("elsewhere", actor_name="Reward(1)", ip="10.0.0.2"))
        dispatcher.emit(printed("early", actor_name=None))
    dispatcher.emit(printed("too late"))
    assert found == [
        ("Generator(0) (pid 7)", "one"),
        ("Generator(0) (pid 7)", "two"),
        ("Reward(1) (pid 7 on 10.0.0.2)", "elsewhere"),
        ("process (pid 7)", "early"),
    ]


def test_of_a_progress_bar_only_its_end_is_kept_and_rays_own_lines_are_not():
    found: list[tuple[str, str]] = []
    with role_output_to(lambda *line: found.append(line)):
        dispatcher.emit(printed("\rLoading:  0%\rLoading: 100%", "", "\r"))
        dispatcher.emit(printed("Resources", pid="autoscaler"))
    assert [text for _, text in found] == ["Loading: 100%"]


def test_after_an_error_the_last_lines_are_waited_for(monkeypatch):
    found: list[str] = []

    def late(seconds: float) -> None:
        if len(found) < 3:
            dispatcher.emit(printed(f"line {len(found)}"))
        clock[0] += 0.4

    clock = [100.0]
    monkeypatch.setattr(role_output.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(role_output.time, "sleep", late)
    with pytest.raises(ValueError, match="died"), role_output_to(lambda name, text: found.append(text)):
        raise ValueError("died")
    assert found == ["line 0", "line 1", "line 2"]
