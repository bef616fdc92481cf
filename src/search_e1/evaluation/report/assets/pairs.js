// A pair: the reference in the teacher's prompt, and the student with the divergence at each of its tokens.

const heat = (kl) => 1 - Math.exp(-kl); // the same color for the same KL in every pair
const meanKl = (pair) => (pair.kl && pair.kl.kl.length ? pair.kl.kl.reduce((a, b) => a + b, 0) / pair.kl.kl.length : null);

function pairsView(state, changed) {
  return new Explorer({
    items: () => records.pairs,
    id: (pair) => `${pair.round}/${questionId(pair)}`,
    stamp: (pair) => (pair.kl ? "measured" : ""),
    empty: () => overview.empty.pairs || "No pairs.",
    what: ["pair", "pairs"],
    state,
    changed,
    facets: {
      round: { label: "Round", of: (pair) => `round ${pair.round}` },
      student: { label: "Student", of: (pair) => (pair.student.right ? "right" : "wrong") },
      hops: { label: "Hops", of: (pair) => hopsName(questionOf(pair).hops) },
    },
    orders: { "in order": null, "most KL a token": (a, b) => meanKl(b) - meanKl(a), "most KL in one token": (a, b) => peak(b) - peak(a) },
    haystack: (pair) => `${questionOf(pair).id}\n${questionOf(pair).text}\n${said_of(pair.student)}\n${said_of(pair.reference)}`,
    row: (pair, width) => rowOf(verdict(pair.student.right), 20, questionOf(pair).text,
      [`round ${pair.round}`, hopsName(questionOf(pair).hops), meanKl(pair) === null ? "KL not stored" : `KL ${number(meanKl(pair))}`], width),
    detail: (pair) => new PairView(pair).element,
  });
}

const peak = (pair) => (pair.kl ? Math.max(0, ...pair.kl.kl) : 0);

class PairView {
  constructor(pair) {
    this.pair = pair;
    this.tokens = [];
    const question = questionOf(pair);
    this.readout = h("div", { class: "readout", "aria-live": "polite" }, this.hint());
    const student = pair.kl ? this.heatMap(pattern(question.answers)) : trajectoryView(pair.student, question);
    this.element = h("article", { class: "wide" },
      questionHead(question),
      pair.kl ? [this.strip(), this.readout, this.peaks(), scale()] : h("p", { class: "notice" }, "The divergence of each token is not stored in this run: its lead was measured by an older version, or is not measured yet."),
      h("div", { class: "columns two" },
        h("section", { class: "column" }, h("h3", null, label("Reference"), h("small", null, "shown in the teacher's prompt")), h("dl", { class: "answers" }, given(pair.reference)), measures(pair.reference), trajectoryView(pair.reference, question)),
        h("section", { class: "column" }, h("h3", null, label("Student"), h("small", null, "learns from it")), h("dl", { class: "answers" }, given(pair.student)), measures(pair.student), student)));
    this.element.view = this;
  }

  hint() {
    return h("p", null, "Point at a token, or use ← and →, and n for the next peak: its KL, its probability with and without the reference, and the teacher's first choice.");
  }

  /** The student's turns: sampled tokens in the color of their divergence, observations plain and folded. */
  heatMap(marked) {
    const { kl } = this.pair;
    let at = 0;
    return h("div", { class: "trajectory" }, this.pair.student.turns.map((turn, i) => {
      const count = this.pair.lengths[i];
      const tokens = kl.pieces.slice(at, at + count).map((piece, j) => this.token(piece, at + j));
      at += count;
      return [h("div", { class: "block heat" }, h("span", { class: "label" }, `Turn ${i + 1} · `, label(turn.kind)), h("div", { class: "body" }, tokens)), observed(turn, marked, false)];
    }));
  }

  token(piece, index) {
    const token = h("span", { class: "token", onmouseenter: () => this.select(index), onclick: () => this.select(index) }, said(piece.replace(/\n/g, "↵\n")));
    token.style.setProperty("--heat", `${(100 * heat(this.pair.kl.kl[index])).toFixed(1)}%`);
    this.tokens[index] = token;
    return token;
  }

  /** The divergence along the whole trajectory. */
  strip() {
    const values = this.pair.kl.kl, height = 56;
    const highest = Math.max(1, ...values);
    return figure(`KL of each of the student's ${values.length} tokens`, height, (width) => {
      const step = width / values.length;
      const marks = values.map((value, i) => {
        const tall = Math.max(1, (value / highest) * (height - 4));
        const bar = s("rect", { class: "kl", x: i * step, y: height - tall, width: Math.max(0.5, step - (step > 4 ? 1 : 0)), height: tall });
        const target = s("rect", { class: "target", x: i * step, y: 0, width: step, height, onmouseenter: () => this.select(i), onclick: () => this.select(i, true) },
          s("title", null, `${line(this.pair.kl.pieces[i])}: ${number(value)} nats`));
        bar.style.setProperty("--heat", `${(100 * heat(value)).toFixed(1)}%`);
        return [bar, target];
      });
      return { marks, stops: [] };
    });
  }

  /** Token indices by divergence, greatest first. */
  order() {
    const values = this.pair.kl.kl;
    return values.map((_, i) => i).sort((a, b) => values[b] - values[a]);
  }

  peaks() {
    const { kl } = this.pair;
    const top = this.order().slice(0, 5).filter((i) => kl.kl[i] > 0.05);
    if (!top.length) return h("p", { class: "chips" }, "Teacher and student agree throughout: no token above 0.05 nats.");
    return h("p", { class: "chips" }, "Peaks:", top.map((i) => h("button", { type: "button", class: "chip", onclick: () => this.select(i, true) },
      h("code", null, shownToken(kl.pieces[i])), " → ", h("code", null, shownToken(kl.preferred[i])), ` ${number(kl.kl[i], 2)}`)));
  }

  select(index, scroll) {
    const { kl } = this.pair;
    this.tokens[this.at]?.classList.remove("here");
    this.at = index;
    this.tokens[index].classList.add("here");
    if (scroll) this.tokens[index].scrollIntoView({ block: "nearest" });
    const fact = (name, ...value) => h("div", null, h("dt", null, label(name)), h("dd", null, value));
    this.readout.replaceChildren(h("dl", null,
      fact("token", h("code", null, shownToken(kl.pieces[index]))), fact("part of", kl.classes[index]),
      fact("KL", `${number(kl.kl[index])} nats`), fact("p, plain prompt", number(kl.student[index])), fact("p, with the reference", number(kl.teacher[index])),
      fact("teacher's choice", h("code", null, shownToken(kl.preferred[index])))));
  }

  /** Select the next or previous token; `nextPeak`: the next peak. */
  step(by) {
    if (this.tokens.length) this.select(Math.max(0, Math.min(this.tokens.length - 1, (this.at ?? -1) + by)), true);
  }

  nextPeak() {
    if (!this.tokens.length) return;
    const top = this.order().slice(0, 5);
    this.select(top[(top.indexOf(this.at) + 1) % top.length], true);
  }
}

/** One token, with visible spaces and line ends. */
function shownToken(piece) {
  return said(piece.replace(/ /g, "␣").replace(/\n/g, "↵") || "∅");
}

function scale() {
  return h("p", { class: "scale" }, "KL(teacher ‖ student), nats per token:", [0, 0.1, 0.5, 1, 3].map((kl) => {
    const sample = h("span", { class: "token" }, ` ${kl} `);
    sample.style.setProperty("--heat", `${(100 * heat(kl)).toFixed(1)}%`);
    return sample;
  }));
}
