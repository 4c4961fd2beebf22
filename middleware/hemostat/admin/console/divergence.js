// How far the model is from its reference: one chart, one table, by whatever group is chosen.
import { endsOf, fixed, known, nats, NONE, percent, plural, range, counts, whole } from "./format.js";
import { Chart, Explain, Facts, html, Interval, Link, Section, Table } from "./parts.js";
import { marks } from "./events.js";

/** Groups: [name, heading, rows(s) as [name, figures, link or none], what the figures do not mean]. */
const GROUPS = {
  kind: ["kind of traffic", (s) => s.kinds.map((k) => [k.kind, k.raw, ["kinds", k.kind]]), "that a kind is the cause; a kind is a group of requests, named from the request alone."],
  route: ["route and label", (s) => s.where.map((w) => [w.label ? `${w.route}, ${w.label}` : w.route, w]), "that a route is the cause; its prompts differ, too."],
  decoding: ["decoding strategy", (s) => s.decoding.map((d) => [d.strategy, d]), "that the decoding is the cause; its prompts differ, too."],
  engine: ["engine", (s) => s.upstream.filter((e) => known(e.figures.kl_nats)).map((e) => [e.engine, plain(e.figures), ["engines", e.engine]]), "that the engine is broken while its evidence is below 100 %."],
  model: ["served model", (s) => s.models.map((m) => [m.names.join(", "), m.calibrated ? s.raw : m.figures.raw || nothing]), "a comparison of references; each model has its own."],
  arm: ["arm", (s) => ["control", "treated", "none"].filter((arm) => s.arms[arm]).map((arm) => [arm, s.arms[arm]]), "that calibration helps while the interval of treated minus control contains 0."],
  stage: ["stage, on the same tokens", (s) => (s.calibrated.raw_same_requests ? [["raw", { ...s.calibrated.raw_same_requests, requests: s.calibrated.requests }], [`calibrated by ${s.profile.version.slice(0, 8)}`, s.calibrated]] : []),
    "what clients got; for that, group by arm."],
  position: ["position in the output", (s) => s.places.position.map((r) => [r.place, r]), "that the position is the cause; long texts also differ in content."],
  context: ["tokens before", (s) => s.places.context.map((r) => [r.place, r]), "that the length is the cause. A quantized KV cache can make errors grow with the context."],
  phase: ["phase of a reasoning model", (s) => s.places.phase.map((r) => [r.place, r]), "all answers; those longer than shadow.max_tokens are not scored."],
  grammar: ["kind, under a grammar", (s) => (s.conditional.raw.requests ? [["all, on the allowed ids", s.conditional.raw], ...s.conditional.kinds.map((k) => [k.kind, k.raw])] : []),
    "that the model is better there; where few ids are allowed, both models agree for that reason. These requests are in no other group."],
};
const nothing = { requests: 0, kl_nats: { estimate: null, ci95: [null, null] }, kl_nats_estimate: {}, total_variation: null, top1_agreement: null };
/** Of an engine, whose scored requests are not counted: `requests` are those that are compared. */
const plain = (f) => ({ ...nothing, requests: null, kl_nats: { estimate: f.kl_nats, ci95: [null, null] } });

/** A common scale: up to the highest upper end, but at most four times its estimate. */
export const scale = (rows) => 1.1 * Math.max(...rows.map((f) => Math.min(f.kl_nats.ci95[1] ?? f.kl_nats.estimate ?? 0, 4 * (f.kl_nats.estimate || 0))), 1e-4);
/** Columns of figures; of(row): the figures of a row. */
export const figureColumns = (of, most) => [
  ["requests", (r) => whole(of(r).requests), (r) => of(r).requests],
  ["KL ≥", (r) => nats(of(r).kl_nats.estimate), (r) => of(r).kl_nats.estimate],
  ["95 %", (r) => range(endsOf(of(r).kl_nats), nats, of(r).kl_nats.no_interval)],
  ["on one scale", (r) => { const kl = of(r).kl_nats; return html`<${Interval} low=${kl.ci95[0]} mid=${kl.estimate} high=${kl.ci95[1]} to=${most} />`; }],
  ["KL estimate", (r) => nats(of(r).kl_nats_estimate.estimate), (r) => of(r).kl_nats_estimate.estimate],
  ["total variation ≥", (r) => nats(of(r).total_variation), (r) => of(r).total_variation],
  ["same top-1", (r) => percent(of(r).top1_agreement), (r) => of(r).top1_agreement],
];

/** 1 − total variation of raw figures: between its bounds, and the interval around both. */
export const acceptance = ({ draft_acceptance: d, no_interval: why }) => `${percent(d.lower)} to ${percent(d.upper)}, 95 % ${range(d.ci95, percent, why?.total_variation)}`;

function headlines(s) {
  const raw = s.raw, kl = raw.kl_nats, why = raw.no_interval ?? {}, excess = s.excess.kl_nats, text = s.trajectory.sampled, tokens = (x) => fixed(x, 1);
  // With few requests the floor has no upper end below the clipping cap, so the excess has no lower end.
  const open = excess && known(kl.ci95[0]) && excess.ci95[0] <= kl.ci95[0] - kl.cap, ends = excess && [open ? null : excess.ci95[0], excess.ci95[1]];
  return [
    ["KL(reference‖compressed), nats per token", `≥ ${nats(kl.estimate)}, 95 % ${range(endsOf(kl), nats, kl.no_interval)}; estimate ${nats(raw.kl_nats_estimate.estimate)}; ≤ ${nats(raw.kl_nats_upper.estimate)}`],
    ["by request", `≥ ${nats(kl.by_request.estimate)}, finite-sample ${range(kl.by_request.ci95_finite)}`],
    ["excess over the noise floor", excess ? `≥ ${nats(excess.estimate)}, 95 % ${range(ends, nats, kl.no_interval)}; noise floor ${nats(excess.floor)}${open ? ", too few requests to bound it" : ""}` : "the noise floor is not known yet"],
    ["total variation", `≥ ${nats(raw.total_variation)}, 95 % ${range(raw.ci95.total_variation, nats, why.total_variation)}; ≤ ${nats(raw.total_variation_upper.estimate)}`],
    ["accepted as a draft of the reference", acceptance(raw)],
    ["same top-1", `${percent(raw.top1_agreement)}, 95 % ${range(raw.ci95.top1_agreement, percent, why.top1_agreement)}`],
    ["text half-life, tokens", text ? `${known(text.half_life_tokens.estimate) ? fixed(text.half_life_tokens.estimate, 1) : "beyond the data"}, 95 % ${range(text.half_life_tokens.ci95, tokens)}; ${plural(text.requests, "sampled text")}` : "no text sampled at temperature 1 yet"],
    ["perplexity ratio", `${nats(raw.perplexity_ratio.estimate)}, 95 % ${range(raw.perplexity_ratio.ci95, nats, raw.delta_log_likelihood_nats?.no_interval)}`],
    ["from", `${plural(s.requests.scored, "scored choice")}, ${whole(s.tokens_scored)} tokens, the top ${s.top_k} ids of each model (${percent(raw.covered_mass)} of the probability)`],
  ];
}

function thinking({ thinking: t }) {
  const tokens = (x) => fixed(x, 1), less = t.treated_minus_control;
  const rows = Object.entries(t.arms).map(([arm, a]) => ({ arm, ...a }));
  if (known(less.never_ended.estimate)) rows.push({ arm: "treated minus control", ...less });
  return html`<${Table} caption="Thinking, by arm" rows=${rows} empty="no reasoning model, or its markers are not known (hemostat check says what was found)" columns=${[
    ["arm", (r) => r.arm],
    ["requests that think", (r) => whole(r.requests), (r) => r.requests],
    ["tokens of thinking, mean", (r) => `${tokens(r.tokens.estimate)} ${range(r.tokens.ci95, tokens)}`],
    ["finite-sample", (r) => ("ci95_finite" in r.tokens ? range(r.tokens.ci95_finite, tokens) : NONE)],
    ["never ended", (r) => `${percent(r.never_ended.estimate)} ${range(r.never_ended.ci95, percent)}`],
    ["how it ended", (r) => (r.endings ? counts(r.endings) : NONE)],
  ]} />`;
}

export function Divergence(data) {
  const { s, past, chosen, choose } = data, by = Object.hasOwn(GROUPS, chosen.by) ? chosen.by : "kind", [heading, rowsOf, not] = GROUPS[by], rows = rowsOf(s), most = scale(rows.map(([, f]) => f));
  return html`<${Section} title="Divergence">
    <${Chart} label="KL per token over time" height=${240} time=${past.time} show=${nats} band=${true} marks=${marks(data)} series=${[
      ["since the start", "--soft", past.kl_nats], ["low", "--soft", past.kl_low, true], ["high", "--soft", past.kl_high, true], ["last minute", "--accent", past.kl_recent], ["noise floor", "--good", past.floor]]} />
    <div class="controls"><label>Group by <select value=${by} onChange=${(event) => choose({ by: event.target.value })}>
      ${Object.entries(GROUPS).map(([name, [text]]) => html`<option value=${name} selected=${name === by}>${text}</option>`)}</select></label></div>
    <${Table} key=${by} caption="By ${heading}" rows=${rows} columns=${[[heading, ([name, , to]) => (to ? html`<${Link} to=${to}>${name}<//>` : name), ([name]) => name], ...figureColumns(([, f]) => f, most)]} />
    <${Explain} asks="How do I compare these rows?" not=${not}>KL in nats per token since the start. The bar is the 95 % interval; all rows have the same scale.<//>
    ${by === "phase" && thinking(s)}
    <h2>All traffic</h2><${Facts} of=${headlines(s)} />
    <${Explain} asks="What do these figures answer?" not="a loss of quality; a distance has no sign, and several tokens can be right.">KL and total variation are lower bounds, because only the top ids are compared.
      The excess is the KL minus what noise adds (half of how far each model is from itself). Total variation: how often a sampled token would differ. Same top-1: how often greedy
      decoding would agree. Half-life: how many tokens both models generate the same text. A perplexity ratio below 1 is no improvement: the compressed model wrote the text.<//><//>`;
}
