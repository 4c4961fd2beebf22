// The parts of the page about coverage, engines, positions, thinking and grammars; it uses the functions of console.js.
"use strict";

/** Which part of what sampled requests generated is scored, by kind, and why the rest is not. */
function coverage(s) {
  const c = s.coverage, share = (of) => percent(of.scored_share.tokens), shareOfRequests = (of) => percent(of.scored_share.requests);
  say("coverage", share(c));
  say("coverage-sub", c.requests ? `of ${plural(c.tokens, "known token")}; ${shareOfRequests(c)} of ${plural(c.requests, "sampled request")}`
    + (c.requests_of_unknown_tokens ? `; the tokens of ${whole(c.requests_of_unknown_tokens)} are not known` : "") : "no sampled request has ended");
  table("coverage-kinds", "Coverage by kind", ["kind", "sampled requests", "scored", "known tokens", "scored", "requests of unknown tokens"],
    c.by_kind.map((k) => [k.kind, whole(k.requests), shareOfRequests(k), whole(k.tokens), share(k), whole(k.requests_of_unknown_tokens)]));
  table("not-scored", "What is not scored, by reason", ["reason", "outcome", "requests", "known tokens", "requests of unknown tokens"],
    c.not_scored.map((r) => [r.reason, r.outcome, whole(r.requests), whole(r.tokens), whole(r.requests_of_unknown_tokens)]), "everything is scored");
}

/** The engines that requests go to, and which one is not like the others. */
function engines(s) {
  const state = (e) => e.drained ? "drained" : e.up === e.relays ? "up" : e.up ? `up for ${e.up} of ${plural(e.relays, "relay")}` : "failing";
  const like = (f) => f.odd ? `no: ${f.farther ? "further from" : "closer to"} the reference, on ${plural(f.on_tokens, "token")}` : known(f.evidence) ? "yes" : NONE;
  table("engines", "Engines", ["engine", "state", "in progress", "requests", "sent again", "ejections", "KL nats per token", "scored tokens", "like the others", "holds"],
    s.upstream.map((e) => [e.engine, state(e), whole(e.outstanding), whole(e.requests), whole(e.resent), whole(e.ejections),
      known(e.figures.kl_nats) ? fixed(e.figures.kl_nats, 4) : NONE, whole(e.figures.tokens ?? 0), like(e.figures),
      e.holds ? e.holds.map(brief).join(", ") || "no profile" : "not known"]), "no relay has reported yet");
}

/** By position in the output, length of the context, and phase; and how thinking ends. */
function inTexts(s) {
  const most = scale([...s.places.position, ...s.places.context, ...s.places.phase]);
  const by = (id, caption, first, rows, empty) => table(id, caption, [first, ...HEADER], rows.map((r) => [r.place, ...figures(r, most)]), empty);
  by("by-position", "By position in the output", "position", s.places.position);
  by("by-context", "By length of the context", "tokens before", s.places.context);
  by("by-phase", "By phase of a reasoning model", "phase", s.places.phase, "no thinking seen");
  const t = s.thinking, tokens = (x) => fixed(x, 1), less = t.treated_minus_control;
  const row = (name, requests, length, certainty, never, endings) => [name, requests, `${tokens(length.estimate)} ${range(length.ci95, tokens)}`, certainty,
    `${percent(never.estimate)} ${range(never.ci95, percent)}`, endings];
  const arms = Object.entries(t.arms).map(([arm, a]) => row(arm, whole(a.requests), a.tokens, certainLength(a.tokens.ci95_finite), a.never_ended, counts(a.endings)));
  if (known(less.never_ended.estimate)) arms.push(row("treated minus control", "", less.tokens, NONE, less.never_ended, ""));
  table("thinking", "Thinking, by arm", ["arm", "requests that think", "tokens of thinking, mean [95 %]", "finite-sample", "never ended [95 %]", "how it ended, all requests"],
    arms, "no reasoning model, or its markers are not known (hemostat check says what was found)");
}

/** Requests whose tokens a grammar restricts: conditional on the allowed ids, and in no other table. */
function underGrammars(s) {
  const c = s.conditional, any = c.raw.requests > 0;
  $("grammar-room").hidden = !any && c.exact_tokens_share === null;
  table("grammar-figures", "Under a grammar, conditional on the allowed ids", [...HEADER, "tokens where the KL is exact"],
    any ? [[...figures(c.raw, scale([c.raw])), percent(c.exact_tokens_share)]] : []);
  gains("grammar-gains", "Under a grammar, by kind: KL divergence and gain in KL on the allowed ids", c.kinds, "no whole request scored yet");
}

const certainLength = (ends) => ends ? range(ends, (x) => fixed(x, 1)) : "not enough requests";
