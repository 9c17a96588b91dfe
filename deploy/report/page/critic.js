// The critic tab: explained variance by position next to the variance, predicted against realised returns.
"use strict";

// The colours of the parts of a response, in its order.
const PLACE_COLOURS = ["--ink", ...[1, 2, 3, 4, 5, 6].map((number) => `--place-${number}`)];
const LOWEST = -1; // of the explained variance that is drawn
const placesHidden = new Set();

// [key, label, colour] of each part of a response that has figures.
function places() {
  const { parts, explained } = block("critic");
  const all = Object.entries(parts).map(([place, label], i) => [place, label, PLACE_COLOURS[i]]);
  return all.filter(([place]) => explained[place].some((value) => value !== null));
}

function showCritic() {
  const { steps, calibrations, enough_share: enoughShare } = block("critic");
  const { is_critic: isCritic } = block("run");
  const parent = byId("critic-panel");
  const curves = block("curves").flatMap(({ curves: found }) => found);
  if (!steps.length && !calibrations.length) {
    const has = curves.some(({ key }) => key.startsWith("value/"));
    const none = isCritic ? "The critic has not been evaluated yet." : "This run has no critic.";
    const text = has ? "The steps have no figures against realised returns." : none;
    element("p", { text, parent });
    return;
  }
  const part = (name, about, className = "charts") => {
    const box = element("section", { className: "group", parent }, element("h2", { text: name }));
    element("p", { className: "muted", text: about, parent: box });
    return [element("div", { className, parent: box }), box];
  };
  if (steps.length) {
    const [grid, box] = part(
      "What the critic predicts",
      "Explained variance, 1 - Var(returns - values) / Var(returns). Returns are realised: what really followed a " +
        "token. 1: perfect; 0: no better than a constant; values below -1 are cut. " +
        (isCritic
          ? "On held-out prompts, before the first pass and after each pass; the best of these critics is kept."
          : `Before the step's update. In the grey steps less than ${100 * enoughShare} % of the variance of the start ` +
            "is left: the figures there mean little."),
      "charts pair",
    );
    grid.before(placeChoice());
    grid.append(explainedBox(), varianceBox());
    box.addEventListener("dblclick", () => zoomTo(zoom.all));
  }
  const [grid] = part(
    "Predicted against realised returns",
    isCritic
      ? "The mean distance between them, over tokens in ten bins by predicted value; and how the value of the first " +
          "token goes with the score."
      : "Tokens in ten bins of equal size by predicted value: on the dashed line a bin earns what was predicted. A " +
          "flat row of points: the predictions say nothing. Parallel to the line: right in order, wrong in height.",
  );
  if (calibrations.length) grid.append(calibrationChoice(calibrations));
  else if (!isCritic) element("p", { text: "There are no credit files with values (credit.every).", parent: grid });
  for (const key of ["value/calibration_error", "value/score_correlation"]) {
    const curve = curves.find((found) => found.key === key);
    if (curve) grid.append(curveBox(curve));
  }
}

// Boxes that show and hide the lines, with their colours.
function placeChoice() {
  const choice = element("fieldset", { className: "places" }, element("legend", { text: "Show" }));
  for (const [place, label, colour] of places()) {
    const box = element("input", { type: "checkbox", checked: true, name: place });
    box.addEventListener("change", () => {
      if (box.checked) placesHidden.delete(place);
      else placesHidden.add(place);
      for (const { figure } of charts)
        for (const [of, line] of figure?.places ?? []) line.visible = !placesHidden.has(of);
    });
    const swatch = element("span", { className: "swatch", style: `color: var(${colour})` });
    element("label", { parent: choice }, box, swatch, label);
  }
  return element("div", { className: "bar" }, choice);
}

function zoomedBox(title, unit, options, draw) {
  const box = plotBox(title, unit, { x: zoom.now, zoom: true, drawn: follow, ...options }, draw);
  box.querySelector(".plot").chart.zooms = true;
  return box;
}

function explainedBox() {
  const { steps, explained } = block("critic");
  const known = Object.values(explained)
    .flat()
    .filter((value) => value !== null);
  const lowest = Math.max(LOWEST, Math.min(0, ...known)) - 0.04;
  return zoomedBox("explained variance", "share", { y_range: [lowest, 1.02] }, (figure) => {
    shadeLittle(figure);
    const zero = { dimension: "width", location: 0, line_color: style("--muted"), line_dash: "dashed" };
    figure.add_layout(new Bokeh.Span(zero));
    const found = places();
    const little = littleVariance();
    figure.places = found.toReversed().flatMap(([place, , colour]) => {
      const line = { line_color: style(colour), line_width: place === "realised" ? 2.6 : 1.5 };
      const values = explained[place].map(orNaN);
      const judged = values.map((value, i) => (little[i] ? NaN : value));
      const drawn = [figure.line(steps, values, { ...line, line_alpha: 0.22 }), figure.line(steps, judged, line)];
      if (steps.length < 40) drawn.push(figure.scatter(steps, judged, { size: 4, color: line.line_color }));
      for (const renderer of drawn) renderer.visible = !placesHidden.has(place);
      return drawn.map((renderer) => [place, renderer]);
    });
    const pointed = figure.line(steps, explained.realised.map(orNaN), { line_alpha: 0 });
    const columns = found.map(([place]) => [place, explained[place].map(orNaN)]);
    pointed.data_source.data = { ...pointed.data_source.data, ...Object.fromEntries(columns) };
    const rows = found.map(([place, label]) => `${label}: @${place}{0.00}`);
    hover(figure, pointed, ["step @x{0}", ...rows], "vline");
  });
}

function varianceBox() {
  const { steps, variance, enough } = block("critic");
  const top = 1.05 * Math.max(0, ...variance.filter((value) => value !== null)) || 1;
  const title = "variance of the realised returns";
  return zoomedBox(title, "reward units squared", { y_range: [0, top] }, (figure) => {
    shadeLittle(figure);
    const line = figure.line(steps, variance.map(orNaN), { line_color: style("--curve"), line_width: 1.6 });
    hover(figure, line, "step @x{0}: @y{0.[00000]}", "vline");
    const quarter = { dimension: "width", location: enough, line_color: style("--muted"), line_dash: "dashed" };
    figure.add_layout(new Bokeh.Span(quarter));
  });
}

const orNaN = (value) => value ?? NaN;

// For each step: true if less variance is left than the figures need.
function littleVariance() {
  const { variance, enough } = block("critic");
  return variance.map((value) => value !== null && value < enough);
}

// A grey ground under the steps in which hardly any variance is left.
function shadeLittle(figure) {
  const { steps } = block("critic");
  const little = littleVariance();
  for (let first = 0; first < steps.length; first++) {
    if (!little[first]) continue;
    let last = first;
    while (little[last + 1]) last++;
    const edges = { left: steps[first] - 0.5, right: steps[last] + 0.5 };
    const look = { fill_color: style("--muted"), fill_alpha: 0.16, line_color: null, level: "underlay" };
    figure.add_layout(new Bokeh.BoxAnnotation({ ...edges, ...look }));
    first = last;
  }
}

// The chart of one choice of steps. Choosing others draws it again.
function calibrationChoice(calibrations) {
  const names = calibrations.map(({ steps: [a, b] }) => (a === b ? `step ${a}` : `steps ${a} to ${b} together`));
  const select = element("select", { id: "calibration-steps" });
  select.append(...names.map((text, i) => element("option", { value: i, text })));
  const holder = element("div", { className: "chart" });
  const show = () => {
    const old = holder.querySelector(".plot");
    if (old) removeChart(old);
    const chosen = calibrations[Number(select.value)];
    const box = valueCalibrationBox(chosen);
    const about =
      `Mean distance ${number(chosen.error)}; the standard deviation of these returns is ${number(chosen.deviation)}.`;
    holder.replaceChildren(
      ...box.childNodes,
      element("p", { className: "muted about", text: about }),
      element("label", {}, "Steps ", select),
    );
  };
  select.addEventListener("change", show);
  show();
  return holder;
}

function valueCalibrationBox({ bins }) {
  const [predicted, realised, tokens] = unzip(bins);
  const ends = [Math.min(...predicted, ...realised), Math.max(...predicted, ...realised)];
  const room = 0.06 * (ends[1] - ends[0]) || 0.5;
  const range = [ends[0] - room, ends[1] + room];
  const labels = { x_label: "predicted return (value)", y_label: "realised return" };
  return plotBox("realised by predicted return", "reward units", { x: range, y_range: range, ...labels }, (figure) => {
    figure.line(range, range, { line_color: style("--muted"), line_dash: "dashed" });
    figure.line(predicted, realised, { line_color: style("--curve"), line_alpha: 0.5 });
    const points = figure.scatter(predicted, realised, { size: 8, color: style("--curve") });
    points.data_source.data = { ...points.data_source.data, tokens };
    hover(figure, points, "predicted @x{0.[0000]}, realised @y{0.[0000]}, @tokens tokens");
  });
}
