// The evaluation tab: KL from the base by token position.
"use strict";

function showForgetting(part) {
  const { kl } = block("evaluation");
  if (!Object.values(kl).some((parts) => parts.length)) return;
  const box = part(
    "KL from the base by position",
    "Mean over the answers that reach a position, nats per token. Bands: 95 % intervals. Few answers are long, so the " +
      "last positions have few tokens. High at the first tokens: the policy begins its answers differently. Rising: it " +
      "drifts further with every token.",
  );
  box.append(policyLegend(), element("div", { className: "charts pair" }, positionBox(kl)));
}

function positionBox(kl) {
  const last = Math.max(...Object.values(kl).flatMap((parts) => parts.map((part) => part.last)));
  const options = { x: [0.9, 1.1 * (last + 1)], x_type: "log", x_label: "token of the answer, from 1" };
  return plotBox("KL from the base", "nats per token", options, (figure) => {
    for (const [name, colour] of policyColours()) {
      const parts = kl[name] ?? [];
      if (!parts.length) continue;
      const places = parts.map((part) => 1 + (part.first + part.last) / 2);
      const [lows, highs] = [0, 1].map((end) => parts.map(({ value, interval }) => interval?.[end] ?? value));
      figure.varea(places, lows, highs, { fill_color: style(colour), fill_alpha: 0.13 });
      const values = parts.map(({ value }) => value);
      figure.line(places, values, { line_color: style(colour), line_width: 1.8 });
      const points = figure.scatter(places, values, { size: 4, color: style(colour) });
      const from = parts.map((part) => part.first + 1);
      const to = parts.map((part) => part.last + 1);
      const tokens = parts.map((part) => part.tokens);
      points.data_source.data = { ...points.data_source.data, lows, highs, from, to, tokens };
      hover(figure, points, "@y{0.000} (@lows{0.000} to @highs{0.000}), tokens @from to @to, @tokens of them");
    }
  });
}
