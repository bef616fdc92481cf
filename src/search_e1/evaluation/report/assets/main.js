// Views, keys, theme, and unpacking of the records.

const overview = JSON.parse(document.getElementById("overview").textContent);
let records = null;

const VIEWS = [
  { name: "loop", title: "Loop", draw: () => ({ element: loopView(overview) }) },
  { name: "cost", title: "Cost", draw: () => ({ element: costView(overview) }) },
  { name: "trajectories", title: "Trajectories", needsRecords: true, draw: browserView },
  { name: "pairs", title: "Pairs", needsRecords: true, draw: pairsView },
  { name: "questions", title: "Rounds", needsRecords: true, draw: questionsView },
];
const main = document.getElementById("main");
let view = null; // {name, state, element, move?, close?}

/** The view and its state, from the address. */
function place() {
  const [name, query = ""] = location.hash.slice(1).split("?");
  return { kind: VIEWS.find((one) => one.name === name) || VIEWS[0], state: new URLSearchParams(query) };
}

function show() {
  const { kind, state } = place();
  for (const tab of document.querySelectorAll("#tabs a")) {
    if (tab.dataset.view === kind.name) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  document.body.dataset.view = kind.name;
  if (kind.needsRecords && !records) {
    view = null;
    main.replaceChildren(h("p", { class: "empty" }, failed || "Reading trajectories …"));
    return;
  }
  // The view's own changes of the address do not redraw it.
  const changed = () => history.replaceState(null, "", `#${kind.name}${[...state].length ? `?${state}` : ""}`);
  view = kind.draw(state, changed);
  view.kind = kind;
  main.replaceChildren(view.element);
  if (kind.needsRecords && state.has("at")) {
    view.element.classList.add("open");
    view.move?.(0);
  }
  if (!kind.needsRecords) window.scrollTo(0, 0);
}

let failed = "";

/** Unpack trajectories and pairs after the first paint. */
async function readRecords() {
  try {
    const packed = atob(document.getElementById("records").textContent);
    const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    records = JSON.parse(await new Response(stream).text());
  } catch (error) {
    failed = `Trajectories cannot be read: ${error.message}. A browser of 2023 or newer is needed, and the whole file.`;
  }
  if (place().kind.needsRecords) show();
  document.body.dataset.ready = failed ? "failed" : "true";
}

// Theme: the system's, until one is chosen.

function stored(value) {
  try { // storage may be denied to a file
    if (value === undefined) return localStorage.getItem("search-e1-theme");
    localStorage.setItem("search-e1-theme", value);
  } catch { /* not kept then */ }
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
  ["1 – 5", "the views, from left to right"], ["j  k", "next and previous in a list (↓ ↑ in the list too)"], ["/", "search"],
  ["Esc", "leave the search, close the details"], ["Enter", "open the details (narrow screens)"],
  ["← →", "pairs: token by token; rounds: along the policies"], ["n", "pairs: next peak of KL"], ["t", "light or dark"], ["?", "this list"],
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
  Escape: () => view?.close?.(), t: () => setTheme(theme() === "dark" ? "light" : "dark"), "?": help,
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
  const action = VIEWS[Number(event.key) - 1] ? () => { location.hash = VIEWS[Number(event.key) - 1].name; } : ACTIONS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

function start() {
  const chosen = stored();
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
  document.getElementById("run-name").append(...said(overview.run));
  document.getElementById("run-state").append(overview.finished ? "finished" : "not finished");
  document.getElementById("tabs").append(...VIEWS.map((one) => h("a", { href: `#${one.name}`, "data-view": one.name }, one.title)));
  document.getElementById("theme").addEventListener("click", ACTIONS.t);
  document.getElementById("help-button").addEventListener("click", help);
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", show);
  show();
  // The records follow this script in the file; waiting two frames lets the first paint happen before.
  document.addEventListener("DOMContentLoaded", () => requestAnimationFrame(() => setTimeout(readRecords)));
}

start();
