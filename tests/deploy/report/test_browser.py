"""The page in a real headless Chromium: clicks, filters, hovering, keyboard, hostile texts, both colour schemes.

Playwright drives the Chromium that is installed on the machine; without one, the tests are skipped.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import time

import pytest
from PIL import Image

from common.files import write_json
from deploy.report.page import render
from deploy.report.report import evaluation_blocks, page_blocks, tuning_blocks
from deploy.report.run_files import RunFiles
from deploy.report.variance import variance_of
from tests.deploy.report.conftest import HOSTILE
from tests.deploy.report.made_evaluation import write_evaluation
from tests.deploy.report.made_run import write_run
from tests.deploy.report.made_tuning import write_tuning
from tests.deploy.report.test_rollouts import journal_rows, sampled_places
from tests.deploy.report.test_variance import ACCOUNT
from tests.fakes import WORDS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium's sandbox does not work for root
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(page, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page, encoding="utf-8")
    return path.as_uri()


class Opened:
    """A page in a tab of the browser, and what went wrong or left the page since."""

    def __init__(self, browser, address, tab="curves", *, width=1280, scheme="light"):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.faults, self.requests = [], []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on(
            "console", lambda said: self.faults.append(said.text) if said.type in ("error", "warning") else None
        )
        self.page.on("dialog", lambda dialog: self.faults.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"{address}#{tab}")

    def _said(self, said):
        if said.type in ("error", "warning"):
            self.faults.append(said.text)

    def __getattr__(self, name):
        return getattr(self.page, name)

    def until(self, expression):
        """Waits until a JavaScript expression is true. Playwright's own wait needs `eval`, which the page forbids."""
        ends = time.monotonic() + 60
        while not self.page.evaluate(expression):
            assert time.monotonic() < ends, expression
            self.page.wait_for_timeout(20)

    def numbers(self, side=0):
        """The numbers of the current token, as the page shows them."""
        table = self.page.locator(".side .numbers").nth(side)
        return dict(zip(table.locator("dt").all_text_contents(), table.locator("dd").all_text_contents(), strict=True))


@pytest.fixture
def open_page(browser, address):
    opened = []

    def open_tab(*arguments, address=address, **options):
        opened.append(Opened(browser, address, *arguments, **options))
        return opened[-1]

    yield open_tab
    for page in opened:
        page.context.close()
        assert page.faults == []
        assert [url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))] == []


def zoomed(page):
    """The ranges of all curves that are drawn."""
    return page.evaluate(
        "[...charts].filter(c => c.zooms && c.figure).map(c => [c.figure.x_range.start, c.figure.x_range.end])"
    )


def test_curves_are_drawn_and_zoom_together(open_page):
    page = open_page("curves")
    page.until("[...charts].filter(c => c.figure).length > 3")
    page.wait_for_selector(".plot canvas")
    box = page.locator(".plot").first.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.4 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], middle, steps=5)
    page.mouse.up()
    page.until("zoom.now !== zoom.all && zoom.now[0] > zoom.all[0]")
    ranges = zoomed(page)
    assert len(ranges) > 3
    assert all(found == ranges[0] for found in ranges)
    page.locator("#zoom-reset").click()
    assert zoomed(page)[0] == page.evaluate("zoom.all")
    page.fill("#zoom-from", "2")
    page.locator("#zoom-from").press("Enter")
    assert {start for start, _ in zoomed(page)} == {1.5}


def test_a_curve_that_is_first_seen_later_has_the_same_zoom(open_page):
    page = open_page("curves")
    page.wait_for_selector(".plot canvas")
    page.evaluate("zoomTo([1, 3])")
    page.locator(".plot").last.scroll_into_view_if_needed()
    page.until("[...charts].every(c => !c.zooms || c.figure || c.box.getBoundingClientRect().top < -300)")
    assert {tuple(found) for found in zoomed(page)} == {(1, 3)}


def test_a_smoothed_curve_is_the_moving_average(open_page):
    page = open_page("curves")
    assert page.evaluate("smoothed([4, 8, 2], 0.5)") == pytest.approx(
        [4, (0.25 * 4 + 0.5 * 8) / 0.75, (0.5 + 2 + 1) / 0.875]
    )
    page.wait_for_selector(".plot canvas")
    lines = "[...charts].find(c => c.figure)?.figure.renderers.filter(r => r.glyph.type === 'Line').length"
    assert page.evaluate(lines) == 1
    page.select_option("#smooth", "0.95")
    page.until(f"{lines} === 2")


def test_events_are_marked_listed_and_can_be_hidden(open_page):
    page = open_page("curves")
    page.wait_for_selector(".plot canvas")
    shown = "[...charts].find(c => c.figure).figure.marks.map(([kind, mark]) => [kind, mark.visible])"
    assert dict(page.evaluate(shown)) == {"evaluation": True, "died": True}
    page.get_by_label("replicas died").uncheck()
    assert dict(page.evaluate(shown)) == {"evaluation": True, "died": False}
    page.locator("#event-list summary").click()
    assert page.locator("#event-list li", has_text="Generator(0) died: killed <b>by</b> 9").count() == 1


def test_a_health_event_is_named_marked_and_leads_to_its_steps(open_page, blocks, tmp_path):
    said = {"rule": "kl_exploding", "text": "kl_exploding: KL doubled to <b>31</b> nats", "anchor": "docs/health.md#x"}
    event = {"step": 2, "last": 4, "kind": "health", "times": 3, "advice": "lower the learning rate", **said}
    (tmp_path / "report.html").write_text(render("run", {**blocks, "events": [event]}), encoding="utf-8")
    page = open_page("curves", address=(tmp_path / "report.html").as_uri())
    notice = "steps 2 to 4: kl_exploding: KL doubled to <b>31</b> nats; lower the learning rate (docs/health.md#x)"
    assert page.locator("#notices li").first.text_content() == notice
    page.wait_for_selector(".plot canvas")
    assert page.evaluate("[...charts].find(c => c.figure).figure.marks.map(([kind]) => kind)") == ["health"]
    page.locator("#event-list summary").click()
    page.get_by_role("button", name="step 2").click()
    assert all(start < 2 < end < 4 for start, end in zoomed(page))


def test_hovering_a_curve_shows_its_values(open_page):
    page = open_page("curves")
    page.wait_for_selector(".plot canvas")
    plot = page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    for share in (0.45, 0.5, 0.55):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
    page.get_by_text(re.compile(r"step \d: -?\d")).first.wait_for()


def test_rows_are_searched_filtered_and_sorted(open_page, blocks):
    page, table = open_page("rollouts"), blocks["rollouts"]
    rows = page.locator("#table tbody tr")
    assert page.locator("#matches").text_content() == "50 of 50 rollouts"
    page.select_option("#class", "void")
    assert rows.count() == 2
    page.select_option("#class", "all")
    page.fill("#search", "grader: <IMG")
    assert page.locator("#matches").text_content() == "1 of 50 rollouts"
    page.fill("#search", "")
    page.fill("#from", "3")
    page.fill("#to", "4")
    assert page.locator("#matches").text_content() == "16 of 50 rollouts"
    score = page.locator("#table th button", has_text="score")
    score.click()
    best = max(score for score, step in zip(table["score"], table["step"], strict=True) if step in (3, 4))
    assert float(rows.first.locator("td").nth(2).text_content()) == pytest.approx(best, rel=1e-3)
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    score.click()
    page.locator("#next").click()
    assert page.locator("#page-number").text_content() == "page 2 of 2"
    assert rows.count() == 4


def test_a_click_on_a_row_shows_its_tokens_next_to_the_other_step(open_page, blocks):
    page, table = open_page("rollouts"), blocks["rollouts"]
    page.fill("#search", "1/0/0")  # asked first in step 0, again in step 3
    page.locator("#table tbody tr").first.click()
    assert page.locator(".side").count() == 2
    titles = page.locator(".side h3").all_text_contents()
    assert [title.partition(" · score")[0] for title in titles] == ["step 0 · 0/0/0", "step 3 · 1/0/0"]
    row = table["id"].index("1/0/0")
    assert page.locator(".side").nth(1).locator(".token").count() == table["tokens"][row]
    page.select_option("#compare", "")
    assert page.locator(".side").count() == 1


def expected(blocks, sample, quantity, t):
    """A number of a token, unpacked here and formatted as the page does."""
    import numpy as np

    from tests.deploy.report.test_rollouts import numbers

    row = blocks["rollouts"]["id"].index(sample)
    packed = blocks["details"]["rows"][row][quantity]
    return float(np.asarray(numbers(packed, blocks["rollouts"]["tokens"][row]))[t])


def test_numbers_that_need_float32_are_shown(open_page, tmp_path):
    run = write_run(tmp_path / "run", steps=1, tokens=(12, 30), scale=1e9)
    blocks = page_blocks(RunFiles.read(run))
    (tmp_path / "report.html").write_text(render("run", blocks), encoding="utf-8")
    page = open_page("rollouts", address=(tmp_path / "report.html").as_uri())
    page.fill("#search", "0/3/0")
    page.locator("#table tbody tr").first.click()
    page.locator(".token").nth(3).hover()
    for label, name in {"value": "values", "advantage": "advantages", "KL": "kl"}.items():
        assert float(page.numbers()[label].replace(",", "")) == pytest.approx(
            expected(blocks, "0/3/0", name, 3), rel=5e-3
        ), label
    assert abs(expected(blocks, "0/3/0", "values", 3)) > 65_504


def test_every_number_of_a_token_is_shown_on_hover_and_by_keyboard(open_page, blocks):
    page = open_page("rollouts")
    page.fill("#search", "1/0/0")
    page.locator("#table tbody tr").first.click()
    page.select_option("#compare", "")
    page.locator(".token").nth(3).hover()
    assert page.locator(".at").text_content().startswith("token 4 of ")
    shown = {"advantage": "advantages", "value": "values", "TD error": "td_errors", "KL": "kl", "entropy": "entropy"}
    for label, name in shown.items():
        assert float(page.numbers()[label]) == pytest.approx(expected(blocks, "1/0/0", name, 3), rel=5e-3), label
    assert len(page.numbers()) == 15
    page.locator('.token[tabindex="0"]').focus()
    for key, at in (("ArrowRight", 5), ("ArrowRight", 6), ("ArrowLeft", 5), ("Home", 1), ("ArrowLeft", 1)):
        page.keyboard.press(key)
        assert page.locator(".at").text_content().startswith(f"token {at} of "), key
    assert float(page.numbers()["value"]) == pytest.approx(expected(blocks, "1/0/0", "values", 0), rel=5e-3)
    page.keyboard.press("End")
    assert page.locator(".at").text_content().endswith('"')
    assert page.locator(".token:focus").count() == 1


def test_tokens_are_coloured_by_the_chosen_quantity(open_page, blocks):
    page = open_page("rollouts")
    page.fill("#search", "1/0/0")
    page.locator("#table tbody tr").first.click()
    page.select_option("#compare", "")
    row = blocks["rollouts"]["id"].index("1/0/0")
    length = blocks["rollouts"]["tokens"][row]
    for quantity, negative in (("advantages", True), ("kl", True), ("rewards", True), ("entropy", False)):
        page.select_option("#quantity", quantity)
        hues = page.eval_on_selector_all(".token", "found => found.map(t => t.style.getPropertyValue('--hue'))")
        below = [expected(blocks, "1/0/0", quantity, t) < 0 for t in range(length)]
        wanted = ["negative" if negative and low else "positive" if negative else "amount" for low in below]
        assert hues == [f"var(--{hue})" for hue in wanted], quantity
    page.select_option("#quantity", "clipped")
    strengths = page.eval_on_selector_all(".token", "found => found.map(t => t.style.getPropertyValue('--strength'))")
    clipped = [expected(blocks, "1/0/0", "clipped", t) for t in range(length)]
    assert strengths == ["100%" if flag else "0%" for flag in clipped]


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    """The page of a run of episodes whose info is hostile, its data, and the journal's rows by sample id."""
    directory = tmp_path_factory.mktemp("episodes") / "run"
    info = json.dumps({"said": HOSTILE[1], "tool_calls": 1})
    last = [{"role": "user", "content": f"Right!\n{HOSTILE[1]}"}]
    write_run(directory, prompts=24, turns=4, tokens=(16, 30), info=info, last=last)
    blocks = page_blocks(RunFiles.read(directory))
    path = directory / "report.html"
    path.write_text(render("run", blocks), encoding="utf-8")
    return (
        path.as_uri(),
        blocks,
        {f"{r['epoch']}/{r['prompt_index']}/{r['replica']}": r for r in journal_rows(directory)},
    )


def test_turns_of_an_episode_are_apart_and_what_the_environment_said_is_grey(open_page, episodes):
    address, blocks, journal = episodes
    page, table = open_page("rollouts", address=address), blocks["rollouts"]
    assert "turns" in page.locator("#table th button").all_text_contents()
    most = max(
        (row for row in journal.values() if row["turns"] and len(row["turns"]) > 2),
        key=lambda row: len(row["response_ids"]) - len(sampled_places(row)),
    )
    sample = f"{most['epoch']}/{most['prompt_index']}/{most['replica']}"
    page.fill("#search", sample)
    page.locator("#table tbody tr").first.click()
    page.select_option("#compare", "")
    turns = most["turns"]
    side = page.locator(".side")
    assert side.locator(".turn-count").text_content() == f"{len(turns)} turns · finish: terminated"
    *heads, after = side.locator(".turn-head").all_text_contents()
    assert [head.partition(" · ")[0] for head in heads] == [f"turn {n + 1}" for n in range(len(turns))]
    assert [float(re.search(r"reward (-?[\d.]+)", head)[1]) for head in heads] == [turn["reward"] for turn in turns]
    assert heads[0].endswith(f" · {turns[0]['info']}")
    assert page.evaluate("window.hacked") is None
    # Each group has its turn's tokens, then the environment's as one text without numbers.
    words, start = [WORDS[t] for t in most["response_ids"]], 0
    for number, turn in enumerate(turns):
        group = side.locator(".turn").nth(number)
        assert [text.strip() for text in group.locator(".token").all_text_contents()] == words[start : turn["end"]]
        said = words[turn["end"] : turn["next_start"]]
        answer = group.locator(".said:not(.unseen)")
        assert answer.count() == bool(said)
        if said:
            assert answer.text_content().split() == said
            assert answer.get_attribute("title") == "the environment's, not learned from"
        context = "new context, another sequence" if turn["ends"] else "new context"
        assert group.locator(".context").all_text_contents() == [context] * turn["new_context"]
        assert group.locator(".unseen").count() == (number == len(turns) - 1)
        start = turn["next_start"]
    assert any(turn["new_context"] for turn in turns)
    # What it said at the end comes after the last token, as text.
    assert side.locator(".unseen").text_content() == f"Right!↵\n{HOSTILE[1]}"
    assert after == "said after the last turn, not seen by the model:"
    colour = "getComputedStyle(document.querySelector('{}')).color"
    assert page.evaluate(colour.format(".unseen")) == page.evaluate(colour.format(".turn-head"))
    assert page.evaluate(colour.format(".unseen")) != page.evaluate(colour.format(".token"))
    assert table["turns"][table["id"].index(sample)] == len(turns)


def test_the_reward_to_go_of_an_episode_stops_where_a_sequence_ends(open_page, episodes):
    page = open_page("rollouts", address=episodes[0])
    page.evaluate("block('run').settings['ppo.gamma'] = 0.5")
    parts = "[{start: 0, end: 2, context: 2}, {start: 4, end: 5, context: 1}, {start: 6, end: 7}]"
    assert page.evaluate(f"[...endsOf({parts})]") == [1]
    assert page.evaluate(f"rewardToGo([1, 2, 4, 8], endsOf({parts}))") == [1 + 0.5 * 2, 2, 4 + 0.5 * 8, 8]


def test_tokens_of_an_episode_have_their_own_numbers(open_page, episodes):
    address, _, journal = episodes
    page = open_page("rollouts", address=address)
    sample, row = next(
        (sample, row)
        for sample, row in journal.items()
        if row["turns"] and len(row["turns"]) > 1 and 0 < row["turns"][0]["end"] < row["turns"][0]["next_start"]
    )
    page.fill("#search", sample)
    page.locator("#table tbody tr").first.click()
    page.select_option("#compare", "")
    places = sampled_places(row)
    assert page.locator(".token").count() == len(places)
    before = row["turns"][0]["end"]
    page.locator(".token").nth(before - 1).focus()
    assert page.locator(".at").text_content().startswith(f"token {before} of {len(places)}, turn 1: ")
    page.locator(".said").first.hover()
    page.locator(".said").first.click()
    assert page.locator(".at").text_content().startswith(f"token {before} of ")
    page.locator(".token").nth(before - 1).focus()
    page.keyboard.press("ArrowRight")
    second = 2 if row["turns"][1]["end"] > row["turns"][0]["next_start"] else 3
    assert page.locator(".at").text_content().startswith(f"token {before + 1} of {len(places)}, turn {second}: ")
    assert float(page.numbers()["logprob, sampler"]) == pytest.approx(row["rollout_logprobs"][before], rel=5e-3)
    drawn = "[...charts].find(c => c.box.ariaLabel === 'curves over the tokens').figure"
    page.locator(".side .plot").scroll_into_view_if_needed()
    page.until(f"!!{drawn}")
    line = f"[...{drawn}.renderers.find(r => r.glyph.type === 'Line').data_source.data.x]"
    assert page.evaluate(line) == list(range(1, len(places) + 1))
    lengths = []  # of the policy's part of each turn
    start = 0
    for turn in row["turns"]:
        lengths.append(turn["end"] - start)
        start = turn["next_start"]
    breaks = {sum(lengths[:n]) + 0.5 for n in range(1, len(lengths))} - {0.5, len(places) + 0.5}
    spans = f"{drawn}.center.filter(r => r.type === 'Span').map(r => r.location)"
    assert set(page.evaluate(spans)) - {before + 1} == breaks


def test_a_response_without_an_environment_has_no_turns_next_to_episodes(open_page, episodes):
    address, _, journal = episodes
    page = open_page("rollouts", address=address)
    sample = next(sample for sample, row in journal.items() if row["turns"] is None)
    page.fill("#search", sample)
    page.locator("#table tbody tr").first.click()
    page.select_option("#compare", "")
    assert page.locator(".turn, .said, .turn-head").count() == 0
    assert page.locator(".token").count() == len(journal[sample]["response_ids"])
    page.locator(".token").first.focus()
    assert ", turn" not in page.locator(".at").text_content()


def test_reward_to_go_sums_the_rewards_that_follow(open_page):
    page = open_page("rollouts")
    assert page.evaluate("rewardToGo([1, -2, 4])") == [3, 2, 4]
    page.evaluate("block('run').settings['ppo.gamma'] = 0.5")
    assert page.evaluate("rewardToGo([1, -2, 4])") == [1, 0, 4]


EXPLAINED = "[...charts].find(c => c.figure?.places).figure"


def test_the_critic_is_shown_by_position_next_to_the_variance(open_page, blocks):
    page = open_page("critic")
    page.until("[...charts].filter(c => c.figure).length >= 3")
    lines = f"{EXPLAINED}.places.filter(([p, r]) => p === 'first' && r.glyph.type === 'Line')"
    assert page.evaluate(f"[...{lines}[0][1].data_source.data.y]") == blocks["critic"]["explained"]["first"]
    # The last three of the six steps have too little variance: their line is pale, and their background grey.
    judged = page.evaluate(f"[...{lines}[1][1].data_source.data.y].map(y => isNaN(y) ? null : y)")
    assert judged == [*blocks["critic"]["explained"]["first"][:3], None, None, None]
    grey = f"{EXPLAINED}.center.filter(r => r.type === 'BoxAnnotation').map(r => [r.left, r.right])"
    assert page.evaluate(grey) == [[2.5, 5.5]]
    page.get_by_label("first token").uncheck()
    assert page.evaluate(f"{lines}.map(([, r]) => r.visible)") == [False, False]
    shown = page.locator("#figures > div").all_text_contents()
    assert "critic explains0.5 of the returns' variance" in shown
    assert "the returns have20.0% of their variance at the start" in shown


def test_predicted_against_realised_returns_of_a_chosen_step(open_page, blocks):
    page = open_page("critic")
    page.wait_for_selector("#critic-panel .plot canvas")
    choices = page.locator("#calibration-steps option").all_text_contents()
    assert choices == ["steps 0 to 5 together", *(f"step {step}" for step in (5, 4, 3, 2, 1, 0))]
    page.select_option("#calibration-steps", label="step 4")
    drawn = "[...charts].find(c => c.box.ariaLabel?.startsWith('realised by')).figure"
    page.locator("#calibration-steps").scroll_into_view_if_needed()
    page.until(f"!!{drawn}")
    bins = blocks["critic"]["calibrations"][2]["bins"]
    points = f"{drawn}.renderers.find(r => r.glyph.type === 'Scatter').data_source.data"
    shown = page.evaluate(f"(({{x, y, tokens}}) => [...x].map((p, i) => [p, y[i], tokens[i]]))({points})")
    assert shown == [pytest.approx(bin, rel=1e-6) for bin in bins]
    assert f"Mean distance {blocks['critic']['calibrations'][2]['error']:.4g}" in page.locator(".about").text_content()


def test_the_variance_account_has_a_tab_if_the_run_has_one(open_page, blocks, tmp_path):
    without = open_page("variance")  # a tab that this page does not have
    assert without.locator("#tab-variance").is_hidden()
    assert without.locator("#curves-panel").is_visible()
    write_json(tmp_path / "variance.json", ACCOUNT)
    about = {**blocks["run"], "tabs": ["curves", "variance"]}
    with_account = {**blocks, "run": about, "variance": variance_of(tmp_path, [])}
    (tmp_path / "report.html").write_text(render("run", with_account), encoding="utf-8")
    page = open_page("variance", address=(tmp_path / "report.html").as_uri())
    page.until("[...charts].filter(c => c.figure).length >= 3")
    rows = [row.locator("th, td").all_text_contents() for row in page.locator("#variance-panel tbody tr").all()]
    assert [row[0] for row in rows] == ["critic, lam 0.95 *", "none"]
    assert rows[0][1:] == ["0.25 (0.2 to 0.3)", "0.7 (0.6 to 0.8)", "62 (36 to 110)", "-", "0.99 (0.9 to 1)",
                           "0.9 (0.8 to 1.1)", "0.5", "0.1"]  # fmt: skip
    assert rows[1][1:4] == ["1 (1 to 1)", "0.98 (0.9 to 1.1)", "above 150"]
    drawn = "[...charts].find(c => c.box.ariaLabel?.startsWith('standard error')).figure"
    points = f"{drawn}.renderers.find(r => r.glyph.type === 'Scatter').data_source.data"
    assert page.evaluate(f"(({{x, y, name}}) => [[...x], [...y], name])({points})") == [
        [0.7, 0.98], [0, -1], ["critic, lam 0.95 *", "none"]
    ]  # fmt: skip
    assert "Left out: group: one response" in page.locator("#variance-panel").text_content()


def test_the_page_can_be_used_by_keyboard_alone(open_page):
    page = open_page("curves")
    page.locator("#tab-curves").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#rollouts-panel").is_visible()
    assert page.evaluate("document.activeElement.id") == "tab-rollouts"
    page.locator("#table tbody button").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator("#table tbody tr").nth(1).get_attribute("aria-selected") == "true"
    page.keyboard.press("PageDown")
    assert page.locator("#page-number").text_content().startswith("page 2 of ")
    page.locator("#tab-rollouts").focus()
    page.keyboard.press("End")
    assert page.locator("#scores-panel").is_visible()


def test_hostile_texts_are_shown_and_do_nothing(open_page):
    page = open_page("rollouts")
    page.select_option("#class", "void")
    page.locator("#table tbody tr", has_text="grader").click()
    assert page.locator(".side .tokens").text_content() == HOSTILE[0]
    page.select_option("#class", "learned")
    page.locator("#table tbody tr").first.click()
    shown = page.locator("#prompt").text_content()
    assert HOSTILE[1] in shown
    assert "\\x1b[31mred" in shown
    assert "\\u202egnp.exe" in shown
    for tab in ("scores", "curves"):
        page.locator(f"#tab-{tab}").click()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, main b, main i, main script").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(open_page, width, scheme):
    page = open_page("curves", width=width, scheme=scheme)
    for tab in ("curves", "rollouts", "critic", "scores"):
        page.locator(f"#tab-{tab}").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark))) < 200) == (scheme == "dark")


def brightness(locator):
    """The darkest and the brightest grey of an element."""
    return Image.open(io.BytesIO(locator.screenshot())).convert("L").getextrema()


def test_charts_take_the_new_colours_when_the_scheme_changes(open_page):
    page = open_page("curves")
    page.wait_for_selector(".plot canvas")
    plot = page.locator(".plot").first
    assert brightness(plot)[0] < 120  # dark text
    page.emulate_media(color_scheme="dark")
    ends = time.monotonic() + 60
    while brightness(plot)[1] < 140:  # bright text
        assert time.monotonic() < ends


def test_a_run_that_has_not_learned_yet_is_shown(open_page, tmp_path):
    blocks = page_blocks(RunFiles.read(write_run(tmp_path / "run", steps=0, finished=False)))
    (tmp_path / "report.html").write_text(render("run", blocks), encoding="utf-8")
    page = open_page("curves", address=(tmp_path / "report.html").as_uri())
    assert page.locator("#run-state").text_content() == "stopped"
    for tab in ("rollouts", "critic", "scores"):
        page.locator(f"#tab-{tab}").click()
    assert page.locator("#matches").text_content() == "0 of 0 rollouts"
    assert page.locator("#critic-panel").text_content() == "This run has no critic."


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """The page of an evaluation whose prompts and answers are hostile, and the data of its blocks."""
    directory = tmp_path_factory.mktemp("evaluations") / "compared"
    write_evaluation(directory, prompts=12, texts=HOSTILE)
    blocks = evaluation_blocks(directory)
    path = directory / "report.html"
    path.write_text(render("compared", blocks), encoding="utf-8")
    return path.as_uri(), blocks["evaluation"]


def test_an_evaluation_shows_its_curves_and_figures(open_page, evaluation):
    address, data = evaluation
    page = open_page("", address=address)
    assert page.locator('[role="tab"]:visible').all_text_contents() == ["Evaluation"]
    page.until("[...charts].some(c => c.figure)")
    drawn = "[...charts][0].figure.renderers.filter(r => r.glyph.type === 'Line').map(r => [...r.data_source.data.y])"
    lines = page.evaluate(drawn)
    for curve in data["curves"].values():
        assert [figure["value"] for figure in curve] in lines
    values = [figure["value"] for figure in data["kl"]["mine"]]
    page.get_by_text("KL from the base by position").scroll_into_view_if_needed()
    page.until("[...charts].filter(c => c.figure).length === 2")
    assert values in page.evaluate(drawn.replace("[...charts][0]", "[...charts][1]"))
    table = page.locator("table.figures")
    assert table.locator("th[scope=col]").all_text_contents() == ["base", "mine"]
    cells = table.locator("tbody tr").first.locator("td").all_text_contents()
    assert cells == list(data["rows"][0][1])
    for sentence in data["sentences"]:
        assert page.get_by_text(sentence).count() == 1


@pytest.mark.parametrize("width", [1280, 400])
def test_hostile_answers_of_an_evaluation_are_only_text(open_page, evaluation, width):
    address, data = evaluation
    page = open_page("", address=address, width=width)
    asked = page.locator(".asked")
    assert asked.count() == len(data["answers"]) == 12
    assert "<img src=x onerror=" in asked.nth(1).locator("> pre").text_content()
    shown = asked.nth(0).locator(".side pre").first.text_content()
    assert shown in [HOSTILE[4].replace("\x1b", "\\x1b").replace("\x07", "\\x07")]
    assert "no score: no service" in asked.nth(1).locator(".side h3").first.text_content()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, main b, main i, main script").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [1280, 400])
def test_a_tuning_shows_trials_finalists_and_keys(open_page, tmp_path, width):
    directory = tmp_path / "tune"
    write_tuning(directory, why=HOSTILE[1])
    blocks = tuning_blocks(directory)
    (tmp_path / "report.html").write_text(render("tune", blocks), encoding="utf-8")
    page = open_page("", address=(tmp_path / "report.html").as_uri(), width=width)
    data = blocks["tuning"]
    assert page.locator('[role="tab"]:visible').all_text_contents() == ["Tuning"]
    page.until("[...charts].some(c => c.figure)")
    drawn = "[...charts][0].figure.renderers.filter(r => r.glyph.type === 'Line').map(r => [...r.data_source.data.y])"
    lines = page.evaluate(drawn)
    assert sorted(lines) == sorted([y for _, y in run["curve"]] for run in [*data["trials"], *data["repeats"]])
    tables = page.locator("table.figures")
    assert tables.count() == 4  # trials, finalists, their further seeds, keys
    first, *_, last = tables.nth(0).locator("tbody tr").all()
    shown = [cell.text_content() for cell in first.locator("th, td").all()]
    assert shown[:5] == ["1", "7", data["trials"][0]["settings"], "0.1", "-"]
    assert shown[5] == f"failed: {HOSTILE[1]}"
    assert last.locator("td").nth(4).text_content() == "complete"
    assert tables.nth(1).locator("tbody th").all_text_contents() == ["6", "5"]
    assert tables.nth(3).locator("tbody th").all_text_contents() == [key["key"] for key in data["sensitivity"]["keys"]]
    for key in data["sensitivity"]["keys"]:
        assert page.get_by_text(f"{key['sentence']}.").count() == 1
    page.locator(".charts").last.scroll_into_view_if_needed()
    page.until("[...charts].every(c => c.figure)")
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= width
