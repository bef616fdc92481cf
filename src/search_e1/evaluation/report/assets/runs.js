// Several runs side by side: results, curves, and config differences.

function runsView({ runs, differences }) {
  const stages = [...new Set(runs.flatMap((run) => run.policies.map((policy) => policy.stage)))].sort(byPlace(runs));
  const chart = (title, key, options) => {
    const series = runs.map((run) => {
      const values = stages.map((stage) => run.policies.find((policy) => policy.stage === stage) || {});
      return { name: line(run.run), values: values.map((policy) => policy[key]), ...ends(values, `${key}_interval`) };
    });
    return pointChart(`${title} by run`, stages, series, options);
  };
  const overlaid = (title, key, options) => h("div", null, h("h3", null, title), chart(title, key, options));
  return h("div", { class: "page" }, hiddenTitle("Runs"), resultCard(runs),
    card("Greedy exact match by policy", "With 95% intervals over questions. The runs may have been asked different questions: `search-e1 compare` compares them question by question.",
      legend(runs.map((run) => named(run.run))), chart("Greedy exact match", "em", { height: 320 }) || h("p", { class: "empty" }, "No run has evaluated a policy."),
      h("div", { class: "duo" }, overlaid("Searches", "searches", { digits: 2 }), overlaid("Sampled tokens", "tokens", { digits: 0 }))),
    Object.keys(CURVES).map((kind) => curvesCard(runs, kind)), differenceCard(runs, differences));
}

/** Stages in loop order, which is each run's own order. */
function byPlace(runs) {
  const place = (stage) => Math.max(...runs.map((run) => run.policies.findIndex((policy) => policy.stage === stage)));
  return (a, b) => place(a) - place(b);
}

function resultCard(runs) {
  const last = (run) => run.policies[run.policies.length - 1];
  const total = (run, key) => run.costs.reduce((sum, cost) => sum + (cost[key] || 0), 0);
  const scored = (policy) => (policy ? h("span", { title: within(...policy.em_interval) }, `${number(policy.em)} ${within(...policy.em_interval)}`) : "–");
  return card("Runs", "The last policy of each. A run's name leads to its own figures.", table([
    ["run", (run) => h("a", { href: link("loop", { run: run.run }) }, line(run.run))],
    ["state", (run) => stateOf(run)], ["model", (run) => line(String(run.model ?? "–"))], ["seed", (run) => String(run.seed ?? "–"), "number"],
    ["policy", (run) => last(run)?.stage || "–"], ["n", (run) => many(last(run)?.n), "number"], ["greedy EM", (run) => scored(last(run)), "number"],
    ["at first", (run) => number(run.policies[0]?.em), "number"],
    ["searches", (run) => number(last(run)?.searches, 2), "number"], ["tokens", (run) => number(last(run)?.tokens, 1), "number"],
    ["wall-clock", (run) => duration(total(run, "seconds")), "number"], ["GPU-hours", (run) => number(total(run, "gpu_hours"), 2), "number"],
  ], runs, "Runs"));
}

function differenceCard(runs, differences) {
  if (!differences.length) return card("Config", "The configs of the runs are the same.");
  return card("Where the configs differ", "A dash: not set. All other keys are the same; each run's whole config is under Config.", table([
    ["key", (row) => h("code", null, line(row.key))],
    ...runs.map((run, i) => [named(run.run), (row) => (row.values[i] === null ? "–" : h("code", null, line(row.values[i])))]),
  ], differences, "Where the configs differ"));
}
