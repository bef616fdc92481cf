// Words of ours, explained by hover or focus wherever they are labels. The definitions are in glossary.json. Other elements
// with a `data-meaning` tell it in the same way.

/** `text`, with what it means if it, or `word`, is in the glossary. Names that are not ours come as elements, see `named`. */
function label(text, word = text) {
  const meaning = typeof word === "string" && Object.hasOwn(data.glossary, word.toLowerCase()) && data.glossary[word.toLowerCase()];
  return meaning ? h("span", { class: "term", tabindex: 0, "data-meaning": meaning }, text) : text;
}

/** A name that others have given, which is none of our words even if it reads like one. */
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
