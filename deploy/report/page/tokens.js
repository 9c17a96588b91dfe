// The token view: one response, each token coloured by a quantity, next to another response to the same prompt.
"use strict";

// Quantities: label, scale and meaning. Scales: "signed" is blue above and orange below its middle, "amount" is one
// hue from the lowest to the highest value, "flag" is coloured or not.
const QUANTITIES = {
  advantages: ["advantage", "signed", "how much better than expected the response went on, before whitening; the policy learns from it"],
  whitened_advantages: ["advantage, whitened", "signed", "with mean 0 and deviation 1 over the batch: what the loss has"],
  rewards: ["reward", "signed", "the KL penalty of each token, and the normalised score on the last one"],
  kl: ["KL", "signed", "from the reference, nats, by the configured estimator; times the coefficient it is the penalty"],
  values: ["value", "amount", "what the critic expects of the rest of the response"],
  td_errors: ["TD error", "signed", "reward + gamma x next value - value: the critic's surprise at this token"],
  returns: ["return", "amount", "advantage before whitening + value: what the critic learns"],
  entropy: ["entropy", "amount", "spread of the policy before this token, nats"],
  ratio: ["ratio", "around one", "probability in the last pass over probability before the update"],
  clipped: ["clipped", "flag", "the clip removed this token's gradient in the last pass"],
  importance_weight: ["importance weight", "around one", "learner's over sampler's probability, truncated"],
  policy_versions: ["policy version", "amount", "the weights that sampled this token"],
  old_logprobs: ["logprob, learner", "amount", "before the update, nats"],
  rollout_logprobs: ["logprob, sampler", "amount", "as the generator sampled it, nats"],
  ref_logprobs: ["logprob, reference", "amount", "of the frozen starting policy, nats"],
};
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
  const furthest = others.reduce((best, j) => (Math.abs(step[j] - step[i]) > Math.abs(step[best ?? i] - step[i]) ? j : best), null);
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
  const box = element("section", { className: "side", "aria-label": sideTitle(i) }, element("h3", { text: sideTitle(i) }));
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
  const holder = element("div", { className: "tokens", role: "listbox", tabIndex: -1, "aria-label": "tokens of the response", dir: "auto", parent: box }, ...tokens);
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
    return element("div", { className, title: meaning }, element("dt", { text: label }), element("dd", { text: shown }));
  });
  side.table.replaceChildren(...rows);
  if (side.cursor) side.cursor.location = t + 1;
}

function offerQuantities() {
  const known = Object.keys(QUANTITIES).filter((name) => view.sides.some(({ numbers }) => name in numbers));
  byId("quantity").replaceChildren(...known.map((value) => element("option", { value, text: QUANTITIES[value][0] })));
  if (!known.includes(view.quantity) && known.length) view.quantity = known[0];
  byId("quantity").value = view.quantity;
  for (const id of ["quantity-label", "legend", "quantity-meaning"]) byId(id).hidden = !known.length;
}

// Colours all sides by one scale, so that they can be compared. It ends at the 2nd and 98th percentile: one score at
// the end of a response would leave every other token pale.
function colourTokens() {
  const [, scale, meaning] = QUANTITIES[view.quantity];
  const values = view.sides.flatMap(({ numbers }) => [...(numbers[view.quantity] ?? [])]).filter(Number.isFinite).sort((a, b) => a - b);
  const [low, high] = [0.02, 0.98].map((share) => values[Math.round(share * (values.length - 1))] ?? 0);
  const middle = scale === "around one" ? 1 : 0;
  const reach = Math.max(Math.abs(low - middle), Math.abs(high - middle)) || 1;
  const signed = scale === "signed" || scale === "around one";
  const strength = (value) => {
    if (scale === "flag") return value ? 1 : 0;
    if (signed) return (value - middle) / reach;
    return high > low ? (value - low) / (high - low) : 0;
  };
  for (const side of view.sides) {
    side.tokens.forEach((token, t) => {
      const value = side.numbers[view.quantity]?.[t];
      const found = Number.isFinite(value) ? Math.min(1, Math.max(-1, strength(value))) : 0;
      token.style.setProperty("--hue", signed ? (found < 0 ? "var(--negative)" : "var(--positive)") : "var(--amount)");
      token.style.setProperty("--strength", `${Math.round(100 * Math.abs(found))}%`);
    });
    if (side.tokens.length) focusToken(side, side.at);
  }
  byId("quantity-meaning").textContent = meaning;
  const flag = scale === "flag";
  byId("legend-low").textContent = flag ? "no" : number(signed ? middle - reach : low);
  byId("legend-high").textContent = flag ? "yes" : number(signed ? middle + reach : high);
  const [from, to] = signed ? ["--negative", "--positive"] : ["--surface", "--amount"];
  byId("legend-bar").style.background = `linear-gradient(90deg, var(${from}), ${signed ? "var(--surface)," : ""} var(${to}))`;
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
    element("span", { parent: keys }, element("span", { className: "swatch", style: `border-top-style: ${dash}; color: var(${colour})` }), label);
  }
  side.plot = element("div", { className: "plot", role: "img", "aria-label": "curves over the tokens", parent: side.box });
  chart(side.plot, { zoom: true, x_label: "token" }, (figure) => {
    const at = side.tokens.map((_, t) => t + 1);
    for (const [label, found, colour, dash] of lines) {
      const line = figure.line(at, found, { line_color: style(colour), line_width: 1.6, line_dash: dash });
      figure.scatter(at, found, { size: at.length < 40 ? 4 : 0, color: style(colour) });
      hover(figure, line, [["token", "@x{0}"], [label, "@y{0.[0000]}"]]);
    }
    side.cursor = new Bokeh.Span({ dimension: "height", location: side.at + 1, line_color: style("--muted"), line_dash: "dotted" });
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
