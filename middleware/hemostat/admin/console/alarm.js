// The alarm: which tests there are, how far each is, and, only here, accepting a new baseline.
import { fixed, known, lasted, nats, NONE, percent, plural, when, whole } from "./format.js";
import { Action, Bar, Coloured, Explain, html, Link, Section, Table } from "./parts.js";
import { EventTable } from "./events.js";

const kindOf = (kind) => (kind && kind !== "all" ? html`<${Link} to=${["kinds", kind]}>${kind}<//>` : kind || "all");

function lead(s) {
  const a = s.alarm, waits = a.waits_for, raised = a.tests.filter((t) => t.raised), begun = a.tests.filter((t) => t.begun).length;
  const waiting = waits.length ? ` Waits for: ${waits.slice(0, 3).join(", ")}${waits.length > 3 ? ` and ${waits.length - 3} more` : ""}.` : "";
  if (raised.length) {
    return html`<p><${Coloured} as="bad"><strong>${plural(raised.length, "test")} raised.</strong><//> ${raised.map((t) => html`${t.test} in ${kindOf(t.kind)} since ${when(t.since)}, for ${lasted(s.at - t.since)}; `)}
      an alarm clears after ${plural(a.clears_after_requests, "consecutive normal request")}.${waiting}</p>`;
  }
  return html`<p>${begun ? `No alarm: ${plural(begun, "test")} active; the probability of a false alarm in a week is at most ${percent(a.alpha)}.` : "No alarm yet: the baseline is being learned."}${waiting}</p>`;
}

/** The mix of kinds: information about the traffic, no alarm. */
function workload(mix) {
  const spread = known(mix.spread_ratio) ? `; spread of the divergence in the baseline's mix ×${fixed(mix.spread_ratio, 2)}` : "";
  if (!known(mix.distance)) return `Workload: learning the mix of kinds, ${whole(mix.baseline_requests)} of ${plural(mix.baseline_needed, "request")}`;
  return `Workload: ${mix.changed ? "the mix of kinds has changed, which is no alarm" : "no change of the mix of kinds is proven"}; distance from the baseline's mix ${percent(mix.distance, 0)}${spread}`;
}

/** What accepting means, and its button. */
const Accept = ({ kind, needed }) => html`<${Action} label=${kind ? `Accept ${kind} as baseline` : "Accept all kinds as baseline"} asks=${[kind ? "Accept as the new baseline?" : "Accept all as the new baseline?",
  `The next ${plural(needed, "request")} of ${kind ? "this kind become its" : "each kind become its"} baseline; a raised change alarm ends, and a loss of quality that is there now is not reported again.`,
  "api/v1/alarm/rebase", kind ? { kind } : {}]}>${kind ? "Accept as baseline" : "Accept all as baseline"}<//>`;

export function Alarm({ s }) {
  const a = s.alarm, mix = a.workload, needed = mix.baseline_needed;
  return html`<${Section} title="Alarm">${lead(s)}<p class="sub">${workload(mix)}</p>
    <${Table} caption="Tests" rows=${a.tests} empty="none yet: a test begins with the first complete baseline" columns=${[
      ["test", (t) => (t.test === "budget" ? `budget ${nats(a.budget_nats)} nats` : t.test), (t) => t.test], ["kind", (t) => kindOf(t.kind), (t) => t.kind],
      ["state", (t) => html`<${Coloured} as=${t.raised ? "bad" : t.begun ? "good" : "wait"}>${t.raised ? "raised" : t.begun ? "active" : "learning the baseline"}<//>`, (t) => (t.raised ? 2 : t.begun ? 1 : 0)],
      ["evidence", (t) => percent(t.evidence, 0), (t) => t.evidence], ["relative to the alarm level", (t) => html`<${Bar} share=${t.evidence} bad=${t.raised} />`], ["since", (t) => when(t.since), (t) => t.since],
      ["data", (t) => (t.raised ? `${whole(t.on_tokens)} tokens of ${plural(t.on_requests, "request")}` : plural(t.requests, "request")), (t) => t.requests]]} />
    <details class="baselines"><summary>Baselines of ${plural(a.kinds.length, "kind")}: accept the present state</summary>
      <p><strong>What accepting means:</strong> the present divergence becomes what is normal. A change alarm that is raised ends, and the alarm says nothing more about what has changed so far. Accept after a
        change that you made yourself, such as a new checkpoint. Do not accept in order to silence an alarm whose cause is not known.</p>
      <${Table} caption="Baselines" rows=${a.kinds} empty="none yet: no request has been scored" columns=${[
        ["kind", (k) => kindOf(k.kind), (k) => k.kind], ["baseline", (k) => (k.watched ? "complete" : k.kind === "rest" ? "not tested: several kinds" : `${whole(k.baseline_requests)} of ${plural(needed, "request")}`), (k) => k.baseline_requests],
        ["spread, of the baseline's", (k) => (known(k.spread_ratio) ? `×${fixed(k.spread_ratio, 2)}` : NONE), (k) => k.spread_ratio], ["part of the baseline's mix", (k) => percent(k.baseline_share, 0), (k) => k.baseline_share],
        ["action", (k) => html`<${Accept} kind=${k.kind} needed=${needed} />`]]} />
      ${a.kinds.length > 1 && html`<${Accept} needed=${needed} />`}</details>
    <${Explain} asks="When is an alarm raised?" not="that quality fell, only that the divergence is too large or has changed. No alarm does not mean no divergence: one that existed from the start is part of the baseline."><em>change</em>
      compares each request with the baseline of its kind, the first requests of that kind; <em>budget</em> compares the KL of a kind with <code>alarm.budget_nats</code>. <code>alarm.alpha</code> bounds the
      probability of a false alarm in a week. “Since” is the time at which the evidence begins. A change of the spread within a factor of ${fixed(a.tolerance, 2)} is no alarm, because different traffic could cause it.<//>
    <${EventTable} caption="Alarms so far" events=${a.events} /><//>`;
}
