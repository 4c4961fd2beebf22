// The engines that requests go to, and the proxy in front of them.
import { counts, fixed, known, lasted, ms, nats, NONE, percent, perSecond, pluginAlone, plural, when, whole } from "./format.js";
import { Action, Bar, Chart, Coloured, Explain, Facts, html, Link, Section, Table, Version } from "./parts.js";
import { Canaries } from "./canaries.js";
import { marks } from "./events.js";

const stateOf = (e) => (e.drained ? "drained" : e.excluded ? html`<${Coloured} as="bad">excluded as an outlier<//>` : !e.up ? html`<${Coloured} as="bad">failing<//>` : e.up === e.relays ? "up" : html`<${Coloured} as="wait">up for ${e.up} of ${plural(e.relays, "relay")}<//>`);
const outlier = (f) => (f.outlier ? html`<${Coloured} as="bad">yes: ${f.farther ? "further from" : "closer to"} the reference, on ${plural(f.on_tokens, "token")}<//>` : f.requests ? "no" : NONE);
const holds = (e) => (e.holds ? (e.holds.length ? e.holds.map((version, n) => html`${n ? ", " : ""}<${Version} of=${version} />`) : "no profile") : "not known");

export function Engines(data) {
  const { s, past, rate } = data, proxy = s.proxy;
  return html`<${Section} title="Engines">
    <${Table} caption="By engine" rows=${s.upstream} empty="no relay has reported yet" columns=${[
      ["engine", (e) => html`<${Link} to=${["engines", e.engine]}>${e.engine}<//>`, (e) => e.engine], ["state", stateOf, (e) => e.up / (e.relays || 1)],
      ["in progress", (e) => whole(e.outstanding), (e) => e.outstanding], ["requests", (e) => whole(e.requests), (e) => e.requests], ["sent again", (e) => whole(e.resent), (e) => e.resent],
      ["ejections", (e) => whole(e.ejections), (e) => e.ejections], ["KL, nats per token", (e) => nats(e.figures.kl_nats), (e) => e.figures.kl_nats],
      ["outlier", (e) => outlier(e.figures), (e) => e.figures.evidence], ["holds", holds]]} />
    <${Explain} asks="Which engine is an outlier?" not="that the engine is broken: another checkpoint, flag or GPU can be the cause.">Of one kind of traffic and one profile, each engine is compared with the others, by request. ${s.outlier_engine.state === "off" && html`Off: ${s.outlier_engine.detail}.`}<//>
    <${Canaries} s=${s} />
    <h2>All traffic</h2>
    <${Chart} label="Requests per second over time" height=${170} time=${past.time} show=${(x) => fixed(x, 2)} marks=${marks(data)}
      series=${[["requests/s", "--accent", perSecond(past, "requests")], ["failed/s", "--bad", perSecond(past, "failed")]]} />
    <${Facts} of=${[
      ["requests", `${fixed(rate((x) => x.proxy.requests), 1)} per second, ${whole(proxy.requests)} so far`],
      ["failed", `${percent(proxy.failed_ratio, 2)}, ${whole(proxy.failed)} of ${whole(proxy.requests)}`],
      s.passive ? ["relays", pluginAlone(s.passive)] : ["overhead of the relay", `median ≤ ${ms(proxy.overhead_seconds.p50)}, 99 % ≤ ${ms(proxy.overhead_seconds.p99)}, since the start`],
      ["processes", `${s.passive ? plural(s.passive.servers, "API server") : plural(s.relays, "relay")}, ${plural(s.engines.live, "engine")} with the plugin`],
      ["by outcome", counts(proxy.by_outcome)], ["by route", counts(proxy.by_route)], ["engine plugins", counts(s.engines.counters)]]} /><//>`;
}

export function Engine({ s, name }) {
  const e = s.upstream.find((x) => x.engine === name);
  if (!e) return html`<${Section} title="Engine ${name}" id="engine"><p>No relay sends requests to it. <${Link} to="engines">All engines<//></p><//>`;
  const f = e.figures, drain = e.drained ? ["Resume", "The engine gets new requests again.", "undrain"] : ["Drain", "The engine gets no new requests and ends those that it has.", "drain"];
  return html`<${Section} title="Engine ${name}" id="engine"><${Facts} of=${[
      ["state", html`${stateOf(e)} <${Action} label="${drain[0]} ${name}" asks=${[`${drain[0]} this engine?`, drain[1], `api/v1/engines/${drain[2]}`, { engine: name }]}>${drain[0]}<//>`],
      ["requests", `${whole(e.requests)}, ${whole(e.outstanding)} in progress, ${whole(e.resent)} sent again to another engine`],
      ["ejections", whole(e.ejections)],
      ["KL, nats per token", known(f.kl_nats) ? `${nats(f.kl_nats)} on ${plural(f.tokens, "token")}` : "nothing scored yet"],
      ["outlier", html`${outlier(f)}${known(f.since) ? ` since ${when(f.since)}, for ${lasted(s.at - f.since)}` : ""}`],
      ["holds", holds(e)]]} />
    ${f.requests > 0 && html`<p>Evidence that it differs: ${percent(f.evidence, 0)} of what raises the alarm</p><${Bar} share=${f.evidence} bad=${f.outlier} />`}<//>`;
}
