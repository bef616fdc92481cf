// Charts: functions from values to SVG, redrawn when their width changes.

const LEFT = 46, RIGHT_EDGE = 18, TOP = 20, BOTTOM = 40;

/** An SVG of height `height` whose content is `draw(width)`. */
function figure(label, height, draw) {
  const image = s("svg", { role: "img", "aria-label": label, height, width: "100%" });
  const box = h("div", { class: "figure" }, image);
  let drawn = 0;
  new ResizeObserver(() => {
    const width = Math.floor(box.clientWidth);
    if (!width || width === drawn) return;
    drawn = width;
    image.setAttribute("viewBox", `0 0 ${width} ${height}`);
    image.replaceChildren(...draw(width).flat(Infinity).filter(Boolean));
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

/** Centres of `count` slots across the drawing. */
function slots(count, width) {
  const step = (width - LEFT - RIGHT_EDGE) / count;
  return Array.from({ length: count }, (_, i) => LEFT + step * (i + 0.5));
}

function categories(names, places, height) {
  const room = names.length > 1 ? places[1] - places[0] : 200;
  return names.map((name, i) => s("text", { class: "tick", x: places[i], y: height - 10, "text-anchor": "middle" },
    name.length * 7 > room ? `${name.slice(0, Math.max(2, Math.floor(room / 7) - 1))}…` : name, s("title", null, name)));
}

/**
 * Values by category: points joined by a line, with whiskers for intervals.
 * `series`: [{name, values, low?, high?, hollow?}]; the values of the first are written beside its points.
 */
function pointChart(label, names, series, { height = 220, digits = 3, zero = false } = {}) {
  const all = series.flatMap((one) => [...one.values, ...(one.low || []), ...(one.high || [])]);
  if (!all.some(Number.isFinite)) return null;
  return figure(label, height, (width) => {
    const { y, grid } = vertical(all, width, height, { zero });
    const x = slots(names.length, width);
    return [grid, categories(names, x, height), series.map((one, index) => pointSeries(one, index, names, x, y, digits))];
  });
}

function pointSeries(one, index, names, x, y, digits) {
  const known = one.values.map((value, i) => [i, value]).filter(([, value]) => Number.isFinite(value));
  const color = `series-${index}`;
  const whisker = (i) => one.low && Number.isFinite(one.low[i]) &&
    s("line", { class: `whisker ${color}`, x1: x[i], x2: x[i], y1: y(one.low[i]), y2: y(one.high[i]) });
  return s("g", null,
    s("polyline", { class: `line ${color}`, points: known.map(([i, value]) => `${x[i]},${y(value)}`).join(" ") }),
    known.map(([i, value]) => [
      whisker(i),
      s("circle", { class: `point ${color}${one.hollow ? " hollow" : ""}`, cx: x[i], cy: y(value), r: 4.5 },
        s("title", null, `${names[i]}: ${one.name} ${number(value, digits)}`)),
      index === 0 && valueLabel(one.values, i, x[i], y(value), number(value, digits)),
    ]));
}

/** A point's value, beside the line. */
function valueLabel(values, i, x, y, text) {
  const rises = values[i + 1] > values[i], rose = values[i] > values[i - 1];
  if (rises && rose) return s("text", { class: "value", x: x - 8, y: y - 7, "text-anchor": "end" }, text);
  if (rises) return s("text", { class: "value", x: x + 9, y: y + 16 }, text);
  return s("text", { class: "value", x: x + 9, y: y - 7 }, text);
}

/** Signed bars with whiskers: bars = [{name, value, low, high, note}]. */
function gainChart(label, bars, { height = 220 } = {}) {
  return figure(label, height, (width) => {
    const { y, grid } = vertical(bars.flatMap((bar) => [bar.value, bar.low, bar.high]), width, height, { zero: true });
    const x = slots(bars.length, width);
    const thick = Math.min(56, (width - LEFT) / bars.length / 2);
    return [grid, categories(bars.map((bar) => bar.name), x, height), bars.map((bar, i) => s("g", null,
      s("title", null, `${bar.name}: ${bar.note}`),
      s("rect", { class: `bar ${bar.value < 0 ? "loss" : "gain"}`, x: x[i] - thick / 2, width: thick, rx: 2,
        y: y(Math.max(0, bar.value)), height: Math.max(1, Math.abs(y(0) - y(bar.value))) }),
      s("line", { class: "whisker ink", x1: x[i], x2: x[i], y1: y(bar.low), y2: y(bar.high) }),
      s("text", { class: "value", x: x[i], "text-anchor": "middle", y: bar.value < 0 ? y(bar.low) + 16 : y(bar.high) - 6 }, signed(bar.value))))];
  });
}

/** Curves side by side, one panel for each part (a round's stage): parts = [{name, x, values}]. */
function curveChart(label, parts, { height = 170 } = {}) {
  const values = parts.flatMap((part) => part.values);
  if (!values.some(Number.isFinite)) return null;
  return figure(label, height, (width) => {
    const { y, grid } = vertical(values, width, height);
    const room = (width - LEFT - RIGHT_EDGE) / parts.length;
    return [grid, parts.map((part, index) => curve(part, LEFT + index * room, room, y, height, index))];
  });
}

function curve(part, left, room, y, height, index) {
  const first = part.x[0], span = part.x[part.x.length - 1] - first || 1;
  const x = (step) => left + 8 + (room - 16) * (part.x.length > 1 ? (step - first) / span : 0.5);
  const known = part.values.map((value, i) => [part.x[i], value]).filter(([, value]) => Number.isFinite(value));
  return s("g", null,
    index > 0 && s("line", { class: "divide", x1: left, x2: left, y1: TOP, y2: height - BOTTOM }),
    s("polyline", { class: "line series-0", points: known.map(([step, value]) => `${x(step)},${y(value)}`).join(" ") }),
    known.length <= 40 && known.map(([step, value]) => s("circle", { class: "point series-0", cx: x(step), cy: y(value), r: 2.5 },
      s("title", null, `${part.name}, step ${step}: ${shortNumber(value)}`))),
    s("text", { class: "tick", x: left + room / 2, y: height - 10, "text-anchor": "middle" },
      `${part.name} · ${plural(part.x[part.x.length - 1], "step")}${part.complete ? "" : ", not finished"}`));
}

/** One bar in parts that add up: parts = [{name, count, kind}]. */
function shareBar(label, parts) {
  const total = parts.reduce((sum, part) => sum + part.count, 0) || 1;
  return h("div", null,
    h("div", { class: "share", role: "img", "aria-label": `${label}: ${parts.map((part) => `${part.name} ${part.count}`).join(", ")}` },
      parts.filter((part) => part.count).map((part) => sized(h("span", { class: part.kind, title: `${part.name}: ${part.count}` }), part.count / total))),
    h("ul", { class: "legend" }, parts.map((part) => h("li", null, h("i", { class: part.kind }), `${part.name} `, h("b", null, many(part.count))))));
}

/** A horizontal bar of `share` of the width, and its value. */
function meter(share, value, kind = "series") {
  return [h("span", { class: "meter" }, sized(h("span", { class: kind }), share)), h("span", { class: "metered" }, value)];
}

function sized(element, share) {
  element.style.width = `${(100 * share).toFixed(2)}%`;
  return element;
}

function legend(names) {
  return h("ul", { class: "legend" }, names.map((name, i) => h("li", null, h("i", { class: `series-${i}` }), name)));
}
