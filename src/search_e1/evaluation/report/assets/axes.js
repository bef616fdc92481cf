// The base of charts: a frame that follows its width, axes, grids, numbers.

const LEFT = 46, RIGHT_EDGE = 18, TOP = 20, BOTTOM = 40;
const SERIES = 4; // colors; further series repeat them, dashed

const seriesClass = (index) => `series-${index % SERIES}${index >= SERIES ? " again" : ""}`;

/** A chart of `height` px: `draw(width)` gives {marks, stops}, see Crosshair. */
function figure(label, height, draw) {
  const image = s("svg", { role: "img", "aria-label": label, height, width: "100%" });
  const box = h("div", { class: "figure", tabindex: 0, role: "group", "aria-label": `${label}: ← and → show values` }, image);
  const crosshair = new Crosshair(box, image);
  let drawn = 0;
  new ResizeObserver(() => {
    const width = Math.floor(box.clientWidth);
    if (!width || width === drawn) return;
    drawn = width;
    image.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const { marks, stops } = draw(width);
    image.replaceChildren(...marks.flat(Infinity).filter(Boolean));
    crosshair.reset(stops, height);
  }).observe(box);
  return box;
}

/** About `count` round values that cover [low, high]. */
function ticks(low, high, count = 4) {
  const span = high - low || Math.abs(high) || 1;
  const raw = span / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((m) => m >= raw);
  const found = [];
  for (let i = Math.floor(low / step + 1e-9); i <= Math.ceil(high / step - 1e-9); i++) found.push(+(i * step).toPrecision(12));
  return found.length > 1 ? found : [found[0], +(found[0] + step).toPrecision(12)];
}

const shortNumber = (value) =>
  Math.abs(value) >= 10000 ? `${+(value / 1000).toPrecision(3)}k`
  : value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(0)
  : String(+value.toPrecision(4)).replace("-", "−");

/** Grid, scale and labels of a vertical axis; `y(value)` is the coordinate. */
function vertical(values, width, height, { zero = false, bottom = BOTTOM } = {}) {
  const known = values.filter((value) => Number.isFinite(value));
  let low = Math.min(...known), high = Math.max(...known);
  if (zero) [low, high] = [Math.min(0, low), Math.max(0, high)];
  const marks = ticks(low, high);
  [low, high] = [marks[0], marks[marks.length - 1]];
  const y = (value) => TOP + (height - TOP - bottom) * (1 - (value - low) / (high - low));
  const grid = marks.map((mark) => [
    s("line", { class: mark === 0 ? "axis" : "grid", x1: LEFT, x2: width - RIGHT_EDGE, y1: y(mark), y2: y(mark) }),
    s("text", { class: "tick", x: LEFT - 8, y: y(mark) + 4, "text-anchor": "end" }, shortNumber(mark)),
  ]);
  return { y, grid };
}

/** Centers of `count` slots across the drawing. */
function slots(count, width) {
  const step = (width - LEFT - RIGHT_EDGE) / count;
  return Array.from({ length: count }, (_, i) => LEFT + step * (i + 0.5));
}

function categories(names, places, height) {
  const room = names.length > 1 ? places[1] - places[0] : 200;
  return names.map((name, i) => s("text", { class: "tick", x: places[i], y: height - 10, "text-anchor": "middle" },
    name.length * 7 > room ? `${name.slice(0, Math.max(2, Math.floor(room / 7) - 1))}…` : name, s("title", null, name)));
}

function legend(names) {
  return h("ul", { class: "legend" }, names.map((name, i) => h("li", null, h("i", { class: seriesClass(i) }), label(name))));
}

/** "(95% a to b)", or an empty string. */
const within = (low, high, show = number) => (Number.isFinite(low) && Number.isFinite(high) ? `(95% ${show(low)} to ${show(high)})` : "");
