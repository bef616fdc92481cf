// One question under every policy, side by side.

/** Questions that were evaluated: [{question, by: {policy: trajectory}}] */
function questions() {
  const found = new Map();
  for (const t of records.trajectories) {
    if (t.source !== "evaluation") continue;
    if (!found.has(t.question)) found.set(t.question, { question: t.question, by: {} });
    found.get(t.question).by[t.stage] = t;
  }
  return [...found.values()];
}

const policyNames = () => overview.policies.map((policy) => policy.stage);

/** The changes of a question's outcome from policy to policy. */
function changes(item) {
  const present = policyNames().filter((name) => item.by[name]);
  const found = [];
  present.slice(1).forEach((name, i) => {
    const before = item.by[present[i]].right, after = item.by[name].right;
    if (before !== after) found.push(`${after ? "won" : "lost"} by ${name}`);
  });
  if (!found.length) found.push(item.by[present[0]]?.right ? "always right" : "never right");
  return found;
}

function questionsView(state, changed) {
  return new Explorer({
    items: questions,
    id: questionId,
    stamp: (item) => Object.keys(item.by).join(),
    empty: () => overview.empty.questions || "No questions: the evaluations hold none.",
    what: ["question", "questions"],
    state,
    changed,
    facets: {
      change: { label: "Change", of: changes },
      benchmark: { label: "Benchmark", of: (item) => questionOf(item).benchmark },
      hops: { label: "Hops", of: (item) => hopsName(questionOf(item).hops) },
    },
    orders: { "in order": null, "most changes": (a, b) => changes(b).length - changes(a).length },
    haystack: (item) => `${questionOf(item).id}\n${questionOf(item).text}\n${questionOf(item).answers.join("\n")}`,
    row: (item, width) => rowOf(
      h("span", { class: "squares" }, policyNames().map((name) => square(name, item.by[name]))), 19 * policyNames().length,
      questionOf(item).text, [questionOf(item).benchmark, hopsName(questionOf(item).hops), ...changes(item)], width),
    detail: (item) => h("article", { class: "wide" },
      questionHead(questionOf(item)),
      elsewhere(item),
      h("div", { class: "columns" }, policyNames().filter((name) => item.by[name]).map((name, i, names) => column(item, name, names[i - 1])))),
  });
}

/** The same question in the other runs of the page. */
function elsewhere(item) {
  const others = data.runs.filter((run, i) => run !== overview && all.trajectories.some((t) => t.run === i && t.question === item.question && t.source === "evaluation"));
  return others.length > 0 && h("p", { class: "chips" }, "In other runs:", others.map((run) => h("a", { class: "chip", href: link("questions", { run: run.run, at: questionId(item) }) }, line(run.run))));
}

/** A policy's trajectory, compared with the previous policy's. */
function column(item, name, previous) {
  const trajectory = item.by[name], before = item.by[previous];
  const shared = before ? sharedTurns(trajectory, before) : 0;
  const whole = before && shared === trajectory.turns.length && shared === before.turns.length;
  const note = !before ? "" : whole ? `The same as ${previous}.` : shared ? `The first ${plural(shared, "turn")} as in ${previous}, then different.` : `Differs from ${previous} from the first turn on.`;
  return h("section", { class: "column" }, h("h3", null, line(name)), h("dl", { class: "answers" }, given(trajectory)), measures(trajectory), h("p", { class: "about" }, line(note) || "\u00a0"),
    trajectoryView(trajectory, questionOf(item), before, true));
}

function square(name, trajectory) {
  const state = trajectory ? (trajectory.right ? "right" : "wrong") : "none";
  return h("i", { class: state, title: `${line(name)}: ${state}` }, state === "right" ? "✓" : state === "wrong" ? "✗" : "");
}
