// The evaluation tab: pass@k of all policies with the crossover, their figures, answers side by side.
"use strict";

const POLICY_COLOURS = ["--ink", ...[1, 2, 3, 4, 5, 6].map((number) => `--place-${number}`)];

// [name, colour] of each policy.
function policyColours() {
  const names = Object.keys(block("evaluation").paths);
  return names.map((name, i) => [name, POLICY_COLOURS[i % POLICY_COLOURS.length]]);
}

function showEvaluation() {
  const { curves, rows, sentences, answers } = block("evaluation");
  const parent = byId("evaluation-panel");
  const part = (name, about) => {
    const box = element("section", { className: "group", parent }, element("h2", { text: name }));
    if (about) element("p", { className: "muted", text: about, parent: box });
    return box;
  };
  if (Object.keys(curves).length) {
    const box = part(
      "pass@k",
      "The chance that at least one of k answers to a prompt passes, over held-out prompts (Chen et al. 2021). Bands: " +
        "95 % intervals. Diamonds: from this k on the base, asked k times, beats the policy, asked once.",
    );
    box.append(policyLegend(), element("div", { className: "charts pair" }, passBox()));
    for (const text of sentences) element("p", { text, parent: box });
  }
  if (rows.length) {
    const box = part("Figures", "In parentheses: 95 % intervals over prompts.");
    figureTable(element("div", { className: "scroll", parent: box }), rows);
  }
  showForgetting(part);
  const box = part("Answers", "The first answer of each policy, with its score.");
  for (const { question, answers: given } of answers) sideBySide(box, question, given);
  if (!answers.length) element("p", { text: "There are no answers yet.", parent: box });
}

function policyLegend() {
  const legend = element("div", { className: "bar" });
  for (const [name, colour] of policyColours()) {
    const swatch = element("span", { className: "swatch", style: `color: var(${colour})` });
    element("span", { parent: legend, title: block("evaluation").paths[name] }, swatch, name);
  }
  return legend;
}

function passBox() {
  const { curves, crossovers } = block("evaluation");
  const samples = Math.max(...Object.values(curves).map((curve) => curve.length));
  const options = { x: [0.9, 1.1 * samples], x_type: "log", y_range: [-0.02, 1.02], x_label: "k: answers to each prompt" };
  return plotBox("pass@k", "share of prompts", options, (figure) => {
    for (const [name, colour] of policyColours()) {
      if (!curves[name]) continue;
      const k = curves[name].map((_, i) => i + 1);
      const [values, lows, highs] = unzip(curves[name].map(({ value, interval }) => [value, ...interval]));
      const look = { line_color: style(colour), line_width: 1.8 };
      figure.varea(k, lows, highs, { fill_color: style(colour), fill_alpha: 0.13 });
      figure.line(k, values, look);
      const points = figure.scatter(k, values, { size: 4, color: style(colour) });
      points.data_source.data = { ...points.data_source.data, lows, highs };
      hover(figure, points, "pass@@x{0}: @y{0.0%} (@lows{0.0%} to @highs{0.0%})");
      const found = crossovers[name];
      if (!found || found.value === null) continue;
      const [low, high] = found.interval.map((end) => end ?? samples);
      figure.line([1, found.value], [values[0], values[0]], { line_color: style(colour), line_dash: "dashed" });
      figure.line([low, high], [values[0], values[0]], { line_color: style(colour), line_width: 3, line_alpha: 0.6 });
      figure.scatter([found.value], [values[0]], { marker: "diamond", size: 12, color: style(colour) });
    }
  });
}

function figureTable(parent, rows) {
  const table = element("table", { className: "figures", parent });
  const head = element("tr", { parent: element("thead", { parent: table }) }, element("th", { text: "" }));
  for (const [name] of policyColours()) element("th", { text: name, scope: "col", parent: head });
  const body = element("tbody", { parent: table });
  for (const [label, cells] of rows) {
    const row = element("tr", { parent: body }, element("th", { text: label, scope: "row" }));
    for (const text of cells) element("td", { text, parent: row });
  }
}

function sideBySide(parent, question, given) {
  const box = element("article", { className: "asked", parent }, element("pre", { text: question, dir: "auto" }));
  const sides = element("div", { className: "charts pair", parent: box });
  for (const [name] of policyColours()) {
    const answer = given[name];
    if (!answer) continue;
    const said = answer.void === undefined ? `score ${number(answer.score)}` : `no score: ${answer.void}`;
    element(
      "div",
      { className: "side", parent: sides },
      element("h3", { text: `${name} · ${said}` }),
      element("pre", { text: answer.text, dir: "auto" }),
    );
  }
}

// The head of the page of an evaluation.
function showEvaluationHead({ state, directory }) {
  const { paths, samples, curves, warnings, finished } = block("evaluation");
  headFigure("policies", Object.keys(paths).length);
  headFigure("answers to each prompt", number(samples));
  for (const [name, [{ value, interval }]] of Object.entries(curves))
    headFigure(`pass@1 of ${name}`, percent(value), `${percent(interval[0])} to ${percent(interval[1])}`);
  for (const text of warnings) element("li", { text, className: "bad", parent: byId("notices") });
  if (!finished && state !== "running") {
    const text = `The evaluation stopped before its end; ratchet evaluate --resume ${directory} continues it.`;
    element("li", { text, parent: byId("notices") });
  }
}
