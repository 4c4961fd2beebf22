// Shows what /api/v1/stream says. Text nodes only, so that nothing it carries can become markup.
"use strict";

const $ = (id) => document.getElementById(id);
const known = (x) => x !== null && x !== undefined && Number.isFinite(x);
const number = (x, digits = 3) => (known(x) ? x.toFixed(digits) : "–");
const percent = (x, digits = 1) => (known(x) ? `${(100 * x).toFixed(digits)} %` : "–");
const whole = (x) => (known(x) ? x.toLocaleString("en-US", { maximumFractionDigits: 0 }) : "–");
const range = (ends, show = number) => (ends && (known(ends[0]) || known(ends[1])) ? `[${show(ends[0])}, ${show(ends[1])}]` : "[not known yet]");
const counts = (o) => Object.entries(o || {}).filter(([, n]) => n).map(([k, n]) => `${k} ${whole(n)}`).join(", ") || "none";
const when = (t) => (known(t) ? new Date(1000 * t).toLocaleString() : "–");
const brief = (version) => (version && version.length === 32 ? version.slice(0, 8) : version || "–");

function say(id, text, className) {
  const element = $(id);
  // Only what changed: a screen reader would read a status anew at every state.
  if (element.textContent !== text) element.textContent = text;
  if (className !== undefined && element.className !== className) element.className = className;
}

function table(id, caption, header, rows, empty = "nothing yet") {
  const element = $(id);
  const parts = [];
  if (caption) { const c = document.createElement("caption"); c.textContent = caption; parts.push(c); }
  const body = document.createElement("tbody");
  if (header) {
    const head = document.createElement("thead");
    const row = head.insertRow();
    header.forEach((text) => { const th = document.createElement("th"); th.scope = "col"; th.textContent = text; row.append(th); });
    parts.push(head);
  }
  const shown = rows.length ? rows : [[empty]];
  shown.forEach((cells) => {
    const row = body.insertRow();
    cells.forEach((cell, i) => {
      const heading = i === 0 && rows.length;
      const made = document.createElement(heading ? "th" : "td");
      if (heading) made.scope = "row";
      if (cell instanceof Node) made.append(cell); else made.textContent = cell;
      if (!header || (typeof cell === "string" && cell.length > 40)) made.classList.add("text");
      row.append(made);
    });
  });
  parts.push(body);
  // A button that has the focus keeps it.
  const active = document.activeElement;
  const kept = active && element.contains(active) ? active.dataset.key : null;
  element.replaceChildren(...parts);
  if (kept) element.querySelector(`[data-key="${CSS.escape(kept)}"]`)?.focus();
}

// --- what operators do ------------------------------------------------------------------------------------------------

let token = "";  // for as long as this page is open, and nowhere else

function ask(title, text, method, path, body) {
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
        method, headers: { authorization: `Bearer ${token}`, "content-type": "application/json" }, body: JSON.stringify(body),
      });
      if (answer.ok) { dialog.close(); return; }
      const detail = (await answer.json().catch(() => ({}))).detail;
      say("confirm-error", `Refused (${answer.status}): ${detail || answer.statusText}`);
    } catch (error) {
      say("confirm-error", `No answer from the admin port (${error.message})`);
    }
  };
  dialog.showModal();
}

function button(key, text, label, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.dataset.key = key;
  made.setAttribute("aria-label", label);
  made.onclick = act;
  return made;
}

const MODES = {
  off: "Nothing is calibrated or learned any more, at once.",
  observe: "It learns and reports; no request is changed.",
  auto: "What has proven itself on held-out requests serves.",
};
document.querySelectorAll("[data-mode]").forEach((b) => {
  b.onclick = () => ask(`Set calibration to ${b.dataset.mode}?`, MODES[b.dataset.mode], "POST", "api/v1/calibration", { mode: b.dataset.mode });
});
$("rollback").onclick = () => ask("Roll back?", "Identity serves until another profile is promoted.", "POST", "api/v1/profiles/rollback", {});
$("unpin").onclick = () => ask("Unpin?", "What is pinned goes on serving, and is judged again.", "POST", "api/v1/profiles/pin", { version: null });
$("confirm-no").onclick = () => $("confirm").close();

// --- what is shown ----------------------------------------------------------------------------------------------------

function bleeding(s) {
  const raw = s.raw, kl = raw.kl_nats, excess = s.excess.kl_nats;
  const raised = s.alarm.tests.filter((t) => t.raised);
  if (raised.length) {
    say("alarm", raised.map((t) => `ALARM (${t.test}) on ${t.route} since ${when(t.since)}, on ${whole(t.on_tokens)} tokens of ${whole(t.on_requests)} requests`).join("; "), "alarm bad");
  } else {
    const watching = s.alarm.tests.filter((t) => t.test === "budget" || t.learning >= 1).length;
    const learning = s.alarm.tests.filter((t) => t.test === "change" && t.learning < 1).map((t) => `${t.route}: baseline ${percent(t.learning, 0)}`);
    say("alarm", `No alarm; ${watching} test${watching === 1 ? "" : "s"} watching${learning.length ? `, learning what is usual (${learning.join(", ")})` : ""}.`, "alarm good");
  }
  say("excess", excess ? number(excess.estimate) : "–");
  say("excess-sub", excess ? `nats per token, at least; ${range(excess.ci95)}; floor ${number(excess.floor, 5)}` : "the noise floor is not known yet");
  say("kl", `≥ ${number(kl.estimate)}`);
  say("kl-sub", `${range(kl.ci95)}; estimate ${number(raw.kl_nats_estimate.estimate)} ${range(raw.kl_nats_estimate.ci95)}; at most ${number(raw.kl_nats_upper.estimate)}`);
  say("tv", `≥ ${number(raw.total_variation)}`);
  say("tv-sub", `${range(raw.ci95.total_variation)}; at most ${number(raw.total_variation_upper.estimate)}`);
  say("top1", percent(raw.top1_agreement));
  say("top1-sub", range(raw.ci95.top1_agreement, percent));
  const sampled = s.trajectory.sampled;
  say("half", sampled ? (known(sampled.half_life_tokens.estimate) ? number(sampled.half_life_tokens.estimate, 1) : "beyond the data") : "–");
  say("half-sub", sampled ? `tokens ${range(sampled.half_life_tokens.ci95, (x) => number(x, 1))}, sampled text` : "no text sampled at temperature 1 yet");
  say("ppl", number(raw.perplexity_ratio.estimate));
  say("ppl-sub", `${range(raw.perplexity_ratio.ci95)}; compressed over reference, on the compressed model's own text`);
  say("bleeding-note", `${whole(s.requests.scored)} scored requests, ${whole(s.tokens_scored)} tokens, top ${s.top_k} ids of each model `
    + `(${percent(raw.covered_mass)} of the probability). Intervals are 95 %, count requests and hold at every look. A distance is not a loss of quality.`);
}

const FIGURES = ["KL ≥", "95 %", "KL estimate", "total variation ≥", "same top-1"];
const figures = (f) => [number(f.kl_nats.estimate), range(f.kl_nats.ci95), number(f.kl_nats_estimate.estimate), number(f.total_variation), percent(f.top1_agreement)];

function places(s) {
  table("where", "By route and label", ["route", "label", "requests", ...FIGURES],
    s.where.map((w) => [w.route, w.label || "–", whole(w.requests), ...figures(w)]));
  table("strategies", "By decoding; “drawn from” is after temperature and cut", ["decoding", "requests", ...FIGURES, "drawn from: total variation"],
    s.decoding.map((d) => {
      const tv = d.drawn_from && d.drawn_from.total_variation;
      return [d.strategy, whole(d.requests), ...figures(d), tv ? `${number(tv.lower)} – ${number(tv.upper)}` : "–"];
    }));
}

function calibration(s) {
  const won = s.recovered, gain = won.gain_nats, change = s.arms.treated_minus_control.kl_nats_estimate;
  say("won", percent(won.ratio));
  say("won-sub", known(won.ratio) ? `of KL, ${range(won.ci95, percent)}` : "no profile has been measured");
  say("gain", gain && known(gain.estimate) ? number(gain.estimate, 4) : "–");
  say("gain-sub", gain ? `nats per token ${range(gain.ci95)}, ${whole(gain.requests)} requests` : "");
  say("arms", known(change.estimate) ? number(change.estimate) : "–");
  say("arms-sub", known(change.estimate) ? `nats ${range(change.ci95)}, on their own tokens` : "needs 20 requests in each arm");
  say("learned", whole(s.learner.tokens || s.calibration.learned_tokens));
  say("learned-sub", `tokens; learner ${s.learner.state}${s.learner.detail ? `: ${s.learner.detail}` : ""}`);
  const after = s.calibrated.raw_same_requests ? [
    ["before, the same requests", s.calibrated.raw_same_requests], [`after ${brief(s.profile.version)}`, s.calibrated],
  ] : [];
  table("stages", "What the profile that serves, or would, makes of the same tokens", ["", "KL ≥", "KL estimate", "total variation ≥", "same top-1"],
    after.map(([name, f]) => [name, number(f.kl_nats.estimate), number(f.kl_nats_estimate.estimate), number(f.total_variation), percent(f.top1_agreement)]),
    "no profile yet: identity serves");
  table("endings", "How all answers end, sampled or not, by arm", ["arm", "answers", "cut at the length limit", "tokens each", "loops", "JSON and tool calls"],
    Object.entries(s.endings).map(([arm, e]) => {
      const answers = Object.values(e.finished).reduce((a, b) => a + b, 0);
      return [arm, whole(answers), percent((e.finished.length || 0) / answers), number(e.output_tokens / answers, 1), whole(e.loops),
        Object.entries(e.structured).map(([kind, by]) => `${kind}: ${counts(by)}`).join("; ") || "none"];
    }));
}

function serves(s, p) {
  say("mode", s.profile.mode);
  document.querySelectorAll("[data-mode]").forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.mode === s.profile.mode)));
  $("unpin").hidden = !p.pinned;
  const evidence = new Map([s.calibration.selected, ...s.calibration.candidates].filter(Boolean).map((e) => [e.version, e]));
  table("profiles", `Serving: ${p.serving}${p.pinned ? ", pinned" : ""}`, ["version", "family", "state", "made", "evidence", ""],
    p.profiles.filter((f) => f.state !== "probe").map((f) => {
      const code = document.createElement("code");
      code.textContent = f.version;
      const e = evidence.get(f.version);
      const actions = document.createElement("span");
      actions.className = "controls";
      if (f.state !== "selected" && f.state !== "forced") {
        actions.append(button(`promote ${f.version}`, "Promote", `Promote ${f.version}`, () => ask("Promote it?",
          `${f.version} serves before the guard has spoken for it, and is watched like any other.`, "POST", "api/v1/profiles/promote", { version: f.version })));
      }
      if (p.pinned !== f.version) {
        actions.append(button(`pin ${f.version}`, "Pin", `Pin ${f.version}`, () => ask("Pin it?",
          `${f.version} serves all requests, whatever is measured, until it is unpinned.`, "POST", "api/v1/profiles/pin", { version: f.version })));
      }
      return [code, f.family, f.state, when(f.created),
        e ? `${whole(e.requests)} held-out requests, gain ${number(e.mean_gain, 4)} nats, for sure ${known(e.lower) ? `above ${number(e.lower, 4)}` : known(e.upper) ? `below ${number(e.upper, 4)}` : "nothing"}` : "–",
        actions];
    }), "none yet: identity serves");
  const events = [...p.events, ...s.alarm.events].sort((a, b) => b.at - a.at).slice(0, 30);
  table("events", null, ["when", "decision", "profile", "why"], events.map((e) => [when(e.at), e.decision, brief(e.version), e.why]));
}

let before = null;

function costs(s) {
  const seconds = before ? s.at - before.at : 0;
  const rate = (now, then) => (seconds > 0 ? `${number((now - then) / seconds, 1)} a second` : "–");
  const r = s.requests;
  table("cost", null, null, [
    ["sampled", `${percent(s.shadow.rate)} of the requests: ${whole(r.shadowed)} captured, ${whole(r.scored)} scored, ${whole(r.pending)} under way`],
    ["reference", `${s.reference.state} ${s.reference.detail || ""}`],
    ["tokens through the reference", `${whole(s.shadow.reference_tokens)}; ${rate(s.shadow.reference_tokens, before ? before.shadow.reference_tokens : 0)}`
      + (s.shadow.reference_tokens_per_second ? `, at most ${whole(s.shadow.reference_tokens_per_second)}` : "")],
    ["queue", `${whole(s.queue.depth)} waiting, the oldest for ${number(s.queue.lag_seconds, 1)} s`],
    ["skipped", counts(r.skipped)], ["dropped", counts(r.dropped)],
    ["noise floor", Object.entries(s.noise_floor).map(([m, f]) => `${m} ${number(f.kl_nats.estimate, 5)} nats (${whole(f.requests)} requests)`).join(", ") || "not measured yet"],
    ["engines", `${whole(s.engines.live)} with the plugin; ${counts(s.engines.counters)}`],
  ]);
  const p = s.proxy;
  table("proxy", null, null, [
    ["requests", `${whole(p.requests)}; ${rate(p.requests, before ? before.proxy.requests : 0)}`],
    ["by outcome", counts(p.by_outcome)], ["by route", counts(p.by_route)],
    ["failed", percent(p.failed_ratio, 2)],
    ["added by the relay", known(p.overhead_seconds.p50) ? `half below ${number(1000 * p.overhead_seconds.p50, 2)} ms, 99 % below ${number(1000 * p.overhead_seconds.p99, 2)} ms` : "–"],
    ["relays", whole(s.relays)],
  ]);
  if (!before || s.at - before.at > 10) before = s;
}

// --- the plot ---------------------------------------------------------------------------------------------------------

let plot = null;
const COLUMNS = ["time", "kl_nats", "kl_low", "kl_high", "kl_estimate", "floor"];

function series() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const show = (u, v) => (v === null || v === undefined ? "–" : v.toFixed(4));
  return {
    stroke: colour("--soft"), line: colour("--line"),
    list: [{},
      { label: "at least", stroke: colour("--accent"), width: 2, value: show },
      { label: "its interval, low", stroke: colour("--accent"), dash: [4, 4], value: show },
      { label: "high", stroke: colour("--accent"), dash: [4, 4], value: show },
      { label: "estimate", stroke: colour("--bad"), width: 2, value: show },
      { label: "noise floor", stroke: colour("--good"), value: show }],
  };
}

async function draw() {
  const answer = await fetch("api/v1/history");
  if (!answer.ok) return;
  const history = await answer.json();
  const data = COLUMNS.map((name) => history[name]);
  const room = $("plot-kl");
  if (plot) { plot.setData(data); return; }
  if (data[0].length < 2 || typeof uPlot === "undefined") return;
  const look = series();
  const axis = { stroke: look.stroke, grid: { stroke: look.line, width: 1 }, ticks: { stroke: look.line } };
  plot = new uPlot({ width: room.clientWidth, height: 220, series: look.list, axes: [axis, axis], scales: { y: { range: (u, lo, hi) => [0, Math.max(1.1 * hi, 1e-3)] } } }, data, room);
}

addEventListener("resize", () => plot && plot.setSize({ width: $("plot-kl").clientWidth, height: 220 }));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (plot) { plot.destroy(); plot = null; draw(); } });

// --- the stream -------------------------------------------------------------------------------------------------------

const stream = new EventSource("api/v1/stream");
let drawn = 0;
stream.addEventListener("state", (event) => {
  const { status, profiles } = JSON.parse(event.data);
  const ready = status.reference.state === "ready";
  say("connection", `reference ${status.reference.state}; calibration ${status.profile.mode}; ${status.relays} relay${status.relays === 1 ? "" : "s"}`, ready ? "good" : "bad");
  bleeding(status);
  places(status);
  calibration(status);
  serves(status, profiles);
  costs(status);
  document.documentElement.dataset.at = status.at;
  if (Date.now() - drawn > 10000) { drawn = Date.now(); draw().catch(() => {}); }
});
stream.onerror = () => say("connection", "no answer from the admin port; trying again", "bad");
