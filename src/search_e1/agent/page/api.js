// Requests to the server of this page. Addresses are relative, so that a proxy may serve it under a path.

const KEY = "search-e1-key";
let key = "";
try { // storage may be denied
  key = sessionStorage.getItem(KEY) || "";
} catch { /* the key is asked for again after a reload */ }

/** Use `value` as the bearer key of this session; empty forgets it. */
export function setKey(value) {
  key = value.trim();
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch { /* kept until the page is left */ }
}

/** An error: `kind` is a key of PROBLEMS in problem.js, `wait` the seconds to wait, `message` the server's text. */
export class Problem extends Error {
  constructor(kind, message = "", wait = 0) {
    super(message);
    this.kind = kind;
    this.wait = wait;
  }
}

async function reach(path, options = {}) {
  const headers = { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem("gone");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const { status } = response;
  const told = await response.json().catch(() => ({}));
  const message = messageOf(told) || `status ${status}`;
  if (status === 401) return new Problem(key ? "wrong_key" : "no_key");
  if (status === 429 || status === 503) return new Problem("full", message, Number(response.headers.get("retry-after")) || 5);
  if (status === 408 || status === 504) return new Problem("timeout", message);
  return new Problem(status < 500 ? "refused" : "failed", message);
}

function messageOf(told) {
  const found = told?.error?.message ?? told?.error ?? told?.detail;
  return typeof found === "string" ? found : "";
}

/** Name of the agent, as the server lists it. */
export async function agentName() {
  const { data } = await (await reach("v1/models")).json();
  return String(data?.[0]?.id ?? "agent");
}

/** The complete passage with this id. */
export async function passage(id) {
  return (await reach(`passages/${encodeURIComponent(id)}`)).json();
}

/** Ask; yields {thought: text}, {search: {query, passages}}, {call: {tool, argument, passages}} as they arrive, then {answer}. */
export async function* ask(question, model, signal) {
  const body = JSON.stringify({ model, stream: true, messages: [{ role: "user", content: question }] });
  const response = await reach("v1/chat/completions", { method: "POST", body, signal });
  let answered = false;
  for await (const event of events(response.body)) {
    if (event.error) throw broken(event.error);
    const delta = event.choices?.[0]?.delta ?? {};
    if (delta.reasoning_content) yield { thought: delta.reasoning_content };
    const told = delta.search_e1 ?? {};
    if (told.search) yield { search: told.search };
    if (told.call) yield { call: told.call };
    if (told.answer) {
      answered = true;
      yield { answer: told.answer };
    }
  }
  if (!answered) throw new Problem("cut");
}

/** An error that arrived after the stream had begun. */
function broken(error) {
  return new Problem(error.code === "timeout" ? "timeout" : "failed", messageOf({ error }));
}

/** The JSON of each server-sent event. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const data = line.startsWith("data:") ? line.slice(5).trim() : "";
        if (data && data !== "[DONE]") yield JSON.parse(data);
      }
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem("cut");
  } finally {
    reader.cancel().catch(() => {}); // it is broken already
  }
}
