// A trajectory: thought, search, passages and answer differ in label, shape and color.

/** The argument of a call in JSON, or its text if it cannot be parsed. */
function argument(call) {
  try {
    return String(Object.values(JSON.parse(call).arguments)[0]);
  } catch {
    return call;
  }
}

/** The parts of a turn's text: [{kind: "thought" | "search" | "tool" | "answer", text}]; tags separate them. */
function actionParts({ text, tool }) {
  const parts = [];
  const called = tool ? `|${tool.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}` : "";
  const action = new RegExp(`<(search|answer|tool_call${called})>([\\s\\S]*?)(?:<\\/\\1>|$)`, "g");
  const tag = new RegExp(`<\\/?(?:think|search|answer|tool_call${called})>`, "g");
  let at = 0;
  const thought = (piece) => {
    const plain = piece.replace(tag, "").trim();
    if (plain) parts.push({ kind: "thought", text: plain });
  };
  for (const match of text.matchAll(action)) {
    thought(text.slice(at, match.index));
    const isCall = match[1] === "tool_call";
    const kind = tool && match[1] !== "answer" ? "tool" : isCall ? "search" : match[1];
    parts.push({ kind, text: (isCall ? argument(match[2]) : match[2]).trim() });
    at = match.index + match[0].length;
  }
  thought(text.slice(at));
  return parts;
}

function block(kind, label, ...children) {
  return h("div", { class: `block ${kind}` }, h("span", { class: "label" }, label), h("div", { class: "body" }, children));
}

/** A passage's stored text "(Title: T) text" as [title, text]; a title may hold brackets itself. */
function splitPassage(text) {
  const begin = "(Title: ".length;
  for (let at = begin, depth = 1; at < text.length; at++) {
    depth += text[at] === "(" ? 1 : text[at] === ")" ? -1 : 0;
    if (!depth) return [text.slice(begin, at), text.slice(at + 1).trim()];
  }
  return ["", text];
}

function passageList(indices, marked, open = true) {
  let gold = false;
  const titles = [];
  const passages = indices.map((index) => {
    const [id, text] = records.passages[index];
    const [title, body] = splitPassage(text);
    titles.push(line(title) || line(id));
    gold ||= Boolean(marked) && text.search(marked) >= 0;
    return h("li", null, h("b", null, said(title, marked)), " ", h("code", { class: "id" }, said(id)), h("div", null, said(body, marked)));
  });
  return h("details", { class: "block passages", open },
    h("summary", null, h("span", { class: "label" }, "Passages"), gold && h("span", { class: "pill", title: "a gold answer is in them" }, "gold"), titles.join(" · ")),
    h("ol", { class: "body" }, passages));
}

/** The observation of a turn. */
function observed(turn, marked, open) {
  if (turn.passages) return passageList(turn.passages, marked, open);
  if (turn.said) return turn.tool ? block("passages", "Result", said(turn.said.trim())) : block("correction", "Corrected", said(turn.said.trim()));
  return null;
}

function turnBlocks(turn, trajectory, marked, open) {
  const parts = actionParts(turn).map((part) => {
    if (part.kind === "thought") return block("thought", label("Thought"), said(part.text));
    if (part.kind === "search") return block("search", turn.kind === "search" && !turn.passages ? "Search, not served" : "Search", said(part.text));
    if (part.kind === "tool") return block("search", line(turn.tool), said(part.text));
    return block(trajectory.right ? "answer right" : "answer wrong", trajectory.right ? "Answer ✓" : "Answer ✗", said(part.text));
  });
  return [parts, turn.kind === "malformed" && block("correction", label("No action"), "neither a search nor an answer"), observed(turn, marked, open)];
}

const STOPS = {
  answered: null,
  max_turns: "Stopped: asked for more searches than it is allowed.",
  max_tokens: "Stopped: no room for another token.",
  malformed: "Stopped: the last generation was neither a search nor an answer.",
  refused: "Stopped: the endpoint refused.",
};

/** A trajectory with gold answers highlighted. Turns shared with `before` are dimmed; passages may be `folded`. */
function trajectoryView(trajectory, question, before, folded) {
  const marked = pattern(question.answers);
  const shared = before ? sharedTurns(trajectory, before) : 0;
  return h("div", { class: "trajectory" },
    trajectory.turns.map((turn, i) => h("div", { class: i < shared ? "turn same" : "turn" }, turnBlocks(turn, trajectory, marked, i >= shared && !folded))),
    STOPS[trajectory.stop] && h("p", { class: "stop" }, STOPS[trajectory.stop]));
}

/** Number of identical leading turns. */
function sharedTurns(trajectory, before) {
  const at = trajectory.turns.findIndex((turn, i) => turn.text !== before.turns[i]?.text);
  return at < 0 ? trajectory.turns.length : at;
}

function verdict(right) {
  return h("span", { class: `verdict ${right ? "right" : "wrong"}`, title: right ? "right" : "wrong" }, right ? "✓" : "✗", h("span", { class: "hidden" }, right ? "right" : "wrong"));
}

const pills = (answers) => answers.map((answer) => h("span", { class: "pill" }, said(answer)));

/** Question, source and gold answers, with the answer of `trajectory` if one is given. */
function questionHead(question, trajectory) {
  return h("header", { class: "question" },
    h("h2", null, said(question.text)),
    h("p", { class: "meta" }, [question.benchmark, hopsName(question.hops), question.id].filter(Boolean).map((part) => h("span", null, line(part)))),
    h("dl", { class: "answers" }, trajectory && given(trajectory),
      h("div", null, h("dt", null, label("Gold", "gold answers"), question.answers.length > 1 && "any of these"), h("dd", null, pills(question.answers)))));
}

/** The answer given, and whether it is right. */
function given(trajectory) {
  const { right, answer } = trajectory;
  return h("div", { class: right ? "given right" : "given wrong" },
    h("dt", null, verdict(right), right ? "Answered, right" : answer === null ? "No answer" : "Answered, wrong"),
    h("dd", null, answer === null ? STOPS[trajectory.stop] || "No answer was given." : said(answer)),
    restsOn(trajectory));
}

/** Which of the passages read hold the answer; nothing for yes/no questions, whose answers are in no passage. */
function restsOn({ answer, turns }) {
  const wanted = answer === null || /^\s*(yes|no)\W*$/i.test(answer) ? null : pattern([answer.trim()]);
  if (!wanted) return null;
  const read = [...new Set(turns.flatMap((turn) => turn.passages || []))];
  const holding = read.map((index) => records.passages[index]).filter(([, text]) => text.search(wanted) >= 0);
  const titles = holding.map(([id, text]) => line(splitPassage(text)[0]) || line(id));
  return h("dd", { class: "meta rests" }, titles.length ? `found in ${[...new Set(titles)].join(" · ")}` : "found in nothing that was read");
}

function measures(trajectory) {
  return h("p", { class: "meta" },
    h("span", null, plural(trajectory.searches, "search", "searches")),
    h("span", null, plural(trajectory.tokens, "sampled token")),
    trajectory.class && trajectory.class !== "right" && h("span", null, label(line(trajectory.class))));
}

const hopsName = (hops) => (hops === null || hops === undefined ? "" : `${hops}-hop`);
