// Keys and theme.

// Theme: the system's, until one is chosen.

function stored(value) {
  try { // a page opened as a file may have no storage
    if (value === undefined) return localStorage.getItem("search-e1-theme");
    localStorage.setItem("search-e1-theme", value);
  } catch { /* the choice is not kept */ }
  return null;
}

function theme() {
  return document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

function setTheme(value) {
  document.documentElement.dataset.theme = value;
  stored(value);
}

// Keys.

const KEYS = [
  ["1 – 7", "the views, from left to right"], ["j  k", "next and previous in a list (↓ ↑ in the list too)"], ["/", "search"],
  ["Esc", "leave the search, close the details"], ["Enter", "open the details (narrow screens)"],
  ["← →", "pairs: token by token; rounds: along the policies"], ["Tab", "to a chart, then ← and → for its values; to words with a dotted line for their meaning"], ["n", "pairs: next peak of KL"], ["t", "light or dark"], ["?", "this list"],
];

function help() {
  const dialog = document.getElementById("help");
  dialog.replaceChildren(h("h2", { id: "help-title" }, "Keys"), h("dl", null, KEYS.map(([key, what]) => h("div", null, h("dt", null, h("kbd", null, key)), h("dd", null, what)))),
    h("button", { type: "button", onclick: () => dialog.close() }, "Close"));
  if (dialog.open) dialog.close();
  else dialog.showModal();
}

const pair = () => view?.opened?.view;

function sideways(by) {
  if (pair()) pair().step(by);
  else document.querySelector(".columns")?.scrollBy({ left: by * 320 });
}

const ACTIONS = {
  j: () => view?.move?.(1), k: () => view?.move?.(-1),
  ArrowDown: () => view?.move?.(1), ArrowUp: () => view?.move?.(-1),
  ArrowLeft: () => sideways(-1), ArrowRight: () => sideways(1), n: () => pair()?.nextPeak(),
  Enter: () => view?.chosen && view.choose(view.chosen, true),
  Escape: () => (tip.hidden ? view?.close?.() : hideTip()), t: () => setTheme(theme() === "dark" ? "light" : "dark"), "?": help,
  "/": () => view?.search && (view.search.focus(), view.search.select()),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.getElementById("help").open) return;
  const target = event.target;
  if (target.matches("input, select, textarea")) {
    if (event.key === "Escape") target.blur();
    return;
  }
  const scrolls = /^Arrow(Up|Down)$/.test(event.key) && (!view?.move || target.closest(".detail"));
  if (scrolls || (event.key === "Enter" && target.matches("a, button, summary"))) return;
  const chosen = views()[Number(event.key) - 1];
  const action = chosen ? () => { location.hash = link(chosen.name); } : ACTIONS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}
