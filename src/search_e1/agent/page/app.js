// Asking: the form, the question in progress, the session's history, the address, and keys.

import { answerView } from "./answer.js";
import * as api from "./api.js";
import { h, line, said } from "./dom.js";
import { closePassage, isOpen, openPassage } from "./passage.js";
import { problemView } from "./problem.js";
import { Trace } from "./trace.js";

const HISTORY = "search-e1-history";
const MOST = 50; // records in the history
const OUTCOMES = { found: ["✓", "answered"], missing: ["○", "not found"], stopped: ["–", "stopped"], failed: ["✗", "failed"] };
const [intro, box, stopButton, result, status, historyButton, historyList] =
  ["start", "question", "stop", "result", "status", "history-button", "history"].map((id) => document.getElementById(id));

let records = kept(); // {question, outcome, answer?, steps, seconds}, oldest first
let running = null; // the AbortController of the question in progress
let agent = null;

// The question in progress.

async function ask(question) {
  stop();
  const control = running = new AbortController();
  const record = { question, outcome: "stopped", steps: [] };
  const begun = performance.now();
  const trace = new Trace((passage, opener) => open(record, passage, opener));
  const outcome = h("div", { class: "outcome" });
  place(question);
  draw(question, trace.element, outcome);
  busy(true);
  tell("Question sent. The agent is working.");
  let problem = null;
  try {
    agent ??= await api.agentName();
    named();
    for await (const { thought, search, call, answer } of api.ask(question, agent, control.signal)) {
      if (control.signal.aborted) break;
      if (thought) trace.thought(thought);
      if (call) trace.called(call.tool, call.argument, call.passages);
      if (search) {
        trace.called("search", search.query, search.passages);
        tell(`Searched: ${line(search.query)}`);
      }
      if (answer) record.answer = answer;
    }
  } catch (error) {
    agent = null; // the server may be a different one by now
    if (error.name !== "AbortError") problem = error instanceof api.Problem ? error : new api.Problem("failed", String(error));
  }
  record.seconds = (performance.now() - begun) / 1000;
  if (problem) record.outcome = "failed";
  else if (record.answer) record.outcome = record.answer.found ? "found" : "missing";
  end(record, trace, outcome, problem);
  if (running === control) busy(false);
}

function end(record, trace, outcome, problem) {
  trace.end(record.outcome === "stopped" ? "stopped" : `${record.seconds.toFixed(1)} s`, Boolean(record.answer));
  record.steps = trace.steps;
  keep(record);
  outcome.replaceChildren(...outcomeOf(record, problem));
  if (!outcome.isConnected) return; // the reader has moved on to another question
  if (trace.followed && !trace.element.open) window.scrollTo(0, 0);
  if (problem?.kind.endsWith("_key")) document.getElementById("key")?.focus();
  if (!problem) tell(told(record)); // a problem is an alert of its own
}

/** A record in one line. */
function told({ answer, outcome }) {
  if (!answer) return outcome === "stopped" ? "Stopped." : "Failed.";
  if (answer.found) return `Answer: ${line(answer.answer)}`;
  return `Not found in these documents.${answer.answer ? ` The model's guess: ${line(answer.answer)}` : ""}`;
}

function outcomeOf(record, problem) {
  const again = () => ask(record.question);
  if (problem) return [problemView(problem, again)];
  if (!record.answer) {
    const what = record.outcome === "failed" ? "This question failed." : "Stopped before there was an answer.";
    return [h("div", { class: "card stopped" }, h("p", null, what), actions(record, again))];
  }
  const shown = answerView(record.answer, (source, opener) => open(record, source, opener));
  shown[0].append(actions(record, again));
  return shown.filter(Boolean);
}

function actions(record, again) {
  return h("p", { class: "actions" },
    h("button", { type: "button", onclick: (event) => copyLink(record.question, event.currentTarget) }, "Copy link"),
    h("button", { type: "button", onclick: again }, "Ask again"));
}

/** A passage of the trace is shown with the marks it has as a source of the answer. */
function open(record, passage, opener) {
  const source = record.answer?.sources?.find((one) => one.id === passage.id);
  openPassage(source ?? passage, opener);
}

/** Cancel the question in progress. */
function stop() {
  if (!running) return;
  running.abort();
  busy(false);
}

function busy(is) {
  if (!is) running = null;
  if (!is && document.activeElement === stopButton) result.focus({ preventScroll: true });
  stopButton.hidden = !is;
  result.setAttribute("aria-busy", is);
}

// Rendering.

function draw(question, ...parts) {
  if (isOpen()) closePassage();
  document.title = `${line(question)} · search-e1`;
  intro.hidden = true;
  if (box.value.trim() !== question) box.value = question; // keeps the caret in place
  fit();
  const focused = result.contains(document.activeElement);
  result.replaceChildren(h("h1", { class: "asked", dir: "auto" }, said(question)), ...parts);
  if (focused) result.focus({ preventScroll: true });
}

function showRecord(record) {
  stop();
  const trace = new Trace((passage, opener) => open(record, passage, opener));
  trace.replay(record.steps);
  trace.end(record.seconds === undefined ? "" : `${record.seconds.toFixed(1)} s`, true);
  draw(record.question, trace.element, h("div", { class: "outcome" }, outcomeOf(record)));
  tell(told(record));
}

function showStart(...parts) {
  stop();
  if (isOpen()) closePassage();
  document.title = agent ? `${line(agent)} · search-e1` : "search-e1";
  intro.hidden = false;
  result.replaceChildren(...parts);
}

function named() {
  document.getElementById("agent").replaceChildren(line(agent));
}

/** Announces to screen readers; not shown. */
function tell(text) {
  status.textContent = text;
}

// The address: #q=QUESTION asks it.

const addressOf = (question) => `#${new URLSearchParams({ q: question })}`;
const questionInAddress = () => (new URLSearchParams(location.hash.slice(1)).get("q") ?? "").trim();

function place(question) {
  if (questionInAddress() !== question) history.pushState(null, "", addressOf(question));
}

/** Show what the address names: an answer of this session, or else ask the question. */
function follow() {
  const question = questionInAddress();
  if (!question) return showStart();
  const known = records.findLast((record) => record.question === question && record.answer);
  return known ? showRecord(known) : ask(question);
}

async function copyLink(question, button) {
  const address = new URL(addressOf(question), location.href).href;
  try {
    await navigator.clipboard.writeText(address);
    button.textContent = "Copied";
    tell("Link copied.");
    setTimeout(() => { button.textContent = "Copy link"; }, 2000);
  } catch { // not over plain http, or not allowed
    const field = h("input", { class: "address", readonly: true, "aria-label": "Link to copy", value: address });
    button.replaceWith(field);
    field.select();
    field.focus();
  }
}

// The history, as long as the tab is open.

function kept() {
  try {
    return JSON.parse(sessionStorage.getItem(HISTORY)) ?? [];
  } catch {
    return [];
  }
}

function keep(record) {
  const tried = (one) => one.question === record.question && !one.answer; // an earlier attempt without an answer
  records = [...records.filter((one) => !tried(one)), record].slice(-MOST);
  store();
}

function store() {
  for (let from = 0; from <= records.length; from++) {
    try { // storage holds some megabytes: if full, the oldest records are dropped
      sessionStorage.setItem(HISTORY, JSON.stringify(records.slice(from)));
      break;
    } catch { /* storage may also be denied */ }
  }
  drawHistory();
}

function drawHistory() {
  historyButton.hidden = !records.length;
  historyButton.textContent = `History (${records.length})`;
  const items = records.map((record) => {
    const [sign, what] = OUTCOMES[record.outcome] ?? OUTCOMES.failed;
    const choose = () => {
      historyList.hidePopover();
      place(record.question);
      showRecord(record);
    };
    return h("li", null, h("button", { type: "button", onclick: choose },
      h("span", { class: `sign ${record.outcome}`, "aria-hidden": "true" }, sign), h("bdi", null, said(line(record.question))), h("span", { class: "hidden" }, `, ${what}`)));
  });
  const clear = () => {
    historyList.hidePopover();
    records = [];
    store();
    box.focus();
  };
  historyList.replaceChildren(h("ol", { reversed: true }, items.reverse()), h("button", { type: "button", class: "link", onclick: clear }, "Clear"));
}

// The form and keys.

/** Makes the box as high as its text. */
function fit() {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

function submit(event) {
  event.preventDefault();
  const question = box.value.trim();
  if (question) ask(question);
}

function onKey(event) {
  if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === box && event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    document.getElementById("ask").requestSubmit();
  } else if (event.key === "Escape" && !document.querySelector(":popover-open, dialog:modal")) {
    if (isOpen()) closePassage();
    else stop();
  } else if (event.key === "/" && !event.target.closest("input, textarea")) {
    event.preventDefault();
    box.focus();
    box.select();
  }
}

/** Shows the agent's name, or why the server does not report it. */
async function greet() {
  showStart();
  try {
    agent = await api.agentName();
    named();
  } catch (error) {
    if (!(error instanceof api.Problem)) throw error;
    if (!running && !questionInAddress()) showStart(problemView(error, greet));
  }
}

function start() {
  document.getElementById("ask").addEventListener("submit", submit);
  document.querySelector(".skip").addEventListener("click", (event) => { // the address belongs to the question
    event.preventDefault();
    box.focus();
  });
  stopButton.addEventListener("click", stop);
  box.addEventListener("input", fit);
  document.addEventListener("keydown", onKey);
  window.addEventListener("popstate", follow);
  drawHistory();
  if (questionInAddress()) follow();
  else greet();
}

start();
