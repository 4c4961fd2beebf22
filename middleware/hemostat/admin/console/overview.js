// The first page: what is wrong, what compression costs, what is served since when, what to do.
import { brief, briefly, counts, fixed, known, lasted, ms, named, nats, ofTokens, percent, perSecond, pluginAlone, plural, range, interval, when, whole } from "./format.js";
import { Action, Chart, html, Link, Spark } from "./parts.js";
import { marks, servedSince } from "./events.js";
import { MODES } from "./profiles.js";

/** Parts of the deployment, as `area` of a problem names them, with what each says while it has none. What is said of a problem comes with it. */
const AREAS = {
  vLLM: (s) => (s.upstream.length ? `${s.upstream.filter((e) => e.up).length} of ${plural(s.upstream.length, "engine")} up` : "not known yet"),
  relays: (s) => (s.passive ? `none, the plugin reports from ${plural(s.passive.servers, "API server")}` : `${s.relays} connected`),
  errors: ({ passive, proxy: { recent } }) => passive ? null : `${whole(recent.failed)} of ${plural(recent.requests, "request")} in the last minute`,
  reference: (s) => s.reference.state,
  store: (s) => s.control.state,
  alarm: (s) => (s.alarm.tests.some((t) => t.begun) ? "none" : "learning"),
  canaries: ({ canaries: c }) => (c.engines.length ? "unchanged" : c.set ? "no replay yet" : "no set"),
  gate: ({ gate }) => (gate.state === "none" ? null : gate.state),
  adapters: (s) => s.adapter.state,
  profiles: () => null,
  measurement: (s) => (s.reference.state !== "ready" ? "waits for the reference" : s.requests.scored ? "running" : "no score yet"),
  configuration: (s) => (s.configuration.needs_restart.length ? "needs a restart" : "loaded"),
};

/** What is neither good nor bad. */
const NEUTRAL = ["not known yet", "learning", "no replay yet", "no set", "off", "waits for the reference", "no score yet"];

const held = (s) => s.calibration.kinds.filter((k) => k.held);

/** The sentence that says whether something is wrong. */
export function headline({ s, p, lost }) {
  if (lost) return { as: "wait", text: "Whether anything is wrong is not known: the admin port does not answer", sub: `The figures below are of ${when(s?.at)}.` };
  const [worst] = s.state.problems, begun = s.alarm.tests.filter((t) => t.begun).length;
  if (worst) {
    return {
      as: s.state.level === "critical" ? "bad" : "wait", text: worst.text, runbook: worst.runbook,
      sub: `Since ${when(worst.since)}, for ${lasted(s.at - worst.since)}. Are clients affected? ${worst.clients} ${worst.act}`,
    };
  }
  const sub = !s.requests.scored ? "No request has been scored yet." : begun ? `${plural(begun, "alarm test")} active; the probability of a false alarm in a week is at most ${percent(s.alarm.alpha, 0)}.`
    : `The alarm cannot be raised yet: it is learning its baseline (${s.alarm.waits_for[0] || "waits for requests"}).`;
  return { as: "good", text: s.requests.scored ? "No problem found" : "No problem found, and nothing measured yet", sub };
}

/** More on the alarm: how far the divergence is from before. */
function howMuch(s, past) {
  const now = past.kl_recent?.at(-1);
  return s.alarm.raised && known(now) && !s.state.problems[0]?.alert.match(/Upstream|Relays|Proxy/) ? ` KL of the last minute ${nats(now)} nats, mean since the start ${nats(s.raw.kl_nats.estimate)}.` : "";
}

function Status({ s, p, past, lost }) {
  const { as, text, sub, runbook } = headline({ s, p, lost }), others = s.state.problems.slice(1, 3), more = s.state.problems.length - 1 - others.length;
  const { failed, requests } = s.proxy.recent, failing = failed > 0.05 * requests ? "bad" : failed ? "wait" : "good";
  const chips = Object.entries(AREAS).map(([name, ok]) => [name, s.state.problems.find((p) => p.area === name), ok(s)])
    .filter(([, problem, ok]) => problem || ok).sort((a, b) => Boolean(b[1]) - Boolean(a[1]));
  const colour = (name, problem, ok) => (problem ? (problem.severity === "critical" ? "bad" : "wait") : lost || NEUTRAL.includes(ok) ? "" : name === "errors" ? failing : "good");
  return html`<section class="verdict ${as}" aria-label="Status">
    <p class="headline" role="status">${briefly(text)}</p>
    <p class="sub">${sub}${howMuch(s, past)} ${runbook && html`<a href=${runbook}>Runbook</a>`}</p>
    ${others.map((p) => html`<p class="also">${briefly(p.text)} <span class="sub">since ${when(p.since)}, for ${lasted(s.at - p.since)}</span> <a href=${p.runbook}>Runbook</a></p>`)}
    ${more > 0 && html`<p class="also">and ${plural(more, "more problem")}: <${Link} to="events">Events<//></p>`}
    <ul class="chips">${chips.map(([name, problem, ok]) => html`<li class=${colour(name, problem, ok)}>${name}: ${problem ? "problem" : lost ? "not known" : ok}</li>`)}</ul>
  </section>`;
}

// --- tiles --------------------------------------------------------------------------------------------------------------

const Tile = ({ title, to, big, unit, children }) => html`<section class="tile"><h2><${Link} to=${to}>${title}<//></h2><p class="big">${big} <span class="unit">${unit}</span></p>${children}</section>`;

function Traffic({ s, past, rate }) {
  const { failed, requests: all } = s.proxy.recent;
  const requests = rate((x) => x.proxy.requests), p99 = past.overhead_p99?.at(-1) ?? s.proxy.overhead_seconds.p99;
  return html`<${Tile} title="Traffic" to="engines" big=${fixed(requests, 1)} unit="requests/s">
    ${s.passive ? html`<p class="sub">${pluginAlone(s.passive)}</p>` : html`<p class="sub">Overhead of the relay: 99 % of requests at most ${ms(p99)}. <span class=${failed > 0 ? "bad-text" : ""}>Failed in the last minute: ${whole(failed)} of ${whole(all)}.</span></p>`}
    <div class="sparks"><${Spark} label="requests/s" values=${perSecond(past, "requests")} />${!s.passive && html`<${Spark} label="overhead, 99 %" values=${past.overhead_p99 || []} />`}</div><//>`;
}

/** Against the budget, or without one against the noise floor. */
function compared(s) {
  const kl = s.raw.kl_nats.estimate, budget = s.alarm.budget_nats, floor = s.excess.kl_nats?.floor;
  if (known(budget)) return `${percent(kl / budget, 0)} of the budget of ${nats(budget)}`;
  return floor > 0 ? `${fixed(kl / floor, kl / floor < 10 ? 1 : 0)} times the noise floor of ${nats(floor)}; no budget is set` : "no budget is set, and the noise floor is not known yet";
}

function Cost({ s, past }) {
  const differ = ofTokens(s.raw.total_variation, s.raw.total_variation_upper?.estimate), over = s.alarm.tests.some((t) => t.test === "budget" && t.raised), kl = s.raw.kl_nats, now = past.kl_recent?.at(-1);
  return html`<${Tile} title="Cost of compression" to="divergence" big="≥ ${nats(kl.estimate)}" unit="nats per token">
    <p><strong>${differ ? `${differ} tokens differ` : "not known yet"}</strong></p>
    <p class="sub">95 % ${interval(kl)}; ${compared(s)}. ${known(now) && html`<span class=${over ? "bad-text" : ""}>Last minute ${nats(now)}.</span>`}</p>
    <${Spark} label="KL of the last minute" values=${past.kl_recent || []} level=${s.alarm.budget_nats} /><//>`;
}

function armsOf(s) {
  const less = s.arms.treated_minus_control, name = known(less.kl_nats_estimate.estimate) ? "kl_nats_estimate" : "total_variation", found = less[name];
  if (!known(found.estimate)) return "Treated against control: not enough requests in both arms yet.";
  return `Treated minus control: ${nats(found.estimate)} ${range(found.ci95, nats, found.no_interval)} ${name === "total_variation" ? "of the total variation" : "nats"}.`;
}

function Served({ s, p, past }) {
  const kinds = s.calibration.kinds, serving = kinds.filter((k) => p.by_kind[k.kind]), share = serving.reduce((sum, k) => sum + (k.share || 0), 0);
  const [first, ...others] = [...new Set(serving.map((k) => p.by_kind[k.kind]))];
  const since = Math.min(...serving.map((k) => servedSince(p, p.by_kind[k.kind], k.kind) ?? Infinity)), harmed = held(s);
  return html`<${Tile} title="Served profile" to="profiles" big=${first ? brief(first) : "none"}
    unit=${first ? `${percent(share, 0)} of the traffic${others.length ? `, with ${plural(others.length, "other version")}` : ""}` : `mode ${s.profile.mode}`}>
    <p class="sub">${first ? `Mode ${s.profile.mode}. ${known(since) ? `Since ${when(since)} (${lasted(s.at - since)})` : "Since before the oldest event"}${p.pinned ? ", pinned" : ""}. ${armsOf(s)}`
      : s.profile.mode === "auto" ? "No profile is proven yet; every request is decoded unchanged." : `Every request is decoded unchanged. ${MODES[s.profile.mode]}`}</p>
    ${harmed.length > 0 && html`<p class="wait-text">${plural(harmed.length, "kind")} held without a profile.</p>`}
    <${Spark} label="recovered part of the KL" values=${past.recovered || []} /><//>`;
}

/** Unix time at which the history last saw a new score. */
function lastScore(past, s) {
  const scored = past.scored || [], at = scored.findLastIndex((x, i) => i && x > scored[i - 1]);
  return at > 0 && s.requests.scored === scored.at(-1) ? past.time[at] : s.requests.scored > (scored.at(-1) ?? s.requests.scored) ? s.at : null;
}

function Measured({ s, past }) {
  const last = lastScore(past, s);
  return html`<${Tile} title="Measurement" to="measurement" big=${percent(s.coverage.scored_share.tokens, 0)} unit="of sampled tokens scored">
    <p class="sub">${percent(s.shadow.rate)} of the requests are sampled. ${whole(s.queue.depth)} wait${s.queue.depth ? `, the oldest ${lasted(s.queue.lag_seconds)}` : ""}.
      ${known(last) ? ` Last score ${lasted(s.at - last)} ago.` : s.requests.scored ? " No score since the history began." : " No score yet."}</p>
    <div class="sparks"><${Spark} label="scores/s" values=${perSecond(past, "scored")} /><${Spark} label="queue" values=${past.queue || []} /></div><//>`;
}

// --- before the first score, next steps -------------------------------------------------------------------------------------

function Checklist({ s }) {
  const up = s.upstream.some((e) => e.up), why = s.reference.detail;
  const rows = [
    ["vLLM answers", up, s.relays ? (s.upstream.length ? "it does not answer: start it, or correct upstream.url" : "no relay has reported yet") : s.passive ? "it has not answered yet" : "no relay is connected"],
    [`The reference is ready${s.reference.state === "ready" ? `: ${named(s.reference)}` : ""}`, s.reference.state === "ready", `${s.reference.state}${why ? `: ${why}` : ""}`],
    ...(s.passive ? [["The plugin reports", s.passive.servers > 0, "restart vLLM with HEMOSTAT_ADMIN_URL and HEMOSTAT_ENGINE_TOKEN"]] : []),
    ["First request", s.proxy.generations > 0, s.passive ? "send one to vLLM: /v1/chat/completions" : `send one to port ${s.data_port || "of the relays"}: /v1/chat/completions`],
    ["First score", s.requests.scored > 0, s.requests.shadowed ? `${plural(s.requests.shadowed, "request")} captured; skipped: ${counts(s.requests.skipped)}; dropped: ${counts(s.requests.dropped)}` : `no request captured yet; ${percent(s.shadow.rate)} of them are sampled`],
  ];
  return html`<section class="checklist"><h2>Until the first score</h2><ol>${rows.map(([name, done, missing]) => html`<li class=${done ? "good" : "wait"}>
    <strong>${done ? "✓" : "✗"} ${name}</strong>${!done && html`<span class="sub"> – ${briefly(missing)}</span>`}</li>`)}</ol>
    ${s.passive && html`<p class="sub">${pluginAlone(s.passive)}</p>`}</section>`;
}

function steps(s) {
  const found = s.state.problems.map((p) => [p.advice, p.page.length ? html`<${Link} to=${p.page}>Open ${p.page.length > 1 ? p.page[1] : `the ${p.page[0]}`}<//>` : html`<a href=${p.runbook}>Runbook: ${p.alert}</a>`]);
  const proven = s.calibration.kinds.filter((k) => k.version), [worst] = s.coverage.not_scored;
  if (s.profile.mode === "observe" && proven.length) {
    found.push([`A profile is proven in ${plural(proven.length, "kind")}: serve it.`, html`<${Action} label="Set calibration to auto" asks=${["Set calibration to auto?", MODES.auto, "api/v1/calibration", { mode: "auto" }]}>Set mode auto<//>`]);
  }
  if (s.configuration.needs_restart.length) found.push([`Restart Hemostat when convenient: ${s.configuration.needs_restart.join(", ")} take effect then.`, html`<${Link} to="events">Open the events<//>`]);
  if (s.coverage.scored_share.tokens < 0.5 && worst) found.push([`Most sampled tokens are not scored, mainly ${worst.reason}: see whether the figures describe your traffic.`, html`<${Link} to="measurement">Open the measurement<//>`]);
  if (s.requests.scored && !known(s.alarm.budget_nats)) found.push(["Set alarm.budget_nats, so that an alarm says when compression costs too much.", html`<${Link} to="alarm">Open the alarm<//>`]);
  return found.slice(0, 5);
}

/** What is known already, and what takes longer: nothing once all of it is there. */
function Progress({ s }) {
  const open = s.progress.filter((x) => !x.known), done = s.progress.filter((x) => x.known).map((x) => x.what);
  return open.length > 0 && html`<section class="progress"><h2>What comes when</h2>${done.length > 0 && html`<p class="sub">Known now: ${done.join("; ")}.</p>`}
    <ul>${open.map((x) => html`<li><strong>${x.what}</strong> <span class="sub">${x.when}</span></li>`)}</ul></section>`;
}

function Next({ s }) {
  const found = steps(s);
  return html`<section class="next"><h2>Next steps</h2>${found.length > 0 && html`<ol>${found.map(([text, action]) => html`<li>${text} <span class="do">${action}</span></li>`)}</ol>`}
    <p>${!found.length && "Nothing to do. "}${s.state.problems.length < 3 && s.background && html`<span class="sub">Background: ${s.background}.</span>`}</p></section>`;
}

function Timeline(data) {
  const { s, past } = data, time = past.time || [], from = time[0] ?? Infinity, shown = marks(data).filter((m) => m.at >= from), budget = s.alarm.budget_nats;
  const height = 280 - 25 * Math.min(4, s.state.problems.length);  // so that everything fits on one screen
  return html`<section class="timeline"><h2>Divergence <span class="unit">KL in nats per token, lower bound</span></h2>
    <${Chart} key=${`${height} ${known(budget)}`} label="KL per token over time" height=${height} time=${past.time} show=${nats} marks=${shown} series=${[
      ["last minute", "--accent", past.kl_recent], ["since the start", "--soft", past.kl_nats], ["noise floor", "--good", past.floor],
      ...(known(budget) ? [["budget", "--bad", time.map(() => budget)]] : [])]} />
    <ul class="marks">${shown.slice(0, 4).map((m) => html`<li class=${m.bad ? "bad-text" : ""}><b>${m.letter}</b> ${when(m.at)} ${m.text}</li>`)}
      ${!shown.length && html`<li class="sub">No alarm, promotion, change of models or reload in this time.</li>`}</ul></section>`;
}

export const Overview = (data) => html`<h1 class="quiet">Overview</h1><${Status} ...${data} />
  ${data.s.requests.scored ? html`<div class="four"><${Traffic} ...${data} /><${Cost} ...${data} /><${Served} ...${data} /><${Measured} ...${data} /></div>
    <div class="below"><${Timeline} ...${data} /><div><${Next} ...${data} /><${Progress} ...${data} /></div></div>`
    : html`<div class="below"><${Checklist} ...${data} /><div><${Next} ...${data} /><${Progress} ...${data} /></div></div>`}`;
