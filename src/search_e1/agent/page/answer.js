// The answer, where passages hold it, and the passages that were read.

import { excerpt, h, line, origin, plural, said } from "./dom.js";

const STOPS = {
  max_turns: "It asked for more searches than it is allowed.",
  max_tokens: "It ran out of context.",
  malformed: "Its last output was neither a search nor an answer.",
  refused: "A content filter refused the question.",
};

/** Cards of an answer and its sources; `open(source, opener)` shows one. */
export function answerView(answer, open) {
  const sources = answer.sources ?? [];
  const card = { held, yes_no: yesOrNo, guess: missing, none: missing }[answer.support] ?? missing;
  return [h("div", { class: `card answer ${answer.found ? "found" : "missing"}` }, card(answer, sources, open)), sourceList(answer, sources, open)];
}

const big = (text) => h("p", { class: line(text).length > 90 ? "big long" : "big", dir: "auto" }, said(text));

function held(answer, sources, open) {
  const holding = sources.filter((source) => source.holds);
  const best = holding.find((source) => source.marks?.length) ?? holding[0];
  const more = holding.length - 1;
  return [
    h("h2", { class: "label" }, "Answer"), big(answer.answer),
    best && h("figure", null,
      h("blockquote", { dir: "auto" }, excerpt(best)),
      h("figcaption", null, opener(best, sources.indexOf(best) + 1, open), origin(best) && h("bdi", { class: "origin" }, origin(best)),
        more > 0 && h("span", { class: "origin" }, `and in ${plural(more, "other passage")} below`))),
  ];
}

function opener(source, number, open) {
  return h("button", { type: "button", class: "link", "aria-haspopup": "dialog", onclick: (event) => open(source, event.currentTarget) },
    h("span", { class: "cite" }, `[${number}]`), " ", h("bdi", null, said(line(source.title) || source.id)));
}

function yesOrNo(answer, sources) {
  return [
    h("h2", { class: "label" }, "Answer"), big(answer.answer),
    h("p", { class: "about" }, sources.length
      ? "No passage states a yes or no word for word: check it against what was read, below."
      : "The model answered without reading a passage."),
  ];
}

function missing({ answer, support, stop_reason }, sources) {
  const guess = support === "guess" && answer;
  return [
    h("h2", { class: "label" }, "No answer"), big("Not found in these documents"),
    h("p", { class: "about" }, guess ? unheld(sources.length) : ["The model gave no answer. ", STOPS[stop_reason]]),
    guess && h("p", { class: "guess" }, h("span", { class: "label" }, "The model's guess"), h("bdi", null, said(answer))),
  ];
}

function unheld(read) {
  if (!read) return "The model has a guess, but it read no passage.";
  return read === 1 ? "The model has a guess, but the passage it read does not hold it." : `The model has a guess, but none of the ${read} passages it read holds it.`;
}

/** The passages that were read, in the server's order: those that hold the answer first. */
function sourceList({ support }, sources, open) {
  if (!sources.length) return null;
  return h("section", { class: "sources", "aria-labelledby": "sources-title" },
    h("h2", { id: "sources-title" }, support === "held" ? "Sources" : "Passages read"),
    h("ol", null, sources.map((source, i) => h("li", { class: source.holds ? "card source holds" : "card source" },
      h("span", { class: "number", "aria-hidden": "true" }, i + 1),
      h("div", { class: "about-source" },
        h("button", { type: "button", class: "title", dir: "auto", "aria-haspopup": "dialog", onclick: (event) => open(source, event.currentTarget) },
          said(line(source.title) || source.id)),
        h("p", { class: "origin" }, source.holds && h("span", { class: "pill" }, "holds the answer"), h("bdi", null, origin(source))),
        h("p", { class: "excerpt", dir: "auto" }, excerpt(source)))))));
}
