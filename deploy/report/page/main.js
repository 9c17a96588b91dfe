// The head of the page and its tabs. A tab is filled when it is first opened.
"use strict";

const TABS = {
  curves: showCurves,
  rollouts: showRollouts,
  critic: showCritic,
  variance: showVariance,
  scores: showScores,
  evaluation: showEvaluation,
  tuning: showTuning,
};
const opened = new Set();

function openTab(name, { focus = false } = {}) {
  for (const tab of Object.keys(TABS)) {
    const button = byId(`tab-${tab}`);
    button.setAttribute("aria-selected", String(tab === name));
    button.tabIndex = tab === name ? 0 : -1;
    byId(`${tab}-panel`).hidden = tab !== name;
  }
  if (focus) byId(`tab-${name}`).focus();
  if (!opened.has(name)) {
    opened.add(name);
    TABS[name]();
  }
  history.replaceState(null, "", `#${name}`);
}

function moveInTabs(event) {
  const names = block("run").tabs;
  const at = names.findIndex((name) => byId(`tab-${name}`) === document.activeElement);
  const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: names.length - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  openTab(names[(next + names.length) % names.length], { focus: true });
}

function showHead() {
  const run = block("run");
  byId("run-name").textContent = run.name;
  byId("run-state").textContent = run.state;
  byId("run-state").classList.add(run.state);
  byId("run-about").textContent = [
    run.model,
    `seed ${run.seed}`,
    typeof run.started === "string" && `started ${run.started.slice(0, 16).replace("T", " ")}`,
  ]
    .filter(Boolean)
    .join(" · ");
  if (run.tabs.includes("evaluation")) showEvaluationHead(run);
  else if (run.tabs.includes("tuning")) showTuningHead(run);
  else {
    showFigures(run);
    showNotices(run);
    setZoom();
  }
  const versions = Object.entries(run.versions ?? {}).map(([name, version]) => `${name} ${version}`);
  byId("footer").textContent = [`Written ${run.written}`, run.directory, ...versions].join(" · ");
}

function headFigure(label, value, note = "") {
  element(
    "div",
    { parent: byId("figures") },
    element("dt", { text: label }),
    element("dd", { text: `${value} ` }, element("small", { text: note })),
  );
}

function showFigures({ steps, num_steps: planned, last, before, after }) {
  const brief = (value) =>
    typeof value === "number" && !Number.isInteger(value) ? number(Number(value.toPrecision(3))) : number(value);
  headFigure("steps", number(steps), planned ? `of ${number(planned)}` : "");
  const change = (label, key, shown) => {
    if (after?.[key] === null || after?.[key] === undefined) return;
    const both = before && before.policy_version !== after.policy_version;
    headFigure(
      label,
      both ? `${shown(before[key])} → ${shown(after[key])}` : shown(after[key]),
      `version ${after.policy_version}`,
    );
  };
  if ((after?.pass_at_1 ?? null) !== null) change("held-out pass@1", "pass_at_1", percent);
  else change("held-out score", "score", brief);
  const newest = (label, key, unit) => {
    if (last[key] !== undefined) headFigure(label, brief(last[key]), unit);
  };
  newest("score", "rollout/score/mean", "");
  newest("KL", "kl/per_response", "nats per response");
  newest("entropy", "ppo/entropy", "nats");
  const { left, explained } = block("critic");
  if (block("run").is_critic) {
    const known = explained.realised;
    if (known.length)
      headFigure(
        "held-out explained variance",
        `${brief(known[0])} → ${brief(Math.max(...known))}`,
        `best of ${known.length} evaluations`,
      );
    return;
  }
  newest("critic explains", "value/explained_variance/realised", "of the returns' variance");
  if (left !== null) headFigure("the returns have", percent(left), "of their variance at the start");
  const [rollouts] = block("rollouts").kept.all;
  const [voids] = block("rollouts").kept.void;
  headFigure("rollouts", number(rollouts), voids ? `${number(voids)} void` : "none void");
}

function showNotices(run) {
  const notice = (text, className = "") => element("li", { text, className, parent: byId("notices") });
  const health = block("events").filter(({ kind }) => kind === "health");
  const newest = new Map(health.map((event) => [event.rule, event]));
  for (const event of newest.values()) {
    notice(`${when(event)}: ${event.text}${event.advice && `; ${event.advice}`} (${event.anchor})`, "bad");
  }
  if (newest.size < health.length)
    notice("Some of these rules held earlier too: the list of events has all times.", "bad");
  if (run.state === "stopped" && !run.is_critic)
    notice(
      `The run stopped after ${number(run.steps)} of ${number(run.num_steps)} steps; ` +
        `ratchet train --resume ${run.directory} continues it.`,
    );
  if (run.unreadable.length) notice(`Left out because they cannot be read: ${run.unreadable.join(", ")}`);
  if (!run.tokenizer) notice("The run kept no tokenizer, so tokens are shown as numbers.");
  if (!run.credit && block("rollouts").step.length)
    notice("There are no credit files, so the token view has log-probabilities and versions only.");
}

// The steps at which the rule of a health event held.
const when = ({ step, last }) => (step === last ? `step ${step}` : `steps ${step} to ${last}`);

for (const name of Object.keys(TABS)) {
  byId(`tab-${name}`).hidden = !block("run").tabs.includes(name);
  byId(`tab-${name}`).addEventListener("click", () => openTab(name));
}
document.querySelector('[role="tablist"]').addEventListener("keydown", moveInTabs);
showHead();
openTab(block("run").tabs.includes(location.hash.slice(1)) ? location.hash.slice(1) : block("run").tabs[0]);
