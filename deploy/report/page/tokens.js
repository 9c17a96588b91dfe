// The token view: one response, each token coloured by a quantity, next to another response to the same prompt.
"use strict";

const view = { sides: [], quantity: "advantages" };

function setUpTokens() {
  byId("quantity").addEventListener("change", () => {
    view.quantity = byId("quantity").value;
    colourTokens();
  });
  byId("compare").addEventListener("change", showSides);
  if (block("rollouts").turns)
    QUANTITIES.rewards[2] += "; rewards of an environment are on the last token of their turn";
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
  const texts = detail.tokens.map((piece) => list.details.pieces[piece]);
  const parts = partsOf(detail);
  const sampled = texts.filter((_, place) => parts.some(({ start, end }) => place >= start && place < end));
  const numbers = {};
  for (const name of Object.keys(QUANTITIES)) {
    const found = unpack(detail[name], sampled.length);
    if (found) numbers[name] = found;
  }
  const tokens = sampled.map((text, t) => tokenElement(text, numbers, t));
  const side = { box, numbers, texts: sampled, tokens, at: 0 };
  if (detail.turns) {
    side.parts = parts;
    const count = parts.length === 1 ? "1 turn" : `${number(parts.length)} turns`;
    const text = `${count} · finish: ${block("rollouts").finish[i]}`;
    element("p", { className: "turn-count muted", text, parent: box });
  }
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
    ...(detail.turns ? turnElements(parts, texts, tokens, detail.unseen) : tokens),
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

// The policy's turns: places of the first token and behind the last one, where the environment's answer ends, the
// reward, the info, and whether the answer is a new context (1; 2: a sequence also ends before it). The last turn may
// have no answer. A response without an environment is one turn.
function partsOf({ tokens, turns = [] }) {
  let start = 0;
  const parts = turns.map(([end, next, reward, info, context = 0]) => {
    const part = { start, end, next, reward, info, context };
    start = next;
    return part;
  });
  if (start < tokens.length || !turns.length) parts.push({ start, end: tokens.length, next: tokens.length });
  return parts;
}

// A group for each turn: its number, reward and info, its tokens, and the environment's answer, which has no numbers.
// `unseen` is what it said after the last turn.
function turnElements(parts, texts, tokens, unseen) {
  let first = 0;
  return parts.map(({ start, end, next, reward, info, context }, turn) => {
    const title = `turn ${turn + 1} · ${reward === undefined ? "not answered" : `reward ${number(reward)}`}`;
    const head = element("div", { className: "turn-head" }, element("b", { text: title }));
    if (info) element("span", { text: ` · ${info}`, dir: "auto", title: "the environment's info", parent: head });
    const group = element("div", { className: "turn", role: "group", "aria-label": title }, head);
    group.append(...tokens.slice(first, first + end - start));
    first += end - start;
    if (next > end) {
      const title = "the environment's, not learned from";
      if (context) {
        const text = context === 2 ? "new context, another sequence" : "new context";
        element("div", { className: "context", text, title: "the policy reads nothing before this", parent: group });
      }
      const said = element("span", { className: "said", title, parent: group });
      addText(said, texts.slice(end, next).join(""));
    }
    if (unseen && turn === parts.length - 1) {
      element("div", { className: "turn-head", text: "said after the last turn, not seen by the model:", parent: group });
      const title = "the environment's, not seen by the model";
      addText(element("span", { className: "said unseen", title, dir: "auto", parent: group }), unseen);
    }
    return group;
  });
}

// An empty text (part of a character) is shown by a dot.
function tokenElement(text, numbers, t) {
  const token = element("span", { className: "token", role: "option", tabIndex: t === 0 ? 0 : -1 });
  if (text === "") element("span", { className: "mark", text: "·", parent: token });
  addText(token, text);
  if (numbers.clipped?.[t]) token.classList.add("clipped");
  return token;
}

// A line break is shown by a mark as well.
function addText(parent, text) {
  for (const [i, part] of text.split("\n").entries()) {
    if (i > 0) parent.append(element("span", { className: "mark", text: "↵" }), "\n");
    parent.append(part);
  }
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
  const turn = side.parts ? `, turn ${turnOf(side.parts, t)}` : "";
  side.at_text.textContent = `token ${t + 1} of ${side.tokens.length}${turn}: ${JSON.stringify(side.texts[t])}`;
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

// The number of the turn, from 1, of the policy's token t.
function turnOf(parts, t) {
  let before = 0;
  return 1 + parts.findIndex(({ start, end }) => t < (before += end - start));
}

// Value, reward-to-go and advantage over the policy's tokens.
function addTokenCurves(side) {
  const { values, rewards, advantages } = side.numbers;
  const lines = [
    ["value", values && [...values], "--curve", "solid"],
    ["reward-to-go", rewards && rewardToGo([...rewards], endsOf(side.parts ?? [])), "--curve-3", "dashed"],
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
    for (const t of at.slice(1)) {
      if (!side.parts || turnOf(side.parts, t - 1) === turnOf(side.parts, t - 2)) continue;
      const turn = { dimension: "height", location: t - 0.5, line_color: style("--line") };
      figure.add_layout(new Bokeh.Span(turn));
    }
  });
}

// The policy's tokens that end a sequence, but for the last one of all.
function endsOf(parts) {
  let before = 0;
  const ends = new Set();
  for (const { start, end, context } of parts) {
    before += end - start;
    if (context === 2) ends.add(before - 1);
  }
  return ends;
}

// The discounted sum of the rewards from each token to the end of its sequence.
function rewardToGo(rewards, ends = new Set()) {
  const gamma = block("run").settings["ppo.gamma"] ?? 1;
  const sums = [...rewards];
  for (let t = sums.length - 2; t >= 0; t--) if (!ends.has(t)) sums[t] += gamma * sums[t + 1];
  return sums;
}
