// What is measured of the traffic, why the rest is not, and what measuring costs.
import { bytes, counts, fixed, known, lasted, named, nats, percent, perSecond, plural, total, when, whole } from "./format.js";
import { Chart, Coloured, Explain, Facts, html, Link, Section, Table } from "./parts.js";

export function Measurement({ s, past, rate }) {
  const c = s.coverage, r = s.requests, budget = s.shadow.reference_tokens_per_second, dropped = total(r.dropped);
  return html`<${Section} title="Measurement">
    <${Chart} label="Reference tokens per second and queue over time" height=${190} time=${past.time} show=${(x) => fixed(x, 1)}
      series=${[["reference tokens/s", "--accent", perSecond(past, "reference_tokens")], ["queue", "--wait", past.queue]]} />
    <${Facts} of=${[
      ["sampled", `${percent(s.shadow.rate)} of the requests: ${plural(r.shadowed, "request")} captured, ${plural(r.scored, "choice")} scored, ${whole(r.pending)} in progress`],
      ["coverage", c.requests ? `${percent(c.scored_share.tokens)} of ${plural(c.tokens, "known token")}; ${percent(c.scored_share.requests)} of ${plural(c.requests, "sampled request")}${c.requests_of_unknown_tokens ? `; the tokens of ${whole(c.requests_of_unknown_tokens)} are not known` : ""}` : "no sampled request has ended"],
      ["queue", `${plural(s.queue.depth, "capture")} waiting, the oldest ${fixed(s.queue.lag_seconds, 1)} s`],
      ...(s.later ? [["period", s.later.figures_until ? `figures and alarms are of requests of ${when(s.later.figures_from)} to ${when(s.later.figures_until)}; ${plural(s.later.scored, "choice")} scored later${s.later.segments_left_out ? `; ${plural(s.later.segments_left_out, "segment")} of the spool cannot be read: see the log` : ""}` : "nothing was scored in the window of spool.score since the start"]] : []),
      ...(s.spool ? [["spool", `${bytes(s.spool.bytes)}; ${plural(s.spool.written, "capture")} written since the start, ${whole(s.spool.lost)} lost, ${whole(s.spool.refused)} not admitted${s.spool.journals_left ? `; ${plural(s.spool.journals_left, "journal")} of earlier processes cannot be read: see the log` : ""}`]] : []),
      ["dropped", html`<${Coloured} as=${dropped ? "wait" : "good"}>${counts(r.dropped)}<//>`], ["skipped", counts(r.skipped)],
      ["reference", `${s.reference.state}; ${named(s.reference)}; ${fixed(rate((x) => x.shadow.reference_tokens), 1)} tokens per second, ${budget ? `budget ${whole(budget)}` : "no budget set"}; ${whole(s.shadow.reference_tokens)} in ${lasted(s.shadow.uptime_seconds)}`],
      ["noise floor, KL ≥", Object.entries(s.noise_floor).map(([m, f]) => `${m} ${nats(f.kl_nats.estimate)} nats (${plural(f.requests, "request")})`).join(", ") || "not measured yet"],
      ["learner", s.learner.dropped && total(s.learner.dropped) ? `dropped: ${counts(s.learner.dropped)}` : s.learner.state],
      ...s.models.filter((m) => !m.reference).map((m) => [`model ${m.names.join(", ")}`, `not scored, not treated${m.detail ? `: ${m.detail}` : ""}`])]} />
    <${Table} caption="Coverage by kind" rows=${c.by_kind} columns=${[
      ["kind", (k) => html`<${Link} to=${["kinds", k.kind]}>${k.kind}<//>`, (k) => k.kind], ["sampled requests", (k) => whole(k.requests), (k) => k.requests], ["scored", (k) => percent(k.scored_share.requests), (k) => k.scored_share.requests],
      ["known tokens", (k) => whole(k.tokens), (k) => k.tokens], ["scored", (k) => percent(k.scored_share.tokens), (k) => k.scored_share.tokens], ["requests of unknown tokens", (k) => whole(k.requests_of_unknown_tokens), (k) => k.requests_of_unknown_tokens]]} />
    <${Table} caption="What is not scored, by reason" rows=${c.not_scored} empty="everything is scored" columns=${[
      ["reason", (x) => x.reason, (x) => x.reason], ["outcome", (x) => x.outcome], ["requests", (x) => whole(x.requests), (x) => x.requests], ["known tokens", (x) => whole(x.tokens), (x) => x.tokens],
      ["requests of unknown tokens", (x) => whole(x.requests_of_unknown_tokens), (x) => x.requests_of_unknown_tokens]]} />
    <${Explain} asks="Which part of what was generated is scored?" not="a part of all traffic; that is the shadow rate. Dropped captures are no lost requests; those were answered.">Generated tokens of sampled requests: those that both models
      scored, of all that are known. If one kind is dropped more often than another, the figures are biased towards the others. Measuring costs the other requests nothing; they are relayed unchanged.<//><//>`;
}
