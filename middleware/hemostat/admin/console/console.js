// Shows the events of /api/v1/stream. Writes text nodes only, so that no data can become markup.
"use strict";

const $ = (id) => document.getElementById(id);
const known = (x) => x !== null && x !== undefined && Number.isFinite(x);
const NONE = "–";
const fixed = (x, digits) => (known(x) ? x.toFixed(digits).replace("-", "−") : NONE);
/** Three decimals; two significant digits below 0.01. */
function nats(x) {
  if (!known(x) || x === 0 || Math.abs(x) >= 0.01) return fixed(x, 3);
  return Math.abs(x) < 1e-5 ? x.toExponential(1).replaceAll("-", "−") : fixed(x, 1 - Math.floor(Math.log10(Math.abs(x))));
}
/** The name of the reference's checkpoint or model, if it is ready. */
const named = (reference) => (reference.state === "ready" ? reference.detail.split("/").pop() : reference.detail) || NONE;
const percent = (x, digits = 1) => (known(x) ? `${fixed(100 * x, digits)} %` : NONE);
const whole = (x) => (known(x) ? x.toLocaleString("en-US", { maximumFractionDigits: 0 }) : NONE);
const range = (ends, show = nats) => (ends && (known(ends[0]) || known(ends[1])) ? `[${show(ends[0])}, ${show(ends[1])}]` : "interval not known yet");
/** Those of a figure; none where the interval is all that the figure can be, as after very few requests. */
const endsOf = (figure) => (known(figure.ci95[1]) && figure.ci95[1] >= figure.cap ? [null, null] : figure.ci95);
const counts = (o) => Object.entries(o || {}).filter(([, n]) => n).sort((a, b) => b[1] - a[1]).map(([k, n]) => `${k} ${whole(n)}`).join(", ") || "none";
const total = (o) => Object.values(o || {}).reduce((a, b) => a + b, 0);
const brief = (version) => (version && version.length === 32 ? version.slice(0, 8) : version || NONE);
const plural = (n, one) => `${whole(n)} ${one}${n === 1 ? "" : "s"}`;
const two = (n) => String(n).padStart(2, "0");

function when(t) {
  if (!known(t)) return NONE;
  const d = new Date(1000 * t), now = new Date();
  const time = `${two(d.getHours())}:${two(d.getMinutes())}:${two(d.getSeconds())}`;
  return d.toDateString() === now.toDateString() ? time : `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())} ${time}`;
}

function lasted(seconds) {
  if (seconds < 120) return `${whole(Math.max(seconds, 0))} s`;
  if (seconds < 7200) return `${whole(seconds / 60)} min`;
  return seconds < 172800 ? `${whole(seconds / 3600)} h` : `${whole(seconds / 86400)} days`;
}

function say(id, text, className) {
  const element = $(id);
  // Write only changes: a screen reader would repeat an unchanged status at every event.
  if (element.textContent !== text) element.textContent = text;
  if (className !== undefined && element.className !== className) element.className = className;
}

function svg(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
  made.append(...children);
  return made;
}

/** A drawing of an interval and its estimate on a scale. */
function interval(low, mid, high, from, to) {
  const at = (x) => 100 * Math.min(1, Math.max(0, (x - from) / (to - from || 1)));
  const parts = [svg("line", { class: "axis", x1: "0%", x2: "100%", y1: 7, y2: 7 })];
  if (from <= 0 && to > 0) parts.push(svg("line", { class: "zero", x1: `${at(0)}%`, x2: `${at(0)}%`, y1: 1, y2: 13 }));
  if (known(mid)) {
    const left = at(known(low) ? low : from), right = at(known(high) ? high : to);
    parts.push(svg("rect", { class: "span", x: `${left}%`, width: `${Math.max(right - left, 0.5)}%`, y: 4, height: 6, rx: 1 }));
    parts.push(svg("rect", { class: "mid", x: `calc(${at(mid)}% - 1.5px)`, width: 3, y: 1, height: 12 }));
  }
  return svg("svg", { "aria-hidden": "true" }, ...parts);
}

function part(share, raised) {
  return svg("svg", { "aria-hidden": "true" }, svg("rect", { class: "zero", fill: "none", x: 0, y: 3, width: "100%", height: 8 }),
    svg("rect", { class: raised ? "full-part" : "part", x: 0, y: 3, width: `${100 * Math.min(1, share)}%`, height: 8 }));
}

function bar(id, ends, mid, from, to) {
  $(id).replaceChildren(...(known(mid) ? [interval(ends[0], mid, ends[1], from, to)] : []));
}

function table(id, caption, header, rows, empty = "nothing yet") {
  const element = $(id);
  const parts = [];
  const titled = document.createElement("caption");
  titled.textContent = caption;
  parts.push(titled);
  if (header && rows.length) {
    const head = document.createElement("thead");
    const row = head.insertRow();
    header.forEach((text) => { const th = document.createElement("th"); th.scope = "col"; th.textContent = text; row.append(th); });
    parts.push(head);
  }
  const body = document.createElement("tbody");
  (rows.length ? rows : [[empty]]).forEach((cells) => {
    const row = body.insertRow();
    cells.forEach((cell, i) => {
      const heading = i === 0 && rows.length;
      const made = document.createElement(heading ? "th" : "td");
      if (heading) made.scope = "row";
      if (cell instanceof Node) made.append(cell); else made.textContent = cell;
      if (!heading && (!header || (typeof cell === "string" && cell.length > 48))) made.classList.add("text");
      row.append(made);
    });
  });
  parts.push(body);
  // Keep an unchanged table, and with it the selection.
  const fresh = element.cloneNode(false);
  fresh.append(...parts);
  if (fresh.isEqualNode(element)) return;
  // Keep the focus on its button.
  const active = document.activeElement;
  const kept = active && element.contains(active) ? active.dataset.key : null;
  element.replaceChildren(...fresh.childNodes);
  if (kept) element.querySelector(`[data-key="${CSS.escape(kept)}"]`)?.focus();
}

// --- actions of operators ------------------------------------------------------------------------------------------------

let token = "";  // kept only in memory, while this page is open

function ask(title, text, path, body) {
  const dialog = $("confirm");
  say("confirm-title", title);
  say("confirm-text", text);
  say("confirm-error", "");
  $("token").value = token;
  dialog.onsubmit = async (event) => {
    event.preventDefault();
    token = $("token").value;
    try {
      const answer = await fetch(path, {
        method: "POST", headers: { authorization: `Bearer ${token}`, "content-type": "application/json" }, body: JSON.stringify(body),
      });
      if (answer.ok) { dialog.close(); return; }
      const detail = (await answer.json().catch(() => ({}))).detail;
      say("confirm-error", `Refused (${answer.status}): ${detail || answer.statusText}`);
    } catch (error) {
      say("confirm-error", `The admin port does not answer (${error.message})`);
    }
  };
  dialog.showModal();
}

function button(text, label, ...asked) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.dataset.key = label;
  made.setAttribute("aria-label", label);
  made.onclick = () => ask(...asked);
  return made;
}

const MODES = {
  off: "Calibration and learning stop at once.",
  observe: "Profiles are learned and judged; no request is changed.",
  auto: "Profiles that are proven on held-out requests are served.",
};
document.querySelectorAll("[data-mode]").forEach((b) => {
  b.onclick = () => ask(`Set calibration to ${b.dataset.mode}?`, MODES[b.dataset.mode], "api/v1/calibration", { mode: b.dataset.mode });
});
$("rollback").onclick = () => ask("Roll back?", "No profile (identity) serves any kind until one is promoted there.", "api/v1/profiles/rollback", {});
$("unpin").onclick = () => ask("Unpin?", "The profile continues to serve, and is judged again.", "api/v1/profiles/pin", { version: null });
$("confirm-no").onclick = () => $("confirm").close();
$("explain").onclick = () => {
  const open = $("explain").getAttribute("aria-pressed") !== "true";
  $("explain").setAttribute("aria-pressed", String(open));
  document.querySelectorAll("details").forEach((d) => { d.open = open; });
};

// --- divergence, by route and decoding ----------------------------------------------------------------------------------------

function verdict(s) {
  const tests = s.alarm.tests, watching = tests.filter((t) => t.begun), waits = s.alarm.waits_for;
  const [worst, ...others] = s.state.problems, red = s.state.level === "critical" || s.alarm.raised;
  document.title = worst ? `${red ? "ALARM" : "WARNING"} – Hemostat` : "Hemostat";  // visible in a background tab
  $("todo").hidden = !worst;
  const kind = (k) => { if ($("verdict").className !== `verdict ${k}`) $("verdict").className = `verdict ${k}`; };
  problems(s, others);
  if (worst) {
    kind(red ? "bad" : "wait");
    $("todo").href = worst.runbook;
    say("alarm", worst.text);
    say("alarm-sub", `since ${when(worst.since)}, for ${lasted(s.at - worst.since)}`
      + (s.alarm.raised ? `; an alarm clears after ${plural(s.alarm.clears_after_requests, "consecutive normal request")}` : ""));
  } else if (watching.length) {
    kind("good");
    say("alarm", "No alarm");
    say("alarm-sub", `${plural(watching.length, "test")} active; probability of any false alarm at most ${percent(s.alarm.alpha)}${waiting(waits)}`);
  } else {
    kind("wait");
    say("alarm", s.alarm.kinds.length || waits.length ? "No alarm yet: learning the baseline" : "No data yet");
    say("alarm-sub", s.alarm.kinds.length || waits.length ? waiting(waits).slice(2) : "no request has been scored");
  }
  table("tests", "Tests", ["test", "kind", "state", "evidence", "relative to the alarm level", "since", "data"], tests.map((t) => {
    const state = document.createElement("span");
    state.textContent = t.raised ? "raised" : t.begun ? "active" : "learning the baseline";
    state.className = t.raised ? "bad-text" : t.begun ? "good-text" : "wait-text";
    return [t.test === "budget" ? `budget ${nats(s.alarm.budget_nats)} nats` : t.test, t.kind, state, percent(t.evidence, 0), part(t.evidence, t.raised), when(t.since),
      t.raised ? `${whole(t.on_tokens)} tokens of ${plural(t.on_requests, "request")}` : plural(t.requests, "request")];
  }), "none yet: a test begins with the first complete baseline");
  const mix = s.alarm.workload, needed = mix.baseline_needed;
  workload(mix);
  table("baselines", "Baselines", ["kind", "baseline", "spread, of the baseline's", "part of the baseline's mix", "action"], [
    ...s.alarm.kinds.map((k) => [k.kind, k.watched ? "complete" : k.kind === "rest" ? "not tested: several kinds" : `${whole(k.baseline_requests)} of ${plural(needed, "request")}`,
      k.spread_ratio === null ? NONE : `×${k.spread_ratio.toFixed(2)}`, percent(k.baseline_share, 0),
      button("Accept as baseline", `Accept ${k.kind} as baseline`, "Accept as the new baseline?",
        `The next ${plural(needed, "request")} of this kind become its baseline; a raised change alarm ends.`, "api/v1/alarm/rebase", { kind: k.kind })]),
    ...(s.alarm.kinds.length > 1 ? [["all, in the baseline's mix", mix.changed ? "the mix of kinds has changed (no alarm)" : NONE, mix.spread_ratio === null ? NONE : `×${mix.spread_ratio.toFixed(2)}`, "",
      button("Accept all as baseline", "Accept all kinds as baseline", "Accept all as the new baseline?",
        `The next ${plural(needed, "request")} of each kind become its baseline; a raised change alarm ends.`, "api/v1/alarm/rebase", {})]] : []),
  ], "none yet: no request has been scored");
}

/** What is wrong besides the headline. */
function problems(s, others) {
  $("problems-room").hidden = !others.length;
  table("problems", "Also wrong", ["what", "since", "for", "runbook"], others.map((p) => {
    const link = document.createElement("a");
    link.href = p.runbook;
    link.textContent = p.alert;
    return [p.text, when(p.since), lasted(s.at - p.since), link];
  }));
}

/** A finite-sample interval: it holds for any number of requests; null is "wider than half of the figure's range". */
const certain = (ends) => ends ? range(ends) : "not enough requests";

/** The mix of kinds: information about the traffic, no alarm. */
function workload(mix) {
  const spread = mix.spread_ratio === null ? "" : `; spread of the divergence in the baseline's mix ×${mix.spread_ratio.toFixed(2)}`;
  if (mix.distance === null) {
    say("workload", `Workload: learning the mix of kinds, ${whole(mix.baseline_requests)} of ${plural(mix.baseline_needed, "request")}`);
  } else {
    say("workload", `Workload: ${mix.changed ? "the mix of kinds has changed, which is no alarm" : "no change of the mix of kinds is proven"}; `
      + `distance from the baseline's mix ${percent(mix.distance, 0)}${spread}`, mix.changed ? "sub wait-text" : "sub");
  }
}

const waiting = (waits) => waits.length ? `; waits for: ${waits.slice(0, 3).join(", ")}${waits.length > 3 ? ` and ${waits.length - 3} more` : ""}` : "";

function divergence(s) {
  verdict(s);
  const raw = s.raw, kl = raw.kl_nats, excess = s.excess.kl_nats;
  say("excess", excess ? `≥ ${nats(excess.estimate)}` : NONE);
  // With few requests the floor has no upper end below the clipping cap, so the excess has no lower end.
  const open = excess && known(kl.ci95[0]) && excess.ci95[0] <= kl.ci95[0] - kl.cap;
  const ends = excess ? [open ? null : excess.ci95[0], excess.ci95[1]] : [];
  say("excess-sub", excess ? `95 % ${range(ends)}; noise floor ${nats(excess.floor)}${open ? ", too few requests to bound it" : ""}` : "the noise floor is not known yet");
  bar("excess-bar", ends, excess && excess.estimate, 0, excess ? Math.max(excess.ci95[1] || 0, s.alarm.budget_nats || 0, excess.estimate) * 1.1 : 1);
  say("kl", `≥ ${nats(kl.estimate)}`);
  say("kl-sub", `95 % ${range(endsOf(kl))}, finite-sample ${certain(kl.ci95_finite)}; by request ${nats(kl.by_request.estimate)}, finite-sample ${certain(kl.by_request.ci95_finite)}; estimate ${nats(raw.kl_nats_estimate.estimate)} ${known(raw.kl_nats_estimate.estimate) ? range(endsOf(raw.kl_nats_estimate)) : ""}; ≤ ${nats(raw.kl_nats_upper.estimate)}`);
  say("tv", `≥ ${nats(raw.total_variation)}`);
  say("tv-sub", `95 % ${range(raw.ci95.total_variation)}; ≤ ${nats(raw.total_variation_upper.estimate)}`);
  say("top1", percent(raw.top1_agreement));
  say("top1-sub", `95 % ${range(raw.ci95.top1_agreement, percent)}`);
  const text = s.trajectory.sampled;
  say("half", text ? (known(text.half_life_tokens.estimate) ? fixed(text.half_life_tokens.estimate, 1) : "beyond the data") : NONE);
  say("half-sub", text ? `95 % ${range(text.half_life_tokens.ci95, (x) => fixed(x, 1))}; ${plural(text.requests, "sampled text")}` : "no text sampled at temperature 1 yet");
  say("ppl", nats(raw.perplexity_ratio.estimate));
  say("ppl-sub", `95 % ${range(raw.perplexity_ratio.ci95)}`);
  say("divergence-note", `${plural(s.requests.scored, "scored choice")}, ${whole(s.tokens_scored)} tokens, the top ${s.top_k} ids of each model `
    + `(${percent(raw.covered_mass)} of the probability). Intervals are 95 % and count conversations; they are asymptotic: right for many requests with the tails that were seen.`);
}

const HEADER = ["requests", "KL ≥", "95 %", "on one scale", "KL estimate", "total variation ≥", "same top-1"];
const figures = (f, most) => [whole(f.requests), nats(f.kl_nats.estimate), range(endsOf(f.kl_nats)), interval(f.kl_nats.ci95[0], f.kl_nats.estimate, f.kl_nats.ci95[1], 0, most),
  nats(f.kl_nats_estimate.estimate), nats(f.total_variation), percent(f.top1_agreement)];
/** A common scale: up to the highest upper end, but at most four times its estimate. */
const scale = (rows) => 1.1 * Math.max(...rows.map((f) => Math.min(f.kl_nats.ci95[1] ?? 0, 4 * (f.kl_nats.estimate || 0))), 1e-4);

function places(s) {
  const most = scale([...s.where, ...s.decoding]);
  table("where", "By route and label", ["route", "label", ...HEADER], s.where.map((w) => [w.route, w.label || NONE, ...figures(w, most)]));
  table("strategies", "By decoding strategy", ["decoding", ...HEADER, "sampling distribution: total variation"], s.decoding.map((d) => {
    const tv = d.drawn_from && d.drawn_from.total_variation;
    return [d.strategy, ...figures(d, most), tv && known(tv.lower) ? `${nats(tv.lower)} – ${nats(tv.upper)}` : NONE];
  }));
}

function servedModels(s) {
  $("by-model-room").hidden = s.models.length < 2;
  table("by-model", "By served model", ["model", "reference", "profiles", "requests", "KL ≥", "95 %", "excess KL ≥"], s.models.map((m) => {
    const raw = m.calibrated ? s.raw : m.figures.raw, excess = m.calibrated ? s.excess : m.figures.excess;
    return [m.names.join(", "), m.reference || `none: not scored, not treated${m.detail ? ` (${m.detail})` : ""}`, m.calibrated ? "for this model" : "never",
      raw ? whole(raw.requests) : NONE, raw ? nats(raw.kl_nats.estimate) : NONE, raw ? range(endsOf(raw.kl_nats)) : NONE,
      excess && excess.kl_nats ? nats(excess.kl_nats.estimate) : NONE];
  }));
}

// --- kinds of traffic ---------------------------------------------------------------------------------------------

function coloured(text, className) {
  const made = document.createElement("span");
  made.textContent = text;
  made.className = className;
  return made;
}

/** What serves a kind, and why if not on evidence. */
function served(k, p) {
  if (k.held) return coloured("identity, held", "bad-text");
  if (!k.version) return "identity";
  const how = k.pinned ? ", pinned" : k.chosen ? ", by an operator" : "";
  return p.by_kind[k.kind] ? coloured(`${brief(k.version)}${how}`, "good-text") : `identity; in mode auto ${brief(k.version)}${how}`;
}

function harm(outcome) {
  if (!outcome) return NONE;
  if (outcome.harmed) return coloured(`harmed: ${outcome.harmed.outcome}`, "bad-text");
  return outcome.units ? `no harm proven in ${plural(outcome.units, "conversation")}` : NONE;
}

function actionOn(k) {
  if (k.held) {
    return button("Release", `Release ${k.kind}`, "Release this kind?", "Profiles may be tested and promoted in this kind again.", "api/v1/profiles/release", { kind: k.kind });
  }
  return k.version ? button("Roll back", `Roll back ${k.kind}`, "Roll back this kind?",
    "No profile (identity) serves this kind until one is promoted in it; the other kinds keep theirs.", "api/v1/profiles/rollback", { kind: k.kind }) : "";
}

/** A table of the divergence of kinds, and of the gain there. */
function gains(id, caption, kinds, empty) {
  table(id, caption, ["kind", "requests", "KL ≥ [95 %]", "profile", "held out", "gain by request [95 %]", "finite-sample", "gain by token [95 %]", "finite-sample",
    "recovered"], kinds.map((k) => {
    const kl = k.raw.kl_nats, gain = k.gain_nats, measured = gain && gain.requests > 0;
    const both = (figure) => measured ? [`${nats(figure.estimate)} ${range(figure.ci95)}`, gain.total_variation ? NONE : certain(figure.ci95_finite)] : [NONE, NONE];
    return [k.kind, whole(k.requests), `${nats(kl.estimate)} ${range(endsOf(kl))}`, k.profile ? brief(k.profile) : NONE, measured ? whole(gain.requests) : NONE,
      ...both(gain && gain.by_request), ...both(gain), k.recovered ? percent(k.recovered.estimate) : NONE];
  }), empty);
}

function kinds(s, p) {
  const c = s.calibration, outcomes = new Map(s.outcomes.kinds.map((o) => [o.kind, o]));
  say("kinds-sub", `${plural(c.kinds.filter((k) => k.kind !== "rest").length, "kind")} followed, all others are “rest”. One client contributes at most `
    + `${percent(c.client_share.limit, 0)} of a test's conversations; this limit is inactive below ${c.client_share.needs_clients} clients.`);
  table("kinds", "Kinds of traffic", ["kind", "part of the traffic", "served by", "evidence", "outcomes", "limit of a client's share", "action"],
    c.kinds.map((k) => [k.kind, percent(k.share), served(k, p), k.summary, harm(outcomes.get(k.kind)), k.client_share, actionOn(k)]));
  gains("gains", "KL divergence, and the gain in KL of the profile that serves or would serve, by kind", s.kinds, "no request scored yet");
  table("outcomes", "Outcomes of answers, treated minus control, by kind", ["kind", "outcome", "profile", "control", "treated", "difference", "95 %", "evidence of harm"],
    s.outcomes.kinds.flatMap((o) => o.outcomes.map((r) => {
      const show = r.outcome === "length" ? (x) => fixed(x, 1) : percent;
      return [o.kind, r.outcome, brief(o.version), `${show(r.control.value)} of ${whole(r.control.units)}`, `${show(r.treated.value)} of ${whole(r.treated.units)}`,
        show(r.difference), known(r.interval[0]) && known(r.interval[1]) ? range(r.interval, show) : "not enough requests", percent(Math.max(r.evidence, 0), 0)];
    })), "nothing to compare: no profile serves, or no answer in both arms yet");
}

// --- calibration and the serving profile --------------------------------------------------------------------------

/** In which part of the traffic a version serves, or in mode observe would. */
function partOf(s, version) {
  const all = s.calibration.kinds, own = all.filter((k) => k.version === version);
  return `${own.length} of ${plural(all.length, "kind")}, ${percent(own.reduce((sum, k) => sum + (k.share || 0), 0), 0)} of the traffic`;
}

function calibration(s) {
  const won = s.recovered, gain = won.gain_nats, less = s.arms.treated_minus_control;
  const name = known(less.kl_nats_estimate.estimate) ? "kl_nats_estimate" : "total_variation", change = less[name];
  say("won", percent(won.ratio));
  say("won-sub", known(won.ratio) ? `of the KL, 95 % ${range(won.ci95, percent)}, by ${brief(s.profile.version)} in ${partOf(s, s.profile.version)}` : "no profile has been measured on held-out conversations");
  bar("won-bar", won.ci95, won.ratio, Math.min(0, Math.max(-1, won.ci95[0] ?? -1)), 1);
  say("gain", gain && known(gain.estimate) ? nats(gain.estimate) : NONE);
  say("gain-sub", gain && gain.requests ? `by token, 95 % ${range(gain.ci95)}, finite-sample ${gain.total_variation ? "none: an adapter's gain in KL has no bound" : certain(gain.ci95_finite)}; by request ${nats(gain.by_request.estimate)} ${range(gain.by_request.ci95)}; ${plural(gain.requests, "request")}` : "");
  say("arms", nats(change.estimate));
  say("arms-unit", name === "total_variation" ? "total variation" : "KL, nats per token");
  const far = known(change.estimate) ? 1.1 * Math.max(Math.abs(change.ci95[0] ?? 0), Math.abs(change.ci95[1] ?? 0), Math.abs(change.estimate)) : 1;
  bar("arms-bar", change.ci95, change.estimate, -far, far);
  say("arms-sub", known(change.estimate) ? `95 % ${range(change.ci95)}` : "no request has been treated, or too few");
  const tokens = s.learner.tokens || s.calibration.learned_tokens;
  say("learned", whole(tokens));
  say("learned-sub", `learner ${s.learner.state}${s.learner.detail ? `: ${s.learner.detail}` : ""}`);
  const before = s.calibrated.raw_same_requests;
  const stages = before ? [["raw", { ...before, requests: s.calibrated.requests }], [`calibrated by ${brief(s.profile.version)}`, s.calibrated]]
     : [];
  const most = stages.length ? scale(stages.map(([, f]) => f)) : 1;
  table("stages", "Raw against calibrated, the same tokens", ["stage", ...HEADER], stages.map(([name, f]) => [name, ...figures(f, most)]), "no profile yet: identity serves");
  const arms = ["control", "treated", "none"].filter((arm) => s.arms[arm]);
  table("by-arm", "What clients got, by arm", ["arm", ...HEADER], arms.map((arm) => [arm, ...figures(s.arms[arm], scale(arms.map((a) => s.arms[a])))]));
  table("endings", "How answers end, all traffic, by arm", ["arm", "answers", "cut at the length limit", "tokens per answer", "repetition loops", "JSON and tool calls"],
    Object.entries(s.endings).map(([arm, e]) => {
      const answers = total(e.finished);
      return [arm, whole(answers), percent((e.finished.length || 0) / answers), fixed(e.output_tokens / answers, 1), whole(e.loops),
        Object.entries(e.structured).map(([kind, by]) => `${kind}: ${counts(by)}`).join("; ") || "none"];
    }));
}

/** A mean gain of a test. Adapters are judged by total variation, whose gain has no unit; the gain in KL stands beside it. */
function proof(e, named) {
  if (!e || !e.units || !known(e.mean_gain)) return NONE;
  const tv = e.figure === "total_variation", byToken = known(e.mean_gain_by_token) ? `, ${nats(e.mean_gain_by_token)} by token` : "";
  const kl = known(e.mean_kl_gain) ? `; of the KL ${nats(e.mean_kl_gain)} nats by request` : "";
  return `${named ? `${e.kind}: ` : ""}${plural(e.units, "held-out conversation")}, mean gain ${tv ? "of the total variation " : ""}${nats(e.mean_gain)}${tv ? "" : " nats"} by request${byToken}${kl}`;
}

function serves(s, p) {
  say("mode", s.profile.mode);
  document.querySelectorAll("[data-mode]").forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.mode === s.profile.mode)));
  $("unpin").hidden = !p.pinned;
  const versions = [...new Set(s.calibration.kinds.map((k) => k.version).filter(Boolean))], verb = Object.keys(p.by_kind).length ? "serves" : "would serve in mode auto";
  const shown = versions.map((v) => `${v} ${verb} ${partOf(s, v)}`).join("; ");
  say("serving", s.calibration.forced ? `${s.calibration.forced} is forced on every request.` : `${shown || "identity serves all kinds"}${p.pinned ? "; pinned" : ""}.`);
  // Of each version, the test with the most conversations.
  const tests = s.calibration.kinds.flatMap((k) => [...k.candidates, { version: k.version, ...k.watch }]).filter((e) => e.units);
  const evidence = new Map(tests.sort((a, b) => a.units - b.units).map((e) => [e.version, e]));
  table("profiles", "Profiles", ["version", "family", "state", "rank and size", "made", "evidence", "actions"],
    p.profiles.filter((f) => f.state !== "probe").map((f) => {
      const code = document.createElement("code");
      code.textContent = brief(f.version);
      code.title = f.version;
      const actions = document.createElement("span");
      actions.className = "controls";
      if (f.kinds.length < s.calibration.kinds.length && f.state !== "forced") {
        actions.append(button("Promote", `Promote ${f.version}`, "Promote this profile?",
          `${f.version} serves all kinds without statistical proof, and is watched in each like any other profile.`, "api/v1/profiles/promote", { version: f.version }));
      }
      if (!(p.pinned && f.state === "selected")) {
        actions.append(button("Pin", `Pin ${f.version}`, "Pin this profile?",
          `${f.version} serves all requests, whatever is measured, until it is unpinned.`, "api/v1/profiles/pin", { version: f.version }));
      }
      const state = f.kinds.length ? `${f.state} for ${plural(f.kinds.length, "kind")}` : f.state;
      return [code, f.family, state, sizeOf(f), when(f.created), proof(evidence.get(f.version), true), actions];
    }), "none yet: identity serves");
  const events = [...p.events, ...s.alarm.events].sort((a, b) => b.at - a.at).slice(0, 50);
  table("events", "Decisions, newest first", ["when", "decision", "kind", "profile", "why", "evidence"],
    events.map((e) => [when(e.at), e.decision, e.kind || NONE, brief(e.version), e.why, e.decision === "alarm" ? (e.evidence.raised ? `${whole(e.evidence.on_tokens)} tokens of ${plural(e.evidence.on_requests, "request")}` : NONE) : proof(e.evidence)]));
}

// --- cost and proxy -------------------------------------------------------------------------------------

const recent = [];  // the last states, to compute rates

function rate(s, read) {
  const then = recent[0], seconds = then ? s.at - then.at : 0;
  // A counter that decreased means that the server was restarted.
  return seconds > 0 && read(s) >= read(then) ? (read(s) - read(then)) / seconds : null;
}

function costs(s) {
  const r = s.requests, dropped = total(r.dropped);
  const tokens = rate(s, (x) => x.shadow.reference_tokens), budget = s.shadow.reference_tokens_per_second;
  say("rate", percent(s.shadow.rate));
  say("rate-sub", `${plural(r.shadowed, "request")} captured, ${plural(r.scored, "choice")} scored, ${whole(r.pending)} in progress`);
  say("reference", fixed(tokens, 1));
  say("reference-sub", budget ? `budget ${whole(budget)}` : "no budget set");
  say("queue", whole(s.queue.depth));
  say("queue-sub", `oldest: ${fixed(s.queue.lag_seconds, 1)} s`);
  say("dropped", whole(dropped), dropped ? "big wait-text" : "big");
  say("dropped-sub", counts(r.dropped));
  table("cost", "In detail", null, [
    ["reference", `${s.reference.state}; ${named(s.reference)}`],
    ["tokens processed", `${whole(s.shadow.reference_tokens)} in ${lasted(s.shadow.uptime_seconds)}`],
    ["skipped by reason", counts(r.skipped)], ["dropped by reason", counts(r.dropped)],
    ["noise floor, KL ≥", Object.entries(s.noise_floor).map(([m, f]) => `${m} ${nats(f.kl_nats.estimate)} nats (${plural(f.requests, "request")})`).join(", ") || "not measured yet"],
    ["learner", s.learner.dropped && total(s.learner.dropped) ? `dropped: ${counts(s.learner.dropped)}` : s.learner.state],
  ]);
}

function proxy(s) {
  const p = s.proxy, ms = (x) => (known(x) ? fixed(1000 * x, 2) : NONE);
  say("requests", fixed(rate(s, (x) => x.proxy.requests), 1));
  say("requests-sub", `${whole(p.requests)} so far`);
  say("failed", percent(p.failed_ratio, 2), p.failed_ratio > 0.01 ? "big bad-text" : p.failed ? "big wait-text" : "big");
  say("failed-sub", `${whole(p.failed)} of ${whole(p.requests)}`);
  say("overhead", known(p.overhead_seconds.p50) ? `≤ ${ms(p.overhead_seconds.p50)}` : NONE);
  say("overhead-sub", `99 %: ≤ ${ms(p.overhead_seconds.p99)}`);
  say("relays", whole(s.relays), s.relays ? "big" : "big bad-text");
  say("relays-sub", `${plural(s.engines.live, "engine")} with the plugin`);
  table("proxy", "In detail", null, [
    ["by outcome", counts(p.by_outcome)], ["by route", counts(p.by_route)], ["engine plugins", counts(s.engines.counters)],
  ]);
}

// --- plots ------------------------------------------------------------------------------------------------------------

const past = {};  // columns of /api/v1/history
const MAX_POINTS = 2160;
const column = (name) => past[name];
const perSecond = (name) => past[name].map((x, i) => {
  const y = past[name][i - 1], seconds = past.time[i] - past.time[i - 1];
  return i && known(x) && known(y) && x >= y && seconds > 0 ? (x - y) / seconds : null;
});
const most = (...columns) => Math.max(1e-3, ...columns.flat().filter(known));
const last = (name) => past[name][past.time.length - 1];
// The scale follows the estimates: a still very wide interval would make their changes invisible.
const PLOTS = {
  kl: { data: () => ["kl_nats", "kl_low", "kl_high", "kl_recent", "floor"].map(column), show: nats, band: true,
    range: () => [0, 1.2 * most(past.kl_nats, past.kl_recent, [Math.min(last("kl_high") ?? 0, 2 * (last("kl_nats") ?? 0))])],
    series: [["since the start", "--accent"], ["low", "--accent", [2, 4]], ["high", "--accent", [2, 4]], ["last minute", "--bad"], ["noise floor", "--good"]] },
  won: { data: () => ["recovered", "recovered_low", "recovered_high"].map(column), show: percent, band: true,
    range: () => [Math.max(-1, Math.min(0, last("recovered_low") ?? 0, ...past.recovered.filter(known))), Math.min(1, 1.2 * most(past.recovered, [last("recovered_high")]))],
    series: [["recovered", "--accent"], ["low", "--accent", [2, 4]], ["high", "--accent", [2, 4]]] },
  cost: { data: () => [perSecond("reference_tokens"), past.queue], show: (x) => fixed(x, 1), range: () => [0, 1.2 * Math.max(1, most(perSecond("reference_tokens"), past.queue))],
    series: [["tokens per second", "--accent"], ["queue", "--wait"]] },
  proxy: { data: () => [perSecond("requests"), perSecond("failed")], show: (x) => fixed(x, 2), range: () => [0, 1.2 * Math.max(1, most(perSecond("requests")))],
    series: [["requests", "--accent"], ["failed", "--bad"]] },
};
const drawn = {};
const HEIGHT = 190;

function make(name) {
  const { series, show, band } = PLOTS[name], room = $(`plot-${name}`);
  const style = getComputedStyle(document.documentElement), colour = (key) => style.getPropertyValue(key).trim();
  const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
  const clock = (u, ticks) => ticks.map((t) => { const d = new Date(1000 * t); return `${two(d.getHours())}:${two(d.getMinutes())}${u.scales.x.max - u.scales.x.min < 300 ? `:${two(d.getSeconds())}` : ""}`; });
  return new uPlot({
    width: room.clientWidth, height: HEIGHT,
    axes: [{ ...axis, values: clock }, { ...axis, size: 62, values: (u, ticks) => ticks.map((t) => (name === "won" ? percent(t, 0) : String(Number(t.toPrecision(3))))) }],
    series: [{ label: "at", value: (u, t) => when(t) }, ...series.map(([label, key, dash]) => ({
      label, stroke: colour(key), width: dash ? 1 : 2, dash, spanGaps: false, value: (u, v) => show(v), points: { show: past.time.length < 3 },
    }))],
    bands: band ? [{ series: [3, 2], fill: colour("--band") }] : [],
    scales: { y: { range: () => PLOTS[name].range() } },
    hooks: { ready: [showLast] },
  }, [past.time, ...PLOTS[name].data()], room);
}

/** Show the last values in the legend while no pointer is over the plot. */
function showLast(plot) {
  if (!known(plot.cursor.left) || plot.cursor.left < 0) plot.setLegend({ idx: past.time.length - 1 });
}

function draw() {
  if (!past.time || past.time.length < 2 || typeof uPlot === "undefined") return;
  Object.keys(PLOTS).forEach((name) => {
    if (drawn[name]) drawn[name].setData([past.time, ...PLOTS[name].data()]);
    else drawn[name] = make(name);
    showLast(drawn[name]);
  });
}

async function fetchPast() {
  const after = past.time && past.time.length ? past.time[past.time.length - 1] : 0;
  const answer = await fetch(`api/v1/history?after=${after}`);
  if (!answer.ok) return;
  Object.entries(await answer.json()).forEach(([name, values]) => { past[name] = [...(past[name] || []), ...values].slice(-MAX_POINTS); });
  draw();
}

addEventListener("resize", () => Object.entries(drawn).forEach(([name, plot]) => plot.setSize({ width: $(`plot-${name}`).clientWidth, height: HEIGHT })));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  Object.keys(drawn).forEach((name) => { drawn[name].destroy(); delete drawn[name]; });
  draw();
});

// --- the stream -------------------------------------------------------------------------------------------------------

let fetched = 0;

function show(s, p) {
  const ready = s.reference.state === "ready";
  say("models", `${s.compressed.models.join(", ") || "no model known yet"} against ${ready ? named(s.reference) : "its reference"}`);
  say("connection", `reference ${s.reference.state}; calibration ${s.profile.mode}; ${plural(s.relays, "relay")}`, s.state.level === "ok" ? "pill good" : "pill bad");
  divergence(s);
  places(s);
  inTexts(s);
  underGrammars(s);
  servedModels(s);
  kinds(s, p);
  calibration(s);
  serves(s, p);
  adapters(s);
  costs(s);
  coverage(s);
  engines(s);
  proxy(s);
  recent.push(s);
  while (recent.length > 6) recent.shift();
  document.documentElement.dataset.at = s.at;
}

function listen() {
  const stream = new EventSource("api/v1/stream");
  stream.addEventListener("state", (event) => {
    const { status, profiles } = JSON.parse(event.data);
    show(status, profiles);
    if (Date.now() - fetched > 10000) { fetched = Date.now(); fetchPast().catch(() => {}); }
  });
  stream.onerror = () => {
    say("connection", "the admin port does not answer; reconnecting. The figures are out of date", "pill bad");
    $("verdict").className = "verdict wait";  // a green headline would be of before
    say("alarm", "Whether anything is wrong is not known: the admin port does not answer");
    document.title = "NOT KNOWN – Hemostat";
    // The browser reconnects by itself unless the answer was an error.
    if (stream.readyState === EventSource.CLOSED) setTimeout(listen, 3000);
  };
}

listen();
