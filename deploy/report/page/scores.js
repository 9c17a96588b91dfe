// The score tab: each source over training, judges against it, KL against score, calibration of reward models.
"use strict";

function showScores() {
  const scores = block("scores");
  const parent = byId("scores-panel");
  const part = (name, about, className = "group") => {
    const box = element("section", { className, parent }, element("h2", { text: name }));
    if (about) element("p", { className: "muted", text: about, parent: box });
    return element("div", { className: "charts", parent: box });
  };
  const curves = block("curves").flatMap(({ curves: found }) => found);
  const keys = [
    "rollout/score/mean",
    ...scores.sources.map((name) => `reward/${name}/score`),
    ...scores.judges.map((name) => `heldout/${name}`),
  ];
  const found = keys.map((key) => curves.find((curve) => curve.key === key)).filter(Boolean);
  if (found.length)
    part(
      "Sources over training",
      "Orange diamonds: held-out evaluations. A judge is never trained on.",
      "group wide",
    ).append(...found.map(curveBox));
  const versions = scores.heldout;
  const pairs = scores.judges.flatMap((judge) => scores.sources.map((source) => [source, judge]));
  const known = pairs.filter(
    ([source, judge]) => versions.filter(({ components: c }) => source in c && judge in c).length > 1,
  );
  if (known.length) {
    const grid = part(
      "Proxy against judge",
      "Each point is one held-out evaluation, joined in order. A source that rises while the judge falls is exploited.",
    );
    for (const [source, judge] of known) {
      const points = versions.filter(({ components: c }) => source in c && judge in c);
      grid.append(
        pathBox(
          `${judge} against ${source}`,
          points.map(({ version, components: c }) => [version, c[source], c[judge]]),
          source,
          judge,
        ),
      );
    }
  }
  const grid = part(
    "KL against score",
    "The over-optimisation curve (Gao et al. 2022): the score at each distance from the reference. " +
      "Circles: training steps, darker with time. Diamonds: held-out evaluations.",
  );
  const heldout = versions
    .filter(({ kl, score }) => (kl ?? null) !== null && (score ?? null) !== null)
    .map(({ version, kl, score }) => [version, kl, score]);
  if (scores.training.length || heldout.length) grid.append(klBox(scores.training, heldout));
  for (const calibration of scores.calibrations)
    calibrationBox(part(`Calibration of ${calibration.source}`, calibrationText(calibration)), calibration);
}

function plotBox(title, unit, options, draw) {
  const plot = element("div", { className: "plot tall", role: "img", "aria-label": title });
  chart(plot, { zoom: false, ...options }, draw);
  const about = element(
    "summary",
    {},
    element("span", { className: "key", text: title }),
    element("span", { className: "unit", text: unit }),
  );
  return element("div", { className: "chart" }, element("details", {}, about), plot);
}

const unzip = (points) => (points.length ? points[0].map((_, i) => points.map((point) => point[i])) : [[], [], []]);

function pathBox(title, points, xLabel, yLabel) {
  const [order, x, y] = unzip(points);
  return plotBox(title, "held out", { x_label: xLabel, y_label: yLabel }, (figure) => {
    figure.line(x, y, { line_color: style("--curve-2"), line_alpha: 0.6 });
    const renderer = figure.scatter(x, y, { marker: "diamond", size: 9, color: style("--curve-2") });
    renderer.data_source.data = { ...renderer.data_source.data, order };
    hover(figure, renderer, "version @order{0}: @x{0.[0000]}, @y{0.[0000]}");
  });
}

function klBox(training, heldout) {
  return plotBox(
    "score against KL",
    "nats per response",
    { x_label: "KL per response, nats", y_label: "score" },
    (figure) => {
      const [steps, kl, score] = unzip(training);
      const last = Math.max(1, ...steps.slice(-1));
      const circles = figure.scatter(kl, score, {
        size: 6,
        color: style("--curve"),
        fill_alpha: steps.map((step) => 0.15 + 0.75 * (step / last)),
        line_alpha: 0.25,
      });
      circles.data_source.data = { ...circles.data_source.data, order: steps };
      hover(figure, circles, "step @order{0}: KL @x{0.[0000]}, score @y{0.[0000]}");
      const [versions, x, y] = unzip(heldout);
      figure.line(x, y, { line_color: style("--curve-2"), line_alpha: 0.6 });
      const diamonds = figure.scatter(x, y, { marker: "diamond", size: 10, color: style("--curve-2") });
      diamonds.data_source.data = { ...diamonds.data_source.data, order: versions };
      hover(figure, diamonds, "held out, version @order{0}: KL @x{0.[0000]}, score @y{0.[0000]}");
    },
  );
}

function calibrationText({ pairs, accuracy, interval, calibration_error: error }) {
  const within = `${percent(interval?.[0])} to ${percent(interval?.[1])}`;
  return (
    `Right on ${percent(accuracy)} of ${number(pairs)} held-out pairs (95 %: ${within}); calibration error ` +
    `${number(error)}. On the dashed line, a predicted probability comes true as often as it says.`
  );
}

function calibrationBox(grid, { bins }) {
  grid.append(
    plotBox(
      "share that came true",
      "by predicted probability",
      { x: [0.48, 1.02], y_range: [0, 1.02], x_label: "predicted probability of the preferred response" },
      (figure) => {
        figure.line([0.5, 1], [0.5, 1], { line_color: style("--muted"), line_dash: "dashed" });
        const x = bins.map(({ predicted }) => predicted);
        figure.segment(
          x,
          bins.map(({ interval }) => interval[0]),
          x,
          bins.map(({ interval }) => interval[1]),
          { line_color: style("--curve") },
        );
        const renderer = figure.scatter(
          x,
          bins.map(({ right }) => right),
          { size: 8, color: style("--curve") },
        );
        renderer.data_source.data = { ...renderer.data_source.data, pairs: bins.map(({ pairs }) => pairs) };
        hover(figure, renderer, "predicted @x{0.000}, came true @y{0.000}, @pairs pairs");
      },
    ),
  );
}
