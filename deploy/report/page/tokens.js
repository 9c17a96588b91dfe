// The token view: one response, each token coloured by a quantity, next to another response to the same prompt.
"use strict";

const view = { sides: [], quantity: "advantages" };

function setUpTokens() {
  byId("quantity").addEventListener("change", () => {
    view.quantity = byId("quantity").value;
    colourTokens();
  });
  byId("compare").addEventListener("change", showSides);
}

function showTokens(i) {
  const detail = list.details.rows[i];
  byId("token-view").hidden = false;
  byId("prompt").textContent = promptOf(i) ?? "(not in this page)";
  const others = detail?.tokens ? samePrompt(i) : [];
  const compare = byId("compare");
  compare.replaceChildren(element("option", { value: "", text: "nothing" }));
  for (const other of others) element("option", { value: other, text: sideTitle(other), parent: compare });
  byId("compare-label").hidden = !others.length;
  const { step } = block("rollouts");
  const furthest = others.reduce(
    (best, j) => (Math.abs(step[j] - step[i]) > Math.abs(step[best ?? i] - step[i]) ? j : best),
    null,
  );
  compare.value = furthest ?? "";
  view.row = i;
  showSides();
}

// Other rollouts of the prompt that are in the page, in order.
function samePrompt(i) {
  const { id } = block("rollouts");
  if (!view.byPrompt) {
    view.byPrompt = new Map();
    for (const row of Object.keys(list.details.rows).map(Number)) {
      if (!list.details.rows[row].tokens) continue;
      const prompt = id[row].split("/")[1];
      if (!view.byPrompt.has(prompt)) view.byPrompt.set(prompt, []);
      view.byPrompt.get(prompt).push(row);
    }
  }
  return (view.byPrompt.get(id[i].split("/")[1]) ?? []).filter((j) => j !== i);
}

function sideTitle(i) {
  const { step, id, score } = block("rollouts");
  return `step ${step[i]} · ${id[i]} · score ${number(score[i])}`;
}

function showSides() {
  for (const { plot } of view.sides) if (plot) removeChart(plot);
  const other = byId("compare").value === "" ? [] : [Number(byId("compare").value)];
  const { step } = block("rollouts");
  view.sides = [view.row, ...other].sort((a, b) => step[a] - step[b]).map(makeSide);
  byId("sides").replaceChildren(...view.sides.map(({ box }) => box));
  offerQuantities();
  colourTokens();
}

function makeSide(i) {
  const detail = list.details.rows[i];
  const box = element(
    "section",
    { className: "side", "aria-label": sideTitle(i) },
    element("h3", { text: sideTitle(i) }),
  );
  if (!detail?.tokens) {
    const reason = list.reason(i);
    const step = String(block("rollouts").step[i]).padStart(6, "0");
    const missing = `Its text and token numbers are not in this page; journal/step-${step}.arrow has them.`;
    element("p", { className: "muted", text: reason === null ? missing : `Void: ${reason}`, parent: box });
    if (detail?.text) element("div", { className: "tokens", dir: "auto", text: detail.text, parent: box });
    return { box, numbers: {}, tokens: [] };
  }
  const length = detail.tokens.length;
  const numbers = {};
  for (const name of Object.keys(QUANTITIES)) {
    const found = unpack(detail[name], length);
    if (found) numbers[name] = found;
  }
  const texts = detail.tokens.map((piece) => list.details.pieces[piece]);
  const tokens = texts.map((text, t) => tokenElement(text, numbers, t));
  const side = { box, numbers, texts, tokens, at: 0 };
  const holder = element(
    "div",
    {
      className: "tokens",
      role: "listbox",
      tabIndex: -1,
      "aria-label": "tokens of the response",
      dir: "auto",
      parent: box,
    },
    ...tokens,
  );
  side.at_text = element("p", { className: "at muted", parent: box });
  side.table = element("dl", { className: "numbers", "aria-live": "polite", parent: box });
  holder.addEventListener("mouseover", (event) => focusToken(side, tokens.indexOf(event.target.closest(".token"))));
  holder.addEventListener("focusin", (event) => focusToken(side, tokens.indexOf(event.target.closest(".token"))));
  holder.addEventListener("click", (event) => event.target.closest(".token")?.focus());
  holder.addEventListener("keydown", (event) => moveInTokens(event, side));
  addTokenCurves(side);
  return side;
}

// A line break is shown by a mark as well, and an empty text (part of a character) by a dot.
function tokenElement(text, numbers, t) {
  const token = element("span", { className: "token", role: "option", tabIndex: t === 0 ? 0 : -1 });
  if (text === "") element("span", { className: "mark", text: "·", parent: token });
  for (const [i, part] of text.split("\n").entries()) {
    if (i > 0) token.append(element("span", { className: "mark", text: "↵" }), "\n");
    token.append(part);
  }
  if (numbers.clipped?.[t]) token.classList.add("clipped");
  return token;
}

function moveInTokens(event, side) {
  const last = side.tokens.length - 1;
  const next = { ArrowRight: side.at + 1, ArrowLeft: side.at - 1, Home: 0, End: last }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  side.tokens[Math.min(Math.max(next, 0), last)].focus();
}

function focusToken(side, t) {
  if (t < 0) return;
  const [before, now] = [side.tokens[side.at], side.tokens[t]];
  before.classList.remove("current");
  before.tabIndex = -1;
  before.removeAttribute("aria-selected");
  now.classList.add("current");
  now.tabIndex = 0;
  now.setAttribute("aria-selected", "true");
  side.at = t;
  side.at_text.textContent = `token ${t + 1} of ${side.tokens.length}: ${JSON.stringify(side.texts[t])}`;
  const rows = Object.entries(side.numbers).map(([name, values]) => {
    const [label, scale, meaning] = QUANTITIES[name];
    const shown = scale === "flag" ? (values[t] ? "yes" : "no") : number(values[t]);
    const className = name === view.quantity ? "chosen" : "";
    return element(
      "div",
      { className, title: meaning },
      element("dt", { text: label }),
      element("dd", { text: shown }),
    );
  });
  side.table.replaceChildren(...rows);
  if (side.cursor) side.cursor.location = t + 1;
}

// Value, reward-to-go and advantage over the tokens.
function addTokenCurves(side) {
  const { values, rewards, advantages } = side.numbers;
  const lines = [
    ["value", values && [...values], "--curve", "solid"],
    ["reward-to-go", rewards && rewardToGo([...rewards]), "--curve-3", "dashed"],
    ["advantage", advantages && [...advantages], "--curve-2", "solid"],
  ].filter(([, found]) => found);
  if (!lines.length || side.tokens.length < 2) return;
  const keys = element("p", { className: "keys", parent: side.box });
  for (const [label, , colour, dash] of lines) {
    element(
      "span",
      { parent: keys },
      element("span", { className: "swatch", style: `border-top-style: ${dash}; color: var(${colour})` }),
      label,
    );
  }
  side.plot = element("div", {
    className: "plot",
    role: "img",
    "aria-label": "curves over the tokens",
    parent: side.box,
  });
  chart(side.plot, { zoom: true, x_label: "token" }, (figure) => {
    const at = side.tokens.map((_, t) => t + 1);
    for (const [label, found, colour, dash] of lines) {
      const line = figure.line(at, found, { line_color: style(colour), line_width: 1.6, line_dash: dash });
      figure.scatter(at, found, { size: at.length < 40 ? 4 : 0, color: style(colour) });
      hover(figure, line, `token @x{0}: ${label} @y{0.[0000]}`);
    }
    side.cursor = new Bokeh.Span({
      dimension: "height",
      location: side.at + 1,
      line_color: style("--muted"),
      line_dash: "dotted",
    });
    figure.add_layout(side.cursor);
  });
}

// The discounted sum of the rewards from each token to the end.
function rewardToGo(rewards) {
  const gamma = block("run").settings["ppo.gamma"] ?? 1;
  const sums = [...rewards];
  for (let t = sums.length - 2; t >= 0; t--) sums[t] += gamma * sums[t + 1];
  return sums;
}
