// The page's one tooltip, and the crosshair of a chart.

const tip = document.getElementById("tip");

/** Shows `content` above `box`, or below it if there is no room; `box` is in window coordinates. */
function showTip(content, box) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(innerWidth - width - 8, (box.left + box.right - width) / 2));
  const above = box.top - height - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above >= 8 ? above : Math.min(innerHeight - height - 8, box.bottom + 8)}px`;
}

function hideTip() {
  tip.hidden = true;
}

window.addEventListener("scroll", hideTip, { capture: true, passive: true });

/**
 * Crosshair and values of a chart, moved by mouse, touch, or the arrow keys. Its `stops` are
 * [{x, title, rows: [{series, name, text}]}] from left to right; `series` is the class of the row's color.
 */
class Crosshair {
  constructor(box, image, label) {
    Object.assign(this, { box, image, label, stops: [], at: null });
    this.line = s("line", { class: "crosshair" });
    box.addEventListener("pointermove", (event) => this.toward(event.clientX));
    box.addEventListener("pointerdown", (event) => this.toward(event.clientX));
    box.addEventListener("pointerleave", () => this.hide());
    box.addEventListener("focus", () => box.matches(":focus-visible") && this.go(this.at ?? 0));
    box.addEventListener("blur", () => this.hide());
    box.addEventListener("keydown", (event) => this.key(event));
  }

  /** Resets the crosshair after the chart was redrawn, `height` px high. */
  reset(stops, height) {
    this.stops = stops;
    this.at = null;
    for (const [key, value] of Object.entries({ y1: TOP - 8, y2: height - BOTTOM })) this.line.setAttribute(key, value);
  }

  toward(clientX) {
    const x = clientX - this.image.getBoundingClientRect().left;
    const distances = this.stops.map((stop) => Math.abs(stop.x - x));
    if (distances.length) this.show(distances.indexOf(Math.min(...distances)));
  }

  show(at) {
    this.at = at;
    const stop = this.stops[at];
    this.line.setAttribute("x1", stop.x);
    this.line.setAttribute("x2", stop.x);
    this.image.prepend(this.line);
    const place = this.image.getBoundingClientRect();
    showTip([h("b", null, stop.title), h("ul", null, stop.rows.map((row) =>
      h("li", null, row.series && h("i", { class: row.series }), `${row.name} `, h("b", null, row.text), row.note && ` ${row.note}`)))],
    { left: place.left + stop.x, right: place.left + stop.x, top: place.top, bottom: place.bottom });
  }

  /** Moves by key; screen readers speak what is shown. */
  go(at) {
    if (!this.stops.length) return;
    this.show(Math.max(0, Math.min(this.stops.length - 1, at)));
    const stop = this.stops[this.at];
    document.getElementById("spoken").textContent = `${stop.title}: ${stop.rows.map((row) => [row.name, row.text, row.note].filter(Boolean).join(" ")).join("; ")}`;
  }

  key(event) {
    if (!this.stops.length) return;
    const places = { ArrowLeft: (this.at ?? 1) - 1, ArrowRight: (this.at ?? -1) + 1, Home: 0, End: this.stops.length - 1 };
    if (event.key === "Escape") this.hide();
    else if (event.key in places) this.go(places[event.key]);
    else return;
    event.preventDefault();
    event.stopPropagation(); // arrows and Esc mean something else elsewhere
  }

  hide() {
    this.line.remove();
    hideTip();
  }
}
