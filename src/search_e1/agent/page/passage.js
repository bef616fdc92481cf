// A full passage in a panel beside the answer; on a narrow screen, in a sheet over it.

import * as api from "./api.js";
import { h, line, link, marked, plural, said } from "./dom.js";

const panel = document.getElementById("passage");
const narrow = matchMedia("(max-width: 999px)");
const NAMED = ["corpus", "file", "page", "heading", "url", "query"];
const OWN = ["id", "title", "text", "marks", "holds"];
let returnTo = null;
let moving = false; // from panel to sheet or back

/** Show `source`, fetching its text if necessary; `opener` gets the focus back when the panel closes. */
export async function openPassage(source, opener) {
  if (source.text === undefined) source = { ...source, url: null }; // it may be the text's URL on this server
  opened(opener);
  draw(source, source.text === undefined ? "Reading …" : null);
  if (!panel.open) show();
  panel.querySelector("h2").focus({ preventScroll: true });
  if (source.text !== undefined) return;
  const shown = panel.firstChild;
  const replace = (whole, notice) => {
    if (panel.firstChild !== shown) return; // another passage was opened meanwhile
    draw(whole, notice);
    panel.querySelector("h2").focus({ preventScroll: true });
  };
  try {
    replace({ ...source, ...(await api.passage(source.id)) }, null);
  } catch (error) {
    replace(source, error.kind === "gone" ? "The server does not respond." : "The server has no text of this passage.");
  }
}

/** Marks the button whose passage is shown. */
function opened(opener) {
  returnTo?.removeAttribute("aria-expanded");
  returnTo = opener;
  returnTo?.setAttribute("aria-expanded", true);
}

const show = () => (narrow.matches ? panel.showModal() : panel.show());

export const isOpen = () => panel.open;
export const closePassage = () => panel.close();

panel.addEventListener("close", () => {
  if (moving) {
    moving = false;
    return;
  }
  if (returnTo?.isConnected && (!document.activeElement || document.activeElement === document.body || panel.contains(document.activeElement))) returnTo.focus();
  opened(null);
});
panel.addEventListener("click", (event) => { if (event.target === panel && panel.matches(":modal")) panel.close(); }); // a click beside the sheet
narrow.addEventListener("change", () => {
  if (!panel.open) return;
  moving = true;
  panel.close();
  show();
});

function draw(source, notice) {
  const marks = source.holds === false ? [] : source.marks ?? [];
  const more = Object.keys(source).filter((name) => !NAMED.includes(name) && !OWN.includes(name)).sort();
  const facts = [...NAMED, ...more, "id"].filter((name) => source[name] !== undefined && source[name] !== null && source[name] !== "");
  panel.replaceChildren(h("article", null,
    h("div", { class: "panel-top" }, h("span", { class: "label" }, "Passage"), h("button", { type: "button", title: "Escape", onclick: closePassage }, "Close")),
    h("h2", { id: "passage-title", tabindex: -1, dir: "auto" }, said(line(source.title) || source.id)),
    h("dl", { class: "facts" }, facts.map((name) => h("div", null, h("dt", null, title(name)), h("dd", { dir: "auto" }, fact(name, source[name]))))),
    source.holds && h("p", { class: "about" }, marks.length ? `It holds the answer in ${plural(marks.length, "place")}.` : "Its title holds the answer."),
    notice ? h("p", { class: "about" }, notice) : h("div", { class: "text", dir: "auto", tabindex: 0, role: "region", "aria-label": "Text of the passage" }, marked(source.text, marks))));
  panel.scrollTop = 0;
  panel.querySelector("mark")?.scrollIntoView({ block: "nearest" });
}

const title = (name) => ({ url: "Link", query: "Found by", id: "Id" })[name] ?? said(name.charAt(0).toUpperCase() + name.slice(1));
const fact = (name, value) => (name === "url" ? link(String(value)) : said(typeof value === "object" ? JSON.stringify(value) : value));
