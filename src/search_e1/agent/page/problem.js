// Errors in plain words, and what to do about them.

import * as api from "./api.js";
import { h, plural, said } from "./dom.js";

const PROBLEMS = {
  no_key: ["This server asks for a key", "Give the key that it was started with. It stays in this tab and is forgotten when the tab is closed."],
  wrong_key: ["The server rejected this key", "Give the key that it was started with."],
  full: ["The server is busy", "Too many questions are waiting. Try again in a moment."],
  timeout: ["It took too long", "The server gave up on this question. Ask again when it is less busy, or start it with a longer time limit."],
  gone: ["The server does not respond", "Check that search-e1 serve is still running and that this machine reaches it, then try again."],
  cut: ["The connection was lost", "The server stopped before it had answered. Try again; if it happens again, check the server's output."],
  refused: ["The server rejected this question", "Change the question and ask again."],
  failed: ["The server failed", "Try again; if it happens again, check the server's output."],
};

/** A card that explains an error; `again` retries. */
export function problemView(problem, again) {
  const [title, remedy] = PROBLEMS[problem.kind] ?? PROBLEMS.failed;
  const wantsKey = problem.kind.endsWith("_key");
  return h("div", { class: "card problem" },
    h("div", { role: "alert" }, h("h2", null, title), h("p", null, remedy, problem.wait ? ` Wait ${plural(problem.wait, "second")}.` : "")),
    problem.message && h("p", { class: "about" }, "Its message: ", h("bdi", null, said(problem.message))),
    wantsKey ? keyForm(again) : h("p", null, retry(problem.wait, again)));
}

function keyForm(again) {
  const input = h("input", { id: "key", type: "password", autocomplete: "off", required: true, pattern: "[!-~]+", title: "letters, digits and punctuation, without spaces" });
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
