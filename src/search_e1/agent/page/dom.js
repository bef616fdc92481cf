// Elements. Text of questions, models and passages becomes text nodes here, never markup.

/** An element. Properties that begin with "on" are listeners; a property or child that is null or false is left out. */
export function h(name, properties, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// Characters that can hide or reverse text: control characters, embeddings, overrides, isolates, tag characters, zero-width
// spaces. Joiners and direction marks stay, since Persian, Indic scripts and emoji need them.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]/gu;

/** External text as nodes: hidden characters are shown as codes. */
export function said(text) {
  const nodes = [], whole = String(text ?? "").replace(/\r\n?/g, "\n");
  let at = 0;
  for (const match of whole.matchAll(HIDDEN)) {
    const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    nodes.push(whole.slice(at, match.index), h("span", { class: "control", title: `control character U+${code}` }, `U+${code}`));
    at = match.index + match[0].length;
  }
  nodes.push(whole.slice(at));
  return nodes.filter((node) => node !== "");
}

/** External text on one line, for titles and announcements. */
export const line = (text) => String(text ?? "").replace(/\s+/g, " ").replace(HIDDEN, "\ufffd").trim();

/** Nodes of `text` with `marks` highlighted. Marks are [start, end) in code points, as Python counts. */
export function marked(text, marks, from = 0, to = Infinity) {
  const points = Array.from(String(text ?? ""));
  const nodes = [], piece = (begin, end) => said(points.slice(begin, end).join(""));
  let at = Math.max(0, from);
  const last = Math.min(points.length, to);
  for (const [begin, end] of validMarks(marks)) {
    if (begin < at || end > last) continue;
    nodes.push(...piece(at, begin), h("mark", null, piece(begin, end)));
    at = end;
  }
  nodes.push(...piece(at, last));
  return nodes;
}

const validMarks = (marks) => (Array.isArray(marks) ? marks : []).filter((mark) => Array.isArray(mark) && mark[0] < mark[1]);

/** About 40 words around the first mark of a passage, or from its beginning, as nodes. */
export function excerpt({ text, marks }, around = 140) {
  const points = Array.from(String(text ?? ""));
  const [begin, end] = validMarks(marks)[0] || [0, around / 2];
  let from = Math.max(0, begin - around), to = Math.min(points.length, end + around);
  const space = (at) => /\s/.test(points[at]);
  // Words stay whole, in scripts that have spaces.
  for (let at = from; from && at < Math.min(begin, from + 20); at++) if (space(at)) { from = at + 1; break; }
  for (let at = to - 1; to < points.length && at > Math.max(end, to - 20); at--) if (space(at)) { to = at; break; }
  return [from > 0 && "… ", marked(text, marks, from, to), to < points.length && " …"];
}

/** The origin of a passage in words: file, page, and the heading if the title, which stands above, does not hold it. */
export const origin = ({ title, file, page, heading }) =>
  [file, page && `page ${page}`, String(title ?? "").includes(heading) ? "" : heading].map(line).filter(Boolean).join(" · ");

/** The address of a passage as a link; plain text unless it is http or https. */
export function link(address) {
  const text = said(address);
  const url = URL.canParse(address) ? new URL(address) : null;
  if (!url || !["http:", "https:"].includes(url.protocol)) return text;
  return h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer", dir: "ltr" }, text);
}

export const plural = (count, one, more = `${one}s`) => `${count} ${count === 1 ? one : more}`;
