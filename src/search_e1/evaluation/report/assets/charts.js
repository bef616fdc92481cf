// Charts: functions from values to SVG, redrawn when their width changes.

/**
 * Values by category: points joined by a line, with whiskers for intervals.
 * `series`: [{name, values, low?, high?, hollow?}]; with one or two series, the first one's values are written beside its points.
 */
function pointChart(label, names, series, { height = 220, digits = 3, zero = false } = {}) {
  const all = series.flatMap((one) => [...one.values, ...(one.low || []), ...(one.high || [])]);
  if (!all.some(Number.isFinite)) return null;
  const show = (value) => number(value, digits);
  const stopAt = (x, i) => ({ x, title: names[i], rows: series.flatMap((one, index) => (Number.isFinite(one.values[i])
    ? [{ series: seriesClass(index), name: one.name, text: show(one.values[i]), note: within(one.low?.[i], one.high?.[i], show) }] : [])) });
  return figure(label, height, (width) => {
    const { y, grid } = vertical(all, width, height, { zero });
    const x = slots(names.length, width);
    const apart = Math.min(9, (width - LEFT) / names.length / series.length / 2); // whiskers of one category side by side
    return {
      marks: [grid, categories(names, x, height), series.map((one, index) =>
        pointSeries(one, index, x.map((place) => place + apart * (index - (series.length - 1) / 2)), y, series.length < 3 && show))],
      stops: x.map(stopAt).filter((stop) => stop.rows.length),
    };
  });
}

function pointSeries(one, index, x, y, show) {
  const known = one.values.map((value, i) => [i, value]).filter(([, value]) => Number.isFinite(value));
  const color = seriesClass(index);
  const whisker = (i) => Number.isFinite(one.low?.[i]) &&
    s("line", { class: `whisker ${color}`, x1: x[i], x2: x[i], y1: y(one.low[i]), y2: y(one.high[i]) });
  return s("g", null,
    s("polyline", { class: `line ${color}`, points: known.map(([i, value]) => `${x[i]},${y(value)}`).join(" ") }),
    known.map(([i, value]) => [
      whisker(i),
      s("circle", { class: `point ${color}${one.hollow ? " hollow" : ""}`, cx: x[i], cy: y(value), r: 4.5 }),
      index === 0 && show && valueLabel(one.values, i, x[i], y(value), show(value)),
    ]));
}

/** A point's value, beside the line. */
function valueLabel(values, i, x, y, text) {
  const rises = values[i + 1] > values[i], rose = values[i] > values[i - 1];
  if (rises && rose) return s("text", { class: "value", x: x - 8, y: y - 7, "text-anchor": "end" }, text);
  if (rises) return s("text", { class: "value", x: x + 9, y: y + 16 }, text);
  return s("text", { class: "value", x: x + 9, y: y - 7 }, text);
}

/** Signed bars with whiskers: bars = [{name, value, low, high, rows}]; `rows` are extra rows of the tooltip. */
function gainChart(label, bars, { height = 220 } = {}) {
  return figure(label, height, (width) => {
    const { y, grid } = vertical(bars.flatMap((bar) => [bar.value, bar.low, bar.high]), width, height, { zero: true });
    const x = slots(bars.length, width);
    const thick = Math.min(56, (width - LEFT) / bars.length / 2);
    return {
      marks: [grid, categories(bars.map((bar) => bar.name), x, height), bars.map((bar, i) => s("g", null,
        s("rect", { class: `bar ${bar.value < 0 ? "loss" : "gain"}`, x: x[i] - thick / 2, width: thick, rx: 2,
          y: y(Math.max(0, bar.value)), height: Math.max(1, Math.abs(y(0) - y(bar.value))) }),
        s("line", { class: "whisker ink", x1: x[i], x2: x[i], y1: y(bar.low), y2: y(bar.high) }),
        s("text", { class: "value", x: x[i], "text-anchor": "middle", y: bar.value < 0 ? y(bar.low) + 16 : y(bar.high) - 6 }, signed(bar.value))))],
      stops: bars.map((bar, i) => ({ x: x[i], title: bar.name, rows: [{ name: "gain", text: signed(bar.value), note: within(bar.low, bar.high, signed) }, ...bar.rows] })),
    };
  });
}

/** Curves side by side, one panel per part (a round's stage): parts = [{name, lines: [{name, x, values, complete}]}]. */
function curveChart(label, parts, { height = 180 } = {}) {
  const values = parts.flatMap((part) => part.lines.flatMap((one) => one.values));
  if (!values.some(Number.isFinite)) return null;
  return figure(label, height, (width) => {
    const { y, grid } = vertical(values, width, height, { bottom: BOTTOM + 6 });
    const room = (width - LEFT - RIGHT_EDGE) / parts.length;
    const panels = parts.map((part, index) => panel(part, LEFT + index * room, room, y, height, index));
    return { marks: [grid, panels.map((one) => one.marks)], stops: panels.flatMap((one) => one.stops) };
  });
}

function panel(part, left, room, y, height, index) {
  const steps = [...new Set(part.lines.flatMap((one) => one.x))].sort((a, b) => a - b);
  const first = steps[0], last = steps[steps.length - 1];
  const x = (step) => left + 8 + (room - 16) * (last > first ? (step - first) / (last - first) : 0.5);
  const at = part.lines.map((one) => new Map(one.x.map((step, i) => [step, one.values[i]]).filter(([, value]) => Number.isFinite(value))));
  const name = `${part.name}${part.lines.every((one) => one.complete) ? "" : ", not finished"}`;
  const title = name.length * 6.5 > room ? part.name : name;
  return {
    marks: s("g", null,
      index > 0 && s("line", { class: "divide", x1: left, x2: left, y1: TOP, y2: height - BOTTOM }),
      part.lines.map((one, i) => [
        s("polyline", { class: `line ${seriesClass(i)}`, points: [...at[i]].map(([step, value]) => `${x(step)},${y(value)}`).join(" ") }),
        at[i].size <= 40 && [...at[i]].map(([step, value]) => s("circle", { class: `point ${seriesClass(i)}`, cx: x(step), cy: y(value), r: 2.5 })),
      ]),
      s("text", { class: "tick", x: x(first), y: height - BOTTOM + 14, "text-anchor": "middle" }, many(first)),
      last > first && s("text", { class: "tick", x: x(last), y: height - BOTTOM + 14, "text-anchor": "middle" }, many(last)),
      s("text", { class: "tick", x: left + room / 2, y: height - 6, "text-anchor": "middle" }, title)),
    stops: steps.map((step) => ({ x: x(step), title: `${name}, step ${many(step)}`, rows: part.lines.flatMap((one, i) => (at[i].has(step)
      ? [{ series: seriesClass(i), name: one.name, text: shortNumber(at[i].get(step)) }] : [])) })).filter((stop) => stop.rows.length),
  };
}

/** A stacked bar: parts = [{name, count, kind}]. */
function shareBar(title, parts) {
  const total = parts.reduce((sum, part) => sum + part.count, 0) || 1;
  return h("div", null,
    h("div", { class: "share", role: "img", "aria-label": `${title}: ${parts.map((part) => `${part.name} ${part.count}`).join(", ")}` },
      parts.filter((part) => part.count).map((part) => sized(h("span", { class: part.kind, title: `${part.name}: ${part.count}` }), part.count / total))),
    h("ul", { class: "legend" }, parts.map((part) => h("li", null, h("i", { class: part.kind }), label(part.name), " ", h("b", null, many(part.count))))));
}

/** A horizontal bar of `share` of the width, and its value. */
function meter(share, value, kind = "series") {
  return [h("span", { class: "meter" }, sized(h("span", { class: kind }), share)), h("span", { class: "metered" }, value)];
}

function sized(element, share) {
  element.style.width = `${(100 * share).toFixed(2)}%`;
  return element;
}
