// Canaries: the same token sequences on every engine again, and, only here, accepting what the engines compute now.
import { known, nats, NONE, plural, when, whole } from "./format.js";
import { Action, Coloured, Explain, html, Table } from "./parts.js";

/** Whether a replay is too far from what it was compared with. */
const verdict = (row, against, far) => {
  const found = row[against];
  if (!found) return NONE;
  const text = `${whole(found.votes)} of ${plural(found.sequences, "sequence")} differ`;
  return html`<${Coloured} as=${far ? "bad" : "good"}>${far ? "no" : "yes"}: ${text}<//>`;
};

export function Canaries({ s }) {
  const c = s.canaries, set = c.set;
  const taken = set && `${plural(set.sequences, "sequence")} of ${set.model}, taken at ${set.engine} on vLLM ${set.vllm || "of an unknown version"}, ${when(set.taken)}.`;
  return html`<h2>Canaries</h2><p>${set ? taken : `No canaries are replayed: ${c.detail}.`}</p>
    ${Object.entries(c.failures).map(([engine, why]) => html`<p class="wait-text">${engine} is not compared: ${why}</p>`)}
    ${set && html`<${Table} caption="Last replay" rows=${c.engines} empty="no replay yet" columns=${[
      ["engine", (r) => r.engine, (r) => r.engine], ["model", (r) => r.model, (r) => r.model],
      ["as when taken", (r) => verdict(r, "baseline", r.changed), (r) => r.baseline?.votes], ["as the other engines", (r) => verdict(r, "engines", r.outlier), (r) => r.engines?.votes],
      ["distance, nats", (r) => nats(r.baseline?.distance_nats), (r) => r.baseline?.distance_nats],
      ["from the reference, then and now", (r) => (known(r.reference_nats) ? `${nats(r.reference_nats[0])}, ${nats(r.reference_nats[1])}` : NONE), (r) => r.reference_nats?.[1]],
      ["at", (r) => when(r.at), (r) => r.at]]} />
    ${c.engines.filter((r) => r.cause).map((r) => html`<p>Cause at ${r.engine} (${r.model}): ${r.cause}.</p>`)}
    ${Object.entries(c.short ?? {}).map(([engine, t]) => html`<p>Short sequences at ${engine}: <${Coloured} as=${known(t.since) ? "bad" : "good"}>${t.detail}<//>.</p>`)}
    ${Object.entries(c.weights ?? {}).map(([engine, t]) => html`<p>Weights in the memory of ${engine}: <${Coloured} as=${known(t.since) ? "bad" : "good"}>${t.detail}<//>.</p>`)}
    ${Object.entries(c.prefix ?? {}).map(([engine, t]) => html`<p>Behind a cached prefix of ${whole(t.tokens)} tokens at ${engine}: <${Coloured} as=${known(t.since) ? "bad" : "good"}>${t.detail}<//>.</p>`)}
    ${Object.entries(c.texts ?? {}).map(([engine, t]) => html`<p>Texts as clients send them at ${engine}: <${Coloured} as=${known(t.since) ? "bad" : "good"}>${t.detail}<//>.</p>`)}
    <p><${Action} label="Accept the canaries' present scores" asks=${["Accept what the engines compute now?",
      "A new set is taken, and engines are compared with that. A change that is there now is not reported again.", "api/v1/canaries/accept", {}]}>Accept present scores<//></p>`}
    <${Explain} asks="Has an engine changed?" not="that answers are worse: it computes something else. A small change that few sequences show is not found.">Each hour, and when it comes back, each engine scores the
      same tokens. A sequence differs if it is further from the scores of then than an unchanged engine's; ${set ? "more than half of them" : "most"} have to, in two replays in a row, or the same part of one by far.<//>`;
}
