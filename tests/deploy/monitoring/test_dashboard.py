"""The Grafana dashboard has one panel for each metric, and panels do not overlap."""

from __future__ import annotations

import itertools
import re

import pytest

from common.metrics.table import ENDPOINT, METERS, STEP
from deploy.monitoring.dashboard import ROWS, dashboard

PANELS = dashboard()["panels"]
SHOWN = [panel for panel in PANELS if panel["type"] != "row"]


def metrics_in(query: str) -> set[str]:
    return set(re.findall(r"\b(?:ray_)?ratchet_\w+", query))


@pytest.mark.parametrize("metric", [*STEP, *ENDPOINT], ids=lambda metric: metric.key)
def test_each_step_metric_has_one_panel_that_says_what_it_means(metric):
    [panel] = [panel for panel in SHOWN if panel["title"] == metric.key]
    [target] = panel["targets"]
    assert metrics_in(target["expr"]) == {metric.prometheus}
    assert metric.meaning in panel["description"]
    assert "{{run}}" in target["legendFormat"] or metric.key == "health"


@pytest.mark.parametrize("meter", METERS.values(), ids=lambda meter: meter.name)
def test_each_meter_has_one_panel_with_its_exported_name(meter):
    [panel] = [panel for panel in SHOWN if panel["title"] == meter.name.removeprefix("ratchet_")]
    name = f"ray_{meter.name}{'_bucket' * (meter.kind == 'histogram')}"
    assert all(metrics_in(target["expr"]) == {name} for target in panel["targets"])
    assert len(panel["targets"]) == (2 if meter.kind == "histogram" else 1)
    assert meter.meaning in panel["description"]


def test_panels_do_not_overlap_and_are_in_the_row_of_their_kind():
    taken = set()
    for panel in PANELS:
        place = panel["gridPos"]
        cells = itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
        for cell in cells:
            assert cell not in taken
            taken.add(cell)
    assert max(x for x, _ in taken) == 23
    assert [panel["id"] for panel in PANELS] == list(range(1, len(PANELS) + 1))
    titles = [panel["title"] for panel in PANELS if panel["type"] == "row"]
    assert titles == [title for title in ROWS.values() if title in titles]
    order = [panel["title"] for panel in PANELS]
    assert order.index("PPO") < order.index("ppo/clip_frac") < order.index("Critic") < order.index("value/loss")


def test_a_share_is_shown_in_percent_and_seconds_as_a_duration():
    units = {panel["title"]: panel["fieldConfig"]["defaults"]["unit"] for panel in SHOWN}
    shown = {units["ppo/clip_frac"], units["time/learn_s"], units["weights/bytes"], units["ppo/ratio"]}
    assert shown == {"percentunit", "s", "bytes", "short"}
