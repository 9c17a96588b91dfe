// Charts: Bokeh draws them, in the colours of the page, once they come into view.
"use strict";

const charts = new Set(); // of {box, draw, figure}: all that were asked for and are still in the page
const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) if (entry.isIntersecting) drawn(entry.target.chart);
  },
  { rootMargin: "200px" },
);

// Draws a chart into `box` when it is first seen. `draw(figure)` adds its glyphs.
function chart(box, options, draw) {
  const made = { box, options, draw, figure: null };
  box.chart = made;
  charts.add(made);
  seen.observe(box);
  return made;
}

function drawn(made) {
  if (made.figure) return;
  seen.unobserve(made.box);
  const { x, x_label: xLabel = null, y_range: yRange } = made.options;
  const figure = Bokeh.Plotting.figure({
    sizing_mode: "stretch_both",
    toolbar_location: null,
    tools: made.options.zoom === false ? "" : "xbox_zoom",
    x_axis_type: made.options.x_type ?? "auto",
    x_range: x ? new Bokeh.Range1d({ start: x[0], end: x[1] }) : new Bokeh.DataRange1d({ range_padding: 0.05 }),
    y_range: yRange
      ? new Bokeh.Range1d({ start: yRange[0], end: yRange[1] })
      : new Bokeh.DataRange1d({ range_padding: 0.08 }),
    min_border_left: 46,
    min_border_right: 10,
    output_backend: "canvas",
  });
  made.figure = figure;
  paint(figure, xLabel, made.options.y_label ?? null);
  made.draw(figure);
  if (!yRange) figure.y_range.default_span = made.options.span ?? 1;
  made.options.drawn?.(figure);
  Bokeh.Plotting.show(figure, made.box);
}

function paint(figure, xLabel, yLabel) {
  const [ink, line, grid] = ["--muted", "--line", "--grid"].map(style);
  figure.background_fill_alpha = 0;
  figure.border_fill_alpha = 0;
  figure.outline_line_color = null;
  for (const [axis, label] of [
    [figure.xaxis, xLabel],
    [figure.yaxis, yLabel],
  ]) {
    axis.axis_line_color = line;
    axis.major_tick_line_color = line;
    axis.minor_tick_line_color = null;
    axis.major_label_text_color = ink;
    axis.major_label_text_font_size = "11px";
    axis.axis_label = label;
    axis.axis_label_text_color = ink;
    axis.axis_label_text_font_size = "11px";
    axis.axis_label_text_font_style = "normal";
  }
  figure.xgrid.grid_line_color = null;
  figure.ygrid.grid_line_color = grid;
}

// Shows `text`, or several lines of it, at the pointer, with the values of columns in place of names such as @x. It is
// part of a label's value, because Bokeh's labels have a fixed colour with too little contrast. Bokeh reads it as HTML:
// it must be our own text.
function hover(figure, renderer, text, mode = "mouse") {
  const tooltips = [text].flat().map((line) => ["", line]);
  figure.add_tools(new Bokeh.HoverTool({ renderers: [renderer], mode, tooltips, line_policy: "nearest" }));
}

function removeChart(box) {
  const made = box.chart;
  if (!made) return;
  seen.unobserve(box);
  charts.delete(made);
  box.replaceChildren();
}

// Draws every chart again when it is next seen.
function drawAgain() {
  for (const made of charts) {
    made.figure = null;
    made.box.replaceChildren();
    seen.observe(made.box);
  }
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAgain);
