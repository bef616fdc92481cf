"use strict";
// Elements. Text of models, passages and questions becomes text nodes here, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. Properties that begin with "on" are listeners; a property or child that is null or false is left out. */
function h(name, properties, ...children) {
  return fill(document.createElement(name), properties, children);
}

/** An SVG element. */
function s(name, properties, ...children) {
  return fill(document.createElementNS(SVG, name), properties, children);
}

function fill(element, properties, children) {
  for (const [key, value] of Object.entries(properties || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : seen(value));
  }
  const given = children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
  element.append(...given.map(seen));
  return element;
}

// Control characters, direction overrides, zero-width characters, and non-characters.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;

/** An external name (of a benchmark, a model, a figure) without invisible characters; other values unchanged. */
const seen = (value) => (typeof value === "string" ? value.replace(HIDDEN, "\ufffd") : value);

/** External text as nodes: invisible characters are shown as codes, matches of `marked` are highlighted. */
function said(text, marked) {
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(HIDDEN)) {
    nodes.push(...highlighted(text.slice(at, match.index), marked));
    const code = match[0].charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
    nodes.push(h("span", { class: "control", title: `control character U+${code}` }, `U+${code}`));
    at = match.index + match[0].length;
  }
  nodes.push(...highlighted(text.slice(at), marked));
  return nodes;
}

/** External text on one line, for a list or a title. */
function line(text) {
  return text.replace(/\s+/g, " ").replace(HIDDEN, "\ufffd");
}

/** A sentence of the report itself, on one line; text between backticks is code. */
function prose(text) {
  return line(text).split("`").map((part, i) => (i % 2 ? h("code", null, part) : part));
}

function highlighted(text, marked) {
  if (!marked || !text) return text ? [text] : [];
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(marked)) {
    nodes.push(text.slice(at, match.index), h("mark", null, match[0]));
    at = match.index + match[0].length;
  }
  nodes.push(text.slice(at));
  return nodes.filter((node) => node !== "");
}

/** A pattern that matches any of `words` as a whole, ignoring case; null without words. */
function pattern(words) {
  const usable = words.filter((word) => word.trim().length > 1).map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  return usable.length ? new RegExp(`(?<![\\p{L}\\p{N}])(?:${usable.join("|")})(?![\\p{L}\\p{N}])`, "giu") : null;
}

const number = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const signed = (value, digits = 3) => (value === null || value === undefined ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits));
const many = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en-US"));
const plural = (count, one, more = `${one}s`) => `${many(count)} ${count === 1 ? one : more}`;

function duration(seconds) {
  if (seconds < 100) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 5400) return `${(seconds / 60).toFixed(seconds < 600 ? 1 : 0)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

/** A table: `columns` are [heading, cell(row), "number"?]. */
function table(columns, rows, caption) {
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    h("table", null,
      h("caption", { class: "hidden" }, caption),
      h("thead", null, h("tr", null, columns.map(([heading, , kind]) => h("th", { scope: "col", class: kind }, label(heading))))),
      h("tbody", null, rows.map((row) => h("tr", null, columns.map(([, cell, kind], i) =>
        i ? h("td", { class: kind }, cell(row)) : h("th", { scope: "row" }, cell(row))))))));
}

function card(title, about, ...children) {
  return h("section", { class: "card" }, h("h2", null, title), about && h("p", { class: "about" }, prose(about)), children);
}

/** The only h1 of a view whose title is its tab. */
const hiddenTitle = (text) => h("h1", { class: "hidden" }, text);

const tile = (name, value, note) => h("div", { class: "tile" }, h("span", null, label(name)), h("b", null, value), h("small", null, note));

/** Text to copy unchanged, although the page shows invisible characters as codes. */
function copyable(name, text) {
  const button = h("button", { type: "button", "aria-label": `Copy ${name}`, onclick: async () => {
    button.textContent = (await copied(text)) ? "Copied" : "Not copied: select it";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  } }, "Copy");
  return h("div", { class: "copyable" }, button, h("pre", { tabindex: 0, role: "region", "aria-label": name }, said(text)));
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // denied, or not a secure context
    const area = h("textarea", { "aria-hidden": "true", class: "hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
