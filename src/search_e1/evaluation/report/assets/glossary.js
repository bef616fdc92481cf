// Glossary terms, explained on hover or focus wherever they are labels. The definitions are in glossary.json. Other elements
// with a `data-meaning` show it in the same way.

/** `text`, with its meaning if it, or `word`, is in the glossary. External names come as elements, see `named`. */
function label(text, word = text) {
  const meaning = typeof word === "string" && Object.hasOwn(data.glossary, word.toLowerCase()) && data.glossary[word.toLowerCase()];
  return meaning ? h("span", { class: "term", tabindex: 0, "data-meaning": meaning }, text) : text;
}

/** An external name, which is not a glossary term even if it reads like one. */
const named = (text) => h("span", null, line(text));

function explain(event) {
  const term = event.target.closest?.("[data-meaning]");
  if (!term) return;
  term.setAttribute("aria-describedby", "tip");
  showTip([term.dataset.meaning], term.getBoundingClientRect());
}

function leaveTerm(event) {
  const term = event.target.closest?.("[data-meaning]");
  if (!term) return;
  term.removeAttribute("aria-describedby");
  hideTip();
}

document.addEventListener("mouseover", explain);
document.addEventListener("focusin", explain);
document.addEventListener("mouseout", leaveTerm);
document.addEventListener("focusout", leaveTerm);
