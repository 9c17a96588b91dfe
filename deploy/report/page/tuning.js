// The tuning tab: the curves of all trials, how each ended, the finalists, and which keys mattered.
"use strict";

// The colour of a run's curve: finalists have one each, other trials share one.
function trialColour({ place }) {
  return place === null ? "--muted" : POLICY_COLOURS[(place % (POLICY_COLOURS.length - 1)) + 1];
}

function showTuning() {
  const { metric, reason, best, trials, repeats, finalists, spaces, sensitivity } = block("tuning");
  const parent = byId("tuning-panel");
  const part = (name, ...about) => {
    const box = element("section", { className: "group", parent }, element("h2", { text: name }));
    for (const text of about.filter(Boolean)) element("p", { className: "muted", text, parent: box });
    return box;
  };
  const scroll = (box, table) => element("div", { className: "scroll", parent: box }, table);
  element("p", { text: `${reason}.`, parent: part("Best", best && `${best} (best.toml)`) });
  const curves = part("Curves", `${metric} of the held-out evaluations. Dashed lines: steps at which ASHA compares trials.`);
  curves.append(finalistLegend(finalists), element("div", { className: "charts pair" }, trialsBox()));
  scroll(part("Trials", `Tried: ${spaces.join("; ")}`), trialTable(trials));
  const box = part("Finalists", "The best first. The mean over the seeds decides.");
  if (finalists.length) scroll(box, finalistTable(finalists));
  else element("p", { text: "There are none yet.", parent: box });
  if (repeats.length) {
    element("p", { className: "muted", text: "Runs with further seeds:", parent: box });
    scroll(box, trialTable(repeats));
  }
  showSensitivity(part, scroll, sensitivity, metric);
}

function finalistLegend(finalists) {
  const legend = element("div", { className: "bar" });
  const entry = (colour, text) =>
    element(
      "span",
      { parent: legend },
      element("span", { className: "swatch", style: `color: var(${colour})` }),
      text,
    );
  finalists.forEach(({ trial }, place) => entry(trialColour({ place }), `trial ${trial}`));
  entry("--muted", "other trials");
  return legend;
}

function trialsBox() {
  const { metric, num_steps: end, rungs, trials, repeats } = block("tuning");
  const options = { x: [-0.02 * end, 1.02 * end], x_label: "step" };
  return plotBox(metric, "thin: other trials, and further seeds of finalists", options, (figure) => {
    for (const location of rungs) {
      const dashed = { dimension: "height", location, line_color: style("--muted"), line_dash: "dashed" };
      figure.add_layout(new Bokeh.Span(dashed));
    }
    const isFinalist = ({ place }) => place !== null;
    const others = trials.filter((run) => !isFinalist(run));
    for (const run of [...others, ...repeats, ...trials.filter(isFinalist)]) {
      if (!run.curve.length) continue;
      const [x, y] = unzip(run.curve);
      const thick = isFinalist(run) && !repeats.includes(run);
      const colour = style(trialColour(run));
      figure.line(x, y, { line_color: colour, line_width: thick ? 2.2 : 1, line_alpha: thick ? 1 : 0.6 });
      const points = figure.scatter(x, y, { size: thick ? 6 : 4, color: colour, alpha: thick ? 1 : 0.6 });
      const [trial, seed] = [x.map(() => run.trial), x.map(() => run.seed)];
      points.data_source.data = { ...points.data_source.data, trial, seed };
      hover(figure, points, "trial @trial, seed @seed, step @x{0}: @y{0.[0000]}");
    }
  });
}

function tuningTable(columns, rows) {
  const heading = element("tr", {}, ...columns.map((text) => element("th", { text, scope: "col" })));
  const body = rows.map(([first, ...cells]) => {
    const row = element("tr", {}, element("th", { text: first, scope: "row" }));
    row.append(...cells.map((text) => element("td", { text })));
    return row;
  });
  return element("table", { className: "figures" }, element("thead", {}, heading), element("tbody", {}, ...body));
}

function trialTable(runs) {
  const { steps, metric } = block("tuning");
  const at = steps.map((step) => `${metric}, step ${step}`);
  const columns = ["trial", "seed", "settings", ...at, "ended", "minutes", "directory"];
  const rows = runs.map(({ trial, seed, settings, curve, ended, why, minutes, directory }) => {
    const known = new Map(curve);
    const values = steps.map((step) => number(known.get(step)));
    return [trial, seed, settings, ...values, why ? `${ended}: ${why}` : ended, number(minutes), directory];
  });
  return tuningTable(columns, rows);
}

function finalistTable(finalists) {
  const columns = ["trial", "settings", "step", `mean ${block("tuning").metric}`, "deviation", "seeds", "failed seeds"];
  const rows = finalists.map(({ trial, settings, step, mean, deviation, values, failed }) => {
    const seeds = values.map(number).join(", ");
    return [trial, settings, step, number(mean), number(deviation), seeds, failed];
  });
  return tuningTable(columns, rows);
}

function showSensitivity(part, scroll, { title, keys, deviation }, metric) {
  const box = part("Sensitivity", `${title[0].toUpperCase()}${title.slice(1)}. Intervals of 95 %.`);
  if (!keys.length) return;
  const rows = keys.map(({ key, explained, effect, best }) => [key, shownFigure(explained), effect, best]);
  scroll(box, tuningTable(["key", "explained share of the variance", "effect", "best near"], rows));
  for (const { sentence, mattered } of keys)
    element("p", { text: `${sentence}.`, className: mattered ? "" : "muted", parent: box });
  if (deviation !== null) {
    const text = `Standard deviation between seeds of one trial: ${number(deviation)}. Smaller effects are chance.`;
    element("p", { text, parent: box });
  }
  const names = keys.map(({ key }) => key);
  const shares = keys.map(({ explained }) => explained);
  const grid = element("div", { className: "charts pair", parent: box });
  grid.append(intervalBox("explained share of the variance", "share", names, shares, 0));
  for (const { key, means, points, log } of keys) {
    const [texts, figures] = [means.map(([text]) => text), means.map(([, mean]) => mean)];
    if (means.length) grid.append(intervalBox(key, `mean ${metric}`, texts, figures, undefined, -Infinity));
    else grid.append(pointsBox(key, metric, points, log));
  }
}

// The outcome of each trial over its value of a range.
function pointsBox(key, metric, points, log) {
  const options = { x_type: log ? "log" : "auto", x_label: key };
  return plotBox(key, `${metric} of each trial`, options, (figure) => {
    const [x, y, trial] = unzip(points);
    const renderer = figure.scatter(x, y, { size: 8, color: style("--curve") });
    renderer.data_source.data = { ...renderer.data_source.data, trial };
    hover(figure, renderer, "trial @trial: @x{0.[000000]}, @y{0.[0000]}");
  });
}

// The head of the page of a tuning.
function showTuningHead({ state, directory }) {
  const { metric, trials, finalists, hours, missing } = block("tuning");
  const ended = trials.filter(({ ended: how }) => !["runs", "cut", "not begun"].includes(how));
  headFigure("trials", number(trials.length), `${number(ended.length)} have ended`);
  if (finalists.length) headFigure(`best ${metric}`, number(finalists[0].mean), `trial ${finalists[0].trial}`);
  headFigure("hours", number(hours), "of all starts");
  if (state === "stopped") {
    const text = `${number(missing)} run(s) are missing; ratchet tune --resume ${directory} continues the tuning.`;
    element("li", { text, parent: byId("notices") });
  }
}
