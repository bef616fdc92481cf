// Cards of the loop: policies in figures, pool and lead of each round, training curves.

// Names are those of steps.jsonl and of live tracking.
const CURVES = {
  coldstart: [["loss", "Loss", "cross-entropy of the demonstrations, nats per token"], ["grad_norm", "Gradient norm", ""]],
  grpo: [
    ["reward", "Reward", "mean exact match of the step's trajectories"],
    ["searches", "Searches", "per trajectory"],
    ["sampled_tokens", "Sampled tokens", "per trajectory"],
    ["mixed", "Mixed groups", "share of groups with right and wrong answers; the others teach nothing"],
    ["entropy", "Entropy", "nats per token"],
    ["kl", "KL to the reference policy", "nats per token"],
    ["grad_norm", "Gradient norm", ""],
    ["clip_ratio", "Clipped share", "of tokens"],
  ],
  ofsd: [["loss", "Loss", "KL teacher ‖ student, or the cross-entropy of fine-tuning; nats per token"], ["grad_norm", "Gradient norm", ""]],
};

const TITLES = { coldstart: "Cold start, step by step", grpo: "GRPO, step by step", ofsd: "Self-distillation, step by step" };

function policyCard(policies) {
  const names = policies.map((policy) => policy.stage);
  const small = (title, key, digits) => h("div", null, h("h3", null, title),
    pointChart(`${title} by policy`, names, [{ name: title.toLowerCase(), values: policies.map((policy) => policy[key]), ...ends(policies, `${key}_interval`) }], { height: 170, digits }));
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

/** The ends of an interval, if a policy has one. */
const ends = (policies, key) => ({ low: policies.map((policy) => policy[key]?.[0]), high: policies.map((policy) => policy[key]?.[1]) });

/** Figures that only some evaluations have. */
function extraColumns(policies) {
  const reward = policies.map((policy) => policy.reward_name).find(Boolean);
  const known = [["reward", `reward: ${reward}`], ["cover_em", "cover EM"], ["em_answerable", "EM, answerable"]];
  return known.filter(([key]) => policies.some((policy) => typeof policy[key] === "number"))
    .map(([key, name]) => [name, (policy) => number(policy[key]), "number"]);
}

function partsCard(policies) {
  const grid = (title, key, name, figure = "em") => {
    const parts = [...new Set(policies.flatMap((policy) => Object.keys(policy[key] || {})))];
    if (!parts.length) return null;
    const shade = (policy, part) => {
      const scores = policy[key]?.[part];
      if (!scores) return "–";
      const cell = h("span", { class: "shade", tabindex: 0, "data-meaning": `${part}, ${policy.stage}: ${figure === "em" ? "EM" : figure} ${number(scores[figure])} ${within(...scores[`${figure}_interval`])}, n = ${scores.n}` }, number(scores[figure]));
      cell.style.setProperty("--share", `${Math.round(100 * scores[figure])}%`);
      return cell;
    };
    return h("div", null, h("h3", null, title), table([["policy", (policy) => policy.stage],
      ...parts.map((part) => [`${name(part)} (${many(Math.max(...policies.map((p) => p[key]?.[part]?.n || 0)))})`, (policy) => shade(policy, part), "number"])], policies, title));
  };
  return card("Where the policies are right", "Greedy EM; the number of questions is in brackets. Point at a cell, or go to it with Tab, for its interval.",
    h("div", { class: "duo" }, grid("By benchmark", "by_benchmark", (part) => part || "unnamed"), grid("By hops", "by_hops", (part) => `${part}-hop`), grid("Reward by kind of answer", "by_answer_type", (part) => part, "reward"), failures(policies)));
}

function failures(policies) {
  const classes = [...new Set(policies.flatMap((policy) => Object.keys(policy.failures || {})))];
  const reasons = [...new Set(policies.flatMap((policy) => Object.keys(policy.stop_reasons || {})))];
  const counts = (title, key, names) => names.length ? h("div", null, h("h3", null, title),
    table([["policy", (policy) => policy.stage], ...names.map((name) => [name.replace(/_/g, " "), (policy) => many(policy[key]?.[name] || 0), "number"])], policies, title)) : null;
  return [recall(policies), counts("Failure classes", "failures", classes), reasons.length > 1 && counts("How trajectories ended", "stop_reasons", reasons)];
}

/** Where an answer occurs: in the passages read, in the question's top k, in the corpus. */
function recall(policies) {
  if (!policies.some((policy) => typeof policy.read === "number")) return null;
  const columns = [["read", "in what was read"], ["in_topk", "in the question's top-k"], ["in_corpus", "in the corpus"], ["em_answerable", "EM, answerable"]];
  return h("div", null, h("h3", null, "Retrieval recall", h("small", null, "share of questions with an answer …")),
    table([["policy", (policy) => policy.stage], ...columns.map(([key, name]) => [name, (policy) => number(policy[key]), "number"])], policies, "Retrieval recall"));
}

function healthCard(rounds) {
  const shown = rounds.filter((round) => round.pairs);
  if (!shown.length) return null;
  return card("Pool health", "Of the questions whose trajectories were sampled for pairs.", shown.map(({ round, pairs, usable_interval: usable }) => h("div", { class: "round" },
    h("h3", null, `Round ${round}`),
    shareBar(`Round ${round}`, [
      { name: "usable", count: pairs.usable, kind: "good" },
      { name: "too many searches", count: pairs.too_many_searches ?? 0, kind: "dull" },
      { name: "nothing to learn", count: pairs.nothing_to_learn, kind: "dull" },
      { name: "never right", count: pairs.never_correct, kind: "bad" },
      { name: "no demonstration", count: pairs.no_demonstration ?? 0, kind: "bad" },
    ]),
    h("p", { class: "meta" }, [usable && `usable ${number(pairs.usable / pairs.questions)} ${within(...usable)}`, `EM ${number(pairs.em)}`, plural(pairs.pairs, "pair"), `${many(pairs.wrong_students)} of them with a wrong student`,
      `divergence ${number(pairs.divergence, 2)}`, `searches: reference ${number(pairs.reference_searches, 2)}, student ${number(pairs.student_searches, 2)}`,
      `tokens: reference ${number(pairs.reference_tokens, 0)}, student ${number(pairs.student_tokens, 0)}`].filter(Boolean).map((part) => h("span", null, part))))));
}

function leadCard(overview) {
  const shown = overview.rounds.filter((round) => round.lead);
  if (!shown.length) return null;
  const names = shown.map((round) => `round ${round.round}`);
  const lead = shown.map((round) => round.lead.em_privileged - round.lead.em_plain);
  return card("The teacher's lead", `EM with the reference in the prompt minus EM without, on held-out pairs, before each distillation${overview.gate === null || overview.gate === undefined ? "" : `; below ${overview.gate} a teacher passes only if it saves tokens`}.`,
    pointChart("Teacher's lead by round", names, [{ name: "lead", values: lead, low: shown.map((round) => round.lead.low), high: shown.map((round) => round.lead.high) }], { height: 190, zero: true }),
    table([
      ["round", (round) => String(round.round)], ["lead", (round) => signed(round.lead.em_privileged - round.lead.em_plain), "number"],
      ["95% interval", (round) => `${signed(round.lead.low)} to ${signed(round.lead.high)}`, "number"], ["plain", (round) => number(round.lead.em_plain), "number"],
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
  return card("Where teacher and student disagree", "KL(teacher ‖ student) at the students' sampled tokens before each distillation: nats per token and share of the total divergence, by token class.", table([
    ["token of", (kind) => label(kind)],
    ...shown.flatMap((round) => [
      [`round ${round.round}`, (kind) => number(round.lead.kl[kind]?.mean), "number"],
      ["share", (kind) => (round.lead.kl[kind] ? meter(round.lead.kl[kind].share, `${Math.round(100 * round.lead.kl[kind].share)}%`, "hot") : "–"), "number"],
    ]),
  ], kinds, "KL by token class"),
  h("p", null, h("a", { href: "#pairs" }, "See it token by token")));
}

/** The curves of all stages of one kind; curves of several runs overlap. */
function curvesCard(runs, kind) {
  const of = (run) => run.curves.filter((curve) => curve.stage.split("-")[0] === kind);
  const names = [...new Set(runs.flatMap((run) => of(run).map((curve) => curve.stage)))];
  const drawn = CURVES[kind].map(([key, name, unit]) => {
    const parts = names.map((stage) => ({
      name: stage,
      lines: runs.map((run) => {
        const curve = of(run).find((one) => one.stage === stage);
        return { name: runs.length > 1 ? line(run.run) : name.toLowerCase(), complete: !curve || curve.complete, x: curve?.step || [], values: curve?.figures[key] || [] };
      }),
    })).filter((part) => part.lines.some((one) => one.values.length));
    const chart = parts.length ? curveChart(`${name} by step`, parts) : null;
    return chart && h("div", null, h("h3", null, label(name), h("small", null, unit)), chart);
  }).filter(Boolean);
  if (!drawn.length) return null;
  return card(TITLES[kind], null, runs.length > 1 && legend(runs.map((run) => named(run.run))), h("div", { class: "duo" }, drawn));
}
