// The loop at a glance: policies, the gain of each stage, rounds, training curves.

function loopView(overview) {
  const { policies, rounds } = overview;
  const parts = [headline(overview), tiles(overview)];
  if (overview.empty.loop) parts.push(h("p", { class: "notice" }, prose(overview.empty.loop)));
  if (policies.length) parts.push(h("div", { class: "grid" }, emCard(policies), gainCard(overview)), falls(overview), policyCard(policies), partsCard(policies));
  if (rounds.length) parts.push(h("div", { class: "grid" }, healthCard(rounds), leadCard(overview)), klCard(rounds));
  parts.push(Object.keys(CURVES).map((kind) => curvesCard([overview], kind)), versions(overview));
  return h("div", { class: "page" }, parts);
}

function headline(overview) {
  const { policies, begun, finished, rounds, rounds_planned: planned } = overview;
  const first = policies[0], last = policies[policies.length - 1];
  const state = finished || overview.empty.loop ? null : h("p", { class: "notice" }, "This run is not finished: ",
    `round ${rounds.length ? rounds[rounds.length - 1].round : 0} of ${planned ?? "?"}`,
    begun.length ? `; begun and not complete: ${begun.join(", ")}` : "", ". The report shows what there is.");
  const refused = rounds.filter((round) => round.refused).map((round) => h("p", { class: "notice" }, `Round ${round.round} was not distilled: `, line(round.refused)));
  const text = policies.length > 1
    ? [`From ${first.stage} to ${last.stage}, greedy exact match went from `, h("b", null, number(first.em)), " to ", h("b", null, number(last.em)),
       ` (${signed(last.em - first.em)}), with ${number(last.searches, 2)} searches and ${number(last.tokens, 0)} sampled tokens per question (${signed(last.searches - first.searches, 2)}, ${signed(last.tokens - first.tokens, 0)}).`]
    : policies.length ? [`One policy is evaluated so far: ${first.stage}, greedy exact match `, h("b", null, number(first.em)), "."]
    : ["No policy is evaluated yet."];
  return h("div", { class: "headline" }, h("h1", null, text), state, refused);
}

function tiles(overview) {
  const { policies, rounds, costs } = overview;
  const last = policies[policies.length - 1];
  const lead = [...rounds].reverse().find((round) => round.lead)?.lead;
  const seconds = costs.reduce((sum, cost) => sum + cost.seconds, 0);
  return h("div", { class: "tiles" },
    last && tile("Greedy EM", number(last.em), last.em_interval ? `95% ${number(last.em_interval[0])} to ${number(last.em_interval[1])}, n = ${many(last.n)}` : `n = ${many(last.n)}`),
    last && last.em_sampled !== null && tile("Sampled EM", number(last.em_sampled), `F1 ${number(last.f1)} (greedy)`),
    last && tile("Searches", number(last.searches, 2), "per question"),
    last && tile("Sampled tokens", number(last.tokens, 0), "per question"),
    lead && tile("Teacher's lead", signed(lead.em_privileged - lead.em_plain), `in EM, before the last distillation ${within(lead.low, lead.high, signed)}`),
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
  return card("Exact match by policy", "With 95% intervals over questions (Wilson's for greedy EM); sampled is the mean of the samples.",
    legend(series.map((one) => one.name)), pointChart("Exact match by policy", names, series, { height: 320 }));
}

/** Why EM fell after a distillation. */
function falls(overview) {
  return Object.values(overview.falls).map((why) => h("p", { class: "notice" }, prose(why), " ", h("small", null, "(docs/distillation.md, docs/when-it-pays.md)")));
}

function gainCard(overview) {
  const { gains } = overview;
  if (!gains.length) return null;
  const bars = gains.map((gain) => ({
    name: gain.stage, value: gain.gain, low: gain.low, high: gain.high,
    rows: [{ name: "over", text: gain.before }, { name: "questions", text: many(gain.n), note: `${many(gain.won)} won, ${many(gain.lost)} lost` }],
  }));
  const asked = (gain, what, count) => h("a", { href: link("questions", { change: `${what} ${gain.stage}` }), "aria-label": `${many(count)} questions ${what} ${gain.stage}` }, many(count));
  return card("What each stage changed", "Greedy EM against the policy before it, on the same questions; 95% paired interval. If gains shrink from round to round, the loop is decaying.",
    gainChart("Gain in EM by stage", bars),
    table([
      ["stage", (gain) => gain.stage], ["gain", (gain) => signed(gain.gain), "number"],
      ["95% interval", (gain) => `${signed(gain.low)} to ${signed(gain.high)}`, "number"],
      ["won", (gain) => asked(gain, "won by", gain.won), "number"], ["lost", (gain) => asked(gain, "lost by", gain.lost), "number"],
    ], gains, "Gain of each stage"));
}

function versions(overview) {
  const entries = [["model", overview.model], ["seed", overview.seed], ...Object.entries(overview.versions)].filter(([, value]) => value !== null && value !== undefined);
  return h("p", { class: "meta foot" }, entries.map(([name, value]) => h("span", null, `${name} ${line(String(value))}`)));
}
