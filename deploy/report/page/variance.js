// The variance tab: what a baseline and the critic do to the noise of the policy gradient.
"use strict";

function showVariance() {
  const found = block("variance");
  const parent = byId("variance-panel");
  const { batches, gradients } = found;
  const which = batches[0] === batches[1] ? `step ${batches[0]}` : `steps ${batches[0]} to ${batches[1]}`;
  const exact = gradients.kept === gradients.weights;
  const part = (name, about) => {
    const box = element("section", { className: "group", parent }, element("h2", { text: name }));
    for (const text of about) element("p", { className: "muted", text, parent: box });
    return box;
  };
  const box = part("Noise of the policy gradient", [
    `Policy and critic after ${number(found.step)} updates, on the batch of ${which}, which they had not learned from: ` +
      `${number(found.responses)} responses to ${number(found.prompts)} prompts, ${number(found.tokens)} tokens. ` +
      `Gradients of ${number(gradients.weights)} weights from ${number(gradients.parts)} parts of the batch` +
      `${exact ? "" : `, each kept as ${number(gradients.kept)} numbers`}. Intervals of 95 %.`,
    "A relative standard error near 1 means that the gradient is mostly noise. The noise scale is the number of " +
      "responses for which the standard error equals the true gradient: fewer is better. The cosine compares the true gradient with " +
      "that of lam 1, which has no bias: noise that is bought with bias makes it smaller.",
  ]);
  box.append(element("div", { className: "scroll" }, estimatorTable(found)));
  for (const text of found.left_out) element("p", { className: "muted", text: `Left out: ${text}`, parent: box });
  const grid = element("div", { className: "charts pair", parent: box });
  const names = found.estimators.map(({ name, own }) => (own ? `${name} *` : name));
  const of = (key) => found.estimators.map((one) => one[key]);
  grid.append(
    intervalBox("variance of the advantages before whitening", "share of the returns' variance", names, of("of_returns")),
    intervalBox(`standard error of the policy gradient, ${found.used} advantages`, "of its norm", names, of("error"), 1),
  );
  if (!found.explained.length) return;
  const explained = part("Explained variance by position", [
    "1: perfect; 0: no better than a constant; values below -1 are cut. On the batch above, against realised returns.",
  ]);
  element("div", { className: "charts pair", parent: explained }).append(
    intervalBox("explained variance", "share", found.explained.map((one) => one.part), found.explained.map((one) => one.share), 0),
    intervalBox("variance of the returns", "reward units squared", found.explained.map((one) => one.part), found.explained.map((one) => one.returns_variance)),
  );
}

const varianceColumns = (used) => [
  ["variance, of the returns'", ({ of_returns: share }) => shownFigure(share)],
  ["relative standard error", ({ error }) => shownFigure(error)],
  ["noise scale", ({ noise_scale: scale }) => shownFigure(scale)],
  ["against none", ({ against_none: ratio }) => shownFigure(ratio)],
  ["cosine", ({ direction }) => shownFigure(direction)],
  [`error ${used === "whitened" ? "unwhitened" : "whitened"}`, ({ other_error: error }) => shownFigure(error)],
  ["variance", ({ variance }) => (variance === null ? "-" : rounded(variance[0], 3))],
  ["mean", ({ mean }) => rounded(mean, 3)],
];

function estimatorTable({ estimators, used }) {
  const columns = varianceColumns(used);
  const heading = element("tr", {}, element("th", { text: "advantages", scope: "col" }));
  heading.append(...columns.map(([text]) => element("th", { text, scope: "col" })));
  const rows = estimators.map((one) => {
    const row = element("tr", {}, element("th", { text: one.own ? `${one.name} *` : one.name, scope: "row" }));
    row.append(...columns.map(([, shown]) => element("td", { text: shown(one) })));
    return row;
  });
  const caption = element("caption", { text: "*: the estimator of this run; (low to high): interval; -: too few responses to tell" });
  return element("table", { className: "figures" }, caption, element("thead", {}, heading), element("tbody", {}, ...rows));
}

// A figure [value, low, high] with its interval. Without a closed interval the value alone would look exact.
function shownFigure(figure) {
  if (figure === null || figure[0] === null) return "-";
  const [value, low, high] = figure;
  if (low === null) return "-";
  const least = rounded(low, 2);
  return high === null ? `above ${least}` : `${rounded(value, 2)} (${least} to ${rounded(high, 2)})`;
}

const rounded = (value, digits) => (value === null ? "-" : number(Number(value.toPrecision(digits))));

// Points with their intervals, one below another; `line`: where a dashed line is drawn. Values below `lowest` are cut.
function intervalBox(title, unit, names, figures, line, lowest = LOWEST) {
  const known = figures.map((figure, i) => [figure, -i]).filter(([figure]) => figure !== null && figure[0] !== null);
  const cut = (x) => Math.max(lowest, x);
  const options = { y_range: [-names.length + 0.4, 0.6], x_label: unit };
  return plotBox(title, unit, options, (figure) => {
    figure.yaxis.ticker = new Bokeh.FixedTicker({ ticks: names.map((_, i) => -i) });
    figure.yaxis.major_label_overrides = new Map(names.map((name, i) => [-i, name]));
    if (line !== undefined) {
      const dashed = { dimension: "height", location: line, line_color: style("--muted"), line_dash: "dashed" };
      figure.add_layout(new Bokeh.Span(dashed));
    }
    const closed = known.filter(([[, low, high]]) => low !== null && high !== null);
    const places = closed.map(([, place]) => place);
    figure.segment(closed.map(([[, low]]) => cut(low)), places, closed.map(([[, , high]]) => cut(high)), places, {
      line_color: style("--curve"),
      line_width: 2,
    });
    const points = figure.scatter(known.map(([[value]]) => cut(value)), known.map(([, place]) => place), {
      size: 8,
      color: style("--curve"),
    });
    points.data_source.data = { ...points.data_source.data, name: known.map(([, place]) => names[-place]) };
    hover(figure, points, "@name: @x{0.[000]}");
  });
}
