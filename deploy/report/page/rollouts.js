// The tab of rollouts: a table that is filtered, searched and sorted, twelve rows at a time.
"use strict";

const PER_PAGE = 12;
const list = { shown: [], page: 0, sort: "step", descending: true, selected: -1 };

// Columns of the table: heading, what it means, the value of a row.
function columns() {
  const rows = block("rollouts");
  const texts =
    ({ texts: names, rows: indices }) =>
    (i) =>
      indices[i] < 0 ? null : names[indices[i]];
  const found = [
    { key: "step", about: "step of the run, from 0", value: (i) => rows.step[i] },
    {
      key: "sample",
      about: "epoch / prompt / replica",
      value: (i) => rows.id[i],
      sorted: (i) => sampleOrder(rows.id[i]),
    },
    { key: "score", about: "weighted sum of the sources", value: (i) => rows.score[i] },
    ...Object.entries(rows.components).map(([name, values]) => ({
      key: name,
      about: `raw score of the source ${name}`,
      value: (i) => values[i],
    })),
    {
      key: "tokens",
      about: rows.turns ? "tokens of the policy in the response" : "length of the response",
      value: (i) => rows.tokens[i],
    },
    ...(rows.turns ? [{ key: "turns", about: "turns of the policy", value: (i) => rows.turns[i] }] : []),
    {
      key: "finish",
      about:
        "stop: it ended with its end token; length: it was cut off" +
        (rows.turns
          ? "; terminated, truncated: the environment ended it; max_turns, max_tokens: a limit of [environment] did"
          : ""),
      value: (i) => rows.finish[i],
    },
    {
      key: "staleness",
      about: "versions between the weights of its oldest token and the learner's",
      value: (i) => rows.staleness[i],
    },
    { key: "KL", about: "from the reference, nats", value: (i) => rows.kl[i] },
    {
      key: "clipped",
      about: "share of its tokens whose gradient the clip or the mask removed in the last pass",
      value: (i) => rows.clipped[i],
      shown: percent,
    },
  ];
  list.reason = texts(rows.void);
  list.generator = texts(rows.generator);
  return found;
}

const sampleOrder = (id) => id.split("/").reduce((sum, part) => sum * 1e6 + Number(part), 0);

function showRollouts() {
  list.columns = columns();
  list.details = block("details");
  list.texts = new Map();
  for (const { key, about } of list.columns) {
    const sort = element("button", { type: "button", text: key, title: about });
    sort.addEventListener("click", () => sortBy(key));
    element("th", { scope: "col", parent: document.querySelector("#table thead tr") }, sort);
  }
  element("th", {
    className: "text",
    scope: "col",
    text: "response, or why it is void",
    parent: document.querySelector("#table thead tr"),
  });
  for (const [value, label] of Object.entries(CLASSES))
    element("option", { value, text: label[0], parent: byId("class") });
  for (const id of ["search", "class", "from", "to"]) byId(id).addEventListener("input", filter);
  byId("filter").addEventListener("submit", (event) => event.preventDefault());
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  document.querySelector("#table tbody").addEventListener("keydown", moveInTable);
  byId("sampling").textContent = samplingRule();
  setUpTokens();
  filter();
  const first = longestOfNewestStep();
  if (first !== null) select(first);
}

function longestOfNewestStep() {
  const { step, tokens } = block("rollouts");
  const better = (a, b) => a === null || step[b] > step[a] || (step[b] === step[a] && tokens[b] > tokens[a]);
  const known = list.shown.filter((i) => list.details.rows[i]?.tokens);
  return known.reduce((best, i) => (better(best, i) ? i : best), null);
}

const CUT_OFF = ["length", "truncated", "max_turns", "max_tokens"];
const CLASSES = {
  all: ["all", () => true],
  learned: ["learned from", (i) => list.reason(i) === null],
  void: ["void", (i) => list.reason(i) !== null],
  length: ["cut off", (i) => CUT_OFF.includes(block("rollouts").finish[i])],
  clipped: ["with clipped tokens", (i) => block("rollouts").clipped[i] > 0],
  kept: ["with tokens in this page", (i) => list.details.rows[i]?.tokens !== undefined],
};

function samplingRule() {
  const kept = block("rollouts").kept;
  const [run, table, detailed] = kept.all;
  if (detailed === run) return `All ${number(run)} rollouts are in this page, each with its text and token numbers.`;
  const part = (name) => `${number(kept[name][2])} of ${number(kept[name][0])} ${name}`;
  return (
    `The table has ${table === run ? "all" : `${number(table)} of`} ${number(run)} rollouts. ` +
    `${number(detailed)} have ` +
    `their text and token numbers here (${["void", "extreme", "clipped"].map(part).join(", ")}): first void and ` +
    "extreme rollouts, then those with clipped tokens, then the first and the last rollout of a prompt, then others, " +
    "drawn by their sample id. The journal has all of them."
  );
}

// The response of a row, as far as the page has it.
function responseOf(i) {
  if (!list.texts.has(i)) {
    const detail = list.details.rows[i];
    const text = detail?.tokens ? detail.tokens.map((piece) => list.details.pieces[piece]).join("") : detail?.text;
    list.texts.set(i, text ?? "");
  }
  return list.texts.get(i);
}

// An environment may have replaced the prompt of this rollout.
const promptOf = (i) => list.details.rows[i]?.prompt ?? list.details.prompts[block("rollouts").id[i].split("/")[1]];

function filter() {
  const rows = block("rollouts");
  const wanted = byId("search").value.trim().toLowerCase();
  const [, inClass] = CLASSES[byId("class").value];
  const from = byId("from").value === "" ? -Infinity : Number(byId("from").value);
  const to = byId("to").value === "" ? Infinity : Number(byId("to").value);
  const matches = (i) => {
    const texts = [responseOf(i), promptOf(i) ?? "", list.reason(i) ?? "", rows.id[i]];
    return texts.some((text) => text.toLowerCase().includes(wanted));
  };
  list.shown = rows.step
    .map((_, i) => i)
    .filter((i) => rows.step[i] >= from && rows.step[i] <= to && inClass(i) && (!wanted || matches(i)));
  byId("matches").textContent = `${number(list.shown.length)} of ${number(rows.step.length)} rollouts`;
  list.page = 0;
  sortShown();
}

function sortBy(key) {
  list.descending = list.sort === key ? !list.descending : key !== "step" && key !== "sample";
  list.sort = key;
  list.page = 0;
  sortShown();
}

// Rows without a value come last.
function sortShown() {
  const { sorted, value } = list.columns.find(({ key }) => key === list.sort);
  const of = sorted ?? value;
  const sign = list.descending ? -1 : 1;
  list.shown.sort((a, b) => {
    const [left, right] = [of(a), of(b)];
    if (left === right) return a - b;
    if (left === null) return 1;
    if (right === null) return -1;
    return (left < right ? -1 : 1) * sign;
  });
  showPage();
}

function showPage() {
  const body = document.querySelector("#table tbody");
  const pages = Math.max(1, Math.ceil(list.shown.length / PER_PAGE));
  list.page = Math.min(Math.max(list.page, 0), pages - 1);
  body.replaceChildren(...list.shown.slice(list.page * PER_PAGE, (list.page + 1) * PER_PAGE).map(tableRow));
  list.columns.forEach(({ key }, i) => {
    const head = document.querySelectorAll("#table th")[i];
    if (key === list.sort) head.setAttribute("aria-sort", list.descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
  byId("page-number").textContent = `page ${number(list.page + 1)} of ${number(pages)}`;
  byId("previous").disabled = list.page === 0;
  byId("next").disabled = list.page === pages - 1;
}

function turn(by) {
  list.page += by;
  showPage();
}

function tableRow(i) {
  const row = element("tr", { "aria-selected": String(i === list.selected) });
  row.dataset.row = i;
  for (const { key, value, shown = number } of list.columns) {
    const cell = element("td", { parent: row });
    if (key === "sample") element("button", { type: "button", text: value(i), parent: cell });
    else cell.textContent = typeof value(i) === "string" ? value(i) : shown(value(i));
  }
  const reason = list.reason(i);
  const text = reason === null ? responseOf(i) || (list.details.rows[i] ? "" : "not in this page") : `void: ${reason}`;
  const about = reason === null ? text : `${text}\n${responseOf(i)}`;
  element("td", {
    className: reason === null ? "text" : "text void",
    text: text.slice(0, 300),
    title: about.slice(0, 600),
    dir: "auto",
    parent: row,
  });
  row.addEventListener("click", () => select(i));
  return row;
}

// Up and Down go from row to row, Page Up and Page Down from page to page.
function moveInTable(event) {
  const row = event.target.closest("tr");
  const button = (of) => of?.querySelector("button");
  const next = { ArrowDown: row?.nextElementSibling, ArrowUp: row?.previousElementSibling }[event.key];
  if (next) button(next).focus();
  else if (event.key === "PageDown" || event.key === "PageUp") {
    turn(event.key === "PageDown" ? 1 : -1);
    button(document.querySelector("#table tbody tr"))?.focus();
  } else return;
  event.preventDefault();
}

function select(i) {
  list.selected = i;
  for (const row of document.querySelectorAll("#table tbody tr"))
    row.setAttribute("aria-selected", String(Number(row.dataset.row) === i));
  showTokens(i);
}
