// A list with search and filters, beside the details of the selected item. Only visible rows are in the DOM.

const ROW = 84; // px, as in the style sheet
const BEYOND = 8; // extra rows above and below the visible ones

/**
 * `items()` returns the items; `id(item)` identifies one, `row(item)` and `detail(item)` render it. `facets` are
 * {key: {label, of(item), asMade?}}: `of` gives the value or values to filter an item by, `asMade` keeps their order.
 * `haystack(item)` is the searchable text; `orders` are {name: compare}; `empty()` says why there are no items; `note` is shown under the count.
 * `stamp(item)` changes when an item differs from what was shown.
 * The selection is kept in `state`, a URLSearchParams; `changed()` is called when it changes.
 */
class Explorer {
  constructor({ items, id, facets, haystack, row, detail, what, orders, state, changed, empty, note = "", stamp = () => "" }) {
    Object.assign(this, { source: items, id, facets, haystack, row, detail, what, orders, state, changed, empty, stamp });
    this.keys = Object.keys(facets);
    this.list = h("div", { class: "rows", tabindex: 0, role: "listbox", "aria-label": what[1], onscroll: () => this.paint() });
    this.space = h("div", { class: "space", role: "presentation" });
    this.list.append(this.space);
    this.why = h("div", { class: "why" }); // for narrow screens, which have no panel beside the list
    this.panel = h("div", { class: "detail", tabindex: 0, role: "region", "aria-label": `The selected ${what[0]}` });
    this.count = h("p", { class: "count", role: "status" });
    this.search = h("input", { type: "search", placeholder: `Search ${what[1]}  ( / )`, "aria-label": `Search ${what[1]}`, value: state.get("q") || "", oninput: () => this.set("q", this.search.value) });
    this.selects = Object.fromEntries(Object.entries(facets).map(([key, facet]) => [key, h("select", { "aria-label": facet.label, onchange: (event) => this.set(key, event.target.value) })]));
    this.order = h("select", { "aria-label": "Order", onchange: () => this.set("order", this.order.value) },
      Object.keys(orders).map((name) => h("option", { value: name, selected: name === state.get("order") }, name)));
    this.element = h("div", { class: "explorer" },
      h("div", { class: "side" },
        h("div", { class: "filters" }, this.search, Object.values(this.selects), this.order, this.resetButton("Clear")),
        this.count, note && h("p", { class: "count" }, note), this.list, this.why),
      this.panel);
    new ResizeObserver(() => this.paint()).observe(this.list);
    this.load();
    this.apply(false);
  }

  load() {
    this.items = this.source();
    this.byId = new Map(this.items.map((item) => [this.id(item), item]));
    this.words = new Map(); // searchable text, computed on first use
    this.filed = new Map(this.items.map((item) => [item, Object.fromEntries(this.keys.map((key) =>
      [key, [this.facets[key].of(item)].flat().filter((value) => value !== "" && value !== null && value !== undefined).map(String)]))]));
  }

  /** Redraws after the items have changed; selection, search, scroll position and open parts stay. */
  update() {
    const shown = this.chosen && [this.id(this.chosen), this.stamp(this.chosen)].join(), top = this.list.scrollTop;
    this.load();
    this.choosing();
    if (this.chosen && [this.id(this.chosen), this.stamp(this.chosen)].join() === shown) this.paint();
    else this.show(false);
    this.list.scrollTop = top;
  }

  resetButton(text) {
    return h("button", { type: "button", onclick: () => this.reset() }, text);
  }

  set(key, value) {
    if (value) this.state.set(key, value);
    else this.state.delete(key);
    this.apply(true);
  }

  reset() {
    for (const key of ["q", "order", "at", ...this.keys]) this.state.delete(key);
    this.search.value = "";
    this.order.selectedIndex = 0;
    this.apply(true);
  }

  text(item) {
    if (!this.words.has(item)) this.words.set(item, this.haystack(item).toLowerCase());
    return this.words.get(item);
  }

  apply(touched) {
    this.choosing();
    if (touched) this.list.scrollTop = 0;
    this.show(touched);
  }

  /** Shows the matching items, and selects the one that the address names, or the first. */
  choosing() {
    const counts = this.filter();
    const compare = this.orders[this.state.get("order")] || Object.values(this.orders)[0];
    if (compare) this.shown.sort(compare);
    this.count.textContent = this.shown.length === this.items.length ? plural(this.items.length, ...this.what) : `${many(this.shown.length)} of ${plural(this.items.length, ...this.what)}`;
    for (const key of this.keys) this.options(key, counts[key]);
    this.space.style.height = `${this.shown.length * ROW}px`;
    const wanted = this.byId.get(this.state.get("at") ?? (this.chosen && this.id(this.chosen)));
    this.chosen = this.shown.includes(wanted) ? wanted : this.shown[0] ?? null;
  }

  /** Finds the matching items, and counts how many each value of each facet would leave, given the other facets. */
  filter() {
    const query = (this.state.get("q") || "").toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = this.keys.map((key) => [key, this.state.get(key)]).filter(([, value]) => value);
    const counts = Object.fromEntries(this.keys.map((key) => [key, new Map()]));
    this.shown = [];
    for (const item of this.items) {
      const filed = this.filed.get(item);
      for (const key of this.keys) for (const value of filed[key]) if (!counts[key].has(value)) counts[key].set(value, 0);
      if (!query.every((word) => this.text(item).includes(word))) continue;
      const failing = wanted.filter(([key, value]) => !filed[key].includes(value)).map(([key]) => key);
      if (!failing.length) this.shown.push(item);
      const counted = failing.length ? (failing.length === 1 ? failing : []) : this.keys;
      for (const key of counted) for (const value of filed[key]) counts[key].set(value, counts[key].get(value) + 1);
    }
    return counts;
  }

  options(key, counts) {
    const select = this.selects[key], wanted = this.state.get(key) || "";
    const names = [...counts.keys()];
    if (!this.facets[key].asMade) names.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    select.replaceChildren(h("option", { value: "" }, `${this.facets[key].label}: all`),
      ...names.map((name) => h("option", { value: name, selected: name === wanted }, `${line(name)} (${many(counts.get(name))})`)));
    select.classList.toggle("set", Boolean(wanted));
    select.hidden = names.length < 2 && !wanted;
  }

  choose(item, open) {
    this.chosen = item;
    this.state.set("at", this.id(item));
    this.show(true);
    if (open) this.element.classList.add("open");
  }

  /** Selects the next or previous item. */
  move(step) {
    if (!this.shown.length) return;
    const at = this.chosen ? this.shown.indexOf(this.chosen) + step : 0;
    const next = Math.max(0, Math.min(this.shown.length - 1, at));
    this.choose(this.shown[next], false);
    const top = next * ROW;
    if (top < this.list.scrollTop) this.list.scrollTop = top;
    else if (top + ROW > this.list.scrollTop + this.list.clientHeight) this.list.scrollTop = top + ROW - this.list.clientHeight;
  }

  close() {
    this.element.classList.remove("open");
    this.list.focus({ preventScroll: true });
  }

  show(touched) {
    this.paint();
    const item = this.chosen;
    this.opened = item ? this.detail(item) : null;
    this.panel.replaceChildren(...(this.opened
      ? [h("button", { type: "button", class: "back", onclick: () => this.close() }, "← Back to the list"), this.opened]
      : [this.nothing()]));
    this.why.replaceChildren(...(item ? [] : [this.nothing()]));
    this.panel.scrollTop = 0;
    if (!item) this.element.classList.remove("open");
    if (touched) this.changed();
  }

  nothing() {
    if (!this.items.length) return h("p", { class: "empty" }, prose(this.empty()));
    return h("div", { class: "empty" }, h("p", null, `No ${this.what[0]} matches the search and these filters.`), this.resetButton("Clear them"));
  }

  paint() {
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW) - BEYOND);
    const last = Math.min(this.shown.length, Math.ceil((this.list.scrollTop + this.list.clientHeight) / ROW) + BEYOND);
    const rows = [];
    for (let i = first; i < last; i++) {
      const item = this.shown[i];
      const element = h("div", { class: "row", role: "option", id: `row-${i}`, "aria-selected": String(item === this.chosen), "aria-setsize": this.shown.length, "aria-posinset": i + 1, onclick: () => this.choose(item, true) }, this.row(item, this.list.clientWidth));
      element.style.top = `${i * ROW}px`;
      rows.push(element);
    }
    this.space.replaceChildren(...(rows.length ? rows : [h("p", { class: "empty", role: "option", "aria-disabled": "true", "aria-selected": "false" }, this.items.length ? "nothing matches" : "nothing yet")]));
    const at = this.chosen ? this.shown.indexOf(this.chosen) : -1;
    if (at >= first && at < last) this.list.setAttribute("aria-activedescendant", `row-${at}`);
    else this.list.removeAttribute("aria-activedescendant");
  }
}

/** A row of a list `width` px wide: a mark of `marked` px, a two-line title, and more facts. */
function rowOf(mark, marked, title, facts, width) {
  const told = facts.filter(Boolean).map(line), text = line(title);
  return [mark, h("span", { class: "title", title: text }, fitted(text, width - marked - 40, 2)),
    h("span", { class: "facts", title: told.join(" · ") }, told.map((fact) => h("span", null, fact)))];
}

const ruler = document.createElement("canvas").getContext("2d");

/** The number of lines of `width` px that the text takes; words longer than a line are broken. */
function linesOf(text, width) {
  const space = ruler.measureText(" ").width;
  let lines = 1, at = 0;
  for (const word of text.split(" ")) {
    const wide = ruler.measureText(word).width;
    if (at && at + space + wide > width) [lines, at] = [lines + 1, 0];
    at += (at ? space : 0) + wide;
    while (at > width) [lines, at] = [lines + 1, at - width];
  }
  return lines;
}

/** `text`, or its beginning and end if it exceeds `lines` lines of `width` px: telling questions apart takes both. */
function fitted(text, width, lines) {
  ruler.font = getComputedStyle(document.body).font;
  if (width <= 0 || linesOf(text, width) <= lines) return text;
  const letters = [...text];
  const cut = (kept) => `${letters.slice(0, Math.ceil(kept * 0.55)).join("").replace(/\s\S{0,12}$/, "")} … ${letters.slice(letters.length - Math.floor(kept * 0.45)).join("").replace(/^\S{0,12}\s/, "")}`;
  let low = 2, high = letters.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (linesOf(cut(middle), width) <= lines) low = middle;
    else high = middle;
  }
  return cut(low);
}
