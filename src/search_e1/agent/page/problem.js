// Errors in plain words, and what to do about them.

import * as api from "./api.js";
import { h, plural, said } from "./dom.js";

const PROBLEMS = {
  no_key: ["This server asks for a key", "Give the key that it was started with. It stays in this tab and is forgotten when the tab is closed."],
  wrong_key: ["The server refuses this key", "Give the key that it was started with."],
  full: ["The server is busy", "More questions are waiting than it takes. Try again in a moment."],
  timeout: ["It took too long", "The server gave this question up. Ask again when it has less to do, or start it with a longer time limit."],
  gone: ["The server does not answer", "Check that search-e1 serve is still running and that this machine reaches it, then try again."],
  cut: ["The connection broke off", "The server stopped before the answer was there. Try again; if it happens again, look at what the server printed."],
  refused: ["The server does not take this question", "Change the question and ask again."],
  failed: ["The server failed", "Try again; if it happens again, look at what the server printed."],
};

/** A card that explains an error; `again` retries. */
export function problemView(problem, again) {
  const [title, remedy] = PROBLEMS[problem.kind] ?? PROBLEMS.failed;
  const wantsKey = problem.kind.endsWith("_key");
  return h("div", { class: "card problem" },
    h("div", { role: "alert" }, h("h2", null, title), h("p", null, remedy, problem.wait ? ` It asks to wait ${plural(problem.wait, "second")}.` : "")),
    problem.message && h("p", { class: "about" }, "It said: ", h("bdi", null, said(problem.message))),
    wantsKey ? keyForm(again) : h("p", null, retry(problem.wait, again)));
}

function keyForm(again) {
  const input = h("input", { id: "key", type: "password", autocomplete: "off", required: true, pattern: "[!-~]+", title: "letters, digits and signs, without spaces" });
  const submit = (event) => {
    event.preventDefault();
    api.setKey(input.value);
    again();
  };
  return h("form", { class: "key", onsubmit: submit }, h("label", { for: "key" }, "Key"), input, h("button", { type: "submit" }, "Use this key"));
}

/** A button that is enabled when the wait is over. */
function retry(wait, again) {
  const button = h("button", { type: "button", onclick: () => wait <= 0 && again() });
  const show = () => {
    button.textContent = wait > 0 ? `Try again in ${wait} s` : "Try again";
    button.setAttribute("aria-disabled", wait > 0);
  };
  show();
  const timer = setInterval(() => {
    wait -= 1;
    show();
    if (wait <= 0 || !button.isConnected) clearInterval(timer);
  }, 1000);
  return button;
}
