// All trajectories, with search and filters: greedy ones from evaluations, sampled ones from pools and GRPO.

const questionOf = (item) => all.questions[item.question];
const said_of = (trajectory) => trajectory.turns.map((turn) => turn.text).join("\n");

const questionId = (item) => [questionOf(item).benchmark, questionOf(item).id].filter(Boolean).join("/");
const trajectoryId = (t) => [t.stage, questionId(t), t.sample].filter(Boolean).join("/");

/** Greedy trajectories of a policy, or sampled ones. */
const origin = (t) => (t.source === "evaluation" ? t.stage : `${t.source} ${t.round}`);

function browserView(state, changed) {
  return new Explorer({
    items: () => records.trajectories,
    id: trajectoryId,
    what: ["trajectory", "trajectories"],
    state,
    changed,
    empty: () => overview.empty.trajectories || "No trajectories: the evaluations hold none.",
    note: overview.left_out ? `${many(overview.left_out)} more are not on this page (--most); the figures cover all of them.` : "",
    facets: {
      source: { label: "Source", of: (t) => SOURCES[t.source], asMade: true },
      stage: { label: "Policy", of: (t) => (t.source === "evaluation" ? t.stage : ""), asMade: true },
      round: { label: "Round", of: (t) => (t.round ? `round ${t.round}` : "") },
      outcome: { label: "Outcome", of: (t) => (t.right ? "right" : "wrong") },
      class: { label: "Failure", of: (t) => (t.right ? "" : t.class) },
      recall: { label: "Answer", of: recallName },
      benchmark: { label: "Benchmark", of: (t) => questionOf(t).benchmark },
      hops: { label: "Hops", of: (t) => hopsName(questionOf(t).hops) },
      searches: { label: "Searches", of: (t) => plural(t.searches, "search", "searches") },
    },
    orders: {
      "in order": null,
      "most searches": (a, b) => b.searches - a.searches,
      "most tokens": (a, b) => b.tokens - a.tokens,
      "fewest tokens": (a, b) => a.tokens - b.tokens,
      "nearly right": (a, b) => a.right - b.right || b.f1 - a.f1,
    },
    haystack: (t) => `${questionOf(t).id}\n${questionOf(t).text}\n${questionOf(t).answers.join("\n")}\n${said_of(t)}`,
    row: (t, width) => rowOf(verdict(t.right), 20, questionOf(t).text,
      [origin(t), questionOf(t).benchmark, hopsName(questionOf(t).hops), plural(t.searches, "search", "searches"), t.right ? "" : t.class], width),
    detail: (t) => h("article", null,
      questionHead(questionOf(t), t),
      h("p", { class: "meta" }, h("b", null, line(origin(t))), h("span", null, SOURCES[t.source]), recallName(t) && h("span", null, `gold answer ${recallName(t)}`)), measures(t),
      t.source === "evaluation" ? siblings(t) : group(t), trajectoryView(t, questionOf(t))),
  });
}

const SOURCES = { evaluation: "evaluation (greedy)", pool: "pool (sampled)", GRPO: "GRPO (sampled)" };

/** Retrieval recall: where an answer occurs. */
function recallName({ recall }) {
  if (!recall) return "";
  if (recall.read) return "was read";
  if (recall.in_topk) return "in the question's top-k, not read";
  if (recall.in_corpus) return "in the corpus, not retrieved";
  return recall.in_corpus === false ? "not in the corpus" : "not read";
}

/** The same question under the other policies. */
function siblings(t) {
  const others = records.trajectories.filter((other) => other.question === t.question && other.source === "evaluation");
  if (others.length < 2) return null;
  return h("p", { class: "chips" }, h("a", { href: link("questions", { at: questionId(t) }) }, "Side by side:"), chips(others, t, (other) => line(other.stage)));
}

/** The siblings of a sampled trajectory. */
function group(t) {
  const others = records.trajectories.filter((other) => other.question === t.question && other.stage === t.stage && other.source === t.source);
  return h("p", { class: "chips" }, label("Group"), `${others.filter((other) => other.right).length} of ${others.length} right:`, chips(others, t, (other) => other.sample));
}

function chips(others, here, name) {
  return others.map((other) => h("a", { class: `chip ${other.right ? "right" : "wrong"}${other === here ? " here" : ""}`, href: link("trajectories", { at: trajectoryId(other) }) }, `${name(other)} ${other.right ? "✓" : "✗"}`));
}
