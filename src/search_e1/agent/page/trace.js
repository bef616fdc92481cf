// Shows how an answer is found, live: thoughts, searches, and the passages that were read.

import { h, line, origin, plural, said } from "./dom.js";

const TAG = /<\/?(?:think|search|answer|tool_call)>/g;
// A search, an answer or a call, of which the last may be incomplete; or a complete call of any other tool.
const ACTION = /<(search|answer|tool_call)>([\s\S]*?)(?:<\/\1>|$)|<(?!think>)([a-z_]+)>([\s\S]*?)<\/\3>/g;
const BEGUN_TAG = /<\/?[a-z_]{0,9}$/;

/** Tool and argument of a call in JSON; its text if it cannot be parsed (yet). */
function parsed(call) {
  try {
    const { name, arguments: given } = JSON.parse(call);
    return { kind: String(name), text: String(Object.values(given)[0]) };
  } catch {
    return { kind: "search", text: call.trim() };
  }
}

/** Parts of the sampled text: [{kind: "thought", "search" or another tool, text}]. The answer is shown elsewhere. */
function partsOf(sampled) {
  const text = sampled.replace(BEGUN_TAG, "");
  const parts = [];
  let at = 0;
  const thought = (piece) => {
    const plain = piece.replace(TAG, "").trim();
    if (plain) parts.push({ kind: "thought", text: plain });
  };
  for (const match of text.matchAll(ACTION)) {
    thought(text.slice(at, match.index));
    const [, kind = match[3], content = match[4]] = match;
    const part = kind === "tool_call" ? parsed(content) : { kind, text: content.trim() };
    if (kind !== "answer" && part.text) parts.push(part);
    at = match.index + match[0].length;
  }
  thought(text.slice(at));
  return parts;
}

function block({ kind, text }) {
  const body = h("div", { class: "body", dir: "auto" }, said(text));
  const element = kind === "thought"
    ? h("details", { class: "block thought", open: true }, h("summary", { class: "label" }, "Thought"), body)
    : h("div", { class: "block search" }, h("span", { class: "label" }, said(kind)), body);
  return { kind, text, element, body };
}

export class Trace {
  /** `open(passage, opener)` shows a passage; `opener` gets the focus back afterwards. */
  constructor(open) {
    this.open = open;
    this.steps = [];
    this.sampled = "";
    this.blocks = [];
    this.state = h("span", null, "Waiting for the model …");
    this.list = h("div", { class: "steps" });
    this.element = h("details", { class: "trace running", open: true }, h("summary", null, this.state), this.list);
    this.element.firstChild.addEventListener("click", () => { this.touched = true; });
  }

  /** Adds sampled text. */
  thought(piece) {
    this.follow(() => this.sample(piece));
  }

  /** Let `change` add to the end; keeps a reader who is at the end there. */
  follow(change) {
    const below = () => this.element.getBoundingClientRect().bottom > window.innerHeight;
    const before = below();
    change();
    if (before || !below() || !this.element.open) return;
    this.followed = true;
    this.element.scrollIntoView({ block: "end" });
  }

  sample(piece) {
    this.sampled += piece;
    const parts = partsOf(this.sampled);
    parts.forEach((part, i) => this.show(i, part));
    for (const { element } of this.blocks.splice(parts.length)) element.remove();
    this.state.textContent = (parts.at(-1)?.kind ?? "thought") === "thought" ? "Thinking …" : "Searching …";
  }

  // Blocks are changed in place, so that folded ones stay folded.
  show(i, part) {
    const shown = this.blocks[i];
    if (shown?.kind !== part.kind) {
      shown?.element.remove();
      this.blocks[i] = block(part);
      const before = this.blocks[i - 1]?.element;
      if (before) before.after(this.blocks[i].element);
      else this.list.append(this.blocks[i].element);
    } else if (shown.text !== part.text) {
      shown.text = part.text;
      shown.body.replaceChildren(...said(part.text));
    }
  }

  /** Adds a search or other tool call that was answered with passages. */
  called(tool, argument, passages) {
    this.follow(() => this.served({ kind: tool, text: argument }, passages ?? []));
  }

  served(part, passages) {
    const shown = [block(part).element, this.passages(passages)];
    if (this.blocks.length && this.blocks.at(-1).kind !== "thought") this.blocks.pop().element.remove(); // the same call, shown while it was sampled
    this.settle();
    this.steps.push({ ...part, passages });
    this.list.append(...shown);
    this.state.textContent = `Reading ${plural(passages.length, "passage")} …`;
  }

  passages(found) {
    const items = found.map((passage) => h("li", null,
      h("button", { type: "button", class: "link", dir: "auto", "aria-haspopup": "dialog", onclick: (event) => this.open(passage, event.currentTarget) },
        said(line(passage.title) || passage.id)),
      origin(passage) && h("bdi", { class: "origin" }, origin(passage))));
    return h("div", { class: "block passages" }, h("span", { class: "label" }, found.length ? "Passages" : "No passages"), h("ol", null, items));
  }

  /** Marks the thoughts so far as complete. */
  settle() {
    for (const { kind, text } of this.blocks) this.steps.push({ kind, text });
    this.sampled = "";
    this.blocks = [];
  }

  /** Ends the trace; `outcome` is shown after the counts. */
  end(outcome, folded) {
    this.settle();
    const served = this.steps.filter((step) => step.passages), searches = served.filter((step) => step.kind === "search");
    const ids = new Set(served.flatMap((step) => step.passages.map((passage) => passage.id)));
    this.state.textContent = [plural(searches.length, "search", "searches"), `${plural(ids.size, "passage")} read`, outcome].filter(Boolean).join(" · ");
    this.element.classList.remove("running");
    if (folded && !this.touched) this.element.open = false;
    this.element.hidden = !this.steps.length;
  }

  /** Shows the stored steps of another trace. */
  replay(steps) {
    for (const step of steps) {
      if (step.passages) {
        this.served(step, step.passages);
        continue;
      }
      this.blocks = [block(step)];
      this.list.append(this.blocks[0].element);
      this.settle();
    }
  }
}
