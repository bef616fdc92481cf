// Keeps the page up to date from its server; selection, search and scroll position stay.

const PERIOD = 1000; // ms
let { version, records: held } = data.live; // versions of the figures and of the records that the page has
let trouble = "";

stateOf = (run) => trouble || (run.finished ? "finished: nothing more to come" : run.holder ? ["live", ...run.begun].join(" · ") : "stopped: no process is running it");

async function follow() {
  try {
    const answer = await fetch(`data?${new URLSearchParams({ version, records: held })}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    if (answer.status === 200) await take(await answer.json());
    else trouble = "";
  } catch {
    trouble = "the server is gone: showing the last state";
  }
  drawState();
  setTimeout(follow, PERIOD);
}

async function take(news) {
  trouble = news.problem || "";
  if (!news.overview) return;
  if (news.packed) all = await unpack(news.packed);
  data = news.overview;
  version = news.version;
  held = news.records;
  const { kind, state } = place();
  choose(state.get("run"));
  drawHeader(kind);
  if (kind.needsRecords) {
    if (view && news.packed) view.update();
    else if (!view) show();
  } else redraw(kind);
}

/** Redraws a view of figures without moving it or losing the focus. */
function redraw(kind) {
  const { scrollY } = window, focus = document.activeElement?.getAttribute("aria-label");
  view = { ...kind.draw(), kind };
  main.replaceChildren(view.element);
  window.scrollTo(0, scrollY);
  if (focus) [...main.querySelectorAll("[aria-label]")].find((one) => one.getAttribute("aria-label") === focus)?.focus({ preventScroll: true });
}

drawState();
document.addEventListener("DOMContentLoaded", () => setTimeout(follow, PERIOD));
