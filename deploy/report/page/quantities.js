// The quantities of a token: what each is, and how tokens are coloured by it.
"use strict";

// Quantities: label, scale and meaning. Scales: "signed" is blue above and orange below its middle, "amount" is one
// hue from the lowest to the highest value, "flag" is coloured or not.
const QUANTITIES = {
  advantages: [
    "advantage",
    "signed",
    "how much better than expected the response went on, before whitening; the policy learns from it",
  ],
  whitened_advantages: [
    "advantage, whitened",
    "signed",
    "with mean 0 and deviation 1 over the batch: what the loss has",
  ],
  rewards: ["reward", "signed", "the KL penalty of each token, and the normalised score on the last one"],
  kl: [
    "KL",
    "signed",
    "from the reference, nats, by the configured estimator; times the coefficient it is the penalty",
  ],
  values: ["value", "amount", "what the critic expects of the rest of the response"],
  td_errors: ["TD error", "signed", "reward + gamma x next value - value: the critic's surprise at this token"],
  returns: [
    "return",
    "amount",
    "what the critic learns: value + TD errors from here on, by gamma and value_lam; if that is 1, the reward-to-go",
  ],
  entropy: ["entropy", "amount", "spread of the policy before this token, nats"],
  ratio: ["ratio", "around one", "probability in the last pass over that before the update; mask: over the sampler's"],
  clipped: ["clipped", "flag", "the clip or the mask removed this token's gradient in the last pass"],
  importance_weight: ["importance weight", "around one", "learner's over sampler's probability, truncated"],
  policy_versions: ["policy version", "amount", "the weights that sampled this token"],
  old_logprobs: ["logprob, learner", "amount", "before the update, nats"],
  rollout_logprobs: ["logprob, sampler", "amount", "as the generator sampled it, nats"],
  ref_logprobs: ["logprob, reference", "amount", "of the frozen starting policy, nats"],
};

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
  const values = view.sides
    .flatMap(({ numbers }) => [...(numbers[view.quantity] ?? [])])
    .filter(Number.isFinite)
    .sort((a, b) => a - b);
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
  byId("legend-bar").style.background =
    `linear-gradient(90deg, var(${from}), ${signed ? "var(--surface)," : ""} var(${to}))`;
}
