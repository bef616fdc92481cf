// Views, the run in view, and unpacking of the records.

let data = JSON.parse(document.getElementById("overview").textContent); // {runs, differences, glossary}
let overview = data.runs[0]; // the selected run's
let all = null; // trajectories and pairs of all runs
let records = null; // the selected run's

const VIEWS = [
  { name: "runs", title: "Runs", several: true, draw: () => ({ element: runsView(data) }) },
  { name: "loop", title: "Loop", draw: () => ({ element: loopView(overview) }) },
  { name: "cost", title: "Cost", draw: () => ({ element: costView(overview) }) },
  { name: "trajectories", title: "Trajectories", needsRecords: true, draw: browserView },
  { name: "pairs", title: "Pairs", needsRecords: true, draw: pairsView },
  { name: "questions", title: "Rounds", needsRecords: true, draw: questionsView },
  { name: "config", title: "Config", draw: () => ({ element: configView(overview) }) },
];
const main = document.getElementById("main");
let view = null; // {kind, state, element, move?, close?, update?}

const views = () => VIEWS.filter((one) => !one.several || data.runs.length > 1);

/** The address of a view of the selected run, or of another. */
function link(name, parameters = {}) {
  const state = new URLSearchParams({ ...(overview === data.runs[0] ? {} : { run: overview.run }), ...parameters });
  return `#${name}${[...state].length ? `?${state}` : ""}`;
}

/** The view and its state, from the address. */
function place() {
  const [name, query = ""] = location.hash.slice(1).split("?");
  return { kind: views().find((one) => one.name === name) || views()[0], state: new URLSearchParams(query) };
}

function choose(run) {
  overview = data.runs.find((one) => one.run === run) || data.runs[0];
  const of = (items) => items.filter((item) => data.runs[item.run] === overview);
  records = all && { passages: all.passages, trajectories: of(all.trajectories), pairs: of(all.pairs) };
}

function show() {
  const { kind, state } = place();
  choose(state.get("run"));
  hideTip();
  drawHeader(kind);
  if (kind.needsRecords && !records) {
    view = null;
    main.replaceChildren(h("p", { class: "empty" }, failed || "Reading trajectories …"));
    return;
  }
  // A view is not redrawn by its own changes of the address.
  const changed = () => history.replaceState(null, "", `#${kind.name}${[...state].length ? `?${state}` : ""}`);
  view = kind.draw(state, changed);
  view.kind = kind;
  if (kind.needsRecords) view.element.prepend(hiddenTitle(kind.title));
  main.replaceChildren(view.element);
  if (kind.needsRecords && state.has("at")) {
    view.element.classList.add("open");
    view.move?.(0);
  }
  if (!kind.needsRecords) window.scrollTo(0, 0);
}

function drawHeader(kind) {
  document.body.dataset.view = kind.name;
  document.getElementById("tabs").replaceChildren(...views().map((one) =>
    h("a", { href: link(one.name), "data-view": one.name, "aria-current": one === kind && "page" }, one.title)));
  const name = document.getElementById("run-name");
  if (data.runs.length === 1) name.replaceChildren(h("span", { title: line(overview.run) }, said(overview.run)));
  else {
    name.replaceChildren(h("select", { "aria-label": "Run", onchange: (event) => { location.hash = link(kind.name === "runs" ? "loop" : kind.name, { run: event.target.value }); } },
      data.runs.map((run) => h("option", { value: run.run, selected: run === overview }, line(run.run)))));
  }
  drawState();
}

/** The state of the run; a live page says more, see live.js. */
let stateOf = (run) => (run.finished ? "finished" : "not finished");

function drawState() {
  const chip = document.getElementById("run-state"), text = line(stateOf(overview));
  if (chip.textContent === text) return; // else screen readers would speak it again
  chip.textContent = chip.title = text;
}

let failed = "";

async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** Unpack trajectories and pairs after the first paint. */
async function readRecords() {
  try {
    all = await unpack(document.getElementById("records").textContent);
    choose(place().state.get("run"));
  } catch (error) {
    failed = `Trajectories cannot be read: ${error.message}. They need a browser from 2023 or later, and the complete file.`;
  }
  if (place().kind.needsRecords) show();
  document.body.dataset.ready = failed ? "failed" : "true";
}

function start() {
  const chosen = stored();
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
  document.querySelector(".skip").addEventListener("click", (event) => { // the address belongs to the view
    event.preventDefault();
    main.focus();
  });
  document.getElementById("theme").addEventListener("click", ACTIONS.t);
  document.getElementById("help-button").addEventListener("click", help);
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", show);
  show();
  // The records follow this script in the file; waiting two frames lets the first paint happen before.
  document.addEventListener("DOMContentLoaded", () => requestAnimationFrame(() => setTimeout(readRecords)));
}

start();
