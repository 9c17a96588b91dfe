// The tab of curves: one chart for each metric, with marks at events, all zoomed together.
"use strict";

const KINDS = {
  health: ["health", "--bad", "solid"],
  evaluation: ["evaluations", "--accent", "dotted"],
  joined: ["replicas joined", "--good", "dashed"],
  died: ["replicas died", "--bad", "dashed"],
  left: ["replicas left", "--muted", "dashed"],
};
const zoom = { all: [0, 1], now: [0, 1], changing: false };
const MANY = 30; // marks of one kind; more of them are hidden at first
const marksShown = new Set();

function showCurves() {
  const groups = block("curves");
  showEvents();
  for (const { name, curves } of groups) {
    const box = element("section", { className: "group", parent: byId("groups") }, element("h2", { text: name }));
    const grid = element("div", { className: "charts", parent: box });
    for (const curve of curves) grid.append(curveBox(curve));
  }
  if (!groups.length) element("p", { text: "No step has been learned yet.", parent: byId("groups") });
  byId("groups").addEventListener("dblclick", () => zoomTo(zoom.all));
  byId("smooth").addEventListener("change", drawAgain);
  byId("zoom-reset").addEventListener("click", () => zoomTo(zoom.all));
  for (const id of ["zoom-from", "zoom-to"]) byId(id).addEventListener("change", zoomFromFields);
}

// All steps of the run, with some room at both ends.
function setZoom() {
  const curves = block("curves").flatMap(({ curves: found }) => found);
  const last = curves
    .flatMap(({ x, heldout }) => [x.at(-1) ?? 0, heldout.x.at(-1) ?? 0])
    .reduce((a, b) => Math.max(a, b), 1);
  zoom.all = zoom.now = [-0.015 * last, 1.015 * last];
}

function curveBox(curve) {
  const newest = curve.y.length ? curve.y.at(-1) : curve.heldout.y.at(-1);
  const about = element(
    "details",
    {},
    element(
      "summary",
      { title: curve.meaning },
      element("span", { className: "key", text: curve.key }),
      element("span", { className: "unit", text: curve.unit === "-" ? "" : curve.unit }),
      element("span", { className: "newest", text: number(newest) }),
    ),
    element("p", { text: `${curve.meaning}.` }),
  );
  const plot = element("div", { className: "plot" });
  const first = Math.abs(curve.y[0] ?? curve.heldout.y[0]);
  const made = chart(plot, { x: zoom.now, span: first / 2 || 1, drawn: follow }, (figure) => drawCurve(figure, curve));
  made.zooms = true;
  return element("div", { className: "chart" }, about, plot);
}

function drawCurve(figure, { key, x, y, heldout }) {
  figure.marks = Object.entries(marks()).map(([kind, steps]) => {
    const [, colour, dash] = KINDS[kind];
    const renderer = figure.vspan(steps, { line_color: style(colour), line_dash: dash, line_alpha: 0.55 });
    renderer.visible = marksShown.has(kind);
    return [kind, renderer];
  });
  if (x.length) {
    const smooth = Number(byId("smooth").value);
    const line = figure.line(x, y, { line_color: style("--curve"), line_width: 1.6, line_alpha: smooth ? 0.25 : 1 });
    if (smooth) figure.line(x, smoothed(y, smooth), { line_color: style("--curve"), line_width: 2 });
    else if (x.length < 40) figure.scatter(x, y, { size: 4, color: style("--curve") });
    hover(figure, line, "step @x{0}: @y{0.[00000]}", "vline");
  }
  if (heldout.x.length) {
    const colour = style("--curve-2");
    if (heldout.low) figure.segment(heldout.x, heldout.low, heldout.x, heldout.high, { line_color: colour });
    if (!x.length) figure.line(heldout.x, heldout.y, { line_color: colour, line_alpha: 0.6 });
    const points = figure.scatter(heldout.x, heldout.y, {
      marker: "diamond",
      size: heldout.x.length < 50 ? 9 : 5,
      color: colour,
    });
    hover(figure, points, `held out, ${block("run").is_critic ? "step" : "version"} @x{0}: @y{0.[0000]}`);
  }
}

// The exponential moving average, which does not lean on the first value: Adam's correction (arXiv:1412.6980).
function smoothed(values, weight) {
  let [sum, known] = [0, 0];
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    known = weight * known + (1 - weight);
    return sum / known;
  });
}

const marks = () => {
  const steps = {};
  for (const { step, kind } of block("events")) (steps[kind] ??= new Set()).add(step);
  return Object.fromEntries(Object.entries(steps).map(([kind, found]) => [kind, [...found]]));
};

function showEvents() {
  const events = block("events");
  const found = Object.keys(KINDS).filter((kind) => events.some((event) => event.kind === kind));
  for (const kind of found) {
    if (kind !== "joined" && kind !== "left" && marks()[kind].length <= MANY) marksShown.add(kind);
    const box = element("input", { type: "checkbox", checked: marksShown.has(kind), name: kind });
    box.addEventListener("change", () => toggle(kind, box.checked));
    const swatch = element("span", {
      className: "swatch",
      style: `border-top-style: ${KINDS[kind][2]}; color: var(${KINDS[kind][1]})`,
    });
    element("label", { parent: byId("marks") }, box, swatch, KINDS[kind][0]);
  }
  if (!found.length) byId("marks").hidden = true;
  const list = byId("event-list");
  list.hidden = !events.length;
  list.querySelector("summary").textContent = `${events.length} event${events.length === 1 ? "" : "s"}`;
  for (const event of events) {
    const jump = element("button", { type: "button", text: `step ${event.step}` });
    const near = (zoom.all[1] - zoom.all[0]) / 20;
    jump.addEventListener("click", () => zoomTo([event.step - near, event.step + near]));
    const item = element("li", { parent: list.querySelector("ol") }, jump);
    element("span", { className: `kind-${event.kind}`, text: event.text, parent: item });
    if (event.advice) element("span", { className: "advice", text: ` Try: ${event.advice}.`, parent: item });
  }
}

function toggle(kind, shown) {
  if (shown) marksShown.add(kind);
  else marksShown.delete(kind);
  for (const { figure } of charts) {
    for (const [of, renderer] of figure?.marks ?? []) if (of === kind) renderer.visible = shown;
  }
}

// Follows what the user does to the range of one figure in all others.
function follow(figure) {
  const range = figure.x_range;
  const changed = () => {
    if (!zoom.changing) zoomTo([range.start, range.end]);
  };
  range.properties.start.change.connect(changed);
  range.properties.end.change.connect(changed);
}

function zoomTo([start, end]) {
  zoom.now = [start, end];
  zoom.changing = true;
  for (const made of charts) {
    if (!made.zooms) continue;
    made.options.x = zoom.now;
    made.figure?.x_range.setv({ start, end });
  }
  zoom.changing = false;
  const whole = start === zoom.all[0] && end === zoom.all[1];
  byId("zoom-from").value = whole ? "" : Math.max(0, Math.ceil(start));
  byId("zoom-to").value = whole ? "" : Math.floor(end);
}

function zoomFromFields() {
  const from = byId("zoom-from").value;
  const to = byId("zoom-to").value;
  if (from === "" && to === "") zoomTo(zoom.all);
  else zoomTo([from === "" ? zoom.all[0] : Number(from) - 0.5, to === "" ? zoom.all[1] : Number(to) + 0.5]);
}
