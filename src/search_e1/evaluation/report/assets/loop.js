// The loop at a glance: policies, the gain of each stage, rounds, training curves.

// Names are those of steps.jsonl and of live tracking.
const CURVES = {
  grpo: [
    ["reward", "Reward", "mean exact match of the step's trajectories"],
    ["searches", "Searches", "a trajectory"],
    ["sampled_tokens", "Sampled tokens", "a trajectory"],
    ["mixed", "Mixed groups", "share of groups with right and wrong answers; the others teach nothing"],
    ["entropy", "Entropy", "nats a token"],
    ["kl", "KL to the reference policy", "nats a token"],
    ["grad_norm", "Gradient norm", ""],
    ["clip_ratio", "Clipped share", "of tokens"],
  ],
  ofsd: [["loss", "Loss", "KL teacher ‖ student, or the cross-entropy of fine-tuning; nats a token"], ["grad_norm", "Gradient norm", ""]],
};

function loopView(overview) {
  const { policies, rounds } = overview;
  const parts = [headline(overview), tiles(overview)];
  if (policies.length) parts.push(h("div", { class: "grid" }, emCard(policies), gainCard(overview)), policyCard(policies), partsCard(policies));
  if (rounds.length) parts.push(h("div", { class: "grid" }, healthCard(rounds), leadCard(overview)), klCard(rounds));
  parts.push(curvesCard(overview, "grpo", "GRPO, step by step"), curvesCard(overview, "ofsd", "Self-distillation, step by step"), versions(overview));
  return h("div", { class: "page" }, parts);
}

function headline(overview) {
  const { policies, begun, finished, rounds, rounds_planned: planned } = overview;
  const first = policies[0], last = policies[policies.length - 1];
  const state = finished ? null : h("p", { class: "notice" }, "This run is not finished: ",
    `round ${rounds.length ? rounds[rounds.length - 1].round : 0} of ${planned ?? "?"}`,
    begun.length ? `; begun and not complete: ${begun.join(", ")}` : "", ". The report shows what there is.");
  const refused = rounds.filter((round) => round.refused).map((round) => h("p", { class: "notice" }, `Round ${round.round} was not distilled: `, line(round.refused)));
  const text = policies.length > 1
    ? [`From ${first.stage} to ${last.stage}, greedy exact match went from `, h("b", null, number(first.em)), " to ", h("b", null, number(last.em)),
       ` (${signed(last.em - first.em)}), with ${number(last.searches, 2)} searches and ${number(last.tokens, 0)} sampled tokens a question (${signed(last.searches - first.searches, 2)}, ${signed(last.tokens - first.tokens, 0)}).`]
    : policies.length ? [`One policy is evaluated so far: ${first.stage}, greedy exact match `, h("b", null, number(first.em)), "."]
    : ["No policy is evaluated yet."];
  return h("div", { class: "headline" }, h("h1", null, text), state, refused);
}

function tiles(overview) {
  const { policies, rounds, costs } = overview;
  const last = policies[policies.length - 1];
  const lead = [...rounds].reverse().find((round) => round.lead)?.lead;
  const seconds = costs.reduce((sum, cost) => sum + cost.seconds, 0);
  const tile = (name, value, note) => h("div", { class: "tile" }, h("span", null, name), h("b", null, value), h("small", null, note));
  return h("div", { class: "tiles" },
    last && tile("Greedy EM", number(last.em), last.em_interval ? `95% ${number(last.em_interval[0])} to ${number(last.em_interval[1])}, n = ${many(last.n)}` : `n = ${many(last.n)}`),
    last && last.em_sampled !== null && tile("Sampled EM", number(last.em_sampled), `F1 ${number(last.f1)} (greedy)`),
    last && tile("Searches", number(last.searches, 2), "a question"),
    last && tile("Sampled tokens", number(last.tokens, 0), "a question"),
    lead && tile("Teacher's lead", signed(lead.em_privileged - lead.em_plain), "in EM, before the last distillation"),
    tile("Wall-clock", duration(seconds), `all stages; ${gpuHours(costs)}`));
}

function gpuHours(costs) {
  const hours = costs.reduce((sum, cost) => sum + cost.gpu_hours, 0);
  return hours ? `${number(hours, hours < 10 ? 2 : 0)} GPU-hours` : "no GPU";
}

function emCard(policies) {
  const names = policies.map((policy) => policy.stage);
  const series = [{
    name: "greedy", values: policies.map((policy) => policy.em),
    low: policies.map((policy) => policy.em_interval?.[0]), high: policies.map((policy) => policy.em_interval?.[1]),
  }];
  if (policies.some((policy) => policy.em_sampled !== null)) series.push({ name: "sampled", values: policies.map((policy) => policy.em_sampled), hollow: true, low: policies.map((policy) => policy.em_sampled_interval?.[0]), high: policies.map((policy) => policy.em_sampled_interval?.[1]) });
  return card("Exact match by policy", "With 95% bootstrap intervals over questions; sampled is the mean of the samples.",
    legend(series.map((one) => one.name)), pointChart("Exact match by policy", names, series, { height: 320 }));
}

function gainCard(overview) {
  const { gains } = overview;
  if (!gains.length) return null;
  const bars = gains.map((gain) => ({
    name: gain.stage, value: gain.gain, low: gain.low, high: gain.high,
    note: `${signed(gain.gain)} (95% ${signed(gain.low)} to ${signed(gain.high)}) over ${gain.before}`,
  }));
  const link = (gain, what, count) => h("a", { href: `#questions?change=${encodeURIComponent(`${what} ${gain.stage}`)}` }, many(count));
  return card("What each stage changed", "Greedy EM against the policy before it, on the same questions; 95% paired bootstrap interval. Gains that shrink from round to round are a loop that decays.",
    gainChart("Gain in EM by stage", bars),
    table([
      ["stage", (gain) => gain.stage], ["gain", (gain) => signed(gain.gain), "number"],
      ["95% interval", (gain) => `${signed(gain.low)} to ${signed(gain.high)}`, "number"],
      ["won", (gain) => link(gain, "won by", gain.won), "number"], ["lost", (gain) => link(gain, "lost by", gain.lost), "number"],
    ], gains, "Gain of each stage"));
}

function policyCard(policies) {
  const names = policies.map((policy) => policy.stage);
  const small = (title, key, digits) => h("div", null, h("h3", null, title),
    pointChart(`${title} by policy`, names, [{ name: title.toLowerCase(), values: policies.map((policy) => policy[key]) }], { height: 170, digits }));
  const columns = [
    ["policy", (policy) => policy.stage], ["n", (policy) => many(policy.n), "number"],
    ["EM", (policy) => number(policy.em), "number"],
    ["95% interval", (policy) => (policy.em_interval ? policy.em_interval.map((end) => number(end)).join(" to ") : "–"), "number"],
    ["sampled EM", (policy) => number(policy.em_sampled), "number"], ["macro EM", (policy) => number(policy.macro_em), "number"],
    ["F1", (policy) => number(policy.f1), "number"],
    ...extraColumns(policies),
    ["searches", (policy) => number(policy.searches, 2), "number"], ["tokens", (policy) => number(policy.tokens, 1), "number"],
  ];
  return card("Policies", "Searches and sampled tokens are means of the greedy trajectories.",
    h("div", { class: "trio" }, small("Searches", "searches", 2), small("Sampled tokens", "tokens", 0), small("F1", "f1", 3)),
    table(columns, policies, "Every evaluated policy"));
}

/** Figures that some evaluations have and others do not. */
function extraColumns(policies) {
  const known = [["cover_em", "cover EM"], ["em_answerable", "EM, answerable"]];
  return known.filter(([key]) => policies.some((policy) => typeof policy[key] === "number"))
    .map(([key, name]) => [name, (policy) => number(policy[key]), "number"]);
}

function partsCard(policies) {
  const grid = (title, key, name) => {
    const parts = [...new Set(policies.flatMap((policy) => Object.keys(policy[key] || {})))];
    if (!parts.length) return null;
    const shade = (policy, part) => {
      const scores = policy[key]?.[part];
      if (!scores) return "–";
      const cell = h("span", { class: "shade", title: `${part}, ${policy.stage}: EM ${number(scores.em)}, n = ${scores.n}` }, number(scores.em));
      cell.style.setProperty("--share", `${Math.round(100 * scores.em)}%`);
      return cell;
    };
    return h("div", null, h("h3", null, title), table([["policy", (policy) => policy.stage],
      ...parts.map((part) => [`${name(part)} (${many(Math.max(...policies.map((p) => p[key]?.[part]?.n || 0)))})`, (policy) => shade(policy, part), "number"])], policies, title));
  };
  return card("Where the policies are right", "Greedy EM; the number of questions is in brackets.",
    h("div", { class: "duo" }, grid("By benchmark", "by_benchmark", (part) => part || "unnamed"), grid("By hops", "by_hops", (part) => `${part}-hop`), failures(policies)));
}

function failures(policies) {
  const classes = [...new Set(policies.flatMap((policy) => Object.keys(policy.failures || {})))];
  const reasons = [...new Set(policies.flatMap((policy) => Object.keys(policy.stop_reasons || {})))];
  const counts = (title, key, names) => names.length ? h("div", null, h("h3", null, title),
    table([["policy", (policy) => policy.stage], ...names.map((name) => [name.replace(/_/g, " "), (policy) => many(policy[key]?.[name] || 0), "number"])], policies, title)) : null;
  return [recall(policies), counts("Failure classes", "failures", classes), reasons.length > 1 && counts("How trajectories ended", "stop_reasons", reasons)];
}

/** Where an answer occurs: in what was read, in the question's own passages, in the corpus. */
function recall(policies) {
  if (!policies.some((policy) => typeof policy.read === "number")) return null;
  const columns = [["read", "in what was read"], ["in_topk", "in the question's top-k"], ["in_corpus", "in the corpus"], ["em_answerable", "EM, answerable"]];
  return h("div", null, h("h3", null, "Retrieval recall", h("small", null, "share of questions with an answer …")),
    table([["policy", (policy) => policy.stage], ...columns.map(([key, name]) => [name, (policy) => number(policy[key]), "number"])], policies, "Retrieval recall"));
}

function healthCard(rounds) {
  const shown = rounds.filter((round) => round.pairs);
  if (!shown.length) return null;
  return card("Pool health", "Of the questions whose trajectories were sampled for pairs.", shown.map(({ round, pairs }) => h("div", { class: "round" },
    h("h3", null, `Round ${round}`),
    shareBar(`Round ${round}`, [
      { name: "usable", count: pairs.usable, kind: "good" },
      { name: "nothing to learn", count: pairs.nothing_to_learn, kind: "dull" },
      { name: "never right", count: pairs.never_correct, kind: "bad" },
      { name: "no demonstration", count: pairs.no_demonstration ?? 0, kind: "bad" },
    ]),
    h("p", { class: "meta" }, [`EM ${number(pairs.em)}`, plural(pairs.pairs, "pair"), `${many(pairs.wrong_students)} of them with a wrong student`,
      `divergence ${number(pairs.divergence, 2)}`, `searches: reference ${number(pairs.reference_searches, 2)}, student ${number(pairs.student_searches, 2)}`,
      `tokens: reference ${number(pairs.reference_tokens, 0)}, student ${number(pairs.student_tokens, 0)}`].map((part) => h("span", null, part))))));
}

function leadCard(overview) {
  const shown = overview.rounds.filter((round) => round.lead);
  if (!shown.length) return null;
  const names = shown.map((round) => `round ${round.round}`);
  const lead = shown.map((round) => round.lead.em_privileged - round.lead.em_plain);
  return card("The teacher's lead", `EM with the reference in the prompt minus EM without, on held-out pairs, before each distillation${overview.gate === null || overview.gate === undefined ? "" : `; below ${overview.gate} a teacher passes only if it saves tokens`}.`,
    pointChart("Teacher's lead by round", names, [{ name: "lead", values: lead, low: shown.map((round) => round.lead.low), high: shown.map((round) => round.lead.high) }], { height: 190, zero: true }),
    table([
      ["round", (round) => String(round.round)], ["plain", (round) => number(round.lead.em_plain), "number"],
      ["privileged", (round) => number(round.lead.em_privileged), "number"],
      ["tokens", (round) => `${number(round.lead.tokens_plain, 1)} → ${number(round.lead.tokens_privileged, 1)}`, "number"],
      ["off track", (round) => `${number(round.lead.em_plain_off_track)} → ${number(round.lead.em_privileged_off_track)}`, "number"],
      ["pairs", (round) => many(round.lead.pairs), "number"],
    ], shown, "The teacher's lead"));
}

function klCard(rounds) {
  const shown = rounds.filter((round) => round.lead?.kl);
  if (!shown.length) return null;
  const kinds = [...new Set(shown.flatMap((round) => Object.keys(round.lead.kl)))];
  return card("Where teacher and student disagree", "KL(teacher ‖ student) at the students' sampled tokens before each distillation: nats a token, and the share of all divergence, by what the token is part of.", table([
    ["token of", (kind) => kind],
    ...shown.flatMap((round) => [
      [`round ${round.round}`, (kind) => number(round.lead.kl[kind]?.mean), "number"],
      ["share", (kind) => (round.lead.kl[kind] ? meter(round.lead.kl[kind].share, `${Math.round(100 * round.lead.kl[kind].share)}%`, "hot") : "–"), "number"],
    ]),
  ], kinds, "KL by token class"),
  h("p", null, h("a", { href: "#pairs" }, "See it token by token")));
}

function curvesCard(overview, kind, title) {
  const stages = overview.curves.filter((curve) => curve.stage.startsWith(`${kind}-`));
  const drawn = CURVES[kind].map(([key, name, unit]) => {
    const parts = stages.filter((stage) => stage.figures[key]).map((stage) => ({ name: stage.stage, complete: stage.complete, x: stage.step, values: stage.figures[key] }));
    const chart = parts.length ? curveChart(`${name} by step`, parts) : null;
    return chart && h("div", null, h("h3", null, name, h("small", null, unit)), chart);
  }).filter(Boolean);
  return drawn.length ? card(title, null, h("div", { class: "duo" }, drawn)) : null;
}

function versions(overview) {
  const entries = [["model", overview.model], ["seed", overview.seed], ...Object.entries(overview.versions)].filter(([, value]) => value !== null && value !== undefined);
  return h("p", { class: "meta foot" }, entries.map(([name, value]) => h("span", null, `${name} ${line(String(value))}`)));
}
