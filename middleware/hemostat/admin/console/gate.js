// The live gate: may a candidate replace what serves?
import { counts, fixed, known, NONE, percent, plural, when, whole } from "./format.js";
import { Coloured, Explain, Facts, html, Section, Table } from "./parts.js";

const AS = { pass: "good", fail: "bad", undecided: "wait", running: "wait" };
const signed = (x) => (known(x) ? `${x > 0 ? "+" : ""}${fixed(x, 3)}` : NONE);
const within = (row) => html`<${Coloured} as=${row.within_margin ? "good" : row.required ? "wait" : ""}>${row.within_margin ? "yes" : row.required ? "not shown yet" : "not asked"}<//>`;

function Found({ g }) {
  const unseen = Object.entries(g.kinds_not_seen_enough).map(([kind, share]) => `${kind} (${percent(share)})`).join(", ");
  return html`<${Facts} of=${[["candidate", g.candidate], ["expected", g.expect === "same" ? "the same model" : "at least as near to the reference"], ["began", when(g.began)], ["compared", plural(g.units, "request")],
      ["what is compared", g.compared], ["waived", g.waived.join(", ") || "nothing"], ["not seen enough", unseen || "no kind"],
      ["tokens of the candidate", `${whole(g.budget.tokens)}, at most ${whole(g.budget.tokens_per_hour)} an hour`], ["failures", counts(g.failures)]]} />
    ${Object.keys(g.notes).map((note) => html`<p class="wait-text">${note}</p>`)}
    <${Table} caption="Excess of the candidate" rows=${g.questions} empty="no request has been compared yet" columns=${[
      ["question", (r) => r.question.replace("_", " "), (r) => r.question], ["kind", (r) => r.kind || "all", (r) => r.kind || ""], ["mean", (r) => signed(r.mean), (r) => r.mean],
      ["interval", (r) => `${signed(r.low)} to ${signed(r.high)}`, (r) => r.high - r.low], ["allowed", (r) => fixed(r.margin, 2), (r) => r.margin], ["within", within, (r) => Number(r.within_margin)],
      ["requests", (r) => whole(r.units), (r) => r.units], ["each counts as", (r) => (known(r.inflation) ? `1/${fixed(r.inflation, 1)}` : NONE), (r) => r.inflation]]} />`;
}

export function Gate({ s }) {
  const g = s.gate;
  return html`<${Section} title="Gate"><p>${g.state === "none" ? `No candidate is compared${g.why ? `: ${g.why}` : ""}.` : html`<${Coloured} as=${AS[g.state]}><strong>${g.state}</strong><//>: ${g.why}`}</p>
    ${g.state !== "none" && html`<${Found} g=${g} />`}
    <${Explain} asks="May the candidate replace what serves?" not="that the model that serves is good: the candidate is compared with it.">Sampled requests are scored by the candidate too, and some of their prompts are answered
      by it. No client sees that. A positive excess is against the candidate; a pass needs every question within its margin, over all traffic and in each kind that is seen enough.<//><//>`;
}
