// Kinds of traffic: what serves each, on what evidence, and what its outcomes are.
import { briefly, fixed, known, lasted, nats, NONE, percent, plural, range, when, whole } from "./format.js";
import { Action, Coloured, Explain, Facts, html, Link, Section, Table, Version } from "./parts.js";
import { EventTable, happened, servedSince } from "./events.js";
import { acceptance, figureColumns, scale } from "./divergence.js";

function served(k, p) {
  if (k.held) return html`<${Coloured} as="bad">identity, held<//>`;
  if (!k.version) return "identity";
  const how = k.pinned ? ", pinned" : k.chosen ? ", by an operator" : "";
  return html`${p.by_kind[k.kind] ? "" : "identity; in mode auto "}<${Version} of=${k.version} />${how}`;
}

function harm(outcome) {
  if (!outcome) return NONE;
  if (outcome.harmed) return html`<${Coloured} as="bad">harmed: ${outcome.harmed.outcome}<//>`;
  return outcome.units ? `no harm proven in ${plural(outcome.units, "conversation")}` : NONE;
}

const outcomesOf = (s, kind) => s.outcomes.kinds.find((o) => o.kind === kind);
const figuresOf = (s, kind) => s.kinds.find((k) => k.kind === kind);

function actionOn(k) {
  if (k.held) return html`<${Action} label="Release ${k.kind}" asks=${["Release this kind?", "Profiles may be tested and promoted in this kind again.", "api/v1/profiles/release", { kind: k.kind }]}>Release<//>`;
  return k.version && html`<${Action} label="Roll back ${k.kind}" asks=${["Roll back this kind?", "No profile (identity) serves this kind until one is promoted in it; the other kinds keep theirs.",
    "api/v1/profiles/rollback", { kind: k.kind }]}>Roll back<//>`;
}

export function Kinds({ s, p }) {
  const c = s.calibration, kl = (k) => figuresOf(s, k.kind)?.raw.kl_nats;
  return html`<${Section} title="Kinds of traffic">
    <p class="sub">${plural(c.kinds.filter((k) => k.kind !== "rest").length, "kind")} followed, all others are “rest”. One client contributes at most ${percent(c.client_share.limit, 0)} of a
      test's conversations; this limit is inactive below ${c.client_share.needs_clients} clients.</p>
    <${Table} caption="By part of the traffic" rows=${c.kinds} columns=${[
      ["kind", (k) => html`<${Link} to=${["kinds", k.kind]}>${k.kind}<//>`, (k) => k.kind],
      ["part of the traffic", (k) => percent(k.share), (k) => k.share],
      ["KL ≥", (k) => nats(kl(k)?.estimate), (k) => kl(k)?.estimate],
      ["served by", (k) => served(k, p), (k) => k.version || ""],
      ["recovered", (k) => percent(figuresOf(s, k.kind)?.recovered?.estimate), (k) => figuresOf(s, k.kind)?.recovered?.estimate],
      ["outcomes", (k) => harm(outcomesOf(s, k.kind)), (k) => (outcomesOf(s, k.kind)?.harmed ? 1 : 0)],
      ["evidence", (k) => briefly(k.summary)],
    ]} />
    <${Explain} asks="When does a profile serve a kind?" not="that a kind without a profile is worse; the profile is not proven there yet.">A kind is a group of requests, named from the request alone. A profile
      serves it only on evidence from held-out conversations of that kind, by request and by token. It leaves the kind when it is proven to harm there, when its window ends without a
      new proof, or when an outcome is harmed; the other kinds keep it.<//><//>`;
}

export function Kind({ s, p, noticed, name }) {
  const k = s.calibration.kinds.find((x) => x.kind === name), f = figuresOf(s, name), outcome = outcomesOf(s, name), baseline = s.alarm.kinds.find((x) => x.kind === name);
  if (!k && !f) return html`<${Section} title="Kind ${name}" id="kind"><p>This kind is not followed. <${Link} to="kinds">All kinds<//></p><//>`;
  const since = k?.version && servedSince(p, k.version, name), gain = f?.gain_nats, measured = gain?.requests > 0, rows = f ? [["raw", f.raw], ...["control", "treated"].filter((arm) => f.arms[arm]).map((arm) => [arm, f.arms[arm]])] : [];
  const both = (figure) => (measured ? `${nats(figure.estimate)} ${range(figure.ci95, nats, figure.no_interval)}${figure.ci95_finite === undefined || gain.total_variation ? "" : `; finite-sample ${range(figure.ci95_finite)}`}` : NONE);
  return html`<${Section} title=${name} id="kind">
    ${k && html`<${Facts} of=${[
      ["part of the traffic", percent(k.share)],
      ["served by", html`${served(k, p)}${known(since) ? ` since ${when(since)}, for ${lasted(s.at - since)}` : ""} ${actionOn(k)}`],
      ["evidence", briefly(k.summary)],
      ["limit of a client's share", k.client_share],
      ["gain by request, nats", both(gain?.by_request)],
      ["gain by token, nats", both(gain)],
      ["recovered", f?.recovered ? `${percent(f.recovered.estimate)} ${range(f.recovered.ci95, percent, f.recovered.no_interval)}` : NONE],
      ["accepted as a draft of the reference", f ? acceptance(f.raw) : NONE],
      ["alarm", baseline ? (baseline.watched ? `watched${known(baseline.spread_ratio) ? `; spread ×${fixed(baseline.spread_ratio, 2)} of the baseline's` : ""}` : `baseline of ${plural(baseline.baseline_requests, "request")} so far`) : NONE],
    ]} />`}
    <${Table} caption="KL divergence" rows=${rows} columns=${[["tokens of", ([what]) => what], ...figureColumns(([, x]) => x, scale(rows.map(([, x]) => x)))]} />
    <${Table} caption="Profiles under test" rows=${k?.candidates || []} empty="none" columns=${[
      ["version", (c) => html`<${Version} of=${c.version} />`], ["conversations", (c) => whole(c.units), (c) => c.units],
      ["effective conversations", (c) => whole(c.effective_units), (c) => c.effective_units], ["evidence", (c) => percent(c.progress, 0), (c) => c.progress], ["in words", (c) => briefly(c.summary)]]} />
    <${Table} caption="Outcomes of answers, treated minus control" rows=${outcome?.outcomes || []} columns=${outcomeColumns} empty=${outcome?.harmed ? `harmed: ${outcome.harmed.outcome}, ${percent(outcome.harmed.treated.value)} with the profile and ${percent(outcome.harmed.control.value)} without` : "nothing to compare: no profile serves, or no answer in both arms yet"} />
    <${Explain} asks="Do profiles harm what people notice?" not="that no harm exists where none is proven; smaller harm than the margin is never reported.">The first answer of each conversation, treated against control.
      Harm beyond the margin that is proven takes the profile from the kind. These intervals hold at every look. Gains: on held-out conversations; “finite-sample” holds for every number of requests.<//>
    <${EventTable} caption="Events of this kind" events=${happened({ s, p, noticed }).filter((e) => e.kind === name || e.evidence?.kind === name)} /><//>`;
}

const show = (r) => (r.outcome === "length" ? (x) => fixed(x, 1) : percent);
const outcomeColumns = [
  ["outcome", (r) => r.outcome], ["control", (r) => `${show(r)(r.control.value)} of ${whole(r.control.units)}`], ["treated", (r) => `${show(r)(r.treated.value)} of ${whole(r.treated.units)}`],
  ["difference", (r) => show(r)(r.difference)], ["95 %", (r) => (known(r.interval[0]) && known(r.interval[1]) ? range(r.interval, show(r)) : "not enough requests")],
  ["evidence of harm", (r) => percent(Math.max(r.evidence, 0), 0)],
];
