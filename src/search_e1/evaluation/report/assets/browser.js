// Every greedy trajectory, with search and filters.

const questionOf = (item) => records.questions[item.question];
const said_of = (trajectory) => trajectory.turns.map((turn) => turn.text).join("\n");

function browserView(state, changed) {
  const notice = overview.left_out ? `${many(overview.left_out)} more trajectories are not in this file (--most). ` : "";
  return new Explorer({
    items: records.trajectories,
    what: ["trajectory", "trajectories"],
    state,
    changed,
    facets: {
      stage: { label: "Policy", of: (t) => t.stage, asMade: true },
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
    row: (t) => rowOf(verdict(t.right), questionOf(t).text, [t.stage, questionOf(t).benchmark, hopsName(questionOf(t).hops), plural(t.searches, "search", "searches"), t.right ? "" : t.class]),
    detail: (t) => h("article", null,
      notice && h("p", { class: "notice" }, notice),
      questionHead(questionOf(t)),
      h("p", { class: "meta" }, h("b", null, line(t.stage)), recallName(t) && h("span", null, `answer ${recallName(t)}`)), measures(t),
      siblings(t), trajectoryView(t, questionOf(t))),
  });
}

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
  const others = records.trajectories.filter((other) => other.question === t.question);
  if (others.length < 2) return null;
  return h("p", { class: "chips" }, h("a", { href: `#questions?at=${questionIndex(t.question)}` }, "Side by side:"),
    others.map((other) => h("a", { class: `chip ${other.right ? "right" : "wrong"}${other === t ? " here" : ""}`, href: `#trajectories?at=${records.trajectories.indexOf(other)}` }, `${line(other.stage)} ${other.right ? "✓" : "✗"}`)));
}
